"""TD3+BC (Fujimoto & Gu, NeurIPS 2021, arXiv 2106.06860; settings and order of CORL) once more, for comparison with the agent.

Ordinary modules, torch.optim.Adam, `.backward()`, and every random number handed in. Actions lie in [-1, 1]. One `step` is one
gradient step of the critics; every `policy_freq`-th one also steps the actor, on the same batch after the critics, and then all targets.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass

import torch
from plain_nets import Tree, column, mlp, polyak_, q, read, write_
from torch import Tensor, nn
from torch.optim import Adam


@dataclass(frozen=True)
class Config:
    alpha: float = 2.5
    gamma: float = 0.99
    tau: float = 0.005
    policy_noise: float = 0.2
    noise_clip: float = 0.5
    policy_freq: int = 2
    actor_lr: float = 3e-4
    critic_lr: float = 3e-4
    actor_hidden: tuple[int, ...] = (256, 256)
    critic_hidden: tuple[int, ...] = (256, 256)


class Trainer:
    def __init__(self, obs_dim: int, action_dim: int, config: Config | None = None, dtype: torch.dtype = torch.float64):
        config = Config() if config is None else config
        self.config, self.dtype, self.steps, self.actor_steps = config, dtype, 0, 0
        self.actor = mlp([obs_dim, *config.actor_hidden, action_dim], dtype, nn.Tanh())
        self.critics = nn.ModuleList(mlp([obs_dim + action_dim, *config.critic_hidden, 1], dtype) for _ in range(2))
        self.target_actor, self.target_critics = deepcopy(self.actor), deepcopy(self.critics)
        self.actor_opt = Adam(self.actor.parameters(), lr=config.actor_lr)
        self.critic_opt = Adam(self.critics.parameters(), lr=config.critic_lr)

    def parameters(self) -> Tree:
        """Copies; the critics' input is [obs, action]."""
        return {"actor": read(self.actor), "critic": {str(j): read(net) for j, net in enumerate(self.critics)}}

    def targets(self) -> Tree:
        return {"actor": read(self.target_actor), "critic": {str(j): read(net) for j, net in enumerate(self.target_critics)}}

    def load_(self, parameters: Tree, targets: Tree | None = None) -> None:
        """Transplant the weights; without `targets` the targets become copies of what they follow. Optimisers keep their moments."""
        targets = parameters if targets is None else targets
        write_(self.actor, parameters["actor"])
        write_(self.target_actor, targets["actor"])
        for j in range(2):
            write_(self.critics[j], parameters["critic"][str(j)])
            write_(self.target_critics[j], targets["critic"][str(j)])


def critic_step(t: Trainer, batch, eps: Tensor) -> Tensor:
    c = t.config
    with torch.no_grad():
        noise = (eps * c.policy_noise).clamp(-c.noise_clip, c.noise_clip)
        next_action = (t.target_actor(batch.next_obs) + noise).clamp(-1, 1)
        next_q = torch.min(*[q(net, batch.next_obs, next_action) for net in t.target_critics])
        y = column(batch.reward, t.dtype) + c.gamma * column(batch.mask, t.dtype) * next_q
    q1, q2 = (q(net, batch.obs, batch.action) for net in t.critics)
    loss = ((q1 - y) ** 2).mean() + ((q2 - y) ** 2).mean()
    t.critic_opt.zero_grad()
    loss.backward()
    t.critic_opt.step()
    return loss.detach()


def actor_loss(t: Trainer, batch) -> Tensor:
    """-lam mean Q1(s, pi(s)) + mean over rows and dimensions of (pi(s) - a)^2, lam = alpha / mean |Q1| without a gradient."""
    pi = t.actor(batch.obs)
    q_pi = q(t.critics[0], batch.obs, pi)
    lam = t.config.alpha / q_pi.abs().mean().detach()
    return -lam * q_pi.mean() + ((pi - batch.action) ** 2).mean()


def step(t: Trainer, batch, noise: dict[str, Tensor]) -> dict[str, Tensor]:
    """One gradient step on rows with obs (B, n), action (B, d), reward (B,), next_obs (B, n) and mask (B,), 0 where the task ended.

    noise["policy"] (B, d), standard normal, smooths the target action. Returns the losses.
    """
    out = {"critic_loss": critic_step(t, batch, noise["policy"])}
    t.steps += 1
    if t.steps % t.config.policy_freq == 0:
        loss = actor_loss(t, batch)
        t.actor_opt.zero_grad()
        loss.backward()
        t.actor_opt.step()
        t.actor_steps += 1
        polyak_(t.target_critics, t.critics, t.config.tau)
        polyak_(t.target_actor, t.actor, t.config.tau)
        out["actor_loss"] = loss.detach()
    return out
