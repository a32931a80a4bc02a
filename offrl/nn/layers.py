"""Building blocks: multilayer perceptrons whose last layer keeps full precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Head(nn.Linear):
    """The last layer, computed in the parameters' own precision under autocast too: values are compared and actions squashed."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


class MLP(nn.Module):
    """(..., sizes[0]) -> (..., sizes[-1]): linear layers with an activation between, LayerNorm before each if asked for.

    head: what the last layer's first weights and biases are multiplied by.
    """

    def __init__(self, sizes: Sequence[int], layer_norm: bool = False, activation: Callable[[Tensor], Tensor] = F.relu, head: float = 1.0):
        super().__init__()
        pairs = list(zip(sizes[:-1], sizes[1:]))
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairs[:-1])
        self.norms = nn.ModuleList(nn.LayerNorm(b) for _, b in pairs[:-1]) if layer_norm else None
        self.head, self.activation = Head(*pairs[-1]), activation
        with torch.no_grad():
            for parameter in self.head.parameters():
                parameter.mul_(head)

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.hidden):
            x = layer(x)
            x = self.activation(x if self.norms is None else self.norms[i](x))
        return self.head(x)
