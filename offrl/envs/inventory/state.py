"""Today's stock as a table: a row for what each node has on hand and for each delivery that is on its way."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offrl.core.checkpoint import atomic_write
from offrl.core.config import nearest
from offrl.envs.inventory.faults import NetworkError, fault
from offrl.envs.inventory.files import read_table
from offrl.envs.inventory.network import Network

COLUMNS = ("node", "arrives_in", "quantity")


def read_state(path: str | os.PathLike[str], network: Network, slots: int, items: Sequence[str] = ("",)) -> Tensor:
    """The inventory (items, N, slots) of a CSV or Parquet file with the columns node, arrives_in and quantity, and item where there are
    several.

    arrives_in is 0 for what is on hand, and k for what arrives k periods from now. Every node needs a row for what it has on hand, of each
    item; deliveries that are left out are none. Raises NetworkError with the first row of each kind that is wrong.
    """
    path = Path(path)
    try:
        table = read_table(path)
    except (OSError, ValueError) as error:
        raise NetworkError([fault("unreadable", path.name, " ".join(str(error).split()))]) from error
    columns = ("item", *COLUMNS) if len(items) > 1 else COLUMNS
    if missing := [key for key in columns if key not in table]:
        raise NetworkError([fault("missing", path.name, f"has no column {key!r}{nearest(key, table)}") for key in missing])
    owners = [str(item).strip() for item in table["item"]] if len(items) > 1 else [items[0]] * len(table["node"])
    made = torch.full((len(items), network.N, slots), math.nan, dtype=torch.float64)
    found: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for row, (item, node, arrives, quantity) in enumerate(zip(owners, *(table[key] for key in COLUMNS))):
        given = item, str(node).strip(), _number(arrives), _number(quantity)
        if wrong := _wrong(*given, network, slots, items):
            found.setdefault(wrong[:2], []).append((row, wrong[2]))
            continue
        place = items.index(item), network.nodes.index(given[1]), int(given[2])
        if not made[place].isnan():
            found.setdefault(("state-twice", "node"), []).append((row, f"gives {given[1]!r} with arrives_in {place[2]} again"))
        made[place] = given[3]
    faults = [
        fault(kind, f"{path.name}: {column}", f"row {rows[0][0]} {rows[0][1]}{_more(rows)}", rows[0][0])
        for (kind, column), rows in found.items()
    ]
    unknown = made[..., 0].isnan().nonzero().tolist()
    if unknown and not faults:  # a row that is wrong may be the one that is missing
        (item, node), of = unknown[0], f" of {items[unknown[0][0]]!r}" if len(items) > 1 else ""
        faults = [fault("state-missing", f"{path.name}: node", f"no row says what {network.nodes[node]!r} has on hand{of}{_more(unknown)}")]
    if faults:
        raise NetworkError(faults)
    return made.nan_to_num(0.0).float()


def _wrong(item: str, node: str, arrives: float, quantity: float, network: Network, slots: int, items: Sequence[str]) -> Any:
    """The kind, column and text of what is wrong with a row, if anything."""
    if item not in items:
        return "demand-item", "item", f"is of {item!r}{nearest(item, items)}"
    if node not in network.nodes:
        return "state-node", "node", f"is of {node!r}{nearest(node, network.nodes)}"
    if not (arrives.is_integer() and 0 <= arrives < slots):
        return "state-arrival", "arrives_in", f"has {arrives:g} for {node!r}; valid: 0 to {slots - 1}"
    may_wait = network.unmet == "backlog" and node in network.stores and arrives == 0
    if not math.isfinite(quantity) or quantity < 0 and not may_wait:
        return "state-quantity", "quantity", f"has {quantity:g} for {node!r}"
    return None


def _more(rows: Sequence[Any]) -> str:
    return f" (and {len(rows) - 1} more)" if len(rows) > 1 else ""


def _number(cell: Any) -> float:
    try:
        return float(cell)
    except (TypeError, ValueError):
        return math.nan


def write_state(path: str | os.PathLike[str], inventory: Tensor, network: Network, items: Sequence[str] = ("",)) -> None:
    """The table that `read_state` reads as `inventory` (items, N, slots)."""
    rows = [
        (item, node, arrives, quantity)
        for item, nodes in zip(items, inventory.tolist())
        for node, slots in zip(network.nodes, nodes)
        for arrives, quantity in enumerate(slots)
        if arrives == 0 or quantity != 0
    ]
    write_rows(path, ("item", *COLUMNS), rows, items)


def write_rows(path: str | os.PathLike[str], columns: Sequence[str], rows: Sequence[Sequence[Any]], items: Sequence[str]) -> None:
    """A CSV file, without its first column where there is one item."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([row[len(items) == 1 :] for row in (columns, *rows)])
    atomic_write(path, text.getvalue().encode())
