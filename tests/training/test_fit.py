"""The loop: pieces make the whole, hooks come on time, seeds decide everything, updates that are not finite can be left out."""

from __future__ import annotations

import subprocess
import sys
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offrl.agents.bc import BC
from offrl.agents.iql import IQL
from offrl.agents.td3bc import TD3BC
from offrl.agents.td3bc import Config as TD3BCConfig
from offrl.core.rng import Noise, Normal, Uniform
from offrl.core.tree import tree_map
from offrl.testing import Example, identical, toy
from offrl.training.accelerate import MODES, accelerate, skipping
from offrl.training.fit import fit, stack, unstack


class Counting:
    """Counts its updates and adds up the noise it was given."""

    needs: ClassVar = ()

    def __init__(self, period: int):
        self.period = period

    def noise(self, batch_size):
        return [{"x": Normal(())}] * self.period

    def init(self, seed):
        return {"params": {"updates": torch.tensor(0.0), "sum": torch.tensor(0.0)}}

    def update(self, state, batches, noise):
        assert len(batches) == len(noise) == self.period
        params = state["params"]
        total = params["sum"] + torch.stack([each["x"] for each in noise]).sum()
        return {"params": {"updates": params["updates"] + 1, "sum": total}}, {"count/updates": params["updates"] + 1}

    def act(self, state, obs, noise=None):
        return obs


class Empty:
    batch_size = 1

    def __init__(self, period: int):
        self.period, self.steps = period, []

    def __call__(self, step, act):
        self.steps.append(step)
        return [None] * self.period


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 30), st.lists(st.integers(1, 12), min_size=1, max_size=4), st.lists(st.integers(0, 30), max_size=3)
)
def test_hooks_come_on_time_however_often_the_run_is_cut(period, steps, intervals, cuts):
    agent, source, called = Counting(period), Empty(period), {i: [] for i in range(len(intervals))}
    hooks = [
        (every, lambda step, state, metrics, i=i: called[i].append((step, metrics["count/updates"].item())))
        for i, every in enumerate(intervals)
    ]
    whole = -(-steps // period) * period
    state, start = agent.init(0), 0
    for cut in [*sorted(min(cut // period * period, whole) for cut in cuts), steps]:
        state = fit(agent, state, source, cut, hooks, start)
        start = max(start, -(-cut // period) * period)
    assert state["params"]["updates"] == whole / period and source.steps == list(range(0, whole, period))
    for i, every in enumerate(intervals):
        due = {-(-multiple // period) * period for multiple in range(every, whole + 1, every)}  # at the end of the update that reaches it
        assert called[i] == [(step, step // period) for step in sorted(due)]


def test_what_an_update_is_given_depends_on_the_seed_and_its_number_alone():
    agent, drawn = Counting(2), Noise([{"x": Normal(())}] * 2, 3)
    expected = sum(each["x"] for i in range(70) for each in drawn(i))
    assert torch.isclose(fit(agent, agent.init(0), Empty(2), 140, seeds=3)["params"]["sum"], expected, atol=1e-4)
    assert not torch.isclose(fit(agent, agent.init(0), Empty(2), 140, seeds=4)["params"]["sum"], expected, atol=1e-4)


@pytest.fixture(scope="module", params=["bc", "td3bc", "iql"])
def example(request):
    data, kind = toy(), {"bc": BC, "td3bc": TD3BC, "iql": IQL}[request.param]
    return Example(kind(kind.Config(hidden=(8, 8)), data.spec), data)


def train(example, seed, cuts=(40,), start=0):
    """(state, log) after the last of the cuts, float32."""
    state, log = example.state(seed, torch.float32), []
    for cut in cuts:
        hook = [(3, lambda step, state, metrics: log.append((step, {name: value.item() for name, value in metrics.items()})))]
        state = fit(example.agent, state, example.source(seed, torch.float32), cut, hook, start, seeds=seed)
        start = cut
    return state, log


def test_pieces_make_the_whole(example):
    whole, log = train(example, 0)
    for cuts in ((20, 40), (2, 4, 6, 38, 40), tuple(range(2, 41, 2))):
        state, pieces = train(example, 0, cuts)
        assert identical(state, whole) and pieces == log


def test_equal_seeds_give_equal_logs_and_others_do_not(example):
    (state, log), (again, same), (other, differs) = (train(example, seed) for seed in (0, 0, 1))
    assert identical(state, again) and log == same
    assert not identical(state, other) and all(a[1] != b[1] for a, b in zip(log, differs, strict=True))


def test_training_draws_nothing_from_the_global_generator(example):
    before = torch.get_rng_state()
    train(example, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_importing_touches_no_global_generator():
    modules = "offrl.recipes.common, offrl.recipes.offline, offrl.agents.a2pr, offrl.training.policy, offrl.testing, offrl.stats"
    code = f"""
import pickle, random, numpy, torch
def states():
    return pickle.dumps((random.getstate(), numpy.random.get_state(), torch.get_rng_state().tolist()))
before, threads, dtype = states(), torch.get_num_threads(), torch.get_default_dtype()
import {modules}
assert states() == before, "a generator"
assert (threads, dtype) == (torch.get_num_threads(), torch.get_default_dtype()), "threads or dtype"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_stacks_come_apart_as_they_were_put_together(example):
    states = [example.state(seed) for seed in (3, 4)]
    assert all(identical(unstack(stack(states), i), state) for i, state in enumerate(states))


class Poisoned(TD3BC):
    """TD3+BC that at some updates is given what is not finite: in a loss, or in a gradient alone."""

    where: ClassVar[str] = "loss"

    def noise(self, batch_size):
        first, second = super().noise(batch_size)
        return [first | {"poison": Uniform(())}, second]

    def update(self, state, batches, noise):
        bad = noise[0]["poison"] < 0.2
        state, metrics = super().update(state, batches, noise)
        if self.where == "loss":
            return state, metrics | {"critic/loss": torch.where(bad, torch.nan, metrics["critic/loss"])}
        return tree_map(lambda leaf: torch.where(bad, torch.inf, leaf), state), metrics


@pytest.mark.parametrize("where", ["loss", "state"])
def test_updates_that_are_not_finite_can_be_left_out(where):
    data = toy()
    Poisoned.where = where
    example = Example(Poisoned(TD3BCConfig(hidden=(8, 8)), data.spec), data)
    agent, source, steps = example.agent, example.source(0, torch.float32), 40
    noise, state = Noise(agent.noise(source.batch_size), 0), example.state(0, torch.float32)
    left_out = [i for i in range(steps // 2) if noise(i)[0]["poison"] < 0.2]
    assert 1 < len(left_out) < 10
    expected, update = state, accelerate(agent.update)
    for i in range(steps // 2):
        if i not in left_out:
            expected, _ = update(expected, source(2 * i), noise(i))
    log = []
    hook = (2, lambda step, state, metrics: log.append(metrics["update/skipped"].item()))
    skipped = fit(agent, state | {"skipped": torch.tensor(0)}, source, steps, [hook])
    assert skipped.pop("skipped") == len(left_out) and identical(skipped, expected)
    assert log == [sum(i <= update for i in left_out) for update in range(steps // 2)]
    seeds = (0, 7)
    both = stack([example.state(seed, torch.float32) | {"skipped": torch.tensor(0)} for seed in seeds])
    both = fit(agent, both, example.source(seeds, torch.float32), 20, seeds=seeds)
    counts = [sum((Noise(agent.noise(16), seed)(i)[0]["poison"] < 0.2).item() for i in range(10)) for seed in seeds]
    assert both["skipped"].tolist() == counts and counts[0] != counts[1], "each seed leaves out its own"


def test_leaving_out_is_one_graph_with_the_update():
    example = Example(BC(BC.Config(hidden=(8,)), toy().spec), toy())
    state, batches = example.state(0) | {"skipped": torch.tensor(0)}, example.source(0)(0)
    eager, compiled = (accelerate(skipping(example.agent.update), mode, backend="aot_eager") for mode in ("eager", "compile"))
    (one, _), (other, _) = eager(state, batches, [{}]), compiled(state, batches, [{}])
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(one["params"]["actor"].values(), other["params"]["actor"].values()))


def test_a_graph_belongs_to_one_update():
    """Graphs are looked up without guards, so one made with other constants must never be found, in whatever order they are called."""

    class Scale:
        def __init__(self, factor):
            self.factor = factor

        def update(self, state, batches, noise):
            return {"x": self.factor * state["x"]}, {}

    factors = (2.5, 0.5, 40.0)
    compiled = [accelerate(Scale(factor).update, "compile", backend="aot_eager") for factor in factors]
    for i in (0, 1, 2, 1, 0):
        assert compiled[i]({"x": torch.ones(3)}, [], [])[0]["x"].tolist() == [factors[i]] * 3


@pytest.mark.parametrize(("mode", "precision"), [("jit", "fp32"), ("eager", "fp16")])
def test_a_mode_or_precision_that_is_none(mode, precision):
    with pytest.raises(ValueError, match=f"mode is one of {', '.join(MODES)} and precision of fp32, bf16, not '{mode}', '{precision}'"):
        accelerate(lambda *_: _, mode, precision)
