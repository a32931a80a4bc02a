"""Value functions. Values have no trailing axis of one: (B,) for one member, (members, B) for all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
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


class V(nn.Module):
    """State value: obs (B, obs) -> (B,)."""

    def __init__(self, obs: int, hidden: Sequence[int], layer_norm: bool = False):
        super().__init__()
        self.mlp = MLP((obs, *hidden, 1), layer_norm)

    def forward(self, obs: Tensor) -> Tensor:
        return self.mlp(obs).squeeze(-1)
