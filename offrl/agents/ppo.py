"""Proximal policy optimisation: several steps on one rollout, cut off where they leave the policy that acted (Schulman et al., 2017,
arXiv 1707.06347).

Eq. 7 is the actor's loss, Eq. 9 the entropy bonus, Eq. 11 and 12 the advantages, which are generalised advantage estimates (Schulman et
al., 2016, arXiv 1506.02438). With one step to a rollout, lambda = 1 and nothing normalised it is REINFORCE (Williams, 1992), with the
value for a baseline or without one: the preset `reinforce`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from offrl.agents.base import Agent
from offrl.core.config import Log, Range
from offrl.core.rng import Permutation
from offrl.core.tree import tree_map
from offrl.losses import discounted_sum, gaussian_entropy, gaussian_log_prob
from offrl.nn import normalize
from offrl.nn.actor import Categorical, UnboundedGaussian
from offrl.nn.critic import V

FAR = 10.0  # standard deviations beyond which an observation counts as this far


@dataclass(frozen=True)
class Config:
    epochs: Annotated[int, Range(1, 100)] = 10
    """Passes over a rollout."""
    minibatches: Annotated[int, Range(1, 1000)] = 32
    """Parts of a rollout, each of which is a gradient step."""
    clip: Annotated[float, Range(0, 1)] = 0.2
    """Distance from 1 beyond which a better ratio of probabilities earns nothing."""
    gamma: Annotated[float, Range(0, 1)] = 0.99
    """Discount."""
    lam: Annotated[float, Range(0, 1)] = 0.95
    """Lambda of the advantages: 0 trusts the critic, 1 the returns."""
    baseline: bool = True
    """Subtract the value from the return; without, actions are weighed by returns, in which the critic only stands for what was cut off."""
    normalize_advantage: bool = True
    """Scale a rollout's advantages to mean 0 and standard deviation 1."""
    entropy: Annotated[float, Range(0, 1)] = 0.0
    """Weight of the policy's entropy."""
    target_kl: Annotated[float | None, Range(0, 10)] = None
    """Divergence from the policy that acted at which the steps on a rollout end; none: all are taken."""
    value_clip: Annotated[float | None, Range(0, 1000)] = None
    """Change of a value beyond which a smaller error earns nothing, in the critic's units; none: no such bound."""
    normalize_obs: bool = True
    """Standardise observations by the moments of all that were seen."""
    normalize_return: bool = True
    """Let the critic predict returns standardised by the moments of all its targets."""
    max_grad_norm: Annotated[float | None, Log(1e-3, 1e3)] = 0.5
    """Norm to which a network's gradient is cut; none: it is not."""
    actor_lr: Annotated[float, Log(1e-5, 1e-2)] = 3e-4
    """Learning rate of the actor."""
    critic_lr: Annotated[float, Log(1e-5, 1e-2)] = 3e-4
    """Learning rate of the critic."""
    lr_steps: Annotated[float | None, Range(1)] = None
    """Gradient steps over which both rates fall to 0 along a line; none: they stay."""
    adam_eps: Annotated[float, Log(1e-10, 1e-2)] = 1e-5
    """Epsilon of Adam."""
    log_std: Annotated[float, Range(-5, 2)] = 0.0
    """First logarithm of the standard deviation of continuous actions, whose bounds are -1 and 1."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers of actor and critic."""


class Rows(NamedTuple):
    """What the losses are made of: the rows of a rollout (T * E, ...), or of one of its parts."""

    obs: Tensor
    action: Tensor
    log_prob: Tensor  # of the policy that acted
    advantage: Tensor
    target: Tensor  # in the critic's units, as is `value`
    value: Tensor  # of the critic before the first step


class PPO(Agent):
    """PPO with a clipped objective, for continuous and discrete actions.

    Its batch is one rollout of the policy in the state: Transitions (T, E, ...) with `truncated`, as `OnPolicy` makes them. Where the
    task ended nothing is bootstrapped; where a time limit or the rollout's end cut it, the value of the true next observation is.
    One update takes epochs * minibatches gradient steps. Compiled, it is one graph of all of them, which takes minutes where they are
    many; several seeds stack.

    Deviations from the paper: 1. actor and critic are two networks, each with its own Adam and its own bound on the gradient's norm, so
    that Eq. 9's c1 has no effect and is left out; 2. the advantages are scaled over the rollout (as released code does over a
    minibatch), 3. observations are standardised and then bounded by +-10, 4. the critic's targets are standardised, all of which the
    config can switch off; 5. an update ends early at `target_kl`, if asked to; 6. the actor's last layer starts at a hundredth of the
    usual size (found to matter by Andrychowicz et al., 2021, arXiv 2006.05990), and initial weights are PyTorch's, not orthogonal;
    7. as everywhere, the discount does not weigh the states themselves; 8. the standard deviation lies within exp(-20) and exp(2).
    """

    Config = Config
    discrete = True
    on_policy = True

    @property
    def period(self):
        return self.config.epochs * self.config.minibatches

    def networks(self):
        obs, action, c = self.spec.obs.size, self.spec.action.size, self.config
        kind = partial(UnboundedGaussian, log_std=c.log_std) if self.continuous else Categorical
        return {
            "actor": kind(obs, action, c.hidden, activation=torch.tanh, head=0.01),
            "critic": V(obs, c.hidden, activation=torch.tanh),
        }

    def learning_rate(self, group, count):
        rate, total = super().learning_rate(group, count), self.config.lr_steps
        return rate if total is None else rate * (1 - (count - 1) / total).clamp(min=0)

    def init(self, seed):
        return super().init(seed) | {"running": {"obs": normalize.moments((self.spec.obs.size,)), "return": normalize.moments()}}

    def noise(self, batch_size):
        return [{"order": Permutation(batch_size)} for _ in range(self.config.epochs)]

    def normalize_obs(self, state, obs):
        return super().normalize_obs(state, obs).clamp(-FAR, FAR)

    def scale(self, state) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the returns: the zero and the unit of the critic."""
        moments = state["running"]["return"]
        return moments["mean"], moments["var"].sqrt().clamp(min=1e-6)

    def density(self, state, obs, action) -> tuple[Tensor, Tensor]:
        """The policy's log density at `action`, in [-1, 1] where within bounds, and its entropy, (...,) both."""
        output = self.bind(state, "actor")(obs)
        if self.continuous:
            mean, log_std = output
            return gaussian_log_prob(action, mean, log_std), gaussian_entropy(log_std).expand(action.shape[:-1])
        log_probs = output.log_softmax(-1)
        return log_probs.gather(-1, action[..., None]).squeeze(-1), -(log_probs.exp() * log_probs).sum(-1)

    def advantages(self, batch, value, following) -> Tensor:
        """(T, E) from values (T, E) of the observations and of the next ones, in units of returns."""
        c = self.config
        error = batch.reward + c.gamma * batch.mask * following - value  # Eq. 12
        return discounted_sum(error, c.gamma * c.lam * batch.mask * (1 - batch.truncated))  # Eq. 11

    def judge(self, state, batch):
        """The state with the moments of the new returns, and the Rows of a normalised rollout."""
        if batch.truncated is None or batch.reward.ndim != 2:
            raise ValueError("PPO learns from rollouts (T, E, ...) with `truncated` and one reward, as OnPolicy makes them")
        c, critic, (mean, std) = self.config, self.bind(state, "critic"), self.scale(state)
        value = mean + std * critic(batch.obs)
        advantage = self.advantages(batch, value, mean + std * critic(batch.next_obs))
        target = advantage + value
        if not c.baseline:
            advantage = target
        if c.normalize_advantage:
            advantage = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
        if c.normalize_return:
            state = self.absorb(state, "return", target)
        mean, std = self.scale(state)
        log_prob, _ = self.density(state, batch.obs, batch.action)
        rows = Rows(batch.obs, batch.action, log_prob, advantage, (target - mean) / std, (value - mean) / std)
        return state, Rows(*(column.flatten(0, 1) for column in rows))

    def absorb(self, state, name, values):
        running = state["running"]
        return state | {"running": running | {name: normalize.absorb(running[name], values.flatten(0, 1))}}

    def observe(self, state, obs):
        """The state whose normaliser has seen `obs` (T, E, obs) too."""
        state = self.absorb(state, "obs", obs)
        moments = state["running"]["obs"]
        scale = {"obs_mean": moments["mean"], "obs_std": moments["var"].sqrt() + normalize.OBS_EPS}
        return state | {"normalizer": state["normalizer"] | scale}

    def actor_loss(self, state, rows):
        c, (log_prob, entropy) = self.config, self.density(state, rows.obs, rows.action)
        change = log_prob - rows.log_prob
        ratio = change.exp()
        gain = torch.minimum(ratio * rows.advantage, ratio.clamp(1 - c.clip, 1 + c.clip) * rows.advantage)  # Eq. 7
        loss = -gain.mean() - c.entropy * entropy.mean()  # Eq. 9
        clipped = ((ratio - 1).abs() > c.clip).to(ratio.dtype).mean()
        kl = (ratio - 1 - change).mean()  # its mean is the divergence, and it is never negative
        return loss, {"actor/loss": loss, "actor/entropy": entropy.mean(), "actor/kl": kl, "actor/clipped": clipped}

    def critic_loss(self, state, rows):
        c, value = self.config, self.bind(state, "critic")(rows.obs)
        error = (value - rows.target).square()
        if c.value_clip is not None:
            near = rows.value + (value - rows.value).clamp(-c.value_clip, c.value_clip)
            error = torch.maximum(error, (near - rows.target).square())
        return error.mean(), {"critic/loss": error.mean()}

    def step(self, state, rows):
        state, metrics = self.descend(state, "critic", self.critic_loss, rows)
        state, more = self.descend(state, "actor", self.actor_loss, rows)
        return state, metrics | more

    def update(self, state, batches, noise):
        c, (batch,) = self.config, batches
        state, rows = self.judge(state, self.normalize(state, batch))
        explained = 1 - (rows.target - rows.value).var(correction=0) / rows.target.var(correction=0).clamp(min=1e-8)
        within = torch.ones_like(explained, dtype=torch.bool)
        for eps in noise:
            parts = (column[eps["order"]].tensor_split(c.minibatches) for column in rows)
            for part in map(Rows, *parts):
                after, metrics = self.step(state, part)
                if c.target_kl is not None:
                    within = within & (metrics["actor/kl"] <= c.target_kl)
                    after = tree_map(partial(torch.where, within), after, state)
                state = after
        if c.normalize_obs:
            state = self.observe(state, batch.obs)
        return state, metrics | {"critic/explained": explained}

    def act(self, state, obs: Tensor, noise: Tensor | None = None) -> Tensor:
        """The mean action within the bounds, the likeliest of discrete ones; or with noise a sample, in the environment's units.

        noise: Normal (..., action), or Uniform (..., actions) where discrete. A sample of a Gaussian may lie beyond the bounds: it is what
        the policy's density is of, and an environment is given the nearest point within.
        """
        output = self.bind(state, "actor")(self.normalize_obs(state, obs))
        if not self.continuous:  # Gumbel's trick: the argmax of logits plus Gumbel noise is a sample
            return (output if noise is None else output - torch.log(-torch.log(noise))).argmax(-1)
        mean, log_std = output
        if noise is None:
            return self.spec.action.clip(self.env_action(state, mean))
        return self.env_action(state, mean + log_std.exp() * noise)
