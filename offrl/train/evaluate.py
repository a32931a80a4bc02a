"""Running a policy in its environment: raw returns of whole episodes from fixed seeds.

Episodes run in lockstep, one environment each, so that one call of the policy serves them all; `benchmarks/evaluation.py`
measures this against the alternatives. Returns equal those of one plain Gymnasium loop after another.
"""

from __future__ import annotations

import math
import secrets
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from offrl.core.types import Act
from offrl.envs.make import make

SLOTS = 64  # environments open at once, at most
NO_LIMIT = 10_000  # steps after which an episode is cut whose environment names no limit
_PLAIN = ("TimeLimit", "OrderEnforcing", "PassiveEnvChecker")  # Gymnasium's wrappers that change no number that is read here

EnvSource = str | Callable[[], Any]


class EvaluationError(RuntimeError):
    """An episode that could not be finished; the message names the episode, the step and the cause."""


@dataclass(frozen=True)
class Episodes:
    """Raw results: returns (n,) float64 undiscounted, lengths (n,) in steps, seeds (n,) of the resets, and the time limit in steps."""

    returns: np.ndarray
    lengths: np.ndarray
    seeds: np.ndarray
    time_limit: int


def evaluate(
    act: Act,
    env: EnvSource,
    episodes: int = 10,
    seed: int = 0,
    fresh: bool = False,
    time_limit: int | None = None,
    obs_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Episodes:
    """Run `episodes` whole episodes of the deterministic policy `act` and return each one's sum of rewards.

    `act` maps (B, obs) float32 to (B, action) in the environment's units, or (B,) integers where actions are discrete; B is the
    number of environments open, whether or not their episodes have ended. `env` is an id for `make` or a function that returns a
    Gymnasium environment. Episode i is reset with `seed` + i; `fresh` draws the seeds from the operating system instead.
    `time_limit` in steps replaces the environment's own; an environment without one is cut after 10,000 steps, with a warning.
    `obs_size` is what the policy expects. `progress(done, episodes)` is called at the end of each episode.

    Raises EvaluationError when the environment raises, rewards or actions are not finite, or shapes disagree.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, not {episodes}")
    if time_limit is not None and time_limit < 1:
        raise ValueError(f"time_limit must be at least 1 step, not {time_limit}")
    seeds = [secrets.randbits(31) if fresh else seed + i for i in range(episodes)]
    opened: list[Any] = []
    try:
        for _ in range(min(episodes, SLOTS)):
            opened.append(make(env) if isinstance(env, str) else env())
        limit = _limit_of(opened[0]) if time_limit is None else time_limit
        # Slot s plays episodes s, s + slots, s + 2 slots, ...: dealt in advance, so that short episodes are not preferred.
        slots = [_Slot(each, dict(list(enumerate(seeds))[s :: len(opened)]), limit) for s, each in enumerate(opened)]
        results = _lockstep(act, slots, obs_size, lambda done: progress and progress(done, episodes))
    finally:
        for each in opened:
            each.close()
    returns, lengths = (np.array(column) for column in zip(*(results[i] for i in range(episodes))))
    return Episodes(returns, lengths, np.array(seeds), limit)


class _Slot:
    """One environment and the episodes dealt to it. `obs` is what the policy is to see next, None when all are played."""

    def __init__(self, env: Any, seeds: dict[int, int], limit: int) -> None:
        self.action_space, self.obs_shape = env.action_space, env.observation_space.shape
        self.env, self.queue, self.limit = _stripped(env), iter(seeds.items()), limit
        self.start()

    def start(self) -> None:
        """Reset for the next episode dealt to this slot, if there is one."""
        self.total, self.steps, self.obs = 0.0, 0, None
        self.episode, self.seed = next(self.queue, (None, None))
        if self.episode is not None:
            self.obs = self.call(self.env.reset, seed=self.seed)[0]

    def step(self, action: Any) -> bool:
        """Whether that was the last step of the episode."""
        self.obs, reward, terminated, truncated, _ = self.call(self.env.step, action)
        try:
            reward = float(reward)
        except TypeError:
            raise self.error(f"the reward is {type(reward).__name__} of shape {np.shape(reward)}, not a number") from None
        if not math.isfinite(reward):
            raise self.error(f"the reward is {reward}")
        self.total += reward
        self.steps += 1
        return bool(terminated or truncated or self.steps >= self.limit)

    def call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except Exception as error:
            raise self.error(f"the environment raised {type(error).__name__}: {error}") from error

    def error(self, cause: str) -> EvaluationError:
        return EvaluationError(f"episode {self.episode} (seed {self.seed}), step {self.steps}: {cause}")


def _lockstep(act: Act, slots: list[_Slot], obs_size: int | None, ended: Callable[[int], None]) -> dict[int, tuple[float, int]]:
    """(return, length) by episode. Every tick calls the policy once and steps the environments whose episodes go on."""
    size = math.prod(slots[0].obs_shape)
    if obs_size not in (None, size):
        raise EvaluationError(f"the policy sees {obs_size} numbers, the environment shows {size}: their tasks or versions differ")
    results: dict[int, tuple[float, int]] = {}
    batch, playing = np.zeros((len(slots), size), np.float32), list(enumerate(slots))
    while playing:
        for s, slot in playing:
            batch[s] = slot.obs if len(slot.obs_shape) == 1 else np.reshape(slot.obs, -1)
        with torch.no_grad():
            actions = _actions(act(torch.from_numpy(batch).clone()), slots[0].action_space, playing, len(slots))
        for s, slot in playing:
            if slot.step(actions[s]):
                results[slot.episode] = slot.total, slot.steps
                slot.start()
                ended(len(results))
        playing = [(s, slot) for s, slot in playing if slot.episode is not None]
    return results


def _actions(output: torch.Tensor, space: Any, playing: list[tuple[int, _Slot]], count: int) -> Any:
    """The policy's output as `count` actions that the environments take; raises EvaluationError where it is no such thing."""
    discrete = not space.shape
    values = output.detach().cpu().numpy()
    shape = (count,) if discrete else (count, math.prod(space.shape))
    if values.shape != shape or discrete != (values.dtype.kind == "i"):
        kind = f"integers of shape {shape}" if discrete else f"numbers of shape {shape}"
        raise EvaluationError(f"the environment takes {kind}, the policy gave {output.dtype} of shape {values.shape}")
    if discrete:
        return values.tolist()
    if not np.isfinite(values).all():
        for s, slot in playing:
            if not np.isfinite(values[s]).all():
                raise slot.error(f"the policy's action is {values[s].tolist()}")
    return values.reshape(count, *space.shape)


def _stripped(env: Any) -> Any:
    """`env` without the outer wrappers that change no number read here: steps are counted, and resets come first, in this module."""
    while type(env).__name__ in _PLAIN and type(env).__module__.startswith("gymnasium.wrappers"):
        env = env.env
    return env


def _limit_of(env: Any) -> int:
    limit = getattr(getattr(env, "spec", None), "max_episode_steps", None)
    while limit is None and env is not None:
        limit, env = getattr(env, "_max_episode_steps", None), vars(env).get("env")
    if limit is None:
        warnings.warn(f"the environment names no time limit: episodes are cut after {NO_LIMIT} steps", stacklevel=3)
        return NO_LIMIT
    return int(limit)
