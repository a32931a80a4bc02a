"""Classical policies, differentiable in their parameters: base stock, capped and echelon base stock, newsvendors, and the oracle.

Each maps an Observation to desired orders (B, E), which the simulator cuts down to what there is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offrl.core.config import ConfigError
from offrl.envs.inventory.faults import reached
from offrl.envs.inventory.forecast import Forecast
from offrl.envs.inventory.network import Network, Values
from offrl.envs.inventory.neural import flow
from offrl.envs.inventory.scenario import Observation, Scenario
from offrl.envs.inventory.simulator import Simulator
from offrl.nn.layers import MLP


def rounded(policy: Callable[[Observation], Tensor]) -> Callable[[Observation], Tensor]:
    """The policy with its orders rounded to whole units, as where demand is whole."""
    return lambda obs: policy(obs).round()


def ship_whole(simulator: Simulator, inventory: Tensor, order: Tensor, values: Values) -> Tensor:
    """What leaves on each edge (B, E) in whole units when `order` (B, E) is asked for, never more than a capacity or than there is.

    What a node rations it deals out by largest remainders.
    """
    net, inventory = simulator.network, inventory.double()
    wanted = torch.minimum(order.double().clamp_min(0).round(), values.capacity.double().floor())
    shipped = simulator.ship(inventory, wanted, values) + 1e-9  # a third of 3 is to be 1
    made = shipped.floor()
    for node in range(net.W):
        edges = torch.tensor([e for e, (source, _) in enumerate(net.ends) if source == node])
        spare = (shipped - made)[:, edges]
        rank = spare.argsort(dim=1, descending=True, stable=True).argsort(1)
        made[:, edges] += rank < spare.sum(1, keepdim=True).add(1e-6).floor()
    return made


def _positive(value: Tensor) -> Tensor:
    """The x of softplus(x) = value."""
    return value + torch.log(-torch.expm1(-value))


def _one_supplier(network: Network) -> Tensor:
    """The target of each edge, where no node has two. Raises ConfigError otherwise."""
    targets = [target for _, target in network.ends]
    if len(set(targets)) < len(targets):
        raise ConfigError(f"{network.name}: a node has several suppliers, and a base-stock level does not say which of them to order from")
    return torch.tensor(targets)


class BaseStock(nn.Module):
    """Each node orders up to a level of its own position: on hand and in transit to it, less backlog. With `caps`, no more than a cap.

    levels and caps: (N,), or one number for all nodes. Every node has one supplier (ValueError).
    """

    def __init__(self, network: Network, levels: float | Sequence[float] | Tensor, caps: float | Sequence[float] | Tensor | None = None):
        super().__init__()
        self.register_buffer("target", _one_supplier(network))
        self.levels = nn.Parameter(_for_nodes(levels, network))
        self.caps = None if caps is None else nn.Parameter(_for_nodes(caps, network))

    def forward(self, obs: Observation) -> Tensor:
        order = (self.levels - obs.inventory.sum(-1)).relu()
        if self.caps is not None:
            order = torch.minimum(order, self.caps.relu())
        return order[:, self.target]


def _for_nodes(numbers: float | Sequence[float] | Tensor, network: Network) -> Tensor:
    return torch.as_tensor(numbers, dtype=torch.float32).expand(network.N).clone()


class EchelonStock(nn.Module):
    """Each node orders up to a level of its echelon's position: that of itself and of all nodes downstream (Clark & Scarf 1960).

    A level is the sum of softplus(weight) over the echelon, so that no level is below one downstream. levels: (N,), the first ones, each
    above the sum of those it supplies. Every node has one supplier (ValueError).
    """

    def __init__(self, network: Network, levels: Sequence[float] | Tensor):
        super().__init__()
        self.register_buffer("target", _one_supplier(network))
        echelon = torch.tensor([[b in reached([a], network.edges) for b in network.nodes] for a in network.nodes]).float()
        self.register_buffer("echelon", echelon)
        steps = torch.linalg.solve(echelon, _for_nodes(levels, network))
        if (steps <= 0).any():
            raise ValueError(f"{network.name}: an echelon's level is above those of the nodes that it supplies, together")
        self.weights = nn.Parameter(_positive(steps))

    @property
    def levels(self) -> Tensor:
        """(N,)"""
        return self.echelon @ F.softplus(self.weights)

    def forward(self, obs: Observation) -> Tensor:
        return (self.levels - obs.inventory.sum(-1) @ self.echelon.T).relu()[:, self.target]


def classical(kind: Literal["base_stock", "capped_base_stock", "echelon_stock"], network: Network) -> BaseStock | EchelonStock:
    """For observations `in_units`: levels begin with the mean demand through a node over its lead time and one period more, caps with
    twice that of a period. Every node has one supplier (ConfigError).
    """
    edge = torch.argsort(_one_supplier(network))  # of each node
    through = torch.tensor(flow(network))[edge]
    cover = through * (network.values.lead_time.float().mean(0)[edge] + 1)
    if kind == "echelon_stock":
        echelons = ([b in reached([a], network.edges) for b in network.nodes] for a in network.nodes)
        return EchelonStock(network, torch.stack([cover[torch.tensor(echelon)].sum() for echelon in echelons]))
    return BaseStock(network, cover, 2 * through if kind == "capped_base_stock" else None)


class Newsvendor(nn.Module):
    """Stores without warehouses order up to a quantile of the demand that an order has to cover.

    level: "critical", p / (p + h); "fixed", one number that is learned; "transformed", a learned function of p / (p + h), which begins as
    the identity. forecast gives the quantiles. Raises ValueError for a network with warehouses or with several suppliers of a store.
    """

    def __init__(
        self, network: Network, forecast: Forecast, level: Literal["critical", "fixed", "transformed"] = "critical", begin: float = 0.7
    ):
        super().__init__()
        if network.W or network.E != network.S:
            raise ValueError(f"{network.name}: a newsvendor's stores each have the outside supplier and no other")
        self.forecast, self.level = forecast, level
        self.register_buffer("edge", torch.argsort(_one_supplier(network)))
        self.fixed = nn.Parameter(torch.logit(torch.tensor(begin))) if level == "fixed" else None
        self.transform = MLP([1, 32, 32, 1]) if level == "transformed" else None
        if self.transform is not None:
            nn.init.zeros_(self.transform.head.weight)
            nn.init.zeros_(self.transform.head.bias)

    def quantile(self, obs: Observation) -> Tensor:
        """(1|B, S): the probability with which stock is to suffice."""
        ratio = obs.values.underage / (obs.values.underage + obs.values.holding)
        if self.fixed is not None:
            return self.fixed.sigmoid().expand(ratio.shape)
        if self.transform is not None:
            return (torch.logit(ratio) + self.transform(ratio[..., None]).squeeze(-1)).sigmoid()
        return ratio

    def forward(self, obs: Observation) -> Tensor:
        level = self.forecast(obs, self.quantile(obs), obs.values.lead_time[:, self.edge])
        return (level - obs.inventory.sum(-1)).relu()[:, torch.argsort(self.edge)]


class JustInTime:
    """The oracle, which sees the demand of its `scenario`: whatever is sold arrives in the period of its sale.

    It comes along the path from the supplier that is the "cheapest" by procurement, or the "fastest"; the published shares of an oracle's
    profit are of the latter.

    Stores order what their stock and pipeline will lack. Warehouses order what will be sold, so they are to begin empty. Demand that comes
    sooner than the path's lead times is not met; after the last period, demand counts as repeating it. No policy, and no bound where
    serving less than all demand pays.
    """

    def __init__(self, network: Network, scenario: Scenario, path: Literal["cheapest", "fastest"] = "cheapest"):
        self.network, values = network, scenario.values
        price, time = (column.double().mean(0).tolist() for column in (values.procurement, values.lead_time))
        first, second = (price, time) if path == "cheapest" else (time, price)  # the second decides between equals
        pairs = [(edge, store) for store in range(network.W, network.N) for edge in _path(network, list(zip(first, second)), store)]
        device = scenario.demand.device
        self.edge, self.store = torch.tensor([(e, s - network.W) for e, s in pairs], device=device).T
        ahead, at = values.lead_time.new_zeros(len(values.lead_time), len(pairs)), {}
        for i, (edge, store) in enumerate(pairs):  # paths are listed from the store up
            at[store] = at.get(store, 0) + values.lead_time[:, edge]
            ahead[:, i] = at[store]
        self.ahead, self.last = ahead, torch.tensor([network.ends[edge][1] >= network.W for edge, _ in pairs], device=device)
        self.demand = F.pad(scenario.demand, (0, int(ahead.max()) + 1), mode="replicate")

    def __call__(self, obs: Observation) -> Tensor:
        rows = len(obs.inventory)
        row, ahead = torch.arange(rows, device=self.edge.device)[:, None], self.ahead.expand(rows, -1)
        needed = self.demand[row, self.store, obs.t + ahead]
        spare = self._left(obs)[row, self.store, ahead.clamp_max(obs.inventory.shape[-1])]
        needed = torch.where(self.last, (needed - spare).clamp_min(0), needed)
        return needed.new_zeros(rows, self.network.E).index_add(1, self.edge, needed)

    def _left(self, obs: Observation) -> Tensor:
        """(B, S, M + 1): the stores' stock in 0, 1, ..., M periods if nothing more is ordered."""
        stock, lost = F.pad(obs.inventory[:, self.network.W :], (0, 1)), self.network.unmet == "lost"
        left = [stock[..., 0]]
        for k in range(1, stock.shape[-1]):
            over = left[-1] - self.demand[..., obs.t + k - 1]
            left.append((over.clamp_min(0) if lost else over) + stock[..., k])
        return torch.stack(left, -1)


def _path(network: Network, weights: list[tuple[float, float]], node: int) -> list[int]:
    """The edges to a node from the supplier whose weights add up to the least; the last edge first."""
    best: dict[int, tuple[float, float, list[int]]] = {-1: (0.0, 0.0, [])}
    for target in range(network.N):
        into = [(best[a], weights[e], e) for e, (a, b) in enumerate(network.ends) if b == target]
        best[target] = min((x + u, y + v, [e, *edges]) for (x, y, edges), (u, v), e in into)
    return best[node][2]
