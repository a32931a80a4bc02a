"""COMBO: soft actor-critic on the data and a model's rollouts, its values lowered on what was imagined (Yu et al., 2021, arXiv 2102.08363).

Eq. 2 there is the critics' loss, Eq. 3 the policy's. The values are lowered at a soft maximum over actions, as in CQL(H) (Kumar et
al., 2020, arXiv 2006.04779, Eq. 4 and appendix F); without imagined rows the agent is CQL.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor

from offrl.agents.base import Agent
from offrl.core.config import Log, Range
from offrl.core.rng import Normal, Uniform
from offrl.losses import twin_mse, weighted_mean
from offrl.nn.actor import SquashedGaussian, Temperature
from offrl.nn.critic import critics
from offrl.nn.descend import cosine


@dataclass(frozen=True)
class Config:
    conservative: Annotated[float, Range(0, 100)] = 5.0
    """Weight of the conservative term, beta."""
    rho: Literal["imagined", "mixed"] = "imagined"
    """States at which values are lowered: the imagined ones, or all."""
    lowered: Annotated[float, Range(0.01, 1)] = 0.5
    """Share of a batch's rows, imagined ones first, at which imagined states' values are lowered: what it costs is in proportion."""
    samples: Annotated[int, Range(1, 100)] = 10
    """Actions of each of three kinds over which the soft maximum is taken."""
    members: Annotated[int, Log(1, 1000)] = 2
    """Critics, over which the minimum is taken."""
    alpha: Annotated[float | None, Range(0, 100)] = None
    """Weight of the entropy; none: learned, so that the entropy is the target's."""
    target_entropy: Annotated[float | None, Range(-1000, 1000)] = None
    """Entropy, in nats of actions in [-1, 1], that a learned weight aims at; none: minus the number of action dimensions."""
    deterministic_backup: bool = True
    """Leave the next action's entropy out of the critics' backup."""
    gamma: Annotated[float, Range(0, 1)] = 0.99
    """Discount."""
    tau: Annotated[float, Range(0, 1)] = 0.005
    """Share of the online critics in a step of their targets."""
    actor_lr: Annotated[float, Log(1e-5, 1e-2)] = 1e-4
    """Learning rate of the actor."""
    actor_lr_steps: Annotated[float | None, Range(1)] = None
    """Steps over which the actor's learning rate falls to 0 along a cosine; none: it stays."""
    critic_lr: Annotated[float, Log(1e-5, 1e-2)] = 3e-4
    """Learning rate of the critics."""
    temperature_lr: Annotated[float, Log(1e-5, 1e-2)] = 1e-4
    """Learning rate of the entropy's weight."""
    hidden: tuple[int, ...] = (256, 256, 256)
    """Widths of the hidden layers of actor and critics."""
    layer_norm: bool = False
    """LayerNorm in the critics."""


class Lowered(NamedTuple):
    """Rows at which values are lowered."""

    obs: Tensor  # (K, obs)
    next_obs: Tensor  # (K, obs)
    weight: Tensor  # (K,) 0: not here


class COMBO(Agent):
    """COMBO, on batches in which `is_demo` (B,) is 1 for rows of the dataset and 0 for imagined ones.

    A batch without imagined rows, or without the column, has its values lowered at its own states: CQL. Where more rows are imagined than
    `lowered` has room for, the first of them, which are as random as the batch, stand for all.

    Deviations from the paper: 1. the squared errors are not halved, as in the released code of CQL and OfflineRL-Kit, so that
    `conservative` is twice the paper's beta; 2. the backup leaves the entropy out, as there; 3. the temperature descends Eq. 18 of SAC
    (arXiv 1812.05905) with log alpha in the place of alpha. From OfflineRL-Kit: 4. the soft maximum is taken over all 3 * samples actions
    of a state, where a reshape without effect leaves three at a time there; 5. the critics step before the actor; 6. values are lowered
    at imagined states, there by default at all (`rho`); 7. the log standard deviation is bounded by -20, not -5.
    """

    Config = Config
    targets = ("critic",)

    def networks(self):
        obs, action, c = self.spec.obs.size, self.spec.action.size, self.config
        learned = {"temperature": Temperature()} if c.alpha is None else {}
        return {
            "actor": SquashedGaussian(obs, action, c.hidden),
            "critic": critics(obs, action, c.hidden, c.members, c.layer_norm),
        } | learned

    def learning_rate(self, group, count):
        if group == "actor" and self.config.actor_lr_steps is not None:
            return cosine(count - 1, self.config.actor_lr, self.config.actor_lr_steps)
        return super().learning_rate(group, count)

    def noise(self, batch_size):
        one = (batch_size, self.spec.action.size)
        many = (self.config.samples, *one)
        return [{"next_action": Normal(one), "action": Normal(one), "random": Uniform(many), "here": Normal(many), "there": Normal(many)}]

    def alpha(self, state) -> Tensor | float:
        return self.bind(state, "temperature")().exp() if self.config.alpha is None else self.config.alpha

    def backup(self, state, batch, alpha, eps) -> Tensor:
        c, actor, critic = self.config, self.bind(state, "actor"), self.bind(state, "critic", of="target")
        action, log_prob = actor(batch.next_obs, eps["next_action"])
        value = critic(batch.next_obs, action).amin(0)
        if not c.deterministic_backup:
            value = value - alpha * log_prob
        return batch.reward + c.gamma * batch.mask * value

    def lowered(self, batch) -> Lowered:
        """The rows at which values are lowered: of a share of the batch that holds imagined rows first, those; or all."""
        c, demo = self.config, batch.is_demo
        if demo is None or c.rho == "mixed":
            return Lowered(batch.obs, batch.next_obs, torch.ones_like(batch.mask))
        first = demo.argsort(stable=True)[: math.ceil(c.lowered * len(demo))]
        weight = torch.where((demo < 1).any(), 1 - demo, demo)
        return Lowered(batch.obs[first], batch.next_obs[first], weight[first])

    def candidates(self, state, rows: Lowered, eps) -> tuple[Tensor, Tensor]:
        """Actions of three kinds for the soft maximum at each state, (3 samples, K, action), and their log densities (3 samples, K).

        They are uniform, the policy's at the state, and the policy's at the next state.
        """
        actor, (uniform, one, two) = self.bind(state, "actor"), (eps[name][:, : len(rows.obs)] for name in ("random", "here", "there"))
        uniform = 2 * uniform - 1
        here, here_log = actor(rows.obs, one)
        there, there_log = actor(rows.next_obs, two)
        uniform_log = torch.full_like(here_log, -self.spec.action.size * math.log(2))
        return torch.cat([uniform, here, there]), torch.cat([uniform_log, here_log, there_log])

    def critic_loss(self, state, batch, target, rows: Lowered, candidates, log_density):
        c, critic = self.config, self.bind(state, "critic")
        values = critic(batch.obs, batch.action)
        error = twin_mse(values, target)
        everywhere = critic(rows.obs.expand(len(candidates), -1, -1), candidates)
        soft_max = torch.logsumexp(everywhere - log_density, 1) - math.log(len(candidates))  # log of the integral of exp Q over actions
        demo = torch.ones_like(batch.mask) if batch.is_demo is None else batch.is_demo
        gap = weighted_mean(soft_max, rows.weight) - weighted_mean(values, demo)
        loss = error + c.conservative * gap.sum(0)  # Eq. 2
        return loss, {"critic/loss": loss, "critic/error": error, "critic/gap": gap.mean(), "critic/q": values.mean()}

    def actor_loss(self, state, batch, alpha, eps):
        actor, critic = self.bind(state, "actor", "critic")
        action, log_prob = actor(batch.obs, eps["action"])
        loss = (alpha * log_prob - critic(batch.obs, action).amin(0)).mean()  # Eq. 3, with SAC's entropy
        return loss, ({"actor/loss": loss, "actor/entropy": -log_prob.mean()}, log_prob)

    def temperature_loss(self, state, log_prob):
        log_alpha, c = self.bind(state, "temperature")(), self.config
        target = -self.spec.action.size if c.target_entropy is None else c.target_entropy
        loss = -log_alpha * (log_prob + target).mean()
        return loss, {"temperature/loss": loss, "temperature/alpha": log_alpha.exp()}

    def update(self, state, batches, noise):
        batch, eps, alpha = self.normalize(state, batches[0]), noise[0], self.alpha(state)
        target, rows = self.backup(state, batch, alpha, eps), self.lowered(batch)
        state, metrics = self.descend(state, "critic", self.critic_loss, batch, target, rows, *self.candidates(state, rows, eps))
        state, (more, log_prob) = self.descend(state, "actor", self.actor_loss, batch, alpha, eps)
        if self.config.alpha is None:
            state, most = self.descend(state, "temperature", self.temperature_loss, log_prob)
            more |= most
        return self.polyak(state), metrics | more

    def act(self, state, obs: Tensor, noise: Tensor | None = None) -> Tensor:
        """The squashed mean action, or with Normal noise (..., action) a sample, in the environment's units."""
        actor, obs = self.bind(state, "actor"), self.normalize_obs(state, obs)
        return self.env_action(state, actor(obs) if noise is None else actor(obs, noise)[0])
