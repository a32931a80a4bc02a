"""Rollouts of the policy that learns, for agents that learn from no other's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from offrl.core.rng import Normal, Uniform, draw, generator
from offrl.core.space import Box
from offrl.core.types import Act, Metrics, Transitions
from offrl.envs.batched import BatchedEnv, Stepped


class OnPolicy:
    """At every update `steps` steps of the current policy in each of the E environments of `env`: one batch, Transitions (T, E, ...).

    Episodes go on from one rollout to the next. `action` is what the stochastic policy act(obs, noise) drew, of which it has the
    density; the environment is given the nearest action within its bounds. `mask` is 0 where the task ended, `truncated` is 1 where a
    time limit cut an episode, and `next_obs` is the true one at both. Densities and values are not kept: the state with which `fit`
    updates is the one that acted, and has them exactly.

    Its state are the environments' and the counts of the episodes under way, so that a run is resumed bit for bit where the
    environments can be saved. Where they cannot (`env.resumes` is false, as of Gymnasium's), a resumed run begins new episodes. One seed.
    """

    def __init__(self, env: BatchedEnv, steps: int, seed: int = 0):
        if steps < 1:
            raise ValueError(f"a rollout has at least 1 step, not {steps}")
        self.env, self.steps, self.seed, self.batch_size = env, steps, seed, steps * env.count
        action = env.spec.action
        self.kind = (Normal if isinstance(action, Box) else Uniform)((env.count, action.size))
        self.obs: Tensor | None = None  # (E, obs); none: episodes are to begin
        self.env_steps = 0
        self.ended: tuple[int, Tensor, Tensor] | None = None  # of the last rollout in which any did: episodes, mean length, mean return

    def __call__(self, step: int, act: Act) -> list[Transitions]:
        with torch.no_grad():
            if self.obs is None:
                self.obs = self.env.reset()
                self.length, self.total = (torch.zeros(self.env.count, device=self.env.device) for _ in range(2))
            noise = draw(self.kind, self.steps, generator(self.seed, "act", step, self.env.device))
            rows, ended = zip(*(self._step(act, each) for each in noise))
        self.env_steps += self.batch_size
        lengths, totals = (torch.cat(column) for column in zip(*ended))
        if len(lengths):
            self.ended = len(lengths), lengths.mean(), totals.mean(0)
        return [Transitions(*(None if column[0] is None else torch.stack(column) for column in zip(*rows)))]

    def _step(self, act: Act, noise: Tensor) -> tuple[Transitions, tuple[Tensor, Tensor]]:
        """One row of each environment, and length and return of the episodes that ended."""
        obs, space = self.obs, self.env.spec.action
        action = act(obs, noise)
        found = self.env.step(space.clip(action) if isinstance(space, Box) else action)
        self.obs = found.obs
        mask, truncated = ((~found.terminated).to(obs.dtype), found.truncated.to(obs.dtype))
        return Transitions(obs, action, found.reward, found.next_obs, mask, truncated=truncated), self._count(found)

    def _count(self, found: Stepped) -> tuple[Tensor, Tensor]:
        reward, over = found.reward, found.terminated | found.truncated
        self.length = self.length + 1
        self.total = reward + (self.total if self.total.ndim == reward.ndim else self.total[:, None])
        ended = self.length[over], self.total[over]
        self.length = self.length * ~over
        self.total = self.total * (~over if reward.ndim == 1 else ~over[:, None])
        return ended

    def metrics(self) -> Metrics:
        """Steps of environments so far; of the last rollout in which episodes ended, how many, and their mean length and return."""
        found = {"rollout/env_steps": torch.tensor(self.env_steps)}
        if self.ended is not None:
            episodes, length, total = self.ended
            found |= {"rollout/episodes": torch.tensor(episodes), "rollout/length_mean": length}
            found |= {"rollout/return_mean": total} if total.ndim == 0 else {f"rollout/return_mean_{i}": x for i, x in enumerate(total)}
        return found

    def state_dict(self) -> dict[str, Any]:
        if self.obs is None:
            return {}
        state = {"env": self.env.state_dict(), "env_steps": torch.tensor(self.env_steps)}
        if self.ended is not None:
            state["ended"] = {"episodes": torch.tensor(self.ended[0]), "length": self.ended[1], "total": self.ended[2]}
        return state | ({"obs": self.obs, "length": self.length, "total": self.total} if self.env.resumes else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not state:
            return
        self.env.load_state_dict(state["env"])
        self.env_steps = int(state["env_steps"])
        if "ended" in state:
            self.ended = int(state["ended"]["episodes"]), state["ended"]["length"], state["ended"]["total"]
        if self.env.resumes:
            self.obs, self.length, self.total = (state[name].to(self.env.device) for name in ("obs", "length", "total"))
