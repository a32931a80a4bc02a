"""A2PR (Liu et al., ICML 2024, arXiv 2405.19909) once more, as plainly as it can be said, for comparison with the agent.

Ordinary modules, one torch.optim.Adam per group, `.backward()`, and every random number handed in. Actions lie in [-1, 1].
One `step` is one gradient step of the critics, V and the VAE; every `policy_freq`-th one also steps the actor and then the targets.

Every loss zeroes its own optimiser's gradients first, so what the actor's loss leaves in the critics and the VAE is never applied.
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
    mask: float = 0.5  # weight of the behaviour-cloning term
    vae_weight: float = 1.0
    gamma: float = 0.99
    tau: float = 0.005
    policy_noise: float = 0.2
    noise_clip: float = 0.5
    policy_freq: int = 2
    actor_lr: float = 3e-4
    critic_lr: float = 3e-4
    value_lr: float = 3e-4
    vae_lr: float = 1e-3
    actor_hidden: tuple[int, ...] = (256, 256, 256)
    critic_hidden: tuple[int, ...] = (256, 256, 256, 256)  # V's too
    vae_hidden: tuple[int, ...] = (750, 750)
    detach_target: bool = False  # False: the released code, the gradient also flows pi -> encoder -> decoder


class Vae(nn.Module):
    """E(s, a) -> (mean, std) of 2d latents; R(s, z) -> action."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: tuple[int, ...], dtype: torch.dtype):
        super().__init__()
        latent = 2 * action_dim
        self.encoder = mlp([obs_dim + action_dim, *hidden], dtype, nn.ReLU())
        self.mean = nn.Linear(hidden[-1], latent, dtype=dtype)
        self.log_std = nn.Linear(hidden[-1], latent, dtype=dtype)
        self.decoder = mlp([obs_dim + latent, *hidden, action_dim], dtype, nn.Tanh())

    def forward(self, obs: Tensor, action: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The reconstruction (B, d), and the mean and std (B, 2d) of its latents."""
        hidden = self.encoder(torch.cat([obs, action], dim=1))
        mean, std = self.mean(hidden), self.log_std(hidden).clamp(-4, 15).exp()
        return self.decoder(torch.cat([obs, mean + std * eps], dim=1)), mean, std


def choose(q_bar: Tensor, q_data: Tensor, v: Tensor, abar: Tensor, action: Tensor, mask: float) -> tuple[Tensor, Tensor]:
    """Each row's target action (B, d) and weight (B, 1); q_bar, q_data and v are (B, 1)."""
    a_pi, a_data = q_bar - v, q_data - v
    target = torch.where(a_pi >= a_data, abar, action)  # a tie goes to the VAE's action
    weight = mask * ((a_pi >= 0) | (a_data > 0)).to(v.dtype)
    return target, weight


class Trainer:
    def __init__(self, obs_dim: int, action_dim: int, config: Config | None = None, dtype: torch.dtype = torch.float64):
        config = Config() if config is None else config
        self.config, self.dtype, self.steps, self.actor_steps = config, dtype, 0, 0
        self.actor = mlp([obs_dim, *config.actor_hidden, action_dim], dtype, nn.Tanh())
        self.critics = nn.ModuleList(mlp([obs_dim + action_dim, *config.critic_hidden, 1], dtype) for _ in range(2))
        self.value = mlp([obs_dim, *config.critic_hidden, 1], dtype)
        self.vae = Vae(obs_dim, action_dim, config.vae_hidden, dtype)
        self.target_actor, self.target_critics = deepcopy(self.actor), deepcopy(self.critics)
        self.actor_opt = Adam(self.actor.parameters(), lr=config.actor_lr)
        self.critic_opt = Adam(self.critics.parameters(), lr=config.critic_lr)
        self.value_opt = Adam(self.value.parameters(), lr=config.value_lr)
        self.vae_opt = Adam(self.vae.parameters(), lr=config.vae_lr)

    def parameters(self) -> Tree:
        """Copies. "vae" has its layers in the order encoder, mean, log_std, decoder; inputs are [obs, action] and [obs, latent]."""
        critics = {str(j): read(net) for j, net in enumerate(self.critics)}
        return {"actor": read(self.actor), "critic": critics, "value": read(self.value), "vae": read(self.vae)}

    def targets(self) -> Tree:
        return {"actor": read(self.target_actor), "critic": {str(j): read(net) for j, net in enumerate(self.target_critics)}}

    def load_(self, parameters: Tree, targets: Tree | None = None) -> None:
        """Transplant the weights; without `targets` the targets become copies of what they follow. Optimisers keep their moments."""
        write_(self.actor, parameters["actor"])
        write_(self.value, parameters["value"])
        write_(self.vae, parameters["vae"])
        for j, critic in enumerate(self.critics):
            write_(critic, parameters["critic"][str(j)])
        targets = parameters if targets is None else targets
        write_(self.target_actor, targets["actor"])
        for j, critic in enumerate(self.target_critics):
            write_(critic, targets["critic"][str(j)])


def critic_step(t: Trainer, batch, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """1. Both critics towards the pessimistic bootstrap of the target networks. Returns (loss, y, a')."""
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
    return loss.detach(), y, next_action


def value_step(t: Trainer, batch, y: Tensor, next_action: Tensor) -> tuple[Tensor, Tensor]:
    """2. V towards the lower of two bootstraps: y, and one from the online critics just stepped. Returns (loss, V(s) before the step)."""
    with torch.no_grad():
        next_q = torch.min(*[q(net, batch.next_obs, next_action) for net in t.critics])
        y_online = column(batch.reward, t.dtype) + t.config.gamma * column(batch.mask, t.dtype) * next_q
    v = t.value(batch.obs)
    loss = ((v - torch.min(y, y_online)) ** 2).mean()
    t.value_opt.zero_grad()
    loss.backward()
    t.value_opt.step()
    return loss.detach(), v.detach()


def vae_step(t: Trainer, batch, v: Tensor, eps: Tensor) -> Tensor:
    """3. The VAE reconstructs only the actions that are better than V (strictly); its KL term sees all rows."""
    with torch.no_grad():
        better = (q(t.critics[0], batch.obs, batch.action) > v).to(t.dtype)
    ahat, mean, std = t.vae(batch.obs, batch.action, eps)
    reconstruction = (t.config.vae_weight * better * (ahat - batch.action) ** 2).mean()
    kl = -0.5 * (1 + (std**2).log() - mean**2 - std**2).mean()
    loss = reconstruction + 0.5 * kl
    t.vae_opt.zero_grad()
    loss.backward()
    t.vae_opt.step()
    return loss.detach()


def actor_loss(t: Trainer, batch, v: Tensor, eps: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """4. Ascend the normalised Q1 and stay near the better of the data's action and the VAE's reconstruction of the actor's own."""
    pi = t.actor(batch.obs)
    abar, _, _ = t.vae(batch.obs, pi, eps)
    if t.config.detach_target:
        abar = abar.detach()
    q_bar = q(t.critics[0], batch.obs, abar)
    q_data = q(t.critics[0], batch.obs, batch.action)
    target, weight = choose(q_bar, q_data, v, abar, batch.action, t.config.mask)
    q_pi = q(t.critics[0], batch.obs, pi)
    lam = t.config.alpha / q_pi.abs().mean().detach()
    loss = -lam * q_pi.mean() + (weight * (pi - target) ** 2).mean()
    return loss, {"target": target.detach(), "weight": weight, "lam": lam}


def step(t: Trainer, batch, noise: dict[str, Tensor]) -> dict[str, Tensor]:
    """One gradient step on rows with obs (B, n), action (B, d), reward (B,), next_obs (B, n) and mask (B,), 0 where the task ended.

    noise, all standard normal: "policy" (B, d) smooths the target action, "vae" (B, 2d) draws the latents of the VAE's loss and "target"
    (B, 2d) those of the actor's own action (read only when the actor steps). Returns the losses and what the actor step chose.
    """
    critic_loss, y, next_action = critic_step(t, batch, noise["policy"])
    value_loss, v = value_step(t, batch, y, next_action)
    vae_loss = vae_step(t, batch, v, noise["vae"])
    out = {"critic_loss": critic_loss, "value_loss": value_loss, "vae_loss": vae_loss}
    t.steps += 1
    if t.steps % t.config.policy_freq == 0:
        loss, chosen = actor_loss(t, batch, v, noise["target"])
        t.actor_opt.zero_grad()
        loss.backward()
        t.actor_opt.step()
        t.actor_steps += 1
        polyak_(t.target_critics, t.critics, t.config.tau)
        polyak_(t.target_actor, t.actor, t.config.tau)
        out |= {"actor_loss": loss.detach()} | chosen
    return out
