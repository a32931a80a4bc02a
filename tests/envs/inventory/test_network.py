"""Networks from names, files and HeteroData: what is right survives the way there and back, what is wrong has a name and a place."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import yaml
from networks import crossed, demands, smooth, store

from offrl.data.checks.finding import Finding
from offrl.envs.inventory.faults import SUPPLIER, NetworkError
from offrl.envs.inventory.files import check, load
from offrl.envs.inventory.hetero import from_hetero, to_hetero
from offrl.envs.inventory.network import Network, Values
from offrl.envs.inventory.rollout import rollout
from offrl.envs.inventory.settings import SETTINGS
from offrl.envs.inventory.simulator import Simulator

FILE = {
    "nodes": {
        "north": {"kind": "store", "holding": 1.0, "underage": 9.0},
        "depot": {"holding": 0.3},
        "south": {"kind": "store", "holding": 0.8, "underage": 7.0},
    },
    "edges": [
        {"from": "depot", "to": "north", "lead_time": "14 days"},
        {"from": "supplier", "to": "depot", "lead_time": 3, "procurement": 0.5, "capacity": 40},
        {"from": "depot", "to": "south", "lead_time": 1},
    ],
    "unmet": "lost",
    "objective": "profit",
    "period": "week",
    "demand": "demand.csv",
}
WEEKS = [f"2024-01-{day:02}" for day in (1, 8, 15, 22)]


def rows(items=("",)):
    return [(item, day, shop, 10 * i + t) for i, item in enumerate(items) for t, day in enumerate(WEEKS) for shop in ("south", "north")]


def write(folder, description=FILE, table=None, head="date,store,demand"):
    (folder / "network.yaml").write_text(description if isinstance(description, str) else yaml.safe_dump(description))
    lines = [",".join(map(str, row[1:])) for row in rows()] if table is None else table
    (folder / "demand.csv").write_text("\n".join([head, *lines]) + "\n")
    return folder / "network.yaml"


def same(a, b):
    assert (a.nodes, a.kinds, a.edges, a.unmet, a.objective) == (b.nodes, b.kinds, b.edges, b.unmet, b.objective)
    for key, x, y in zip(Values._fields, a.values, b.values):
        assert x.dtype == y.dtype and torch.equal(x, y), key


def test_a_file_is_a_network_and_its_demand(tmp_path):
    network, history = load(write(tmp_path))
    assert network.nodes == ("depot", "north", "south") and network.stores == ("north", "south")
    assert network.edges == (("supplier", "depot"), ("depot", "north"), ("depot", "south"))
    assert (network.N, network.S, network.E, network.W, network.K, network.longest) == (3, 2, 3, 1, 1, 3)
    assert network.values.lead_time.tolist() == [[3, 2, 1]] and network.values.capacity.tolist() == [[40, float("inf"), float("inf")]]
    assert network.values.holding[0].tolist() == pytest.approx([0.3, 1.0, 0.8]) and network.values.underage.tolist() == [[9, 7]]
    assert network.values.procurement.tolist() == [[0.5, 0, 0]] and (network.unmet, network.objective) == ("lost", "profit")
    assert history.demand.tolist() == [[[0, 1, 2, 3]] * 2] and history.dates.astype(str).tolist() == WEEKS
    assert check(tmp_path / "network.yaml") == []


def test_items_are_scenarios_and_parquet_is_as_good_as_csv(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = rows(("tea", "ale"))
    path = write(tmp_path, table=[",".join(map(str, row)) for row in table], head="item,date,store,demand")
    first = load(path).history
    assert first.items == ("tea", "ale") and first.demand[:, 0].tolist() == [[0, 1, 2, 3], [10, 11, 12, 13]]
    columns = dict(zip(("item", "date", "store", "demand"), map(list, zip(*table))))
    columns["date"] = np.array(columns["date"], "datetime64[D]")
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "demand.parquet")
    second = load(write(tmp_path, FILE | {"demand": "demand.parquet"})).history
    assert torch.equal(first.demand, second.demand) and (first.dates == second.dates).all() and first.items == second.items


def test_stores_keep_their_demand_whatever_the_order(tmp_path):
    """Of the rows, and of the file's nodes: a store that the supplier serves itself goes before those behind a warehouse."""
    path = write(
        tmp_path,
        table=[f"{day},{shop},{(100 if shop == 'north' else 0) + t}" for shop in ("south", "north") for t, day in enumerate(WEEKS)],
    )
    assert load(path).history.demand.tolist() == [[[100, 101, 102, 103], [0, 1, 2, 3]]]
    table = (tmp_path / "demand.csv").read_text().split()[1:]
    network, history = load(write(tmp_path, broken(edge(2, **{"from": "supplier"})), table))
    assert network.stores == history.stores == ("south", "north") and history.demand[0, 1].tolist() == [100, 101, 102, 103]


def broken(change):
    description = copy.deepcopy(FILE)
    change(description)
    return description


def edge(i, **values):
    return lambda d: d["edges"][i].update(values)


def node(name, **values):
    return lambda d: d["nodes"].setdefault(name, {}).update(values)


def more(**values):
    return lambda d: d["edges"].append({"lead_time": 1} | {"from" if k == "source" else "to": v for k, v in values.items()})


def loop(d):
    more(source="depot", target="b")(d)
    more(source="b", target="depot")(d)


BROKEN = {
    "cycle": [(lambda d: (node("b", holding=1)(d), loop(d)), "edges", "b -> depot -> b")],
    "unreachable-store": [(lambda d: d["edges"].pop(2), "nodes.south", "store south")],
    "unsupplied-node": [(lambda d: (node("b", holding=1)(d), more(source="b", target="north")(d)), "nodes.b", "warehouse b")],
    "dead-end": [(lambda d: (node("b", holding=1)(d), more(source="supplier", target="b")(d)), "nodes.b", "from b")],
    "cost": [
        (node("south", holding=-0.8), "nodes.south.holding", "is -0.8"),
        (node("north", underage=[9, float("nan")]), "nodes.north.underage", "is nan in scenario 1"),
        (edge(1, procurement=-1), "edges.supplier->depot.procurement", "is -1"),
    ],
    "capacity": [(edge(1, capacity=0), "edges.supplier->depot.capacity", "is 0")],
    "lead-time": [
        (edge(2, lead_time=0), "edges.depot->south.lead_time", "is 0"),
        (edge(2, lead_time=1.5), "edges.depot->south.lead_time", "is 1.5"),
        (edge(2, lead_time="10 days"), "edges.depot->south.lead_time", "is 1.42857"),
    ],
    "beyond-horizon": [(edge(2, lead_time=4), "edges.depot->south.lead_time", "4 periods, in data of 4")],
    "duplicate-edge": [(more(source="depot", target="south"), "edges.depot->south", "given 2 times")],
    "unknown-key": [
        (edge(0, leadtime=2), "edges.depot->north", "unknown key 'leadtime'; did you mean lead_time?"),
        (node("south", undrage=2), "nodes.south", "unknown key 'undrage'; did you mean underage?"),
        (lambda d: d.update(backlog=True), "network.yaml", "unknown key 'backlog'"),
        (lambda d: d.update(unmet="backlogged"), "unmet", "did you mean backlog?"),
        (node("south", kind="sotre"), "nodes.south.kind", "no kind 'sotre'; did you mean store?"),
    ],
    "unknown-unit": [
        (lambda d: d.update(period="weak"), "period", "no unit 'weak'; did you mean week?"),
        (edge(2, lead_time="2 wekes"), "edges.depot->south.lead_time", "did you mean week?"),
    ],
    "unknown-node": [
        (edge(2, to="sout"), "edges.depot->sout", "no node 'sout'; did you mean south?"),
        (edge(2, to="supplier"), "edges.depot->supplier", "no node 'supplier'"),
    ],
    "no-stores": [(lambda d: [about.pop("kind", 0) for about in d["nodes"].values()], "nodes", "no node is a store")],
    "store-supplies": [(more(source="north", target="south"), "edges.north->south", "the store north supplies south")],
    "missing": [
        (lambda d: d["nodes"]["south"].pop("underage"), "nodes.south.underage", "has no underage"),
        (lambda d: d["nodes"]["depot"].pop("holding"), "nodes.depot.holding", "has no holding"),
        (lambda d: d["edges"][0].pop("lead_time"), "edges.depot->north.lead_time", "has no lead_time"),
        (lambda d: d["edges"][0].pop("to"), "edges.depot->None", "has no 'to'"),
        (lambda d: d.pop("edges"), "network.yaml", "has no 'edges'"),
    ],
    "value": [
        (node("south", holding="dear"), "nodes.south.holding", "is 'dear'"),
        (node("south", holding=True), "nodes.south.holding", "is True"),
        (lambda d: (node("south", holding=[1, 2])(d), node("north", holding=[1, 2, 3])(d)), "network.yaml", "lists of 2 and of 3 numbers"),
    ],
    "reserved-name": [(node("supplier", holding=1), "nodes.supplier", "a node is called supplier")],
    "profit-backlog": [(lambda d: d.update(unmet="backlog"), "objective", "profit of backlogged demand")],
    "hub-capacity": [(lambda d: (node("depot", kind="transshipment")(d), edge(2, capacity=3)(d)), "edges.depot->south.capacity", "depot")],
    "unreadable": [
        (lambda d: d.update(nodes=["north"]), "nodes", "are to be a mapping"),
        (lambda d: d.update(edges={"a": 1}), "edges", "are to be a list"),
        (lambda d: d.update(demand="orders.csv"), "orders.csv", "No such file"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "change", "field", "what"), [(name, *case) for name, cases in BROKEN.items() for case in cases])
def test_what_is_wrong_with_a_network_is_named(tmp_path, name, change, field, what):
    path = write(tmp_path, broken(change))
    found = check(path)
    assert any(each.name == name and field in each.field and what in each.what for each in found), found
    assert all(isinstance(each, Finding) and each.severity == "error" and each.advice for each in found)
    with pytest.raises(NetworkError) as error:
        load(path)
    assert error.value.findings == found and what in str(error.value)


LINES = [",".join(map(str, row[1:])) for row in rows()]


@pytest.mark.parametrize(
    ("name", "table", "head", "field", "what"),
    [
        ("demand-value", [*LINES[:3], "2024-01-08,north,nan", *LINES[4:]], None, "demand.csv: demand", "row 3: 'nan'"),
        ("demand-value", [*LINES[:3], "2024-01-08,north,-2", *LINES[4:]], None, "demand.csv: demand", "row 3: '-2'"),
        ("demand-value", [*LINES[:3], "2024-01-08,north,", *LINES[4:]], None, "demand.csv: demand", "row 3: ''"),
        ("demand-store", [line for line in LINES if "south" not in line], None, "demand.csv: store", "no row is of the store 'south'"),
        ("demand-store", [*LINES, "2024-01-08,nroth,2"], None, "demand.csv: store", "row 8 is of 'nroth'; did you mean north?"),
        ("demand-store", [*LINES, "2024-01-08,depot,2"], None, "demand.csv: store", "row 8 is of 'depot'"),
        (
            "demand-date",
            [*LINES[:3], *LINES[4:]],
            None,
            "demand.csv: date",
            "1 dates are missing, the first 2024-01-08 in the store 'north'",
        ),
        ("demand-date", [*LINES, LINES[2]], None, "demand.csv: date", "row 8 gives 'south' on 2024-01-08 again"),
        ("demand-date", [*LINES, "2024-01-30,north,2"], None, "demand.csv: date", "row 8 has 2024-01-30, which is not 7 days on"),
        ("demand-date", [*LINES, "30.1.2024,north,2"], None, "demand.csv: date", "row 8 has '30.1.2024'"),
        ("missing", LINES, "date,store,demands", "demand.csv", "no column 'demand'; did you mean demands?"),
        ("missing", [], None, "demand.csv", "has no rows"),
        ("unreadable", [*LINES, "2024-01-30,north"], None, "demand.csv", "row 8 has 2 cells"),
    ],
)
def test_what_is_wrong_with_demand_is_named(tmp_path, name, table, head, field, what):
    found = check(write(tmp_path, table=table, head=head or "date,store,demand"))
    assert [(each.name, each.field) for each in found] == [(name, field)] and what in found[0].what, found
    with pytest.raises(NetworkError, match="demand.csv"):
        load(tmp_path / "network.yaml")


def test_all_faults_are_found_at_once(tmp_path):
    def change(d):
        edge(2, lead_time=0)(d), node("south", holding=-1, colour="red")(d)

    assert {each.name for each in check(write(tmp_path, broken(change), table=["2024-01-01,nort,1"]))} == {
        "lead-time", "cost", "unknown-key", "demand-store",
    }  # fmt: skip
    assert [each.name for each in check(write(tmp_path, "nodes: [}"))] == ["unreadable"]
    assert [each.name for each in check(tmp_path / "nowhere.yaml")] == ["unreadable"]


def test_a_network_made_without_names_is_checked_too():
    network = crossed()
    with pytest.raises(NetworkError, match="nodes.plant"):
        Network(
            network.nodes, network.kinds, network.edges[1:], Values(*(x[:, 1:] if x.shape[1] == network.E else x for x in network.values))
        )
    with pytest.raises(ValueError, match="lead_time has shape"):
        Network(network.nodes, network.kinds, network.edges, network.values._replace(lead_time=network.values.lead_time[:, 1:]))
    with pytest.raises(ValueError, match="Network.of sorts them"):
        Network(network.nodes, network.kinds, network.edges[::-1], network.values)
    with pytest.raises(NetworkError, match="2 nodes have this name"):
        values = Values(*(torch.ones(1, n, dtype=d) for n, d in ((2, torch.int64), (2, None), (2, None), (2, None), (2, None))))
        Network(("s", "s"), ("store", "store"), ((SUPPLIER, "s"), (SUPPLIER, "s")), values)


@pytest.mark.parametrize("make", [store, crossed, lambda: crossed("backlog", hub=True), lambda: store([1, 3, 2]), *SETTINGS.values()])
def test_networks_survive_heterodata(make):
    network = make()
    network = network if isinstance(network, Network) else network.network()
    data = to_hetero(network)
    same(from_hetero(data), network)
    for kind in (key for key in data.node_types if key != SUPPLIER):
        del data[kind]["place"]
    other = from_hetero(data)
    assert sorted(other.edges) == sorted(network.edges)


def test_heterodata_of_ones_own():
    from torch_geometric.data import HeteroData

    data = HeteroData(unmet="backlog")
    data["supplier"].num_nodes, data["warehouse"].num_nodes, data["store"].num_nodes = 1, 1, 2
    data["warehouse"].holding, data["store"].holding = torch.tensor([0.5]), torch.tensor([1.0, 2.0])
    data["store"].underage = torch.tensor([9.0, 4.0])
    data["supplier", "to", "warehouse"].edge_index = torch.tensor([[0], [0]])
    data["supplier", "to", "warehouse"].lead_time = torch.tensor([3])
    data["warehouse", "to", "store"].edge_index = torch.tensor([[0, 0], [1, 0]])
    data["warehouse", "to", "store"].lead_time = torch.tensor([[2, 2], [1, 5]])
    network = from_hetero(data)
    assert network.nodes == ("warehouse0", "store0", "store1") and network.unmet == "backlog"
    assert dict(zip(network.edges, network.values.lead_time.T.tolist()))["warehouse0", "store0"] == [1, 5]
    assert network.values.underage.tolist() == [[9, 4]] and network.values.lead_time.shape == (2, 3)
    data["store"].underage = -data["store"].underage
    with pytest.raises(NetworkError, match="HeteroData: nodes.store0.underage: is -9"):
        from_hetero(data)
    data["stores"].num_nodes = 1
    with pytest.raises(NetworkError, match="no node type 'stores'; did you mean store?"):
        from_hetero(data)


def test_the_order_of_a_description_changes_nothing_but_the_order():
    """The same network from shuffled names, under a policy that goes by names."""
    network, parameter = crossed(), torch.tensor([0.4, 0.1]).double()
    nodes = {
        name: {"kind": kind, "holding": float(network.values.holding[0, i])}
        for i, (name, kind) in enumerate(zip(network.nodes, network.kinds))
    }
    for name, p in zip(network.stores, network.values.underage[0].tolist()):
        nodes[name]["underage"] = p
    edges = [
        {"from": a, "to": b, "lead_time": int(n), "procurement": float(c)}
        for (a, b), n, c in zip(network.edges, network.values.lead_time[0], network.values.procurement[0])
    ]
    other = Network.of(dict(reversed(nodes.items())), edges[::-1])
    assert other.nodes != network.nodes and other.edges != network.edges
    given = demands(network)
    place, stores = [network.nodes.index(n) for n in other.nodes], [network.stores.index(n) for n in other.stores]
    sorted_edges, back = [network.edges.index(e) for e in other.edges], [other.nodes.index(n) for n in network.nodes]
    moved = given._replace(demand=given.demand[:, stores], initial=given.initial[:, place], past=given.past[:, stores])
    moved = moved._replace(values=Values(*(x.double() if x.is_floating_point() else x for x in other.values)))
    policy = smooth(network, parameter)
    once = rollout(Simulator(network), policy, given).total
    again = rollout(Simulator(other), lambda obs: policy(obs._replace(inventory=obs.inventory[:, back]))[:, sorted_edges], moved).total
    torch.testing.assert_close(again, once, rtol=1e-6, atol=0)
