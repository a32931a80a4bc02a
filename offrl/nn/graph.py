"""Message passing on a directed graph's nodes and edges with one set of weights for all (Alvo et al., arXiv 2306.11246, section 4).

A graph is a flat list of edges, source and target (E,), and features of nodes (..., N, F) and edges (..., E, F) under any leading axes: a
batch of scenarios of one network, or, without leading axes, a ragged batch of networks put side by side, as torch-geometric does it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offrl.nn.layers import Affine


def he_uniform(*layers: Affine) -> tuple[Affine, ...]:
    """Layers whose outputs are summed, with initial weights that keep the size of what goes through (He et al., 2015, Eq. 10).

    With torch's, which are smaller by the root of six, an order would not depend on the stock for the first hundreds of steps.
    """
    bound = math.sqrt(6 / sum(len(layer.weight) for layer in layers))
    for layer in layers:
        nn.init.uniform_(layer.weight, -bound, bound)
    return layers


class Perceptron(nn.Module):
    """(..., inputs) -> (..., width): two hidden layers, and SiLU after every one, the last among them."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.layers = nn.ModuleList(layer for a in (inputs, width, width) for layer in he_uniform(Affine(a, width)))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.silu(layer(x))
        return x


class OfEdge(nn.Module):
    """A perceptron of [edge, source, target]. Nodes go through the first layer before they are gathered: there are fewer of them."""

    def __init__(self, edge: int, width: int):
        super().__init__()
        ends = (Affine(width, width, bias=False) for _ in range(2))
        self.edge, self.source, self.target = he_uniform(Affine(edge, width), *ends)
        self.rest = nn.ModuleList(layer for _ in range(2) for layer in he_uniform(Affine(width, width)))

    def forward(self, edge: Tensor, node: Tensor, source: Tensor, target: Tensor) -> Tensor:
        ends = (F.pad(layer(node), (0, 0, 0, 1)).index_select(-2, end) for layer, end in ((self.source, source), (self.target, target)))
        x = self.edge(edge) + next(ends) + next(ends)
        for layer in self.rest:
            x = layer(F.silu(x))
        return F.silu(x)


class GraphNet(nn.Module):
    """Node features (..., N, node), edge features (..., E, edge), source and target (E,) -> edge embeddings (..., len(out), width).

    An end that is N is outside: its embedding is 0 and nothing is sent to it. In a round nodes read the sums of the edges that enter and
    of those that leave them, each divided by the root of their number; then edges read their ends. The same weights serve every round.
    out: indices of the edges whose embedding is wanted; the others do not take part in the last step.
    """

    def __init__(self, node: int, edge: int, width: int = 32, rounds: int = 1):
        super().__init__()
        self.rounds = rounds
        self.first_node, self.first_edge = Perceptron(node, width), OfEdge(edge, width)
        self.node, self.edge = Perceptron(3 * width, width), OfEdge(width, width)

    def forward(self, nodes: Tensor, edges: Tensor, source: Tensor, target: Tensor, out: Tensor) -> Tensor:
        count = nodes.shape[-2]
        node = self.first_node(nodes)
        edge = self.first_edge(edges, node, source, target)
        for i in range(self.rounds):
            entering, leaving = (_summed(edge, end, count) for end in (target, source))
            node = node + self.node(torch.cat([node, entering, leaving], -1))
            if i == self.rounds - 1:
                edge, source, target = edge.index_select(-2, out), source[out], target[out]
            edge = edge + self.edge(edge, node, source, target)
        return edge


def _summed(edge: Tensor, end: Tensor, count: int) -> Tensor:
    """(..., count, width): the sum of the edges at each node, divided by the root of their number."""
    degree = edge.new_zeros(count + 1).index_add(0, end, edge.new_ones(len(end)))
    sums = edge.new_zeros(*edge.shape[:-2], count + 1, edge.shape[-1]).index_add(-2, end, edge)
    return (sums * degree.clamp_min(1).rsqrt()[:, None])[..., :count, :]
