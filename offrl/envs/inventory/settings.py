"""The published settings of inventory control by simulated gradients (Alvo et al., arXiv 2306.11246), by name.

Each is a config whose `problem()` is a network with its scenarios. Parameters that the paper draws are drawn by NumPy's RandomState from
the seeds of the released configs, so that costs compare; demand is drawn by streams of ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch

from offrl.core.config import Log, Range
from offrl.envs.inventory.demand import Demand, History, Horizon, NormalDemand, Observed, PoissonDemand, Sampled
from offrl.envs.inventory.network import SUPPLIER, Network

Periods = Annotated[int, Range(1, 50)]
Price = Annotated[float, Log(1e-3, 1e3)]


@dataclass(frozen=True)
class Setting:
    """What all settings with sampled demand have."""

    batch_size: ClassVar[int] = 8192  # as published
    slots: ClassVar[int] = 1

    train: Horizon = Horizon(50, 30, 32768)
    dev: Horizon = Horizon(100, 60, 32768)
    test: Horizon = Horizon(5000, 3000, 32768)
    seed: Annotated[int, Range(0)] = 0
    """Of the demand and the initial inventory."""

    def network(self) -> Network:
        raise NotImplementedError

    def demand(self) -> Demand:
        raise NotImplementedError

    def problem(self) -> Sampled:
        horizons = {"train": self.train, "dev": self.dev, "test": self.test}
        return Sampled(self.network(), self.demand(), horizons, self.slots, self.seed)


def _edge(source: str, target: str, lead_time: int, **more: Any) -> dict[str, Any]:
    return {"from": source, "to": target, "lead_time": int(lead_time), **more}


@dataclass(frozen=True)
class OneStoreBacklog(Setting):
    """One store, Normal demand, backlog: a base-stock level is optimal."""

    lead_time: Periods = 4
    """Periods from an order to its arrival."""
    holding: Price = 1.0
    """Cost of a unit on hand at the end of a period."""
    underage: Price = 9.0
    """Cost of a unit of demand that waits, for each period."""
    mean: Annotated[float, Range(0)] = 5.0
    """Of a period's demand."""
    std: Annotated[float, Range(0)] = 1.6
    """Of a period's demand, before it is clipped at 0."""

    def network(self) -> Network:
        store = {"kind": "store", "holding": self.holding, "underage": self.underage}
        return Network.of({"store": store}, [_edge(SUPPLIER, "store", self.lead_time)], "backlog", name="one-store-backlog")

    def demand(self) -> Demand:
        return NormalDemand(torch.tensor([self.mean]), torch.tensor([self.std]))


@dataclass(frozen=True)
class OneStoreLost(Setting):
    """One store, Poisson demand, which is lost when not met (Zipkin 2008)."""

    slots: ClassVar[int] = 4

    lead_time: Periods = 4
    """Periods from an order to its arrival."""
    holding: Price = 1.0
    """Cost of a unit on hand at the end of a period."""
    underage: Price = 9.0
    """Cost of a unit of demand that is lost."""
    mean: Annotated[float, Range(0)] = 5.0
    """Of a period's demand."""

    def network(self) -> Network:
        store = {"kind": "store", "holding": self.holding, "underage": self.underage}
        return Network.of({"store": store}, [_edge(SUPPLIER, "store", self.lead_time)], "lost", name="one-store-lost")

    def demand(self) -> Demand:
        return PoissonDemand(torch.tensor([self.mean]))


@dataclass(frozen=True)
class Serial(Setting):
    """Echelons in a row, Normal demand, backlog: echelon base-stock levels are optimal (Clark & Scarf 1960)."""

    ECHELONS: ClassVar[dict[int, tuple[tuple[float, ...], tuple[int, ...]]]] = {  # nodes: holding and lead times before the warehouse
        2: ((), ()),
        3: ((0.1,), (2,)),
        4: ((0.1, 0.2), (2, 4)),
        5: ((0.1, 0.2, 0.25), (2, 4, 1)),
        6: ((0.1, 0.2, 0.25, 0.3), (2, 4, 1, 3)),
        7: ((0.1, 0.2, 0.25, 0.3, 0.4), (2, 4, 1, 3, 2)),
    }

    nodes: Annotated[int, Range(2, 7)] = 4
    """Stages, store and warehouse among them."""
    lead_time: Periods = 4
    """Periods from the warehouse to the store."""
    underage: Price = 9.0
    """Cost of a unit of demand that waits, for each period."""
    mean: Annotated[float, Range(0)] = 5.0
    """Of a period's demand."""
    std: Annotated[float, Range(0)] = 2.0
    """Of a period's demand, before it is clipped at 0."""

    def stages(self) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Lead times and holding costs, upstream first, as `solve.clark_scarf` takes them."""
        holding, lead_times = self.ECHELONS[self.nodes]
        return (*lead_times, 3, self.lead_time), (*holding, 0.5, 1.0)

    def network(self) -> Network:
        lead_times, holding = self.stages()
        names = [*(f"echelon{i + 1}" for i in range(self.nodes - 2)), "warehouse", "store"]
        nodes: dict[str, dict[str, Any]] = {name: {"holding": h} for name, h in zip(names, holding)}
        nodes["store"] |= {"kind": "store", "underage": self.underage}
        return Network.of(nodes, map(_edge, [SUPPLIER, *names], names, lead_times), "backlog", name="serial")

    def demand(self) -> Demand:
        return NormalDemand(torch.tensor([self.mean]), torch.tensor([self.std]))


@dataclass(frozen=True)
class Stores(Setting):
    """What the settings with several stores have: demand whose means and deviations differ from store to store."""

    batch_size: ClassVar[int] = 1024

    correlation: Annotated[float, Range(0, 0.99)] = 0.5
    """Between the demand of any two stores."""

    clipped: ClassVar[bool] = True
    slots: ClassVar[int] = 3

    def demand(self) -> NormalDemand:
        mean = np.random.RandomState(33).uniform(2.5, 7.5, self.stores).round(3)
        std = (mean * np.random.RandomState(92).uniform(0.25, 0.5, self.stores)).round(3)
        return NormalDemand(torch.from_numpy(mean), torch.from_numpy(std), self.correlation, self.clipped)

    def _stores(self) -> dict[str, dict[str, Any]]:
        """Stores of differing costs."""
        holding = np.random.RandomState(73).uniform(0.7, 1.3, self.stores)
        underage = np.random.RandomState(28).uniform(6.3, 11.7, self.stores)
        return {f"store{i}": {"kind": "store", "holding": h, "underage": p} for i, (h, p) in enumerate(zip(holding, underage))}


@dataclass(frozen=True)
class Transshipment(Stores):
    """One warehouse that holds no stock, like stores, backlog; demand is not clipped. A lower bound is known (Federgruen & Zipkin 1984)."""

    clipped: ClassVar[bool] = False

    stores: Annotated[int, Range(1, 200)] = 5
    """Stores behind the warehouse."""
    lead_time: Periods = 2
    """Periods from the warehouse to a store."""
    holding: Price = 1.0
    """Cost of a unit on hand at the end of a period."""
    underage: Price = 4.0
    """Cost of a unit of demand that waits, for each period."""

    def network(self) -> Network:
        store = {"kind": "store", "holding": self.holding, "underage": self.underage}
        names = [f"store{i}" for i in range(self.stores)]
        edges = [_edge(SUPPLIER, "warehouse", 3), *(_edge("warehouse", name, self.lead_time) for name in names)]
        return Network.of({"warehouse": {"kind": "transshipment"}} | dict.fromkeys(names, store), edges, "backlog", name="transshipment")


@dataclass(frozen=True)
class OneWarehouse(Stores):
    """One warehouse, differing stores, demand that is lost when not met. No optimum is known."""

    train: Horizon = Horizon(50, 30, 8192)
    dev: Horizon = Horizon(100, 60, 8192)
    test: Horizon = Horizon(5000, 3000, 8192)
    stores: Annotated[int, Range(1, 200)] = 10
    """Stores behind the warehouse."""
    longest: Annotated[int, Range(2, 20)] = 3
    """Lead times to the stores are 2 to this many periods; the paper's data-efficiency study has 5, the released config 3."""

    def network(self) -> Network:
        lead_times = np.random.RandomState(41).randint(2, self.longest + 1, self.stores)
        stores = self._stores()
        edges = [_edge(SUPPLIER, "warehouse", 3), *(_edge("warehouse", name, n) for name, n in zip(stores, lead_times))]
        return Network.of({"warehouse": {"holding": 0.3}} | stores, edges, "lost", name="one-warehouse")


@dataclass(frozen=True)
class ManyWarehouses(Stores):
    """Warehouses that overlap: cheap and far, or dear and near. Demand is lost when not met. No optimum is known.

    With 2 warehouses and 10 stores the edges are those of the released config, its lead times within the published ranges. Of other sizes
    only the numbers of nodes are published: there, store i is near warehouse i modulo their number and has any other with probability 0.7.
    """

    LACKING: ClassVar[tuple[tuple[int, ...], ...]] = ((0, 1, 5, 9), (6,))  # stores that each of 2 warehouses does not supply
    LEAD_TIMES: ClassVar[tuple[tuple[int, ...], ...]] = ((6, 6, 6, 6, 6, 5, 5, 5, 5, 5), (1, 1, 1, 1, 1, 2, 2, 2, 1, 2))

    train: Horizon = Horizon(50, 30, 8192)
    dev: Horizon = Horizon(100, 60, 8192)
    test: Horizon = Horizon(5000, 3000, 8192)
    warehouses: Annotated[int, Range(2, 20)] = 2
    """Warehouses; holding 0.3 and 0.4, procurement 0.5 and 1.5 in turn."""
    stores: Annotated[int, Range(2, 200)] = 10
    """Stores behind them."""

    def network(self) -> Network:
        nodes, stores, edges = {}, self._stores(), []
        draw = np.random.RandomState(41)
        for w in range(self.warehouses):
            nodes[f"warehouse{w}"] = {"holding": (0.3, 0.4)[w % 2]}
            edges.append(_edge(SUPPLIER, f"warehouse{w}", 3, procurement=(0.5, 1.5)[w % 2]))
            for i, name in enumerate(stores):
                near, drawn, chance = i % self.warehouses == w, draw.randint(2), draw.uniform()
                if (self.warehouses, self.stores) == (2, 10):
                    there, lead_time = i not in self.LACKING[w], self.LEAD_TIMES[w][i]
                else:
                    there, lead_time = near or chance < 0.7, (1 if near else 5) + drawn
                if there:
                    edges.append(_edge(f"warehouse{w}", name, lead_time))
        return Network.of(nodes | stores, edges, "lost", name="many-warehouses")


WEEKS = {"train": (0, 111), "dev": (88, 141), "test": (118, 171)}  # of the paper's weekly sales, 16 of past demand first


@dataclass(frozen=True)
class RealOneStore:
    """Each series of a history as a store of its own: lost demand, profit; lead times of 4 to 6 weeks and prices that differ."""

    batch_size: ClassVar[int] = 8192

    def problem(self, history: History, spans: dict[str, tuple[int, int]] = WEEKS) -> Observed:
        """history: B items in S stores, which make B * S scenarios."""
        series = history.demand.flatten(0, 1)[:, None]
        lead_times = np.random.RandomState(41).randint(4, 7, len(series))
        underage = np.random.RandomState(28).uniform(6.3, 11.7, len(series))
        edge = {"from": SUPPLIER, "to": "store", "lead_time": lead_times}
        network = Network.of(
            {"store": {"kind": "store", "holding": 1.0, "underage": underage}}, [edge], "lost", "profit", name="real-one-store"
        )
        return Observed(network, History(series, ("store",), history.dates), spans)


@dataclass(frozen=True)
class RealWarehouses:
    """Three warehouses and 21 stores with weekly sales of many products: lost demand, profit.

    Edges, lead times and costs are the released config's; it asks for a price for each product and store, its code draws one for each
    store, and so does this.
    """

    batch_size: ClassVar[int] = 72
    LACKING: ClassVar[tuple[tuple[int, ...], ...]] = ((3, 14), (5, 10, 11, 12, 13), (11,))  # stores that each warehouse does not supply
    LEAD_TIMES: ClassVar[tuple[str, ...]] = ("666665555555556666655", "111112221222221111112", "555546555556565555545")
    HOLDING: ClassVar[tuple[float, ...]] = (0.3, 0.4, 0.2)
    PROCUREMENT: ClassVar[tuple[float, ...]] = (0.5, 1.5, 0.7)

    prices: Literal["store", "product"] = "store"
    """Whether a unit's revenue is drawn for each store, or for each product and store."""

    def problem(self, history: History, spans: dict[str, tuple[int, int]] = WEEKS) -> Observed:
        """history: B products in 21 stores."""
        products, count = len(history.demand), len(self.LEAD_TIMES[0])
        if len(history.stores) != count:
            raise ValueError(f"the setting has {count} stores, the history {len(history.stores)}")
        holding = np.random.RandomState(73).uniform(0.7, 1.3, count)
        underage = np.random.RandomState(28).uniform(6.3, 11.7, count if self.prices == "store" else (products, count))
        nodes: dict[str, dict[str, Any]] = {f"warehouse{w}": {"holding": h} for w, h in enumerate(self.HOLDING)}
        nodes |= {name: {"kind": "store", "holding": holding[i], "underage": underage[..., i]} for i, name in enumerate(history.stores)}
        edges = [_edge(SUPPLIER, f"warehouse{w}", 3, procurement=price) for w, price in enumerate(self.PROCUREMENT)]
        for w, (lacking, lead_times) in enumerate(zip(self.LACKING, self.LEAD_TIMES)):
            edges += [_edge(f"warehouse{w}", name, n) for i, (name, n) in enumerate(zip(history.stores, lead_times)) if i not in lacking]
        return Observed(Network.of(nodes, edges, "lost", "profit", name="real-warehouses"), history, spans)


SETTINGS = {
    "one-store-backlog": OneStoreBacklog,
    "one-store-lost": OneStoreLost,
    "serial": Serial,
    "transshipment": Transshipment,
    "one-warehouse": OneWarehouse,
    "many-warehouses": ManyWarehouses,
}
REAL = {"real-one-store": RealOneStore, "real-warehouses": RealWarehouses}
