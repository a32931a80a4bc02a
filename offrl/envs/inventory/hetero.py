"""Networks as PyTorch Geometric's HeteroData and back.

Node types: supplier (one node), warehouse, transshipment and store, with `name` (a list), `holding` and, of stores, `underage`. Edge types
(source, "supplies", target), with edge_index, `lead_time` and, if wanted, `procurement` and `capacity`. Of the data: `unmet`, `objective`.
Numbers are (nodes or edges,), or (nodes or edges, B) where scenarios differ. `place` keeps the network's order of nodes and edges.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from offrl.core.config import nearest
from offrl.envs.inventory.faults import KINDS, SUPPLIER, NetworkError, fault
from offrl.envs.inventory.network import EDGE_KEYS, NODE_KEYS, Network


def to_hetero(network: Network) -> Any:
    """A torch_geometric.data.HeteroData. Raises ImportError without torch_geometric."""
    try:
        from torch_geometric.data import HeteroData
    except ImportError:
        raise ImportError('HeteroData needs torch_geometric: pip install "offrl[hdpo]"') from None
    data, values, place = HeteroData(unmet=network.unmet, objective=network.objective), network.values, {SUPPLIER: 0}
    data[SUPPLIER].num_nodes = 1
    for kind in dict.fromkeys(network.kinds):
        chosen = [i for i, each in enumerate(network.kinds) if each == kind]
        place |= {network.nodes[i]: k for k, i in enumerate(chosen)}
        data[kind].name, data[kind].num_nodes = [network.nodes[i] for i in chosen], len(chosen)
        data[kind].place, data[kind].holding = torch.tensor(chosen), _columns(values.holding, chosen)
        if kind == "store":
            data[kind].underage = _columns(values.underage, [i - network.W for i in chosen])
    kind_of = {SUPPLIER: SUPPLIER} | dict(zip(network.nodes, network.kinds))
    ends = [(kind_of[a], kind_of[b]) for a, b in network.edges]
    for source, target in dict.fromkeys(ends):
        chosen = [e for e, each in enumerate(ends) if each == (source, target)]
        edge = data[source, "supplies", target]
        edge.edge_index = torch.tensor([[place[node] for node in network.edges[e]] for e in chosen]).T
        edge.place = torch.tensor(chosen)
        for key in ("lead_time", "procurement", "capacity"):
            setattr(edge, key, _columns(getattr(values, key), chosen))
    return data


def from_hetero(data: Any, name: str = "HeteroData") -> Network:
    """The network that a HeteroData describes. Nodes without a name are called after their type. Raises NetworkError."""
    nodes, names, found = [], {SUPPLIER: [SUPPLIER]}, []
    for kind in data.node_types:
        if kind not in (SUPPLIER, *KINDS):
            found.append(fault("unknown-key", f"{name}: {kind}", f"no node type {kind!r}{nearest(kind, (SUPPLIER, *KINDS))}"))
        elif kind != SUPPLIER:
            store, count = data[kind], data[kind].num_nodes
            names[kind] = list(store.get("name", [f"{kind}{i}" for i in range(count)]))
            about = [{"kind": kind} | _entries(store, NODE_KEYS[1:], i) for i in range(count)]
            nodes += zip(_place(store, count), names[kind], about)
    if found:
        raise NetworkError(found)
    edges = []
    for source, relation, target in data.edge_types:
        store = data[source, relation, target]
        index = store.edge_index.T.tolist()
        about = [{"from": names[source][a], "to": names[target][b]} | _entries(store, EDGE_KEYS[2:], i) for i, (a, b) in enumerate(index)]
        edges += zip(_place(store, len(index)), range(len(index)), about)
    described = {node: about for _, node, about in sorted(nodes, key=lambda entry: entry[0])}
    arranged = [about for *_, about in sorted(edges, key=lambda entry: entry[0])]
    return Network.of(described, arranged, data.get("unmet", "lost"), data.get("objective", "cost"), name=name)


def _columns(values: Tensor, chosen: list[int]) -> Tensor:
    """(n,) or (n, B) of (1 or B, ...)."""
    return values[0, chosen] if len(values) == 1 else values[:, chosen].T


def _entries(store: Any, keys: tuple[str, ...], i: int) -> dict[str, Any]:
    return {key: store[key][i].tolist() for key in keys if key in store}


def _place(store: Any, count: int) -> list[int]:
    return store["place"].tolist() if "place" in store else [0] * count
