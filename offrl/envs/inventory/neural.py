"""Neural ordering policies: a perceptron for one network, and a graph network whose weights serve any (Alvo et al., arXiv 2306.11246).

They are for observations `in_units` and order in these: a network in other units is ordered for alike. What a node ships beyond its stock
the simulator rations.

Deviations from the released code: 1. these units; 2. the perceptron's orders are rationed in proportion, not by a softmax, and are scaled
by what has to flow along each edge; 3. the graph network's first layers see nodes before they are gathered, which is the same function;
4. in the place of ELU, whose time a CPU mostly spends in exponentials, ReLU in the perceptron and SiLU in the graph network, and there
He's initial weights before a small last layer in the place of torch's; 5. where past demand is seen, its mean is the unit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offrl.envs.inventory.network import Network
from offrl.envs.inventory.scenario import Observation
from offrl.nn.graph import GraphNet, Perceptron
from offrl.nn.layers import Affine

ONE = math.log(math.e - 1)  # whose softplus is 1
TINY = 1e-10
SMALL = 0.1  # of torch's weights: the first orders are near the mean demand, whatever the stock
LEAST = 0.05  # of the mean demand: where less was sold lately, this is the unit all the same


def in_units(given: Any) -> tuple[Any, Tensor, Tensor]:
    """A Scenario or an Observation in units of the stores' mean demand and of their mean underage cost, and these units (1|B, 1).

    Orders in units for it are the orders of the same policy for what was given, divided by the unit; costs, divided by both.
    """
    unit, price = given.mean.mean(1, keepdim=True), given.values.underage.mean(1, keepdim=True)
    costs = {name: getattr(given.values, name) / price for name in ("holding", "underage", "procurement")}
    scaled: dict[str, Any] = {name: getattr(given, name) / unit for name in ("mean", "std")}
    scaled |= {name: getattr(given, name) / unit[..., None] for name in ("inventory", "initial", "demand", "past") if hasattr(given, name)}
    values = given.values._replace(**costs, capacity=given.values.capacity / unit)
    return given._replace(values=values, **scaled), unit, price


def by_recent(obs: Observation) -> tuple[Observation, Tensor]:
    """The observation in units of the stores' mean demand in its window of past demand, and these units (B, 1): sales drift.

    Mean and standard deviation are the window's, too: those of all training periods would tell in training what is to come.
    """
    level = obs.past.mean((1, 2))[:, None].clamp_min(LEAST)
    inventory, past = obs.inventory / level[..., None], obs.past / level[..., None]
    values = obs.values._replace(capacity=obs.values.capacity / level)
    return obs._replace(inventory=inventory, past=past, values=values, mean=past.mean(-1), std=past.std(-1, correction=0)), level


class MLPPolicy(nn.Module):
    """The orders (B, E) of one network from its inventory alone, or with `everything` from all that is observed."""

    def __init__(
        self, network: Network, slots: int, window: int = 0, calendar: int = 0, hidden: tuple[int, ...] = (32, 32), everything: bool = False
    ):
        super().__init__()
        self.everything, self.flow = everything, torch.tensor(flow(network))
        N, S, E = network.N, network.S, network.E
        more = window * S + calendar + N + 3 * S + 2 * E if everything else 0  # as in Observation.flat
        sizes = (slots * N + more, *hidden, E)
        self.layers = nn.ModuleList(Affine(a, b) for a, b in zip(sizes[:-1], sizes[1:]))

    def forward(self, obs: Observation) -> Tensor:
        level = 1.0
        if self.everything and obs.past.shape[-1]:
            obs, level = by_recent(obs)
        x = obs.flat() if self.everything else obs.inventory.flatten(1)
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return F.softplus(self.layers[-1](x) + ONE) * self.flow.to(x) * level


def flow(network: Network) -> list[float]:
    """(E,) mean flow along each edge, in units of the mean store's, if stores were alike and every node split its orders evenly."""
    through = [0.0] * network.W + [1.0] * network.S
    entering = [[e for e, (_, target) in enumerate(network.ends) if target == node] for node in range(network.N)]
    found = [0.0] * network.E
    for node in reversed(range(network.N)):
        for e in entering[node]:
            found[e] = through[node] / len(entering[node])
            if network.ends[e][0] >= 0:
                through[network.ends[e][0]] += found[e]
    return found


class Wiring(NamedTuple):
    """The graph of a network as the graph network sees it: its edges, then one from each store to its customers, then one from each
    warehouse to itself, along which it keeps stock. Of G graphs side by side, the nodes' numbers are offset; outside is one past the last.
    """

    source: Tensor  # (edges,)
    target: Tensor
    out: Tensor  # the network's own edges and those along which stock is kept
    keeper: Tensor  # of the latter the warehouses


def wiring(network: Network) -> Wiring:
    source, target = torch.tensor(network.ends).T
    source = torch.where(source < 0, network.N, source)
    stores = torch.arange(network.W, network.N)
    keeper = torch.tensor([i for i, kind in enumerate(network.kinds) if kind == "warehouse"], dtype=torch.int64)
    source, target = torch.cat([source, stores, keeper]), torch.cat([target, torch.full_like(stores, network.N), keeper])
    out = torch.cat([torch.arange(network.E), network.E + network.S + torch.arange(len(keeper))])
    return Wiring(source, target, out, keeper)


class GNN(nn.Module):
    """The weights of a graph policy, for networks of any shape with at most so many inventory slots.

    window, calendar: of the observations. rounds: of messages; 1 is enough for warehouses and their stores, a longer chain takes as many
    as it has further echelons, and one more.
    """

    def __init__(self, slots: int, window: int = 0, calendar: int = 0, width: int = 32, rounds: int = 1):
        super().__init__()
        self.slots = slots
        self.net = GraphNet(slots + 4 + window + calendar, 2, width, rounds)
        self.last, self.head = Perceptron(width, width), Affine(width, 1)
        nn.init.uniform_(self.head.weight, -SMALL / math.sqrt(width), SMALL / math.sqrt(width))

    def features(self, obs: Observation) -> tuple[Tensor, Tensor]:
        """Node features (B, N, ...) and edge features (1|B, edges, 2)."""
        missing = self.slots - obs.inventory.shape[-1]
        if missing < 0:
            raise ValueError(f"the policy knows {self.slots} inventory slots; the network has {obs.inventory.shape[-1]}")
        return obs._replace(inventory=F.pad(obs.inventory, (0, missing))).node_features(), obs.edge_features()

    def orders(self, nodes: Tensor, edges: Tensor, wiring: Wiring) -> Tensor:
        """(..., len(wiring.out)): what is wanted along the edges that are asked for."""
        edges = F.pad(edges, (0, 0, 0, len(wiring.source) - edges.shape[-2]))
        edge = self.net(nodes, edges.expand(*nodes.shape[:-2], -1, -1), wiring.source, wiring.target, wiring.out)
        return F.softplus(self.head(self.last(edge)).squeeze(-1) + ONE)


class GraphPolicy(nn.Module):
    """The orders (B, E) that a GNN makes in one network; several networks may share the GNN."""

    def __init__(self, network: Network, gnn: GNN):
        super().__init__()
        self.network, self.gnn, self.wiring = network, gnn, wiring(network)
        source = torch.tensor(network.ends)[network.K :, 0]
        self.source, self.leaves = source, F.one_hot(source, network.W) if network.W else None

    def forward(self, obs: Observation) -> Tensor:
        level = 1.0
        if obs.past.shape[-1]:
            obs, level = by_recent(obs)
        return self.rationed(self.gnn.orders(*self.gnn.features(obs), self.wiring), obs.inventory) * level

    def rationed(self, wanted: Tensor, inventory: Tensor) -> Tensor:
        """What is wanted along the network's edges and, behind them, what is to be kept, as orders (B, E) that there is stock for."""
        net = self.network
        order, keep = wanted[:, : net.E], wanted[:, net.E :]
        if net.W == 0:
            return order
        outside, inner = order[:, : net.K], order[:, net.K :]
        asked = (inner @ self.leaves.to(inner)).index_add(1, self.wiring.keeper, keep)
        scale = (inventory[:, : net.W, 0] / (asked + TINY)).clamp_max(1)
        return torch.cat([outside, inner * scale[:, self.source]], 1)


def side_by_side(graphs: Sequence[tuple[Tensor, Tensor, Wiring]]) -> tuple[Tensor, Tensor, Wiring, list[tuple[int, int]]]:
    """Batches of different networks as one graph without batch axes, as torch-geometric makes its batches.

    graphs: node features (B, N, F), edge features (1|B, edges, F) and wiring of each network. Returns the arguments of `GNN.orders`, and
    for each network how its share of what that gives is to be shaped: (B, len(out)).
    """
    nodes, edges, parts, shapes = [], [], [], []
    total = sum(x.shape[0] * x.shape[1] for x, _, _ in graphs)
    first_node = first_edge = 0
    for x, e, wiring in graphs:
        rows, count, width = len(x), x.shape[1], len(wiring.source)
        e = F.pad(e, (0, 0, 0, width - e.shape[1])).expand(rows, -1, -1)
        shift = first_node + count * torch.arange(rows)[:, None]
        ends = [torch.where(end == count, total, end + shift).flatten() for end in (wiring.source, wiring.target)]
        out = (wiring.out + first_edge + width * torch.arange(rows)[:, None]).flatten()
        nodes.append(x.flatten(0, 1)), edges.append(e.flatten(0, 1)), parts.append(Wiring(*ends, out, wiring.keeper))
        shapes.append((rows, len(wiring.out)))
        first_node, first_edge = first_node + rows * count, first_edge + rows * width
    joined = Wiring(*(torch.cat(column) for column in zip(*parts)))
    return torch.cat(nodes), torch.cat(edges), joined, shapes
