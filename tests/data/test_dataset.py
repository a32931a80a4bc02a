"""The dataset type: episode borders, derived columns that respect them, parts of it, and its messages."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offrl.core.space import Box, Discrete
from offrl.data.dataset import DataError, Dataset

LAYOUTS = st.lists(st.tuples(st.integers(1, 6), st.sampled_from("tub-")), min_size=1, max_size=6)


def rows(layout) -> dict[str, np.ndarray]:
    """Arrays whose numbers say where they are from: episode e, step i has the observation (e, i) and the successor (e, i + 1)."""
    obs = np.array([(e, i) for e, (length, _) in enumerate(layout) for i in range(length)], np.float32)
    last = np.cumsum([length for length, _ in layout]) - 1
    terminated, truncated = np.zeros(len(obs), bool), np.zeros(len(obs), bool)
    terminated[last], truncated[last] = [end in "tb" for _, end in layout], [end in "ub" for _, end in layout]
    number = np.arange(len(obs), dtype=np.float32)
    return {
        "obs": obs, "action": number[:, None] + 0.5, "reward": 2**-number, "terminated": terminated, "truncated": truncated,
        "next_obs": obs + (0, 1),
    }  # fmt: skip


def marked(layout):
    """The layout as flags show it: an unflagged end is no end, unless it is the last row."""
    merged = []
    for length, end in layout:
        if merged and merged[-1][1] == "-":
            merged[-1] = (merged[-1][0] + length, end)
        else:
            merged.append((length, end))
    return merged


@settings(deadline=None)
@given(LAYOUTS)
def test_episodes_end_where_a_flag_is_set_and_at_the_last_row(layout):
    data = Dataset.from_arrays(**rows(layout))
    expected = [length for length, _ in marked(layout)]
    assert data.lengths.tolist() == expected and data.episodes == len(expected) and len(data) == sum(expected)
    assert data.starts[0] == 0 and data.starts[-1] == len(data)
    np.testing.assert_allclose(data.returns, [r.sum(dtype=np.float64) for r in np.split(data.reward, data.starts[1:-1])])


@settings(deadline=None)
@given(LAYOUTS)
def test_next_observations_are_given_back_as_stored(layout):
    given_ = rows(layout)
    data = Dataset.from_arrays(**given_)
    assert (data.next_obs is None) == (len(marked(layout)) == len(layout))  # kept only where an unmarked end contradicts the row below
    np.testing.assert_array_equal(data.full_next_obs(), given_["next_obs"])
    batch = data.transitions()
    np.testing.assert_array_equal(batch.next_obs, given_["next_obs"])
    np.testing.assert_array_equal(batch.mask, 1.0 - given_["terminated"])


@settings(deadline=None)
@given(LAYOUTS)
def test_without_stored_successors_only_unterminated_last_rows_are_left_out(layout):
    given_ = rows(layout)
    del given_["next_obs"]
    data, batch = Dataset.from_arrays(**given_), Dataset.from_arrays(**given_).transitions()
    last = data.starts[1:] - 1
    kept = np.setdiff1d(np.arange(len(data)), last[~data.terminated[last]])
    np.testing.assert_array_equal(batch.action[:, 0], kept + 0.5)
    inside = ~np.isin(kept, last)
    np.testing.assert_array_equal(batch.next_obs[inside], data.obs[kept[inside] + 1])


@settings(deadline=None)
@given(LAYOUTS, st.sampled_from([0.0, 0.5, 0.99, 1.0]))
def test_derived_columns_stay_inside_their_episode(layout, gamma):
    data = Dataset.from_arrays(**rows(layout))
    batch = data.transitions(["next_action", "mc_return"], gamma=gamma)
    at = (batch.action[:, 0] - 0.5).int().numpy()
    last = np.repeat(data.starts[1:] - 1, data.lengths)[at]
    running = batch.mask.numpy() == 1
    assert (at[running] < last[running]).all()  # what bootstraps has an action after it
    np.testing.assert_array_equal(batch.next_action[running, 0], at[running] + 1.5)
    expected = [sum(gamma ** (j - i) * 2.0**-j for j in range(i, end + 1)) for i, end in zip(at, last, strict=True)]
    np.testing.assert_allclose(batch.mc_return, expected, rtol=1e-6)


@settings(deadline=None)
@given(LAYOUTS, st.integers(1, 5), st.integers(1, 3))
def test_windows_lie_inside_one_episode(layout, length, stride):
    data = Dataset.from_arrays(**rows(layout))
    windows = data.windows(length, stride)
    expected = [list(range(i, i + length)) for a, b in zip(data.starts, data.starts[1:]) for i in range(a, b - length + 1, stride)]
    assert windows.tolist() == expected and windows.shape == (len(expected), length)


def test_needs_are_checked():
    data = Dataset.from_arrays(**rows([(3, "t")]))
    with pytest.raises(ValueError, match="next_action, mc_return"):
        data.transitions(["q"])
    with pytest.raises(ValueError, match="gamma"):
        data.transitions(["mc_return"])


@settings(deadline=None)
@given(LAYOUTS, st.data())
def test_a_subset_is_its_episodes(layout, data):
    whole = Dataset.from_arrays(**rows(layout))
    chosen = data.draw(st.lists(st.integers(0, whole.episodes - 1), min_size=1, max_size=4))
    part = whole.subset(chosen)
    taken = np.concatenate([np.arange(whole.starts[e], whole.starts[e + 1]) for e in chosen])
    np.testing.assert_array_equal(part.obs, whole.obs[taken])
    np.testing.assert_array_equal(part.full_next_obs(), whole.full_next_obs()[taken])
    np.testing.assert_array_equal(part.returns, whole.returns[chosen])
    assert part.lengths.tolist() == whole.lengths[chosen].tolist() and part.spec == whole.spec
    np.testing.assert_array_equal(whole.subset(np.isin(np.arange(whole.episodes), chosen)).lengths, whole.lengths[np.unique(chosen)])


def test_a_split_deals_whole_episodes():
    whole = Dataset.from_arrays(**rows([(i % 3 + 1, "tu"[i % 2]) for i in range(20)]))
    parts = whole.split([0.5, 0.25, 0.25], seed=3)
    assert [part.episodes for part in parts] == [10, 5, 5]
    seen = [obs[0] for part in parts for obs in part.obs[part.starts[:-1]]]
    assert sorted(seen) == list(range(20))
    assert [p.fingerprint for p in parts] == [p.fingerprint for p in whole.split([0.5, 0.25, 0.25], seed=3)]
    assert [p.fingerprint for p in parts] != [p.fingerprint for p in whole.split([0.5, 0.25, 0.25], seed=4)]
    assert [part.episodes for part in whole.split([0.1])] == [2]
    for fractions in ([0.5, 0.6], [0.5, 0.0], [-0.5]):
        with pytest.raises(ValueError, match="positive and sum"):
            whole.split(fractions)
    with pytest.raises(DataError, match="too few"):
        whole.split([0.99, 0.01])
    with pytest.raises(ValueError, match="not 'row'"):
        whole.split([0.5], by="row")
    with pytest.raises(DataError, match="at least one"):
        whole.subset([])


def test_the_fingerprint_sees_every_column():
    base = rows([(3, "u"), (2, "t")])
    data = Dataset.from_arrays(**base)
    assert data.fingerprint == Dataset.from_arrays(**{k: v.copy() for k, v in base.items()}).fingerprint
    seen = {data.fingerprint}
    for field, value in base.items():
        changed = value.copy()
        changed[1 if value.dtype == bool else 2] += 1
        seen.add(Dataset.from_arrays(**base | {field: changed}).fingerprint)
    seen.add(dataclasses.replace(data, last_known=~data.last_known).fingerprint)
    assert len(seen) == len(base) + 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.obs = data.obs + 1


def test_shapes_and_types_are_made_one():
    base = rows([(3, "u"), (2, "t")])
    loose = {k: v[:, None] if v.ndim == 1 else np.asfortranarray(v, np.float64) for k, v in base.items()}
    assert Dataset.from_arrays(**loose).fingerprint == Dataset.from_arrays(**base).fingerprint
    lists = {k: v.astype(float).tolist() for k, v in base.items()}
    assert Dataset.from_arrays(**lists).fingerprint == Dataset.from_arrays(**base).fingerprint
    data = Dataset.from_arrays(**base)
    assert data.nbytes == sum(c.nbytes for c in (data.obs, data.action, data.reward, data.terminated, data.truncated)) + 3 * 8 + 2 * 8 + 2
    two = Dataset.from_arrays(**base | {"reward": np.ones((5, 2))})
    assert two.reward.shape == (5, 2) and two.returns.tolist() == [[3, 3], [2, 2]]


def test_discrete_actions_are_one_integer_a_row():
    base = rows([(3, "u")])
    for actions in (np.array([0, 2, 1]), np.array([[0.0], [2.0], [1.0]])):
        data = Dataset.from_arrays(**base | {"action": actions}, action_space=Discrete(3))
        assert data.action.dtype == np.int64 and data.action.tolist() == [0, 2, 1] and data.spec.action == Discrete(3)
        assert data.transitions().action.tolist() == [0, 2, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"obs": np.zeros((0, 2))}, "no rows"),
        ({"obs": np.zeros(5)}, "observations must have shape"),
        ({"obs": np.array([["a", "b"]] * 5)}, "observations must be numbers"),
        ({"obs": np.full((5, 2), np.nan)}, "observations has 5 rows with NaN or infinity, the first is row 0"),
        ({"reward": np.array([0, 0, 0, np.inf, 0])}, "rewards has 1 rows .* the first is row 3"),
        ({"reward": np.zeros(4)}, "rewards has 4 rows, observations have 5"),
        ({"terminated": np.array([0, 2, 0, 0, 0])}, "terminals must be one 0 or 1"),
        ({"truncated": np.zeros((5, 2))}, "timeouts must be one 0 or 1"),
        ({"next_obs": np.zeros((5, 3))}, "next_observations are 3 wide, observations 2"),
        ({"action": np.zeros((5, 1), int)}, "give the action space"),
        ({"action": np.zeros((5, 2, 2))}, "actions must have shape"),
        ({"action": np.full(5, 3), "action_space": Discrete(3)}, "from 0 to 2"),
        ({"action": np.full(5, 0.5), "action_space": Discrete(3)}, "from 0 to 2"),
        ({"action_space": Box.of(4)}, "actions are 1 wide, the action space 4"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    with pytest.raises(DataError, match=f"^mine: .*{message}"):
        Dataset.from_arrays(**rows([(5, "t")]) | change, name="mine")
