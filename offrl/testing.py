"""The contract that every registered agent keeps: put your own through it with `offrl.testing.contract("my_agent")`.

Each check is a function of an `Example` that raises AssertionError with what was expected; `contract` runs them all.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from offrl.core.checkpoint import load_file, restore, save_file
from offrl.core.registry import agent_class
from offrl.core.rng import Indices, Noise
from offrl.core.space import Box, Discrete
from offrl.core.tree import flatten, tree_map
from offrl.core.types import Act, State, Transitions
from offrl.data.dataset import Dataset
from offrl.nn.normalize import fitted
from offrl.training.accelerate import accelerate
from offrl.training.fit import fit, stack, unstack
from offrl.training.sources import Replay, Stateless

BATCH = 16
STEPS = 4  # of a rollout


def toy(discrete: bool = False, rows: int = 500, obs: int = 5, actions: int = 3) -> Dataset:
    """Random transitions in which everything occurs: terminations, time limits, an offset and a scale of their own in each column."""
    rng = np.random.default_rng(0)
    observations = 3 + 2 * rng.standard_normal((rows, obs))
    following = observations + 0.1 * rng.standard_normal((rows, obs))
    action = rng.integers(actions, size=rows) if discrete else rng.uniform(-2, 2, (rows, actions))
    space = Discrete(actions) if discrete else Box.of(actions, -2, 2)
    ends = rng.random((2, rows)) < 0.02
    return Dataset.from_arrays(observations, action, rng.standard_normal(rows), ends[0], ends[1], following, action_space=space)


class Rollouts(Stateless):
    """Stretches of the data (STEPS, BATCH / STEPS, ...), for an agent that takes them for rollouts of its policy."""

    def __init__(self, data: Dataset, seeds: int | Sequence[int], dtype: torch.dtype):
        rows = data.transitions()._replace(truncated=torch.from_numpy(data.truncated).float())
        self.rows = [c if c is None or not c.is_floating_point() else c.to(dtype) for c in rows]
        self.batch_size, self.indices = BATCH, Indices(len(rows.mask) - STEPS, (1, BATCH // STEPS), seeds)

    def __call__(self, step: int, act: Act | None = None) -> list[Transitions]:
        at = self.indices(step) + torch.arange(STEPS)[:, None]
        return [Transitions(*(None if column is None else column[at] for column in self.rows))]


@dataclass(frozen=True)
class Example:
    """An agent on toy data, in float64 where rounding must not hide a difference."""

    agent: Any
    data: Dataset
    steps: int = 100

    def state(self, seed: int, dtype: torch.dtype = torch.float64) -> State:
        fresh = self.agent.init(seed) | {"normalizer": fitted(self.data)}
        return tree_map(lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, fresh)

    def source(self, seeds: int | Sequence[int], dtype: torch.dtype = torch.float64) -> Replay | Rollouts:
        if getattr(self.agent, "on_policy", False):
            return Rollouts(self.data, seeds, dtype)
        gamma = getattr(self.agent.config, "gamma", None)
        return Replay(self.data, BATCH, seeds, period=self.agent.period, needs=self.agent.needs, gamma=gamma, dtype=dtype)

    def train(self, seed: int, steps: int | None = None, dtype: torch.dtype = torch.float64) -> State:
        return fit(self.agent, self.state(seed, dtype), self.source(seed, dtype), steps or self.steps, seeds=seed)


def difference(a: State, b: State) -> float:
    """The largest absolute difference between two states."""
    return max(flatten(tree_map(lambda x, y: (x - y).abs().max(), a, b)).values()).item()


def identical(a: State, b: State) -> bool:
    return all(flatten(tree_map(lambda x, y: (x == y).all(), a, b)).values())


def shapes(example: Example) -> None:
    """An action for every observation, of whatever leading axes, within the bounds; metrics are finite scalars."""
    agent, spec, state = example.agent, example.agent.spec, example.state(0, torch.float32)
    for lead in ((), (1,), (7,), (2, 3)):
        with torch.no_grad():
            action = agent.act(state, torch.randn(*lead, spec.obs.size, generator=torch.Generator().manual_seed(0)))
        if isinstance(spec.action, Discrete):
            assert action.shape == lead and action.dtype == torch.int64, f"act gave {action.dtype} {tuple(action.shape)} for {lead}"
            assert ((action >= 0) & (action < spec.action.n)).all()
        else:
            assert action.shape == (*lead, spec.action.size), f"act gave {tuple(action.shape)} for leading axes {lead}"
            assert (action.abs() <= 2 + 1e-6).all(), "actions must stay within the space's bounds"
    _, metrics = accelerate(agent.update)(state, example.source(0, torch.float32)(0), Noise(agent.noise(BATCH), 0)(0))
    assert metrics, "update must return metrics"
    for name, value in metrics.items():
        assert "/" in name and value.shape == () and torch.isfinite(value), f"metric {name!r} must be a finite 0-d tensor called group/name"


def purity(example: Example) -> None:
    """update leaves its arguments and the global random generator as they were, and returns a tree of the same structure."""
    agent, state = example.agent, example.state(0)
    batches, noise = example.source(0)(0), Noise(agent.noise(BATCH), 0, dtype=torch.float64)(0)
    before, generator = tree_map(torch.clone, state), torch.get_rng_state()
    columns = [column.clone() for batch in batches for column in batch if column is not None]
    after, _ = accelerate(agent.update)(state, batches, noise)
    assert identical(before, state), "update changed the state that it was given"
    assert all(torch.equal(a, b) for a, b in zip(columns, (c for batch in batches for c in batch if c is not None)))
    assert torch.equal(generator, torch.get_rng_state()), "update drew from the global generator"
    agent.init(1)
    assert torch.equal(generator, torch.get_rng_state()), "init drew from the global generator"
    tree_map(lambda old, new: _same_kind(old, new), before, after)


def _same_kind(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    assert old.shape == new.shape and old.dtype == new.dtype, "update must keep shapes and dtypes"
    assert not new.requires_grad, "the state must not require gradients"
    return new


def determinism(example: Example) -> None:
    """Equal seeds give equal bits; other seeds other networks; every group is trained."""
    first, again, other = example.train(0, 10), example.train(0, 10), example.train(1, 10)
    assert identical(first, again), "the same seed gave two results"
    fresh = example.state(0)
    for group, params in first["params"].items():
        names = [name for name, leaf in params.items() if not torch.equal(leaf, fresh["params"][group][name])]
        assert names, f"no loss descends the group {group!r}"
        assert any(not torch.equal(leaf, other["params"][group][name]) for name, leaf in params.items()), "two seeds gave the same networks"


def resume(example: Example) -> None:
    """N steps are N/2, a checkpoint, and N/2 more, bit for bit."""
    agent, half, whole = example.agent, 10 * example.agent.period, 20 * example.agent.period
    with tempfile.TemporaryDirectory() as folder:
        save_file(f"{folder}/state.safetensors", example.train(0, half, torch.float32), {})
        saved, _ = load_file(f"{folder}/state.safetensors")
    state = restore(saved, example.state(0, torch.float32))
    source = example.source(0, torch.float32)
    state = fit(agent, state, source, whole, start=half, seeds=0)
    assert identical(state, example.train(0, whole, torch.float32)), "a resumed training differs from an uninterrupted one"


def stacking(example: Example) -> None:
    """A seed trained beside others is the seed trained alone."""
    seeds = (0, 5)
    state, source = stack([example.state(seed) for seed in seeds]), example.source(seeds)
    stacked = fit(example.agent, state, source, example.steps, seeds=seeds)
    for i, seed in enumerate(seeds):
        error = difference(unstack(stacked, i), example.train(seed))
        assert error < 1e-9, f"seed {seed} alone and in a stack differ by {error:.1e}"


def compiling(example: Example, backend: str = "aot_eager") -> None:
    """The whole update is one graph, and the graph is the update."""
    agent, state, source = example.agent, example.state(0), example.source(0)
    noise = Noise(agent.noise(BATCH), 0, dtype=torch.float64)
    update = accelerate(agent.update, "compile", backend=backend)
    for step in range(0, example.steps, agent.period):
        state, _ = update(state, source(step), noise(step // agent.period))
    error = difference(state, example.train(0))
    assert error < 1e-9, f"compiled and eager updates differ by {error:.1e}"


CHECKS: tuple[Callable[[Example], None], ...] = (shapes, purity, determinism, resume, stacking, compiling)


def examples(agent: str | type, config: Any = None, steps: int = 200) -> list[Example]:
    """The agent on continuous actions, and on discrete ones if it takes them; `steps` gradient steps where trainings are compared."""
    kind = agent_class(agent) if isinstance(agent, str) else agent
    sets = [toy()] + ([toy(discrete=True)] if kind.discrete else [])
    return [Example(kind(config or kind.Config(), data.spec), data, steps) for data in sets]


def contract(agent: str | type, config: Any = None, steps: int = 200) -> None:
    """Put an agent (a registered name or a class) through every check. Raises AssertionError saying what it broke."""
    for example in examples(agent, config, steps):
        for check in CHECKS:
            check(example)
