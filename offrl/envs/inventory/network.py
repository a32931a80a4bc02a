"""What a supply network is: nodes, edges, lead times, costs and capacities.

Goods flow from an outside supplier of infinite stock along edges that take whole periods, through any number of echelons, to the stores,
where demand is. The topology is fixed; its numbers may differ from scenario to scenario.

One order of nodes and edges makes everything downstream a slice: nodes go upstream first and stores last, edges out of the supplier go
before all others. `Network.of` brings any description into it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from offrl.core.config import nearest
from offrl.data.checks.finding import Finding
from offrl.envs.inventory import faults
from offrl.envs.inventory.faults import SUPPLIER, NetworkError, fault

UNMET, OBJECTIVES = ("lost", "backlog"), ("cost", "profit")
NODE_KEYS = ("kind", "holding", "underage")
EDGE_KEYS = ("from", "to", "lead_time", "procurement", "capacity")


class Values(NamedTuple):
    """The numbers of a network of N nodes, S stores and E edges, (1, ...) where all scenarios share them and (B, ...) where not."""

    lead_time: Tensor  # (1|B, E) int64, periods: 1 or more
    holding: Tensor  # (1|B, N) for a unit on hand at the end of a period; what is in transit costs nothing
    underage: Tensor  # (1|B, S) for a unit of demand that is not met in its period; where profit is sought, the revenue of a unit sold
    procurement: Tensor  # (1|B, E) for a unit ordered
    capacity: Tensor  # (1|B, E) the most that may be ordered in a period; inf: no limit


@dataclass(frozen=True, eq=False)
class Network:
    """A validated supply network; `Network.of` makes one from names.

    nodes: N names, upstream first, stores last. kinds: of each, "store" (has demand, supplies nobody), "warehouse", or "transshipment" (may
    not hold stock: whatever it has is shipped in the same period). edges: E pairs (source, target), those whose source is the outside
    SUPPLIER first. unmet: whether demand that is not met is "lost" or "backlog". objective: "cost", or "profit", whose cost is minus the
    revenue plus the other costs. Raises NetworkError with all that is wrong.
    """

    nodes: tuple[str, ...]
    kinds: tuple[str, ...]
    edges: tuple[tuple[str, str], ...]
    values: Values
    unmet: Literal["lost", "backlog"] = "lost"
    objective: Literal["cost", "profit"] = "cost"
    name: str = field(default="network", repr=False)

    def __post_init__(self) -> None:
        if found := list(self._faults()):
            raise NetworkError(found)
        kinds, sources = [kind == "store" for kind in self.kinds], [a != SUPPLIER for a, _ in self.edges]
        if kinds != sorted(kinds) or sources != sorted(sources) or any(a >= b for a, b in self.ends):
            raise ValueError(f"{self.name}: nodes go upstream first, stores last, and the supplier's edges first; Network.of sorts them")

    def _faults(self) -> Iterator[Finding]:
        yield from _mode_faults(self.unmet, self.objective, self.name)
        yield from faults.graph_faults(self.nodes, self.kinds, self.edges, self.name)
        widths = (self.E, self.N, self.S, self.E, self.E)
        for name, column, width in zip(Values._fields, self.values, widths):
            if column.ndim != 2 or column.shape[1] != width:
                raise ValueError(f"{self.name}: {name} has shape {tuple(column.shape)}, not (1 or B, {width})")
        columns = {name: column.cpu().numpy() for name, column in self.values._asdict().items()}
        yield from faults.value_faults(self.nodes, self.kinds, self.edges, columns, self.name)

    @classmethod
    def of(
        cls,
        nodes: Mapping[str, Mapping[str, Any]],
        edges: Iterable[Mapping[str, Any]],
        unmet: Literal["lost", "backlog"] = "lost",
        objective: Literal["cost", "profit"] = "cost",
        *,
        period: str = "week",
        name: str = "network",
    ) -> Network:
        """A network from names, in any order.

        nodes: name -> {"kind": "store" | "warehouse" (if left out) | "transshipment", "holding", "underage"}; edges: {"from", "to",
        "lead_time", "procurement", "capacity"}. Each number may be a sequence with one for each scenario. Stores need underage and
        holding, warehouses holding, edges lead_time: a number of periods, or text as in "14 days". `name` stands for the network in
        messages. Raises NetworkError.
        """
        description = {"nodes": nodes, "edges": list(edges), "unmet": unmet, "objective": objective, "period": period}
        parts, found = parse(description, name)
        if found:
            raise NetworkError(found)
        return cls(**parts)

    @property
    def N(self) -> int:
        return len(self.nodes)

    @cached_property
    def S(self) -> int:
        return self.kinds.count("store")

    @property
    def E(self) -> int:
        return len(self.edges)

    @property
    def W(self) -> int:
        """Nodes that are no stores: the first ones."""
        return self.N - self.S

    @cached_property
    def K(self) -> int:
        """Edges out of the outside supplier: the first ones."""
        return sum(a == SUPPLIER for a, _ in self.edges)

    @property
    def stores(self) -> tuple[str, ...]:
        return self.nodes[self.W :]

    @cached_property
    def ends(self) -> tuple[tuple[int, int], ...]:
        """Each edge's source and target by their place in `nodes`; the supplier is -1."""
        place = {SUPPLIER: -1} | {node: i for i, node in enumerate(self.nodes)}
        return tuple((place[a], place[b]) for a, b in self.edges)

    @cached_property
    def capacitated(self) -> bool:
        return bool(self.values.capacity.isfinite().any())

    @cached_property
    def longest(self) -> int:
        """The longest lead time, in periods."""
        return int(self.values.lead_time.max())


def parse(description: Mapping[str, Any], name: str, horizon: int | None = None) -> tuple[dict[str, Any], list[Finding]]:
    """The arguments of Network, and everything that is wrong with them. `horizon`: periods of the demand, if that is known."""
    nodes, edges = description["nodes"], description["edges"]
    kinds = {node: about.get("kind", "warehouse") for node, about in nodes.items()}
    pairs = [(str(edge.get("from", "")), str(edge.get("to", ""))) for edge in edges]
    found = [*_key_faults(description, name)]
    numbers = partial(_numbers, period=str(description.get("period", "week")), name=name, found=found)

    names = faults.upstream_first(list(nodes), pairs)
    names = sorted(names + [node for node in nodes if node not in names], key=lambda node: kinds[node] == "store")
    order = sorted(range(len(edges)), key=lambda i: pairs[i][0] != SUPPLIER)
    pairs, about_edge = [pairs[i] for i in order], [(f"edges.{pairs[i][0]}->{pairs[i][1]}", edges[i]) for i in order]
    about_node = [(f"nodes.{node}", nodes[node]) for node in names]
    columns = {
        "lead_time": [numbers(*each, "lead_time") for each in about_edge],
        "holding": [numbers(*each, "holding", 0.0 if kinds[node] == "transshipment" else None) for node, each in zip(names, about_node)],
        "underage": [numbers(*each, "underage") for node, each in zip(names, about_node) if kinds[node] == "store"],
        "procurement": [numbers(*each, "procurement", 0.0) for each in about_edge],
        "capacity": [numbers(*each, "capacity", math.inf) for each in about_edge],
    }
    counts = {len(entry) for column in columns.values() for entry in column} - {1}
    if len(counts) > 1:
        found.append(fault("value", name, f"lists of {' and of '.join(map(str, sorted(counts)))} numbers, for as many scenarios"))
        columns = {key: [entry[:1] for entry in column] for key, column in columns.items()}
    columns = {key: np.stack(np.broadcast_arrays(*column), 1) if column else np.zeros((1, 0)) for key, column in columns.items()}

    kind_list = [kinds[node] for node in names]
    found += _mode_faults(description.get("unmet", "lost"), description.get("objective", "cost"), name)
    found += faults.graph_faults(names, kind_list, pairs, name)
    found += faults.value_faults(names, kind_list, pairs, columns, name, horizon)
    parts = {"nodes": tuple(names), "kinds": tuple(kind_list), "edges": tuple(pairs), "name": name}
    parts |= {key: description[key] for key in ("unmet", "objective") if key in description}
    if not found:
        parts["values"] = Values(*(torch.tensor(columns[key], dtype=_DTYPES.get(key, torch.float32)) for key in Values._fields))
    return parts, found


_DTYPES = {"lead_time": torch.int64}


def _key_faults(description: Mapping[str, Any], name: str) -> Iterator[Finding]:
    for node, about in description["nodes"].items():
        yield from faults.unknown_keys(about, NODE_KEYS, f"{name}: nodes.{node}")
    for edge in description["edges"]:
        field = f"{name}: edges.{edge.get('from')}->{edge.get('to')}"
        yield from faults.unknown_keys(edge, EDGE_KEYS, field)
        yield from (fault("missing", field, f"has no {key!r}") for key in ("from", "to") if key not in edge)
    period = str(description.get("period", "week"))
    if period not in faults.PERIOD_DAYS:
        yield fault("unknown-unit", f"{name}: period", f"no unit {period!r}{nearest(period, faults.PERIOD_DAYS)}")


def _mode_faults(unmet: str, objective: str, name: str) -> Iterator[Finding]:
    for key, value, valid in (("unmet", unmet, UNMET), ("objective", objective, OBJECTIVES)):
        if value not in valid:
            yield fault("unknown-key", f"{name}: {key}", f"is {value!r}{nearest(str(value), valid)}")
    if (unmet, objective) == ("backlog", "profit"):
        yield fault("profit-backlog", f"{name}: objective", "profit of backlogged demand")


def _numbers(
    where: str, about: Mapping[str, Any], key: str, default: float | None = None, *, period: str, name: str, found: list[Finding]
) -> np.ndarray:
    """(1,) or (scenarios,) of an entry; a placeholder where it is wrong, which `found` then tells."""
    value, field = about.get(key, default), f"{name}: {where}.{key}"
    if value is None:
        found.append(fault("missing", field, f"{where} has no {key}"))
        return np.ones(1)
    if key == "lead_time" and isinstance(value, str):
        value = _periods(value, period, field, found)
    try:
        if isinstance(value, str | bool):
            raise TypeError
        return np.atleast_1d(np.asarray(value, float)).reshape(-1)
    except (TypeError, ValueError):
        found.append(fault("value", field, f"is {value!r}"))
        return np.ones(1)


def _periods(text: str, period: str, field: str, found: list[Finding]) -> float:
    """A time as in "14 days" or "2 weeks", in periods."""
    match = re.fullmatch(r"(\d+) *([a-z]+?)s?", text.strip())
    if match and match[2] in faults.PERIOD_DAYS:
        return int(match[1]) * faults.PERIOD_DAYS[match[2]] / faults.PERIOD_DAYS.get(period, 1)
    unit = match[2] if match else text
    found.append(fault("unknown-unit", field, f"is {text!r}: no unit {unit!r}{nearest(unit, faults.PERIOD_DAYS)}"))
    return 1.0
