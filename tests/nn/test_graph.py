"""Message passing against the same written out node by node and edge by edge."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from offrl.nn.graph import GraphNet

SOURCE, TARGET, OUT = [3, 0, 0, 1, 1], [0, 1, 2, 3, 1], [0, 2, 4]  # of three nodes; 3 is outside


def written_out(net, nodes, edges):
    def perceptron(layers, x):
        for layer in layers:
            x = F.silu(x @ layer.weight + layer.bias)
        return x

    def of_edge(part, edge, a, b):
        x = part.edge(edge) + part.source(a) + part.target(b)
        for layer in part.rest:
            x = layer(F.silu(x))
        return F.silu(x)

    node = [perceptron(net.first_node.layers, x) for x in nodes] + [torch.zeros(4, dtype=nodes.dtype)]
    edge = [of_edge(net.first_edge, x, node[a], node[b]) for x, a, b in zip(edges, SOURCE, TARGET)]
    for _ in range(net.rounds):
        following = []
        for i in range(3):
            sums = []
            for ends in (TARGET, SOURCE):
                mine = [edge[e] for e in range(5) if ends[e] == i]
                sums.append(sum(mine) / len(mine) ** 0.5 if mine else torch.zeros(4, dtype=nodes.dtype))
            following.append(node[i] + perceptron(net.node.layers, torch.cat([node[i], *sums])))
        node = [*following, node[3]]
        edge = [x + of_edge(net.edge, x, node[a], node[b]) for x, a, b in zip(edge, SOURCE, TARGET)]
    return torch.stack([edge[e] for e in OUT])


def test_rounds_of_messages_are_as_defined():
    torch.manual_seed(0)
    net = GraphNet(5, 2, width=4, rounds=2).double()
    nodes, edges = torch.randn(6, 3, 5, dtype=torch.float64), torch.randn(6, 5, 2, dtype=torch.float64)
    found = net(nodes, edges, *map(torch.tensor, (SOURCE, TARGET, OUT)))
    expected = torch.stack([written_out(net, *each) for each in zip(nodes, edges)])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("width", [32, 64])
def test_fresh_weights_let_edges_tell_nodes_apart(width):
    torch.manual_seed(0)
    net, nodes = GraphNet(5, 2, width, rounds=2), torch.randn(2048, 3, 5)
    out = net(nodes, torch.zeros(1, 5, 2), *map(torch.tensor, (SOURCE, TARGET, OUT)))
    assert 0.3 < out.std(0).mean() < 3
