"""Streams of random numbers that depend on the seed, the name and the step alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offrl.core import rng
from offrl.core.rng import BLOCK, Indices, Noise, Normal, Permutation, Uniform, generator

KINDS = [{"a": Normal((3, 2)), "b": Uniform((3,))}, {"a": Normal((3, 2)), "order": Permutation(5)}]


def same(one, two) -> bool:
    return all(torch.equal(x[name], y[name]) for x, y in zip(one, two, strict=True) for name in x | y)


def test_streams_are_told_apart_by_seed_name_and_block():
    draws = {(s, n, b): torch.rand(4, generator=generator(s, n, b)) for s in (0, 1, 11) for n in ("noise", "replay") for b in (0, 1, 11)}
    assert len({tuple(d.tolist()) for d in draws.values()}) == len(draws)
    assert torch.equal(draws[1, "noise", 1], torch.rand(4, generator=generator(1, "noise", 1)))


def test_a_generators_seed_is_fixed_for_ever():
    """A run is continued with the numbers that it would have had: the first eight bytes of `printf 3/replay/2 | sha256sum`."""
    assert generator(3, "replay", 2).initial_seed() % 2**64 == int.from_bytes(bytes.fromhex("f5559b622c208670"), "little")


@given(st.integers(0, 10**6))
def test_noise_depends_on_the_update_alone(update):
    one, two = Noise(KINDS, 7), Noise(KINDS, 7)
    two(update + 1), two(update // 2), two(update + BLOCK)
    assert same(one(update), two(update))


def test_noise_has_the_shapes_that_were_asked_for():
    first, second = Noise(KINDS, 0)(0)
    assert first["a"].shape == (3, 2) and first["b"].shape == (3,) and set(second) == {"a", "order"}
    assert sorted(second["order"].tolist()) == [0, 1, 2, 3, 4]
    assert not torch.equal(first["a"], second["a"])


def test_no_two_updates_or_seeds_share_their_numbers():
    noise = Noise(KINDS, 0)
    rows = [noise(i)[0]["a"] for i in range(3 * BLOCK)] + [Noise(KINDS, 1)(i)[0]["a"] for i in range(3)]
    assert len({tuple(row.flatten().tolist()) for row in rows}) == len(rows)


def test_stacked_seeds_are_the_single_ones():
    stacked, alone = Noise(KINDS, [4, 0, 9]), [Noise(KINDS, seed) for seed in (4, 0, 9)]
    for update in (0, 1, BLOCK - 1, BLOCK, 5 * BLOCK + 3):
        got = stacked(update)
        assert got[0]["a"].shape == (3, 3, 2)
        for i, noise in enumerate(alone):
            assert same([{name: value[i] for name, value in entry.items()} for entry in got], noise(update))
    assert Noise(KINDS, [4])(0)[0]["a"].shape == (1, 3, 2)  # a list of one seed is a stack of one


def test_float64_sees_the_numbers_of_float32():
    low, high = Noise(KINDS, 0)(3), Noise(KINDS, 0, dtype=torch.float64)(3)
    assert high[0]["a"].dtype == torch.float64 and torch.equal(high[0]["a"].float(), low[0]["a"])
    assert torch.equal(high[1]["order"], low[1]["order"])


@pytest.mark.parametrize("name, mean, variance", [("a", 0.0, 1.0), ("b", 0.5, 1 / 12)])
def test_moments(name, mean, variance):
    noise = Noise(KINDS, 5)
    x = torch.cat([noise(i)[0][name].flatten() for i in range(10 * BLOCK)])
    assert x.mean().item() == pytest.approx(mean, abs=4 * (variance / len(x)) ** 0.5)
    assert x.var().item() == pytest.approx(variance, rel=4 * (2 / len(x)) ** 0.5)


def test_the_global_generator_is_not_touched():
    before = torch.get_rng_state()
    Noise(KINDS, 0)(0), Indices(10, (2, 3), 0)(0)
    assert torch.equal(before, torch.get_rng_state())


def test_indices():
    indices = Indices(10, (2, 3), 0)
    drawn = torch.stack([indices(i) for i in range(2 * BLOCK)])
    assert drawn.shape == (2 * BLOCK, 2, 3) and drawn.dtype == torch.int64
    assert set(drawn.flatten().tolist()) == set(range(10))
    assert torch.equal(indices(3), drawn[3])  # after a later block, again
    stacked = Indices(10, (2, 3), [1, 0])(7)
    assert stacked.shape == (2, 2, 3) and torch.equal(stacked[1], drawn[7]) and not torch.equal(stacked[0], drawn[7])
    assert not torch.equal(Indices(10, (2, 3), 0, name="other")(0), drawn[0])


def test_large_updates_are_drawn_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(rng, "ROOM", 10_000)
    few, many = Noise([{"order": Permutation(2000)}], 0), Noise([{"order": Permutation(20_000)}], 0)
    assert (few.block, many.block, Noise(KINDS, 0).block) == (5, 1, BLOCK)
    orders = [few(update)[0]["order"] for update in (4, 5)]
    assert not torch.equal(*orders) and torch.equal(Noise(few.kinds, 0)(5)[0]["order"], orders[1])
