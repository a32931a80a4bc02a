"""Policies over normalised observations; continuous actions lie in [-1, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

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


class Categorical(nn.Module):
    """obs (..., obs) -> logits (..., actions)."""

    def __init__(self, obs: int, actions: int, hidden: Sequence[int]):
        super().__init__()
        self.mlp = MLP((obs, *hidden, actions))

    def forward(self, obs: Tensor) -> Tensor:
        return self.mlp(obs)
