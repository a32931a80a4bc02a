"""Running a policy in its environment: raw returns of whole episodes from fixed seeds.

Episodes run in lockstep, one environment each, so that one call of the policy serves them all; `benchmarks/evaluation.py`
measures this against the alternatives. Returns are those of one plain Gymnasium loop after another, to the last bit for a policy
whose rows do not depend on the size of their batch (matrix products round a little differently at another size).
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offrl.core.types import Act
from offrl.envs.make import check, make
from offrl.envs.render import RenderError

SLOTS = 64  # environments open at once, at most
NO_LIMIT = 10_000  # steps after which an episode is cut whose environment names no limit
FPS = 30  # pictures a second of a film, about
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
    with contextlib.ExitStack() as stack:
        opened = []
        for _ in range(min(episodes, SLOTS)):
            opened.append(_open(env))
            stack.callback(opened[-1].close)
        limit = _limit_of(opened[0]) if time_limit is None else time_limit
        # Slot s plays episodes s, s + slots, s + 2 slots, ...: dealt in advance, so that short episodes are not preferred.
        slots = [_Slot(each, dict(list(enumerate(seeds))[s :: len(opened)]), limit) for s, each in enumerate(opened)]
        results = _lockstep(act, slots, obs_size, lambda done: progress and progress(done, episodes))
    returns, lengths = (np.array(column) for column in zip(*(results[i] for i in range(episodes))))
    return Episodes(returns, lengths, np.array(seeds), limit)


def record(act: Act, env: EnvSource, path: str | os.PathLike, seed: int = 0, time_limit: int | None = None) -> Episodes:
    """Film one episode, reset with `seed`, as an mp4 at `path`, at the task's own pace and about 30 pictures a second.

    An `env` given as a function must return an environment with render_mode "rgb_array". Raises RenderError where nothing can draw,
    ImportError where imageio-ffmpeg is missing, and what `evaluate` raises; a film that was cut short is not left behind.
    """
    try:
        import imageio
        import imageio_ffmpeg  # noqa: F401  (imageio finds it by itself, and says nothing helpful where it does not)
    except ImportError as error:
        raise ImportError('films need imageio and imageio-ffmpeg: pip install "offrl[video]"') from error
    path = Path(path)
    if path.suffix != ".mp4":
        raise ValueError(f"films are written as .mp4, not {path.suffix or 'without a suffix'}: {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.stem}.part.mp4")
    opened = _open(env, "rgb_array")
    try:
        if (mode := getattr(opened, "render_mode", None)) != "rgb_array":
            raise RenderError(f"the environment was made with render_mode {mode!r}, films need 'rgb_array'")
        pace = getattr(opened, "metadata", {}).get("render_fps", FPS)
        every = max(1, round(pace / FPS))
        with contextlib.closing(imageio.get_writer(part, fps=pace / every)) as film:  # imageio's own context stays open on errors
            result = evaluate(act, lambda: _Filmed(opened, film, every), episodes=1, seed=seed, time_limit=time_limit)
        part.replace(path)
    finally:
        opened.close()
        part.unlink(missing_ok=True)
    return result


class _Filmed:
    """An environment that adds a picture to `film` at its reset and at every `every`-th step."""

    def __init__(self, env: Any, film: Any, every: int) -> None:
        self.env, self.film, self.every, self.steps = env, film, every, 0
        self.observation_space, self.action_space, self.spec = env.observation_space, env.action_space, getattr(env, "spec", None)

    def reset(self, **options: Any) -> Any:
        result = self.env.reset(**options)
        self.draw()
        return result

    def step(self, action: Any) -> Any:
        result = self.env.step(action)
        self.steps += 1
        if self.steps % self.every == 0:
            self.draw()
        return result

    def close(self) -> None:
        """Left to whoever opened `env`."""

    def draw(self) -> None:
        try:
            self.film.append_data(self.env.render())
        except Exception as error:
            raise RenderError(f"drawing failed with MUJOCO_GL={os.environ.get('MUJOCO_GL')}: {type(error).__name__}: {error}") from error


def _open(env: EnvSource, render: str | None = None) -> Any:
    return make(env, render=render) if isinstance(env, str) else check("the environment's factory", env())


class _Slot:
    """One environment and the episodes dealt to it. `obs` is what the policy is to see next."""

    def __init__(self, env: Any, seeds: dict[int, int], limit: int) -> None:
        self.obs_size, self.action = math.prod(env.observation_space.shape), env.action_space
        self.env, self.queue, self.limit = _stripped(env), iter(seeds.items()), limit
        self.start()

    def start(self) -> None:
        """Reset for the next episode dealt to this slot; `episode` is None when there is no other."""
        self.total, self.steps = 0.0, 0
        self.episode, self.seed = next(self.queue, (None, None))
        if self.episode is not None:
            self.see(self.call(2, self.env.reset, seed=self.seed)[0])

    def step(self, action: Any) -> bool:
        """Whether that was the last step of the episode."""
        obs, reward, terminated, truncated, _ = self.call(5, self.env.step, action)
        try:
            reward = float(reward)
        except (TypeError, ValueError):
            raise self.error(f"the reward is a {type(reward).__name__} of shape {np.shape(reward)}, not a number") from None
        if not math.isfinite(reward):
            raise self.error(f"the reward is {reward}")
        self.total += reward
        self.steps += 1
        ended = bool(terminated or truncated or self.steps >= self.limit)
        if not ended:
            self.see(obs)
        return ended

    def see(self, obs: Any) -> None:
        self.obs = np.asarray(obs, np.float32).reshape(-1)
        if self.obs.size != self.obs_size:
            raise self.error(f"the observation has shape {np.shape(obs)}, its space has {self.obs_size} numbers")

    def call(self, parts: int, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        try:
            result = function(*args, **options)
        except RenderError:
            raise
        except Exception as error:
            raise self.error(f"the environment raised {type(error).__name__}: {error}") from error
        if not isinstance(result, tuple) or len(result) != parts:
            raise self.error(f"{function.__name__} must return {parts} values as in Gymnasium, not the old Gym's {type(result).__name__}")
        return result

    def error(self, cause: str) -> EvaluationError:
        return EvaluationError(f"episode {self.episode} (seed {self.seed}), step {self.steps}: {cause}")


def _lockstep(act: Act, slots: list[_Slot], obs_size: int | None, ended: Callable[[int], None]) -> dict[int, tuple[float, int]]:
    """(return, length) by episode. Every tick calls the policy once and steps the environments whose episodes go on.

    Rows of ended episodes stay in the batch: at a constant size an episode's result does not depend on when the others end.
    """
    first = slots[0]
    if obs_size not in (None, first.obs_size):
        raise EvaluationError(f"the policy sees {obs_size} numbers, the environment shows {first.obs_size}: their tasks or versions differ")
    results: dict[int, tuple[float, int]] = {}
    batch, playing = np.zeros((len(slots), first.obs_size), np.float32), list(enumerate(slots))
    while playing:
        for s, slot in playing:
            batch[s] = slot.obs
        if not np.isfinite(batch).all():
            raise next(slot for s, slot in playing if not np.isfinite(batch[s]).all()).error("the observation is not finite")
        with torch.no_grad():
            actions = _actions(act(torch.from_numpy(batch).clone()), first.action, playing, len(slots))
        for s, slot in playing:
            if slot.step(actions[s]):
                results[slot.episode] = slot.total, slot.steps
                slot.start()
                ended(len(results))
        playing = [(s, slot) for s, slot in playing if slot.episode is not None]
    return results


def _actions(output: torch.Tensor, space: Any, playing: list[tuple[int, _Slot]], count: int) -> Any:
    """The policy's output as `count` actions that the environments take; raises EvaluationError where it is no such thing."""
    discrete = type(space).__name__ == "Discrete"
    shape = (count,) if discrete else (count, math.prod(space.shape))
    if tuple(output.shape) != shape or output.is_floating_point() == discrete:
        wanted, given = f"{'integers' if discrete else 'floats'} of shape {shape}", f"{output.dtype} of shape {tuple(output.shape)}"
        raise EvaluationError(f"the environment takes {wanted}, the policy gave {given}")
    if discrete:
        return output.tolist()
    values = output.detach().float().cpu().numpy()
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
        limit, env = getattr(env, "_max_episode_steps", None), getattr(env, "env", None)
    if limit is None:
        warnings.warn(f"the environment names no time limit: episodes are cut after {NO_LIMIT} steps", stacklevel=3)
        return NO_LIMIT
    return int(limit)
