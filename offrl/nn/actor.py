"""Policies over normalised observations; continuous actions lie in [-1, 1]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offrl.losses import tanh_log_slope
from offrl.nn.layers import MLP

LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0


class Deterministic(nn.Module):
    """obs (..., obs) -> action (..., action), squashed by tanh."""

    def __init__(self, obs: int, action: int, hidden: Sequence[int]):
        super().__init__()
        self.mlp = MLP((obs, *hidden, action))

    def forward(self, obs: Tensor) -> Tensor:
        return torch.tanh(self.mlp(obs))


class Gaussian(nn.Module):
    """obs (..., obs) -> mean (..., action), squashed by tanh, and log standard deviation (action,), the same in every state."""

    def __init__(self, obs: int, action: int, hidden: Sequence[int]):
        super().__init__()
        self.mlp = MLP((obs, *hidden, action))
        self.log_std = nn.Parameter(torch.zeros(action))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.mlp(obs)), self.log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)


class UnboundedGaussian(nn.Module):
    """As Gaussian, with a mean that nothing bounds (Schulman et al., 2017, arXiv 1707.06347, section 6.1). `mlp` are MLP's options."""

    def __init__(self, obs: int, action: int, hidden: Sequence[int], log_std: float = 0.0, **mlp: Any):
        super().__init__()
        self.mlp = MLP((obs, *hidden, action), **mlp)
        self.log_std = nn.Parameter(torch.full((action,), log_std))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        return self.mlp(obs), self.log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)


class SquashedGaussian(nn.Module):
    """tanh of a Gaussian whose mean and standard deviation depend on the state (Haarnoja et al., 2018, arXiv 1812.05905, appendix C).

    forward(obs) gives the squashed mean: obs (..., obs) -> (..., action). forward(obs, noise) gives a sample and its log density
    in (-1, 1)^action, (..., action) and (...,); noise (..., action) is standard normal and may have more leading axes than obs.
    """

    def __init__(self, obs: int, action: int, hidden: Sequence[int]):
        super().__init__()
        self.mlp = MLP((obs, *hidden, 2 * action))

    def forward(self, obs: Tensor, noise: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        mean, log_std = self.mlp(obs).chunk(2, -1)
        if noise is None:
            return torch.tanh(mean)
        log_std = log_std.clamp(LOG_STD_MIN, LOG_STD_MAX)
        x = mean + log_std.exp() * noise
        log_prob = -0.5 * (noise.square() + math.log(2 * math.pi)) - log_std - tanh_log_slope(x)  # appendix C
        return torch.tanh(x), log_prob.sum(-1)


class Temperature(nn.Module):
    """log of the weight of a policy's entropy, 0-d."""

    def __init__(self):
        super().__init__()
        self.log_alpha = nn.Parameter(torch.zeros(()))

    def forward(self) -> Tensor:
        return self.log_alpha


class Categorical(nn.Module):
    """obs (..., obs) -> logits (..., actions). `mlp` are MLP's options."""

    def __init__(self, obs: int, actions: int, hidden: Sequence[int], **mlp: Any):
        super().__init__()
        self.mlp = MLP((obs, *hidden, actions), **mlp)

    def forward(self, obs: Tensor) -> Tensor:
        return self.mlp(obs)
