"""Many environments as one: what a source of rollouts steps, whether a simulator in tensors or copies of a Gymnasium environment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from offrl.core import space as spaces
from offrl.core.rng import generator
from offrl.core.tree import tree_map
from offrl.core.types import Spec
from offrl.envs.make import check, make

Tree = dict[str, Any]  # of tensors


class Stepped(NamedTuple):
    """One step of E environments."""

    obs: Tensor  # (E, obs) what to act on next: the first of a new episode where one ended
    reward: Tensor  # (E,) or (E, objectives)
    terminated: Tensor  # (E,) bool: the task ended
    truncated: Tensor  # (E,) bool: a time limit cut the episode
    next_obs: Tensor  # (E, obs) what the step led to, before any new episode


class BatchedEnv(Protocol):
    """E environments of one Spec, stepped together; an episode that ends is followed by a new one within the same step."""

    spec: Spec
    count: int  # E
    device: str | torch.device  # of all its tensors
    resumes: bool  # whether load_state_dict restores the episodes under way; where not, `reset` is to follow it

    def reset(self) -> Tensor: ...  # (E, obs) of new episodes
    def step(self, action: Tensor) -> Stepped: ...  # (E, action) within the bounds, or (E,) int64
    def state_dict(self) -> Tree: ...
    def load_state_dict(self, state: Tree) -> None: ...


class Simulated:
    """A simulator given as functions of tensors, `count` episodes at once. It resumes bit for bit.

    start(count, source): a tree of tensors (E, ...), the states in which episodes begin. observe(state): (E, obs).
    advance(state, action, source): the next state, the reward (E,) or (E, objectives), and whether the task ended, (E,) bool.
    horizon: steps after which an episode is cut; none: it goes on until the task ends. Both functions draw from the generator that they
    are given, which is another at every step.
    """

    resumes = True

    def __init__(
        self,
        spec: Spec,
        count: int,
        start: Callable[[int, torch.Generator], Tree],
        observe: Callable[[Tree], Tensor],
        advance: Callable[[Tree, Tensor, torch.Generator], tuple[Tree, Tensor, Tensor]],
        horizon: int | None = None,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ):
        self.spec, self.count, self.start, self.observe, self.advance = spec, count, start, observe, advance
        self.horizon, self.seed, self.device, self.tick = horizon, seed, device, 0

    def reset(self) -> Tensor:
        self.state = self.start(self.count, self._source())
        self.age = torch.zeros(self.count, dtype=torch.int64, device=self.device)  # steps of each episode
        return self.observe(self.state)

    def step(self, action: Tensor) -> Stepped:
        source = self._source()
        state, reward, terminated = self.advance(self.state, action, source)
        age, next_obs = self.age + 1, self.observe(state)
        truncated = age >= self.horizon if self.horizon is not None else torch.zeros_like(terminated)
        ended = terminated | truncated
        if ended.any():
            fresh = self.start(self.count, source)
            state = tree_map(lambda new, old: torch.where(ended.view(-1, *[1] * (old.ndim - 1)), new, old), fresh, state)
        self.state, self.age = state, age * ~ended
        return Stepped(self.observe(state), reward, terminated, truncated, next_obs)

    def _source(self) -> torch.Generator:
        self.tick += 1
        return generator(self.seed, "env", self.tick, self.device)

    def state_dict(self) -> Tree:
        return {"state": self.state, "age": self.age, "tick": torch.tensor(self.tick)}

    def load_state_dict(self, state: Tree) -> None:
        self.state = tree_map(lambda leaf: leaf.to(self.device), state["state"])
        self.age, self.tick = state["age"].to(self.device), int(state["tick"])


class Copies:
    """`count` copies of a Gymnasium environment, stepped one after the other in this process.

    `env` is an id for `make` or a function that returns an environment. Episode k of copy i is reset with a seed made of `seed`, i and k.
    Their episodes cannot be saved: a run that goes on begins new ones, with the seeds that would have come next.

    Raises EnvError where spaces are not a Box of observations and a Box or Discrete of actions.
    """

    resumes = False

    def __init__(self, env: str | Callable[[], Any], count: int, seed: int = 0, device: str | torch.device = "cpu"):
        self.envs = [make(env) if isinstance(env, str) else check("the environment's factory", env()) for _ in range(count)]
        self.count, self.seed, self.device, self.begun = count, seed, device, [0] * count
        first = self.envs[0]
        self.shape = first.action_space.shape
        env_id = env if isinstance(env, str) else getattr(first.spec, "id", None)
        self.spec = Spec(spaces.from_gym(first.observation_space), spaces.from_gym(first.action_space), env_id)

    def reset(self) -> Tensor:
        return self._rows([self._begin(i) for i in range(self.count)])

    def _begin(self, i: int) -> np.ndarray:
        seed = generator(self.seed, f"episode/{i}", self.begun[i]).initial_seed() % 2**31
        self.begun[i] += 1
        return _flat(self.envs[i].reset(seed=seed)[0])

    def step(self, action: Tensor) -> Stepped:
        columns = [self._one(i, each) for i, each in enumerate(action.cpu().numpy())]
        return Stepped(*(self._rows(column) for column in zip(*columns)))

    def _rows(self, values: Sequence[Any]) -> Tensor:
        return torch.from_numpy(np.stack(values)).to(self.device)

    def _one(self, i: int, action: np.ndarray) -> tuple[Any, ...]:
        given = int(action) if isinstance(self.spec.action, spaces.Discrete) else action.reshape(self.shape)
        next_obs, reward, terminated, truncated, _ = self.envs[i].step(given)
        next_obs = _flat(next_obs)
        obs = self._begin(i) if terminated or truncated else next_obs
        return obs, np.float32(reward), bool(terminated), bool(truncated), next_obs

    def state_dict(self) -> Tree:
        return {"begun": torch.tensor(self.begun)}

    def load_state_dict(self, state: Tree) -> None:
        self.begun = state["begun"].tolist()

    def close(self) -> None:
        for env in self.envs:
            env.close()


def _flat(obs: Any) -> np.ndarray:
    return np.array(obs, np.float32).reshape(-1)  # a copy: some environments write the next observation into the same array
