"""Batches from a world model: short rollouts of the current policy from states of the data (MBPO, Janner et al., 2019, arXiv 1906.08253).

Rewards and penalties are kept apart, as they were imagined. What is learned from is made when a batch is drawn: reward - weight * penalty
(MOPO, Yu et al., 2020, arXiv 2005.13239, Eq. 8), or a halt where the penalty is too large (MOReL, Kidambi et al., 2020, arXiv 2005.05951,
Definition 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from offrl.core.machine import threads_of_their_own
from offrl.core.rng import Indices, Normal, draw, generator
from offrl.core.types import Act, Transitions
from offrl.data.dataset import DataError, Dataset
from offrl.models.dynamics import Step
from offrl.models.penalty import auto_weight

PART = 1 << 11  # rows that one thread steps at once

Penalize = Callable[[Step], Tensor]  # -> (B,)
Terminated = Callable[[Tensor, Tensor, Tensor], Tensor]  # obs, action, next_obs -> (B,) bool


class WorldModel(Protocol):
    def noise(self, batch_size: int) -> dict[str, Any]: ...
    def step(self, obs: Tensor, action: Tensor, noise: dict[str, Tensor]) -> Step: ...


class Imagined(NamedTuple):
    """Rows of rollouts: all first steps, then all second ones, and so on."""

    obs: Tensor  # (N, obs)
    action: Tensor  # (N, action), in the environment's units
    reward: Tensor  # (N,) the model's own
    next_obs: Tensor  # (N, obs)
    mask: Tensor  # (N,) 0: the task ended there; a rollout that was cut at its horizon did not end
    penalty: Tensor  # (N,)


def rollout(
    model: WorldModel,
    act: Act,
    obs: Tensor,
    horizon: int,
    terminated: Terminated,
    penalize: Penalize,
    source: torch.Generator,
    halt: float = math.inf,
) -> Imagined:
    """`horizon` steps of the stochastic policy act(obs, noise) from each of obs (B, obs); none follows where the task ended, nor where
    the penalty was above `halt`.

    Numbers are drawn for all starts at every step: those of one rollout do not depend on when the others end. On a CPU each of torch's
    threads steps rows of its own: model, terminated and penalize must be functions of tensors that change nothing.
    """
    steps, alive = [], torch.arange(len(obs), device=obs.device)

    @torch.no_grad()  # of the thread that it runs in
    def step(obs: Tensor, action: Tensor, noise: dict[str, Tensor]) -> Imagined:
        made = model.step(obs, action, noise)
        done = terminated(obs, action, made.next_obs)
        return Imagined(obs, action, made.reward, made.next_obs, (~done).to(obs.dtype), penalize(made))

    with torch.no_grad(), threads_of_their_own(torch.get_num_threads()) as pool:
        kinds = {"action": Normal((len(obs), act(obs[:1]).shape[-1])), **model.noise(len(obs))}
        for _ in range(horizon):
            noise = {name: draw(kind, 1, source)[0][alive] for name, kind in kinds.items()}
            parts = [slice(i, i + PART) for i in range(0, len(obs), PART)] if obs.device.type == "cpu" else [slice(None)]
            given = noise.pop("action")
            rows = [pool.submit(step, obs[p], act(obs[p], given[p]), {k: v[p] for k, v in noise.items()}) for p in parts]
            steps.append(Imagined(*(torch.cat(column) for column in zip(*(each.result() for each in rows)))))
            on = (steps[-1].mask > 0) & (steps[-1].penalty <= halt)
            obs, alive = steps[-1].next_obs[on], alive[on]
            if len(obs) == 0:
                break
    return Imagined(*(torch.cat(column) for column in zip(*steps)))


class Imagine:
    """Batches of imagined transitions, (B, ...), uniform over the rows of the last `keep` generations.

    Every `every` gradient steps a generation is imagined: rollouts of the policy as it then is, from `starts` rows of the data drawn with
    replacement. weight: of the penalty in the reward; with `target` it follows a dual step towards weight * E[penalty] = target instead.
    halt, halt_reward: above this penalty a rollout ends, and the row has that reward and nothing after it.

    Its state is what was imagined, and the weight. One seed.
    """

    def __init__(
        self,
        model: WorldModel,
        data: Dataset,
        batch_size: int,
        seed: int = 0,
        *,
        terminated: Terminated,
        penalize: Penalize,
        horizon: int = 5,
        starts: int = 10_000,
        every: int = 1_000,
        keep: int = 5,
        weight: float = 1.0,
        target: float | None = None,
        weight_lr: float = 0.01,
        halt: float = math.inf,
        halt_reward: float = 0.0,
        period: int = 1,
        device: str | torch.device = "cpu",
    ):
        if data.reward.ndim != 1:
            raise DataError(f"imagined rewards are penalised as one number; the data has {data.reward.shape[1]} objectives")
        if target is not None and weight == 0:
            raise ValueError("a weight that is to be adapted to a target must begin above 0")
        self.model, self.data, self.batch_size, self.seed, self.period, self.device = model, data, batch_size, seed, period, device
        self.terminated, self.penalize, self.horizon, self.starts = terminated, penalize, horizon, starts
        self.every, self.keep, self.target, self.weight_lr, self.halt, self.halt_reward = every, keep, target, weight_lr, halt, halt_reward
        self.log_weight = torch.tensor(weight, device=device).log()
        self.generation, self.counts, self.rows = -1, [], None

    def __call__(self, step: int, act: Act) -> list[Transitions]:
        if step // self.every != self.generation:
            self._imagine(step // self.every, act)
        return [self._batch(rows) for rows in self.indices(step // self.period)]

    def _imagine(self, generation: int, act: Act) -> None:
        source = generator(self.seed, "imagine", generation, self.device)
        rows = torch.randint(len(self.data), (self.starts,), generator=generator(self.seed, "starts", generation)).numpy()
        obs = torch.from_numpy(self.data.obs[rows]).to(self.device)
        new = rollout(self.model, act, obs, self.horizon, self.terminated, self.penalize, source, self.halt)
        old = sum(self.counts[: max(0, len(self.counts) + 1 - self.keep)])  # rows that give way
        self.rows = new if self.rows is None else Imagined(*(torch.cat([a[old:], b]) for a, b in zip(self.rows, new)))
        self.counts = [*self.counts, len(new.obs)][-self.keep :]
        self._index(generation)

    def _index(self, generation: int) -> None:
        self.generation = generation
        shape = (self.period, self.batch_size)
        self.indices = Indices(len(self.rows.obs), shape, self.seed, f"imagined-{generation}", self.device)

    def _batch(self, index: Tensor) -> Transitions:
        rows = Imagined(*(column.index_select(0, index) for column in self.rows))
        if self.target is not None:
            self.log_weight = auto_weight(self.log_weight, rows.penalty.mean(), self.target, self.weight_lr)
        halted = rows.penalty > self.halt
        reward = torch.where(halted, self.halt_reward, rows.reward - self.log_weight.exp() * rows.penalty)
        return Transitions(rows.obs, rows.action, reward, rows.next_obs, rows.mask * ~halted)

    def metrics(self) -> dict[str, Tensor]:
        """Of the last generation: mean reward and penalty, rows, share of rows that ended; and the weight."""
        last = Imagined(*(column[-self.counts[-1] :] for column in self.rows))
        ended = 1 - last.mask.mean()
        found = {"reward": last.reward.mean(), "penalty": last.penalty.mean(), "ended": ended, "weight": self.log_weight.exp()}
        return {f"imagine/{name}": value for name, value in found.items()} | {"imagine/rows": torch.tensor(float(self.counts[-1]))}

    def state_dict(self) -> dict[str, Any]:
        if self.rows is None:
            return {}
        counts = {"generation": torch.tensor(self.generation), "counts": torch.tensor(self.counts), "log_weight": self.log_weight}
        return counts | {"rows": self.rows._asdict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not state:
            return
        self.rows = Imagined(**{name: column.to(self.device) for name, column in state["rows"].items()})
        self.counts, self.log_weight = state["counts"].tolist(), state["log_weight"].to(self.device)
        self._index(int(state["generation"]))
