"""The one training loop. It knows no algorithm; what differs between regimes is the source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from offrl.core.rng import Noise
from offrl.core.tree import flatten, tree_map
from offrl.core.types import Agent, Metrics, Source, State
from offrl.training.accelerate import accelerate, skipping

Hook = Callable[[int, State, Metrics], None]  # (gradient steps done, state, the last update's metrics)


def fit(
    agent: Agent,
    state: State,
    source: Source,
    steps: int,
    hooks: Sequence[tuple[int, Hook]] = (),
    start: int = 0,
    *,
    seeds: int | Sequence[int] = 0,
    mode: str = "eager",
    precision: str = "fp32",
) -> State:
    """Train from gradient step `start` to `steps` (rounded up to a whole update) and return the new state.

    seeds: one seed, or several for a state and a source with a leading axis of seeds. hooks: (every, hook) pairs, a
    hook being called whenever another `every` gradient steps are done. Where the state has an entry `skipped`, integer
    and 0-d (or one for each seed), updates that are not finite are left out and counted in it. Equal arguments give
    equal results, bit for bit on one machine, however often the run is cut and resumed at the end of an update.
    """
    first = next(iter(flatten(state["params"]).values()))
    noise = Noise(agent.noise(source.batch_size), seeds, first.device, first.dtype)
    update = skipping(agent.update) if "skipped" in state else agent.update
    update = accelerate(update, mode, precision, noise.stacked, first.device)
    for step in range(start, steps, agent.period):
        batches = source(step, partial(agent.act, state))
        state, metrics = update(state, batches, noise(step // agent.period))
        done = step + agent.period
        for every, hook in hooks:
            if done // every > step // every:
                hook(done, state, metrics)
    return state


def unstack(state: State, index: int) -> State:
    """The state of one seed of a stacked state."""
    return tree_map(lambda leaf: leaf[index], state)


def stack(states: Sequence[State]) -> State:
    """States of several seeds as one, with a leading axis."""
    return tree_map(lambda *leaves: torch.stack(leaves), *states)
