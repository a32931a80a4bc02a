"""Building blocks: linear layers, and multilayer perceptrons whose last layer keeps full precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Affine(nn.Module):
    """(..., inputs) -> (..., outputs): nn.Linear, but that weights are (inputs, outputs).

    So products for the gradients of few inputs take a CPU a half to a seventh of the time.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = True):
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.T, self.bias)


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
