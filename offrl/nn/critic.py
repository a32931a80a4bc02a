"""Value functions. Values have no trailing axis of one: (B,) for one member, (members, B) for all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offrl.nn.layers import MLP


class Q(nn.Module):
    """Independent action values: obs (B, obs), action (B, action) -> (members, B), or (B,) of one `member`."""

    def __init__(self, obs: int, action: int, hidden: Sequence[int], members: int = 2, layer_norm: bool = False):
        super().__init__()
        self.members = nn.ModuleList(MLP((obs + action, *hidden, 1), layer_norm) for _ in range(members))

    def forward(self, obs: Tensor, action: Tensor, member: int | None = None) -> Tensor:
        x = torch.cat([obs, action], -1)
        if member is not None:
            return self.members[member](x).squeeze(-1)
        return torch.stack([q(x).squeeze(-1) for q in self.members])


class QEnsemble(nn.Module):
    """As Q, with the members as an axis of every weight: one batched product a layer, faster where they are many."""

    def __init__(self, obs: int, action: int, hidden: Sequence[int], members: int, layer_norm: bool = False):
        super().__init__()
        sizes = (obs + action, *hidden)
        shapes = [(members, a, b) for a, b in zip(sizes, hidden)] + [(members, 1, sizes[-1])]
        bounds = [1 / math.sqrt(n) for n in sizes]  # of nn.Linear
        self.weights = nn.ParameterList(torch.empty(shape).uniform_(-k, k) for shape, k in zip(shapes, bounds))
        self.biases = nn.ParameterList(torch.empty(members, 1, b).uniform_(-k, k) for b, k in zip((*hidden, 1), bounds))
        self.scales = nn.ParameterList(torch.ones(members, 1, b) for b in hidden if layer_norm)
        self.shifts = nn.ParameterList(torch.zeros(members, 1, b) for b in hidden if layer_norm)

    def forward(self, obs: Tensor, action: Tensor, member: int | None = None) -> Tensor:
        groups = (self.weights, self.biases, self.scales, self.shifts)
        (*weights, head), (*biases, level), scales, shifts = ([p if member is None else p[member, None] for p in g] for g in groups)
        x = torch.cat([obs, action], -1)
        lead, x = x.shape[:-1], x.flatten(0, -2).expand(len(head), -1, -1)
        for i, (weight, bias) in enumerate(zip(weights, biases)):
            x = torch.baddbmm(bias, x, weight)
            x = F.relu(F.layer_norm(x, x.shape[-1:]) * scales[i] + shifts[i] if scales else x)
        with torch.autocast(x.device.type, enabled=False):
            values = (x.to(head.dtype) * head).sum(-1) + level[..., 0]  # a batched product with single columns is slow
        return values.reshape(lead if member is not None else (-1, *lead))


def critics(obs: int, action: int, hidden: Sequence[int], members: int, layer_norm: bool = False) -> Q | QEnsemble:
    """So many independent action values: two, which are as fast either way, as modules, more as one ensemble."""
    return (Q if members <= 2 else QEnsemble)(obs, action, hidden, members, layer_norm)


class V(nn.Module):
    """State value: obs (..., obs) -> (...,). `mlp` are MLP's options."""

    def __init__(self, obs: int, hidden: Sequence[int], layer_norm: bool = False, **mlp: Any):
        super().__init__()
        self.mlp = MLP((obs, *hidden, 1), layer_norm, **mlp)

    def forward(self, obs: Tensor) -> Tensor:
        return self.mlp(obs).squeeze(-1)
