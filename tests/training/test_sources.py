"""What a Replay draws and a Mix joins."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from offrl.core.rng import BLOCK, Indices
from offrl.core.space import Box, Discrete
from offrl.core.types import Transitions
from offrl.data.dataset import DataError, Dataset
from offrl.training.sources import Mix, Replay


def dataset(rows: int = 60, discrete: bool = False, objectives: int = 0) -> Dataset:
    """Every row differs from every other in every column that can; some episodes terminate, some are cut."""
    rng = np.random.default_rng(0)
    obs = np.arange(rows, dtype=np.float32)[:, None] + np.array([0, 1000, 2000], np.float32)
    action = rng.integers(7, size=rows) if discrete else obs[:, :2] / 10_000
    reward = obs[:, :objectives] + 0.5 if objectives else obs[:, 0] + 0.5
    step = np.arange(rows)
    space = Discrete(7) if discrete else Box.of(2, -1, 1)
    return Dataset.from_arrays(obs, action, reward, step % 20 == 9, step % 20 == 19, obs + 0.25, action_space=space)


def rows_of(batch: Transitions) -> set[tuple]:
    columns = [c.reshape(len(batch.mask), -1) for c in batch if c is not None]
    return {tuple(row) for row in torch.cat([c.double() for c in columns], 1).tolist()}


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("objectives", [0, 2])
@pytest.mark.parametrize("needs", [(), ("next_action", "mc_return")])
def test_every_row_of_a_batch_is_a_row_of_the_data(discrete, objectives, needs):
    """In all columns at once, with their shapes and types."""
    data = dataset(discrete=discrete, objectives=objectives)
    whole = data.transitions(needs, 0.9)
    source = Replay(data, 32, period=2, needs=needs, gamma=0.9)
    for step in range(0, 20, 2):
        for batch in source(step):
            assert rows_of(batch) <= rows_of(whole)
            for name, column in batch._asdict().items():
                original = getattr(whole, name)
                if original is None:
                    assert column is None
                else:
                    assert column.shape == (32, *original.shape[1:]) and column.dtype == original.dtype, name


def test_a_discrete_action_keeps_every_name():
    rows, n = 400, 300_000
    action = np.random.default_rng(0).integers(n, size=rows)
    action[:2] = 0, n - 1
    zeros = np.zeros(rows)
    data = Dataset.from_arrays(np.zeros((rows, 1)), action, zeros, zeros, zeros, np.zeros((rows, 1)), action_space=Discrete(n))
    (batch,) = Replay(data, 5000)(0)
    assert batch.action.dtype == torch.int64 and set(batch.action.tolist()) == set(action.tolist())


def test_rows_are_drawn_uniformly_with_replacement():
    """Chi-square over 100 rows and 64000 draws, the seed being fixed; and repeats within a batch, as with replacement."""
    data = dataset(100)
    source = Replay(data, 64, 3)
    drawn = torch.cat([source(step)[0].obs[:, 0] for step in range(1000)]).long()
    counts = np.bincount(drawn.numpy(), minlength=100)
    assert counts.sum() == 64_000 and chisquare(counts).pvalue > 0.01
    repeats = np.mean([64 - len(source(step)[0].obs[:, 0].unique()) for step in range(1000)])
    assert repeats == pytest.approx(64 - 100 * (1 - 0.99**64), abs=0.3)
    pairs = drawn[:-1] * 100 + drawn[1:]  # nor does a row tell of the next
    assert chisquare(np.bincount((pairs % 97).numpy(), minlength=97)).pvalue > 0.001


@given(st.lists(st.integers(0, 5 * BLOCK), max_size=6), st.integers(0, 5 * BLOCK))
def test_a_step_gives_its_batch_after_any_other_calls(calls, update):
    data = dataset()
    fresh, used = Replay(data, 8, 1, period=2), Replay(data, 8, 1, period=2)
    for call in calls:
        used(2 * call)
    assert all(torch.equal(a.obs, b.obs) for a, b in zip(fresh(2 * update), used(2 * update), strict=True))


def test_an_update_draws_its_own_row_of_the_stream():
    data = dataset()
    whole, indices = data.transitions(), Indices(60, (2, 8), 5)
    source = Replay(data, 8, 5, period=2)
    for update in (0, 1, 2, BLOCK):
        for batch, rows in zip(source(2 * update), indices(update), strict=True):
            assert torch.equal(batch.obs, whole.obs[rows]) and torch.equal(batch.reward, whole.reward[rows])


def test_batches_of_an_update_differ_and_so_do_updates_and_seeds():
    source = Replay(dataset(), 32, 0, period=2)
    batches = [*source(0), *source(2), *source(2 * BLOCK), *Replay(dataset(), 32, 1, period=2)(0)]
    assert len({tuple(b.obs[:, 0].tolist()) for b in batches}) == len(batches)


@pytest.mark.parametrize("discrete", [False, True])
def test_stacked_seeds_are_the_single_ones(discrete):
    data = dataset(discrete=discrete)
    stacked = Replay(data, 8, [4, 0, 9], period=2)
    for step in (0, 2, 2 * BLOCK, 2 * BLOCK + 6):
        for i, seed in enumerate((4, 0, 9)):
            for got, want in zip(stacked(step), Replay(data, 8, seed, period=2)(step), strict=True):
                for a, b in zip(got, want):
                    assert a is b is None or (torch.equal(a[i], b) and a.dtype == b.dtype)
    assert stacked(0)[0].mask.shape == (3, 8)


def test_float64():
    (batch,) = Replay(dataset(), 4, dtype=torch.float64)(0)
    assert {c.dtype for c in batch if c is not None} == {torch.float64}


def test_rows_without_a_successor_are_never_drawn():
    zeros = np.zeros(6)
    data = Dataset.from_arrays(np.arange(6.0)[:, None], np.zeros((6, 1)), zeros, zeros, np.array([0, 0, 1, 0, 0, 1]))
    (batch,) = Replay(data, 500)(0)
    assert set(batch.obs[:, 0].tolist()) == {0, 1, 3, 4}
    with pytest.raises(DataError, match="no transition is usable"):
        Replay(Dataset.from_arrays(np.zeros((1, 1)), np.zeros((1, 1)), [0.0], [0]), 4)


def test_a_replay_has_no_state():
    source = Replay(dataset(), 4)
    assert source.state_dict() == {}
    source.load_state_dict({})
    with pytest.raises(ValueError, match="no state.*position"):
        source.load_state_dict({"position": 3})


@pytest.mark.parametrize("seeds", [0, [0, 1]])
def test_a_mix_is_one_batch_of_each_source(seeds):
    data = dataset()
    parts = Replay(data, 3, seeds, period=2), Replay(data, 5, seeds, period=2)
    mix = Mix(*parts)
    assert mix.batch_size == 8
    for got, one, two in zip(mix(4), parts[0](4), parts[1](4), strict=True):
        lead = (8,) if seeds == 0 else (2, 8)
        assert got.mask.shape == lead and got.obs.shape == (*lead, 3) and got.action.shape == (*lead, 2)
        for a, b, c in zip(got, one, two):
            if a is not None:
                axis = len(lead) - 1
                assert torch.equal(a.narrow(axis, 0, 3), b) and torch.equal(a.narrow(axis, 3, 5), c)


def test_a_mix_refuses_sources_whose_columns_differ():
    data = dataset()
    with pytest.raises(ValueError, match="next_action is not in all"):
        Mix(Replay(data, 4, needs=("next_action",)), Replay(data, 4))(0)
    with pytest.raises(ValueError):
        Mix(Replay(data, 4, period=2), Replay(data, 4, period=1))(0)


def test_a_mix_keeps_its_sources_states_apart():
    class Counting:
        batch_size = 1

        def __init__(self):
            self.count = 0

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state):
            self.count = state["count"]

    one, two = Counting(), Counting()
    one.count, two.count = 3, 4
    saved = Mix(one, two).state_dict()
    assert saved == {"0": {"count": 3}, "1": {"count": 4}}
    fresh = Mix(Counting(), Counting())
    fresh.load_state_dict(saved)
    assert [source.count for source in fresh.sources] == [3, 4]
