"""What `check` finds, all of it at once, and the figures of `info`."""

from __future__ import annotations

import json

import numpy as np
import pytest

from offrl.core.space import Box
from offrl.data.check import check, info, transition_weighted_return
from offrl.data.dataset import Dataset
from offrl.data.load import load_dataset
from offrl.envs.scores import reference


def arrays(n=12, **change) -> dict[str, np.ndarray]:
    """Two clean episodes of a bounded task: nothing to find."""
    rng = np.random.default_rng(0)
    floats = {"observations": rng.standard_normal((n, 3)), "actions": rng.uniform(-0.9, 0.9, (n, 2)), "rewards": rng.standard_normal(n)}
    flags = {"terminals": np.arange(n) == n // 2, "timeouts": np.arange(n) == n - 1}
    return {k: v.astype(np.float32) for k, v in floats.items()} | flags | change


def found(source, **options) -> set[tuple]:
    return {(f.severity, f.field, f.count, f.first_row) for f in check(source, **options)}


def put(value, *at):
    def change(column):
        column = column.copy()
        for place in at:
            column[place] = value
        return column

    return change


def test_clean_data_has_no_findings():
    assert check(arrays()) == []


@pytest.mark.parametrize(
    ("field", "change", "finding", "words"),
    [
        ("observations", put(np.nan, (3, 1), (5, 0), (5, 2)), ("error", "observations", 2, 3), "NaN or infinity"),
        ("actions", put(np.inf, (4, 0)), ("error", "actions", 1, 4), "NaN or infinity"),
        ("rewards", put(-np.inf, 0), ("error", "rewards", 1, 0), "NaN or infinity"),
        ("rewards", lambda c: put(1e300, 2)(c.astype(np.float64)), ("error", "rewards", 1, 2), "NaN or infinity"),  # infinite in float32
        ("terminals", lambda c: put(np.nan, 7)(c.astype(float)), ("error", "terminals", 1, 7), "NaN or infinity"),
        ("terminals", lambda c: put(3, 1)(c.astype(int)), ("error", "terminals", 1, 1), "other than 0 and 1"),
        ("timeouts", lambda c: np.stack([c, c], 1), ("error", "file", 1, None), "timeouts must be one flag a row, not (12, 2)"),
        ("timeouts", put(True, 6), ("note", "timeouts", 1, 6), "both flags"),
        ("timeouts", put(False, 11), ("note", "timeouts", 1, 11), "last episode is open: its last row has no successor"),
        ("timeouts", put(True, 7), ("warning", "terminals", 1, 7), "one step"),
        ("observations", put(2.0, np.s_[:, 1]), ("note", "observations", 1, None), "never change: 1"),
        ("actions", lambda c: np.round(c), ("warning", "actions", 12, 0), "whole number"),
        ("actions", lambda c: (c > 0).astype(int), ("error", "actions", 12, 0), "no action space"),
        ("actions", put(1.5, (8, 1)), ("note", "actions", 1, 8), "outside [-1, 1]"),
        ("actions", put(-1.0, (8, 1), (9, 0)), ("note", "actions", 2, 8), "at the bound"),
        ("rewards", np.zeros_like, ("warning", "rewards", 12, 0), "every reward is zero"),
    ],
)
def test_each_fault_is_found_where_it_is(field, change, finding, words):
    data = arrays()
    data[field] = change(data[field])
    assert finding in found(data)
    assert any(words in f.what for f in check(data) if (f.severity, f.field) == finding[:2])


def test_bounds_that_are_known_are_compared():
    data = arrays(actions=put(1.5, (8, 1))(arrays()["actions"]))
    assert ("warning", "actions", 1, 8) in found(data, env_id="Hopper-v4")
    assert ("warning", "actions", 1, 8) in found(data, action_space="box:-1,1")
    assert found(data, action_space="box:-2,2") == set()
    integers = arrays(actions=np.arange(12) % 3)
    assert not found(integers, action_space="discrete:3")


def test_missing_flags_are_told_apart():
    no_timeouts = {k: v for k, v in arrays().items() if k != "timeouts"}
    assert ("warning", "timeouts", 12, None) in found(no_timeouts)
    never = arrays(terminals=np.zeros(12), timeouts=np.zeros(12))
    assert ("warning", "terminals", 12, None) in found(never)


def test_successors_that_contradict_the_row_below():
    data = arrays()
    data["next_observations"] = np.roll(data["observations"], -1, axis=0)
    data["next_observations"][[6, 11]] = 9  # after an end, anything goes
    assert check(data) == []
    data["next_observations"][[2, 3]] += 1
    assert found(data) == {("warning", "next_observations", 2, 2)}


def test_repeated_rows():
    data = arrays()
    for key in ("observations", "actions", "rewards"):
        data[key][[4, 9]] = data[key][1]
    assert found(data) == {("note", "observations", 2, 4)}
    data["actions"][9, 1] *= -1  # one number differs
    assert found(data) == {("note", "observations", 1, 4)}


def test_everything_at_once_and_errors_first():
    data = arrays(rewards=np.zeros(12, np.float32), timeouts=np.arange(12) == 6)
    data["observations"][2] = np.nan
    data["actions"][3] = np.inf
    severities = [f.severity for f in check(data)]
    assert severities == sorted(severities, key=("error", "warning", "note").index)
    assert {
        ("error", "observations", 1, 2),
        ("error", "actions", 1, 3),
        ("warning", "rewards", 12, 0),
        ("note", "timeouts", 1, 6),
    } <= found(data)
    assert all(f.advice for f in check(data))


def test_what_cannot_be_read_is_a_finding(tmp_path):
    (finding,) = check(tmp_path / "none.hdf5")
    assert finding.severity == "error" and "no such file" in finding.what
    (finding,) = check({"observations": np.zeros((3, 2))})
    assert "no 'actions'" in finding.what and "no 'terminals'" in finding.what


def test_info_counts_by_hand():
    rewards = [1, 2, 3, 10, 20, 5]
    data = Dataset.from_arrays(
        np.zeros((6, 4)),
        np.zeros((6, 2)),
        rewards,
        [0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 0],
        action_space=Box.of(2, -1, 1),
        ref_min=0,
        ref_max=60,
    )
    about = info(data)
    assert json.loads(json.dumps(about)) == about
    assert (about["rows"], about["episodes"], about["obs_size"], about["action"]) == (6, 3, 4, "2 numbers")
    assert about["ends"] == {"terminated": 1, "truncated": 1, "open": 1}
    assert about["return_mean"] == pytest.approx(41 / 3)
    assert about["return_quantiles"] == {"0%": 5, "25%": 5.5, "50%": 6, "75%": 18, "100%": 30}
    assert about["return_mean_by_transition"] == pytest.approx((3 * 6 + 2 * 30) / 5)  # the open episode does not count
    assert (about["length_mean"], about["length_range"]) == (2, [1, 3])
    assert about["score_mean"] == pytest.approx(41 / 3 / 60 * 100)
    assert about["score_mean_by_transition"] == pytest.approx(26)
    assert about["fingerprint"] == data.fingerprint
    assert transition_weighted_return(data) == pytest.approx(15.6)


def test_scores_need_references_and_complete_episodes():
    data = load_dataset(arrays(), env_id="Hopper-v5")
    low, high = reference("Hopper-v5")
    assert info(data)["score_mean"] == pytest.approx(np.mean(100 * (data.returns - low) / (high - low)))
    assert "score_mean" not in info(load_dataset(arrays()))
    open_ = load_dataset(arrays(terminals=np.zeros(12), timeouts=np.zeros(12)), env_id="Hopper-v5")
    assert transition_weighted_return(open_) is None and info(open_)["score_mean_by_transition"] is None
    two = load_dataset(arrays(rewards=np.ones((12, 2))), env_id="Hopper-v5")
    assert transition_weighted_return(two) == pytest.approx([(7 * 7 + 5 * 5) / 12] * 2) and "score_mean" not in info(two)
