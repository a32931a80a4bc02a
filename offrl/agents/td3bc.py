"""TD3+BC: TD3 whose actor is also pulled to the data's actions (Fujimoto and Gu, 2021, arXiv 2106.06860).

Eq. 3 is the actor's loss, Eq. 5 its normalisation; TD3's target smoothing and clipped double Q are Algorithm 1 of
Fujimoto et al., 2018 (arXiv 1802.09477).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from offrl.agents.base import Agent
from offrl.core.config import Log, Range
from offrl.core.rng import Normal
from offrl.losses import mse, twin_mse
from offrl.nn.actor import Deterministic
from offrl.nn.critic import Q


@dataclass(frozen=True)
class Config:
    alpha: Annotated[float, Range(0, 100)] = 2.5
    """Weight of the value against the cloning term."""
    gamma: Annotated[float, Range(0, 1)] = 0.99
    """Discount."""
    tau: Annotated[float, Range(0, 1)] = 0.005
    """Share of the online networks in a step of the targets."""
    policy_noise: Annotated[float, Range(0, 10)] = 0.2
    """Standard deviation of the target policy's smoothing noise, in half action ranges."""
    noise_clip: Annotated[float, Range(0, 10)] = 0.5
    """Bound of that noise."""
    actor_lr: Annotated[float, Log(1e-5, 1e-2)] = 3e-4
    """Learning rate of the actor."""
    critic_lr: Annotated[float, Log(1e-5, 1e-2)] = 3e-4
    """Learning rate of the critics."""
    hidden: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers of actor and critics."""
    layer_norm: bool = False
    """LayerNorm in the critics."""


class TD3BC(Agent):
    """TD3+BC.

    Deviations from the paper: none. From the released code: 1. mean|Q| has a floor of 1e-6, so that a critic at zero
    does not divide by it; 2. actions are scaled to [-1, 1] before every network.
    """

    Config = Config
    period = 2  # TD3's delayed policy: two critic steps to one of the actor
    targets = ("actor", "critic")

    def networks(self):
        sizes = self.spec.obs.size, self.spec.action.size, self.config.hidden
        return {"actor": Deterministic(*sizes), "critic": Q(*sizes, layer_norm=self.config.layer_norm)}

    def noise(self, batch_size):
        return [{"policy": Normal((batch_size, self.spec.action.size))} for _ in range(self.period)]

    def backup(self, state, batch, eps) -> Tensor:
        actor, critic = self.bind(state, "actor", "critic", of="target")
        c = self.config
        smoothing = (c.policy_noise * eps["policy"]).clamp(-c.noise_clip, c.noise_clip)
        next_action = (actor(batch.next_obs) + smoothing).clamp(-1, 1)
        return batch.reward + c.gamma * batch.mask * critic(batch.next_obs, next_action).amin(0)

    def critic_loss(self, state, batch, target):
        values = self.bind(state, "critic")(batch.obs, batch.action)
        loss = twin_mse(values, target)
        return loss, {"critic/loss": loss, "critic/q": values.mean()}

    def actor_loss(self, state, batch):
        actor, critic = self.bind(state, "actor", "critic")
        action = actor(batch.obs)
        q = critic(batch.obs, action, member=0)
        weight = self.config.alpha / q.abs().mean().detach().clamp(min=1e-6)  # Eq. 5
        cloning = mse(action, batch.action)
        loss = cloning - weight * q.mean()  # Eq. 3
        return loss, {"actor/loss": loss, "actor/cloning": cloning}

    def update(self, state, batches, noise):
        for batch, eps in zip(batches, noise):
            batch = self.normalize(state, batch)
            state, metrics = self.descend(state, "critic", self.critic_loss, batch, self.backup(state, batch, eps))
        state, more = self.descend(state, "actor", self.actor_loss, batch)
        return self.polyak(state), metrics | more

    def act(self, state, obs: Tensor, noise: Tensor | None = None) -> Tensor:
        """The deterministic action, in the environment's units."""
        return self.env_action(state, self.bind(state, "actor")(self.normalize_obs(state, obs)))
