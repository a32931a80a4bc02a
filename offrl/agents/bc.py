"""Behaviour cloning: regress the data's actions (Pomerleau, 1989).

Continuous actions: the mean squared error of a deterministic policy, whose optimum is the conditional mean of the
data's actions. Discrete actions: cross-entropy, whose optimum is their conditional distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from offrl.agents.base import Agent
from offrl.core.config import Log
from offrl.losses import mse
from offrl.nn.actor import Categorical, Deterministic


@dataclass(frozen=True)
class Config:
    actor_lr: Annotated[float, Log(1e-5, 1e-2)] = 3e-4
    """Learning rate of the actor."""
    hidden: tuple[int, ...] = (256, 256)
    """Widths of the actor's hidden layers."""


class BC(Agent):
    """Behaviour cloning, for continuous and discrete actions."""

    Config = Config
    discrete = True

    def networks(self):
        kind = Deterministic if self.continuous else Categorical
        return {"actor": kind(self.spec.obs.size, self.spec.action.size, self.config.hidden)}

    def actor_loss(self, state, batch):
        output = self.bind(state, "actor")(batch.obs)
        loss = mse(output, batch.action) if self.continuous else F.cross_entropy(output, batch.action)
        return loss, {"actor/loss": loss}

    def update(self, state, batches, noise):
        (batch,) = batches
        return self.descend(state, "actor", self.actor_loss, self.normalize(state, batch))

    def act(self, state, obs: Tensor, noise: Tensor | None = None) -> Tensor:
        """The policy's action; the likeliest of discrete ones, or with Uniform noise (..., actions) a sample of them."""
        output = self.bind(state, "actor")(self.normalize_obs(state, obs))
        if self.continuous:
            return self.env_action(state, output)
        # Gumbel's trick: the argmax of logits plus Gumbel noise is a sample
        return (output if noise is None else output - torch.log(-torch.log(noise))).argmax(-1)
