"""Supply networks in a YAML file, their demand in CSV or Parquet: `load` reads them, `check` lists all that is wrong."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

from offrl.core.config import nearest
from offrl.data.checks.finding import Finding
from offrl.envs.inventory import faults
from offrl.envs.inventory.demand import History
from offrl.envs.inventory.faults import PERIOD_DAYS, NetworkError, fault
from offrl.envs.inventory.network import Network, parse

KEYS = ("nodes", "edges", "unmet", "objective", "period", "demand")
COLUMNS = ("date", "store", "demand")


class Loaded(NamedTuple):
    network: Network
    history: History | None  # None where the file names no demand


def load(path: str | os.PathLike[str]) -> Loaded:
    """The network that a YAML file describes, and its demand; stores are in the network's order. Raises NetworkError with all findings."""
    loaded, found = _read(Path(path))
    if loaded is None:
        raise NetworkError(found)
    return loaded


def check(path: str | os.PathLike[str]) -> list[Finding]:
    """Everything that keeps `load` from reading a file: empty exactly where it can."""
    return _read(Path(path))[1]


def read_demand(path: str | os.PathLike[str], stores: Sequence[str], period: str = "week") -> History:
    """A network's table of demand on its own, its stores in the order that is given. Raises NetworkError."""
    history, found = _history(Path(path), list(stores), period)
    if history is None:
        raise NetworkError(found)
    return history


def _read(path: Path) -> tuple[Loaded | None, list[Finding]]:
    try:
        description = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return None, [fault("unreadable", str(path), " ".join(str(error).split()))]
    found = list(_shape_faults(description, path.name))
    if found:
        return None, found
    found += faults.unknown_keys(description, KEYS, path.name)
    stores = [node for node, about in description["nodes"].items() if about.get("kind") == "store"]
    history, table_faults = None, []
    if (table := description.get("demand")) is not None:
        history, table_faults = _history(path.parent / str(table), stores, str(description.get("period", "week")))
    parts, network_faults = parse(description, path.name, None if history is None else history.demand.shape[-1])
    found += [*network_faults, *table_faults]
    if found:
        return None, found
    network = Network(**parts)
    if history is not None:
        order = [stores.index(store) for store in network.stores]
        history = History(history.demand[:, order], network.stores, history.dates, history.items)
    return Loaded(network, history), []


def _shape_faults(description: Any, name: str) -> list[Finding]:
    """Where the file's parts are not what `parse` can go through."""
    if not isinstance(description, Mapping):
        return [fault("unreadable", name, f"the file is to be a mapping with the keys {', '.join(KEYS)}")]
    found = [fault("missing", name, f"has no {key!r}{nearest(key, description)}") for key in KEYS[:2] if key not in description]
    nodes, edges = description.get("nodes", {}), description.get("edges", [])
    if not isinstance(nodes, Mapping) or not all(isinstance(node, str) and isinstance(about, Mapping) for node, about in nodes.items()):
        found.append(fault("unreadable", f"{name}: nodes", "nodes are to be a mapping from names to mappings"))
    if not isinstance(edges, list) or not all(isinstance(edge, Mapping) for edge in edges):
        found.append(fault("unreadable", f"{name}: edges", "edges are to be a list of mappings"))
    return found


def read_table(path: Path) -> dict[str, list[Any]]:
    """The columns of a CSV or Parquet file."""
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise ImportError('tables need pyarrow: pip install "offrl[tables]"') from None
        return pyarrow.parquet.read_table(path).to_pydict()
    with path.open(newline="", encoding="utf-8-sig") as lines:
        head, *lines = [row for row in csv.reader(lines) if row]
    for i, row in enumerate(lines):
        if len(row) != len(head):
            raise ValueError(f"row {i} has {len(row)} cells, the head {len(head)}")
    return {name.strip(): list(column) for name, column in zip(head, zip(*lines) if lines else [[] for _ in head])}


def _history(path: Path, stores: list[str], period: str) -> tuple[History | None, list[Finding]]:
    """Rows of (item,) date, store and demand as series, one for each item and store; what is wrong keeps them from being made."""
    name = path.name
    try:
        table = read_table(path)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors; a module that is missing is not a fault of the file
        return None, [fault("unreadable", name, " ".join(str(error).split()))]
    if missing := [key for key in COLUMNS if key not in table]:
        return None, [fault("missing", name, f"has no column {key!r}{nearest(key, table)}") for key in missing]
    if not table["date"]:
        return None, [fault("missing", name, "has no rows")]
    dates, demand, found = _dates(table["date"], name), _numbers(table["demand"], name), []
    found += [*dates[1], *demand[1]]
    owners = [str(store).strip() for store in table["store"]]
    for store in dict.fromkeys(owners):
        if store not in stores:
            row = owners.index(store)
            found.append(fault("demand-store", f"{name}: store", f"row {row} is of {store!r}{nearest(store, stores)}", row))
    found += [fault("demand-store", f"{name}: store", f"no row is of the store {store!r}") for store in stores if store not in owners]
    if found:
        return None, found
    items = [str(item) for item in table.get("item", [""] * len(owners))]
    return _grid(items, owners, dates[0], demand[0], stores, PERIOD_DAYS.get(period, 7), name)


def _dates(column: list[Any], name: str) -> tuple[np.ndarray, list[Finding]]:
    made = []
    for row, cell in enumerate(column):
        try:
            made.append(np.datetime64(cell if isinstance(cell, date) else date.fromisoformat(str(cell).strip()), "D"))
        except ValueError:
            return np.zeros(0), [fault("demand-date", f"{name}: date", f"row {row} has {cell!r}, which is no date like 2024-12-31", row)]
    return np.array(made), []


def _numbers(column: list[Any], name: str) -> tuple[np.ndarray, list[Finding]]:
    made = np.full(len(column), np.nan)
    for row, cell in enumerate(column):
        with suppress(TypeError, ValueError):  # what is no number stays NaN
            made[row] = float(cell)
    bad = np.flatnonzero(~(np.isfinite(made) & (made >= 0)))
    if not len(bad):
        return made, []
    first = int(bad[0])
    return made, [
        fault("demand-value", f"{name}: demand", f"{len(bad)} rows are no demand, the first is row {first}: {column[first]!r}", first)
    ]


def _grid(
    items: list[str], owners: list[str], dates: np.ndarray, demand: np.ndarray, stores: list[str], days: int, name: str
) -> tuple[History | None, list[Finding]]:
    names = list(dict.fromkeys(items))
    of_item, of_store = ({name: i for i, name in enumerate(group)} for group in (names, stores))
    span = (dates - dates.min()).astype(int)
    if len(off := np.flatnonzero(span % days)):
        row = int(off[0])
        return None, [
            fault("demand-date", f"{name}: date", f"row {row} has {dates[row]}, which is not {days} days on from {dates.min()}", row)
        ]
    made = np.full((len(names), len(stores), span.max() // days + 1), np.nan, np.float32)
    place = np.array([of_item[item] for item in items]), np.array([of_store[owner] for owner in owners]), span // days
    flat = np.ravel_multi_index(place, made.shape)
    _, first, counts = np.unique(flat, return_index=True, return_counts=True)
    if (counts > 1).any():
        again = int(np.flatnonzero(flat == flat[first[counts > 1][0]])[1])
        return None, [fault("demand-date", f"{name}: date", f"row {again} gives {owners[again]!r} on {dates[again]} again", again)]
    made[place] = demand
    if len(gaps := np.argwhere(np.isnan(made))):
        item, store, t = gaps[0]
        of = f" of {names[item]!r}" if names[item] else ""
        when = dates.min() + int(t) * days
        what = f"{len(gaps)} dates are missing, the first {when} in the store {stores[store]!r}{of}"
        return None, [fault("demand-date", f"{name}: date", what)]
    grid = dates.min() + days * np.arange(made.shape[-1])
    return History(torch.from_numpy(made), tuple(stores), grid, tuple(names)), []
