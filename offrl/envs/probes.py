"""Tiny tasks with known answers, each of which isolates one thing that an agent can get wrong.

Those that are data have two states, observed as one-hot vectors, and one action in [-1, 1], which is drawn without regard to the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from offrl.core.space import Box, Discrete
from offrl.core.types import Spec
from offrl.data.dataset import Dataset
from offrl.envs.batched import Simulated

LOW, HIGH = -0.5, 0.25  # of the actions that `tempting` shows
EYE = np.eye(2, dtype=np.float32)


def finite(
    transition: np.ndarray,
    reward: np.ndarray,
    start: np.ndarray,
    ends: Sequence[int] = (),
    *,
    count: int,
    horizon: int | None,
    seed: int = 0,
) -> Simulated:
    """A finite task as `count` environments in tensors, observed as one-hot vectors, cut after `horizon` steps.

    transition (S, A, S) and start (S,) are probabilities, reward is (S, A); the task ends where a state of `ends` is reached.
    """
    chances, rewards, first = (torch.as_tensor(each, dtype=torch.float32) for each in (transition, reward, start))
    states, actions = rewards.shape
    over = torch.isin(torch.arange(states), torch.tensor(ends, dtype=torch.int64))

    def begin(count: int, source: torch.Generator) -> dict[str, torch.Tensor]:
        return {"state": torch.multinomial(first, count, replacement=True, generator=source)}

    def advance(state: dict[str, torch.Tensor], action: torch.Tensor, source: torch.Generator) -> tuple:
        at = state["state"]
        following = torch.multinomial(chances[at, action], 1, generator=source).squeeze(1)
        return {"state": following}, rewards[at, action], over[following]

    spec = Spec(Box.of(states), Discrete(actions))
    return Simulated(spec, count, begin, lambda state: torch.eye(states)[state["state"]], advance, horizon, seed)


class Probe(NamedTuple):
    """Data, and what is known about it: the action value at K points of the state and action space."""

    data: Dataset
    obs: np.ndarray  # (K, 2)
    action: np.ndarray  # (K, 1)
    value: np.ndarray  # (K,)


def _probe(state, action, reward, terminated, truncated, next_state, known: list[tuple[int, float, float]]) -> Probe:
    """Rows by the index of their state, and `known` as (state, action, value)."""
    data = Dataset.from_arrays(EYE[state], action, reward, terminated, truncated, EYE[next_state], action_space=Box.of(1, -1, 1))
    at, points, values = (np.array(column) for column in zip(*known))
    return Probe(data, EYE[at], points[:, None].astype(np.float32), values.astype(np.float32))


def _everywhere(state: int, value: float) -> list[tuple[int, float, float]]:
    return [(state, action, value) for action in (-0.8, 0.0, 0.8)]


def _actions(rows: int, low: float = -1.0, high: float = 1.0) -> np.ndarray:
    """(rows, 1): uniform, at equal distances in a random order, so that a mean over the data is the mean of the interval."""
    return low + (high - low) * (np.random.default_rng(0).permutation(rows)[:, None] + 0.5) / rows


def constant_reward(gamma: float, reward: float = 1.0, rows: int = 512) -> Probe:
    """The same reward for ever: every action is worth reward / (1 - gamma). Wrong bootstraps and discounts show."""
    state, never = np.zeros(rows, int), np.zeros(rows)
    return _probe(state, _actions(rows), np.full(rows, reward), never, never, state, _everywhere(0, reward / (1 - gamma)))


def two_steps(gamma: float, reward: float = 1.0, rows: int = 512) -> Probe:
    """State 0, then state 1, then the reward and the end: worth gamma * reward and reward. A discount too many or too few shows."""
    state = np.arange(rows) % 2
    known = _everywhere(0, gamma * reward) + _everywhere(1, reward)
    return _probe(state, _actions(rows), reward * state, state, np.zeros(rows), np.ones(rows, int), known)


def time_limit(gamma: float, reward: float = 1.0, rows: int = 512) -> Probe:
    """Two lots of four steps with the same reward: one is cut by a time limit, its value goes on; the other truly ends.

    State 0 returns to itself and is worth reward / (1 - gamma) although every episode in it is cut; in state 1 each
    episode ends after one step, which is worth the reward.
    """
    step = np.arange(rows) % 8
    state = (step >= 4).astype(int)
    known = _everywhere(0, reward / (1 - gamma)) + _everywhere(1, reward)
    return _probe(state, _actions(rows), np.full(rows, reward), state, step == 3, state, known)


def tempting(rows: int = 512) -> Probe:
    """One step in state 0. The reward is 1 + action on the data's actions, which fill [LOW, HIGH], and 0 beyond HIGH.

    A critic learns the slope and takes actions beyond the data for better ones; a policy that follows it loses all.
    """
    action = _actions(rows, LOW, HIGH)
    state, ends = np.zeros(rows, int), np.ones(rows)
    known = [(0, a, 1 + a) for a in (LOW + 0.1, 0.0, HIGH - 0.1)]
    return _probe(state, action, 1 + action[:, 0], ends, np.zeros(rows), state, known)
