"""IQL (Kostrikov et al., ICLR 2022, arXiv 2110.06169; settings and order of CORL) once more, for comparison with the agent.

Ordinary modules, torch.optim.Adam, `.backward()`; the update draws no random numbers. The order inside one step is CORL's:
  1. V(s') of the critics' bootstrap is computed with V as it stands;
  2. advantage = min target Q(s, a) - V(s), with V as it stands; V steps on the expectile loss of that advantage;
  3. both critics step on r + gamma mask V(s') from 1 (the mean of their two squared errors), and their targets follow at once;
  4. the actor steps on minus the log-likelihood, weighted by min(exp(beta advantage), 100) of 2; its rate decays by a cosine.
The authors' own JAX code differs: there V steps first, and the actor (second) and the critics (third) read the V that has just stepped.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
from plain_nets import Tree, column, mlp, polyak_, q, read, write_
from torch import Tensor, nn
from torch.distributions import Normal
from torch.optim import Adam
from torch.optim.lr_scheduler import CosineAnnealingLR


@dataclass(frozen=True)
class Config:
    expectile: float = 0.7
    beta: float = 3.0
    gamma: float = 0.99
    tau: float = 0.005
    actor_lr: float = 3e-4
    critic_lr: float = 3e-4
    value_lr: float = 3e-4
    max_steps: int = 1_000_000  # gradient steps over which the actor's rate falls to 0
    max_weight: float = 100.0
    log_std_min: float = -20.0
    log_std_max: float = 2.0
    hidden: tuple[int, ...] = (256, 256)


class Actor(nn.Module):
    """Normal(tanh(net(s)), exp(log_std)); the tanh bounds the mean only, and log_std (d,) knows no state."""

    def __init__(self, obs_dim: int, action_dim: int, config: Config, dtype: torch.dtype):
        super().__init__()
        self.net = mlp([obs_dim, *config.hidden, action_dim], dtype, nn.Tanh())
        self.log_std = nn.Parameter(torch.zeros(action_dim, dtype=dtype))
        self.low, self.high = config.log_std_min, config.log_std_max

    def forward(self, obs: Tensor) -> Normal:
        return Normal(self.net(obs), self.log_std.clamp(self.low, self.high).exp())


class Trainer:
    def __init__(self, obs_dim: int, action_dim: int, config: Config | None = None, dtype: torch.dtype = torch.float64):
        config = Config() if config is None else config
        self.config, self.dtype, self.steps = config, dtype, 0
        self.actor = Actor(obs_dim, action_dim, config, dtype)
        self.critics = nn.ModuleList(mlp([obs_dim + action_dim, *config.hidden, 1], dtype) for _ in range(2))
        self.value = mlp([obs_dim, *config.hidden, 1], dtype)
        self.target_critics = deepcopy(self.critics)
        self.actor_opt = Adam(self.actor.parameters(), lr=config.actor_lr)
        self.critic_opt = Adam(self.critics.parameters(), lr=config.critic_lr)
        self.value_opt = Adam(self.value.parameters(), lr=config.value_lr)
        self.actor_schedule = CosineAnnealingLR(self.actor_opt, config.max_steps)

    def parameters(self) -> Tree:
        """Copies; "actor" has its layers and "log_std" (d,); the critics' input is [obs, action]."""
        actor = read(self.actor) | {"log_std": self.actor.log_std.detach().clone()}
        return {"actor": actor, "critic": {str(j): read(net) for j, net in enumerate(self.critics)}, "value": read(self.value)}

    def targets(self) -> Tree:
        return {"critic": {str(j): read(net) for j, net in enumerate(self.target_critics)}}

    def load_(self, parameters: Tree, targets: Tree | None = None) -> None:
        """Transplant the weights; without `targets` the targets become copies of what they follow. Optimisers keep their moments."""
        targets = parameters if targets is None else targets
        actor = dict(parameters["actor"])
        with torch.no_grad():
            self.actor.log_std.copy_(actor.pop("log_std"))
        write_(self.actor, actor)
        write_(self.value, parameters["value"])
        for j in range(2):
            write_(self.critics[j], parameters["critic"][str(j)])
            write_(self.target_critics[j], targets["critic"][str(j)])


def value_step(t: Trainer, batch) -> tuple[Tensor, Tensor]:
    """Expectile regression on the lower target critic. Returns (loss, advantage (B, 1) before the step)."""
    with torch.no_grad():
        target_q = torch.min(*[q(net, batch.obs, batch.action) for net in t.target_critics])
    advantage = target_q - t.value(batch.obs)
    below = (advantage < 0).to(t.dtype)
    loss = ((t.config.expectile - below).abs() * advantage**2).mean()
    t.value_opt.zero_grad()
    loss.backward()
    t.value_opt.step()
    return loss.detach(), advantage.detach()


def critic_step(t: Trainer, batch, next_v: Tensor) -> Tensor:
    y = column(batch.reward, t.dtype) + t.config.gamma * column(batch.mask, t.dtype) * next_v
    q1, q2 = (q(net, batch.obs, batch.action) for net in t.critics)
    loss = (((q1 - y) ** 2).mean() + ((q2 - y) ** 2).mean()) / 2
    t.critic_opt.zero_grad()
    loss.backward()
    t.critic_opt.step()
    polyak_(t.target_critics, t.critics, t.config.tau)
    return loss.detach()


def actor_loss(t: Trainer, batch, advantage: Tensor) -> Tensor:
    weight = (t.config.beta * advantage).exp().clamp(max=t.config.max_weight)
    log_likelihood = t.actor(batch.obs).log_prob(batch.action).sum(dim=1, keepdim=True)
    return (weight * -log_likelihood).mean()


def step(t: Trainer, batch, noise: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """One gradient step on rows with obs (B, n), action (B, d), reward (B,), next_obs (B, n) and mask (B,), 0 where the task ended.

    `noise` is ignored. Returns the losses.
    """
    with torch.no_grad():
        next_v = t.value(batch.next_obs)
    value_loss, advantage = value_step(t, batch)
    critic_loss = critic_step(t, batch, next_v)
    loss = actor_loss(t, batch, advantage)
    t.actor_opt.zero_grad()
    loss.backward()
    t.actor_opt.step()
    t.actor_schedule.step()
    t.steps += 1
    return {"value_loss": value_loss, "critic_loss": critic_loss, "actor_loss": loss.detach()}
