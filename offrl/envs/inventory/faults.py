"""What can be wrong with a supply network: named findings, which `check` lists and a constructor raises."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from offrl.core.config import nearest
from offrl.data.checks.finding import Finding

SUPPLIER = "supplier"
KINDS = ("store", "warehouse", "transshipment")
PERIOD_DAYS = {"day": 1, "week": 7}

_KNOWN = {  # name: what it means, what to do
    "unreadable": ("What is behind this was not looked at.", "mend this first, then check again"),
    "unknown-key": ("A misspelt key would be passed over silently.", "correct or remove it"),
    "missing": ("There is no sensible default.", "state it"),
    "value": ("Costs, lead times and capacities are numbers, or lists of one number for each scenario.", "write a number"),
    "unknown-unit": ("Lead times and dates are counted in periods.", f"write one of {', '.join(PERIOD_DAYS)}"),
    "no-stores": ("Without demand there is nothing to plan for.", "give at least one node the kind store"),
    "reserved-name": ("The outside supplier has that name.", "rename the node"),
    "duplicate-node": ("Nodes go by their names.", "rename one"),
    "unknown-node": ("An edge joins two nodes, or the supplier and a node.", "correct the name, or add the node"),
    "duplicate-edge": ("Two edges between the same nodes cannot be told apart.", "remove one"),
    "cycle": ("Goods flow downstream, from the supplier to the stores.", "remove an edge of the circle"),
    "store-supplies": ("A store's stock meets its demand and nothing else.", "put a warehouse before it"),
    "unreachable-store": ("It will never have anything to sell.", "add the edges that lead to it from the supplier"),
    "unsupplied-node": ("It will never have anything to ship.", "add the edges that lead to it from the supplier"),
    "dead-end": ("What it receives never reaches a store.", "add an edge out of it, or remove the node"),
    "lead-time": ("What is ordered now arrives a whole number of periods later.", "write 1 or more, in periods"),
    "beyond-horizon": ("What is ordered on this edge never arrives within the data.", "shorten the lead time or lengthen the data"),
    "cost": ("Costs are finite and not negative.", "correct the number"),
    "capacity": ("A capacity is the most that may be ordered on an edge in a period.", "write a positive number, or leave it out"),
    "hub-capacity": ("A node that holds no stock ships all that it has.", "make it a warehouse, or limit what it orders"),
    "profit-backlog": ("Profit is booked on units sold from the shelf.", "set unmet: lost, or objective: cost"),
    "demand-value": ("Demand is counted in units: neither missing nor negative.", "correct the row"),
    "demand-store": ("Each store needs a demand series, and each series a store.", "correct the name, or add the rows"),
    "demand-item": ("A policy knows the items that it was trained for.", "correct the name, or add the rows"),
    "state-node": ("A row is of one of the network's nodes.", "correct the name"),
    "state-arrival": ("0 is on hand, k arrives k periods from now, and nothing takes longer than a lead time.", "correct the number"),
    "state-quantity": ("Stock and deliveries are counted in units; only a store whose demand waits may have less than 0.", "correct it"),
    "state-twice": ("A node's stock and each of its deliveries have one row.", "add the two up, or remove one"),
    "state-missing": ("Nothing is guessed: what a node has on hand must be known.", "add a row with arrives_in 0"),
    "demand-date": ("Series are on one grid of dates, a row for each store and date.", "add or remove the row; no demand is a 0"),
}  # fmt: skip


def fault(name: str, field: str, what: str, row: int | None = None) -> Finding:
    """An error of that kind; `field` says where: file, then node, edge or column."""
    return Finding(name, "error", field, 1, row, what, *_KNOWN[name], unit="rows" if row is not None else "")


class NetworkError(ValueError):
    """A supply network, or its demand, that cannot be simulated. `findings` holds all that is wrong."""

    def __init__(self, findings: Iterable[Finding]):
        self.findings = list(findings)
        super().__init__("\n".join(f"{each.field}: {each.what}; {each.advice}" for each in self.findings))


def unknown_keys(given: Mapping[Any, Any], valid: Sequence[str], field: str) -> Iterator[Finding]:
    for key in given:
        if key not in valid:
            yield fault("unknown-key", field, f"unknown key {key!r}{nearest(str(key), valid)}")


def graph_faults(nodes: Sequence[str], kinds: Sequence[str], edges: Sequence[tuple[str, str]], name: str) -> Iterator[Finding]:
    """Of the topology alone; `name` stands for the network in messages."""
    for node, count in Counter(nodes).items():
        if node == SUPPLIER:
            yield fault("reserved-name", f"{name}: nodes.{node}", "a node is called supplier")
        if count > 1:
            yield fault("duplicate-node", f"{name}: nodes.{node}", f"{count} nodes have this name")
    for node, kind in zip(nodes, kinds):
        if kind not in KINDS:
            yield fault("unknown-key", f"{name}: nodes.{node}.kind", f"no kind {kind!r}{nearest(str(kind), KINDS)}")
    if "store" not in kinds:
        yield fault("no-stores", f"{name}: nodes", "no node is a store")
    kind_of = dict(zip(nodes, kinds))
    for (source, target), count in Counter(edges).items():
        field = f"{name}: edges.{source}->{target}"
        for node in {source, target} - {SUPPLIER, *nodes} | ({SUPPLIER} & {target}):
            yield fault("unknown-node", field, f"no node {node!r}{nearest(str(node), nodes)}")
        if count > 1:
            yield fault("duplicate-edge", field, f"given {count} times")
        if kind_of.get(source) == "store":
            yield fault("store-supplies", field, f"the store {source} supplies {target}")
    yield from _flow_faults(nodes, kind_of, edges, name)


def _flow_faults(nodes: Sequence[str], kind_of: dict[str, str], edges: Sequence[tuple[str, str]], name: str) -> Iterator[Finding]:
    if circle := cycle(nodes, edges):
        yield fault("cycle", f"{name}: edges", " -> ".join(circle))
    supplied = reached([SUPPLIER], edges)
    useful = reached([node for node in nodes if kind_of[node] == "store"], [(b, a) for a, b in edges])
    for node in nodes:
        if node not in supplied:
            kind = "unreachable-store" if kind_of[node] == "store" else "unsupplied-node"
            yield fault(kind, f"{name}: nodes.{node}", f"no path leads from the supplier to the {kind_of[node]} {node}")
        if node not in useful:
            yield fault("dead-end", f"{name}: nodes.{node}", f"no path leads from {node} to a store")


def reached(start: Iterable[str], edges: Sequence[tuple[str, str]]) -> set[str]:
    """The nodes that edges lead to from `start`, and those of `start`."""
    found, todo = set(), list(start)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += [b for a, b in edges if a == node]
    return found


def upstream_first(nodes: Sequence[str], edges: Sequence[tuple[str, str]]) -> list[str]:
    """The nodes in an order in which sources go before targets, otherwise as given; those on and behind a cycle are left out."""
    order: list[str] = []
    while ready := [n for n in nodes if n not in order and all(a in order or a not in nodes for a, b in edges if b == n)]:
        order += ready
    return order


def cycle(nodes: Sequence[str], edges: Sequence[tuple[str, str]]) -> list[str]:
    """A path that ends where it began, or nothing."""
    stuck = set(nodes) - set(upstream_first(nodes, edges))
    path: list[str] = sorted(stuck)[:1]
    while path and path[-1] not in path[:-1]:
        path.append(min(a for a, b in edges if b == path[-1] and a in stuck))
    return path[path.index(path[-1]) :][::-1] if path else []


def value_faults(
    nodes: Sequence[str],
    kinds: Sequence[str],
    edges: Sequence[tuple[str, str]],
    columns: Mapping[str, np.ndarray],
    name: str,
    horizon: int | None = None,
) -> Iterator[Finding]:
    """Of the numbers: `columns` are the fields of Values, (B or 1, nodes, stores or edges); `horizon` is the number of periods."""
    stores = [node for node, kind in zip(nodes, kinds) if kind == "store"]
    kind_of = dict(zip(nodes, kinds))
    labels = {"holding": [f"nodes.{n}" for n in nodes], "underage": [f"nodes.{n}" for n in stores]}
    for key, column in columns.items():
        for i, where in enumerate(labels.get(key, [f"edges.{a}->{b}" for a, b in edges])):
            field, numbers = f"{name}: {where}.{key}", column[:, i]
            if key == "lead_time":
                bad = ~((numbers >= 1) & (numbers == np.round(numbers)))
                late = ~bad & (horizon is not None) & (numbers >= (horizon or 0))
                if late.any():
                    yield fault("beyond-horizon", field, f"{numbers[late][0]:g} periods, in data of {horizon}")
            else:
                bad = ~(numbers > 0) if key == "capacity" else ~((numbers >= 0) & np.isfinite(numbers))
            if bad.any():
                kind = {"lead_time": "lead-time", "capacity": "capacity"}.get(key, "cost")
                yield fault(kind, field, f"is {numbers[bad][0]:g}{_scenario(bad)}")
            elif key == "capacity" and np.isfinite(numbers).any() and kind_of.get(edges[i][0]) == "transshipment":
                yield fault("hub-capacity", field, f"limits what the transshipment node {edges[i][0]} ships")


def _scenario(bad: np.ndarray) -> str:
    return "" if len(bad) == 1 else f" in scenario {int(bad.argmax())}"
