"""What a planner uses: orders from today's stock, and a report, both with answers by hand."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
import torch
import yaml

from offrl.core.checkpoint import Checkpoints
from offrl.core.config import ConfigError
from offrl.envs.inventory.network import Network
from offrl.envs.inventory.policies import ship_whole
from offrl.envs.inventory.simulator import Simulator
from offrl.recipes import hdpo, planner, planner_report
from offrl.training.run import RunError, read_json, write_json

NODES = {
    "depot": {"holding": 0.1},
    "a": {"kind": "store", "holding": 1.0, "underage": 9.0},
    "b": {"kind": "store", "holding": 1.0, "underage": 9.0},
}
EDGES = [
    {"from": "supplier", "to": "depot", "lead_time": 1, "procurement": 0.5},
    {"from": "depot", "to": "a", "lead_time": 1},
    {"from": "depot", "to": "b", "lead_time": 1},
]
STATE = "node,arrives_in,quantity\ndepot,0,20\na,0,9\nb,0,4\n"


def write(folder, items=("",), periods=100, demand=lambda item, store, t: 6, **changes):
    """A depot and two stores, 6 sold a week in each unless told otherwise."""
    (folder / "net.yaml").write_text(yaml.safe_dump({"nodes": NODES, "edges": EDGES, "demand": "demand.csv"} | changes))
    dates = np.datetime64("2022-01-03") + 7 * np.arange(periods)
    rows = [f"{i},{d},{s},{demand(i, s, t)}\n" for i in items for t, d in enumerate(dates) for s in ("a", "b")]
    (folder / "demand.csv").write_text("item,date,store,demand\n" + "".join(rows))
    return folder / "net.yaml"


def trained(folder, policy="base_stock", levels=None, window=0, whole=False, **changes):
    """A run of one step; with `levels`, in units of demand, instead of what it learned."""
    agent = {"policy": policy, "lr": 1e-4, "hidden": [4], "width": 4}
    config = {"steps": 1, "eval_every": 1, "whole": whole, "agent": agent, "network": {"window": window, "warm_up": 10}}
    (run,) = hdpo.train(str(write(folder, **changes)), config, runs=folder / "runs")
    if levels is not None:
        best = Checkpoints(run / "best", keep=1)
        meta = best.latest().meta
        best.save(
            2, {"params": {"policy": {"levels": torch.tensor(levels)}}}, {key: meta[key] for key in meta if key not in ("step", "format")}
        )
    return run


def state(folder, text=STATE):
    (folder / "state.csv").write_text(text)
    return folder / "state.csv"


def test_an_order_is_the_level_less_the_position_and_what_is_short_is_shared(tmp_path, run):
    """Levels 30, 15 and 10: the depot lacks 10; the stores want 6 and 6, then 6 and 6 of 4."""
    folder = trained(tmp_path, levels=[5.0, 2.5, 10 / 6])
    (tmp_path / "net.yaml").unlink(), (tmp_path / "demand.csv").unlink()
    code, out, err = run("hdpo", "order", folder, "--state", state(tmp_path), "--out", tmp_path / "orders.csv")
    assert code == 0 and "supplier -> depot: 10, arrives in 1 week\n" in out, err
    with open(tmp_path / "orders.csv") as lines:
        rows = list(csv.DictReader(lines))
    assert [(row["from"], row["to"], float(row["quantity"]), row["arrives_in"]) for row in rows] == [
        ("supplier", "depot", 10, "1"), ("depot", "a", 6, "1"), ("depot", "b", 6, "1")
    ]  # fmt: skip
    policy = planner.load(folder)
    short = policy.orders(torch.tensor([[[4.0], [9.0], [4.0]]]))
    torch.testing.assert_close(short, torch.tensor([[26.0, 2.0, 2.0]]))
    assert policy.orders(torch.tensor([[[40.0], [20.0], [20.0]]])).tolist() == [[0, 0, 0]]


def test_each_item_is_ordered_for_in_its_own_units(tmp_path, run):
    folder = trained(tmp_path, items=("red", "blue"), demand=lambda item, store, t: 6 if item == "red" else 12, levels=[5.0, 2.0, 2.0])
    rows = [f"{item},{node},0,{quantity}\n" for item in ("blue", "red") for node, quantity in (("depot", 20), ("a", 9), ("b", 5))]
    given = state(tmp_path, "item,node,arrives_in,quantity\n" + "".join(rows))
    code, out, err = run("hdpo", "order", folder, "--state", given)
    assert code == 0 and "red: depot -> a: 3, " in out and "red: supplier -> depot: 10, " in out, err
    assert "blue: supplier -> depot: 40, " in out and f"blue: depot -> a: {20 * 15 / 34:.4f}, " in out


def test_whole_orders_are_feasible(tmp_path):
    edges = [
        {"from": "supplier", "to": "depot", "lead_time": 1, "capacity": 3.5},
        *EDGES[1:],
        {"from": "supplier", "to": "a", "lead_time": 1},
    ]
    net = Network.of(NODES, edges)
    simulator, rows = Simulator(net), 500
    torch.manual_seed(0)
    inventory, order = torch.randint(0, 12, (rows, 3, 1)).float(), 8 * torch.rand(rows, 4)
    found = ship_whole(simulator, inventory, order, net.values)
    place = {pair: i for i, pair in enumerate(net.edges)}
    inner = found[:, [place["depot", "a"], place["depot", "b"]]]
    asked = order[:, [place["depot", "a"], place["depot", "b"]]].round()
    assert torch.equal(found, found.round()) and (found >= 0).all() and found[:, place["supplier", "depot"]].max() == 3
    assert torch.equal(inner.sum(1), torch.minimum(asked.sum(1), inventory[:, 0, 0]).double()) and (inner <= asked).all()
    assert torch.equal(found[:, place["supplier", "a"]], order[:, place["supplier", "a"]].double().round())
    nodes = NODES | {"c": NODES["a"]}
    net = Network.of(nodes, [*EDGES, {"from": "depot", "to": "c", "lead_time": 1}])
    found = ship_whole(Simulator(net), torch.tensor([[[10.0], [0], [0], [0]]]), torch.tensor([[0.0, 7, 7, 7]]), net.values)
    assert found.tolist() == [[0, 4, 3, 3]]


def test_a_policy_that_sees_the_past_takes_it_from_the_network_or_a_table(tmp_path, run):
    folder = trained(tmp_path, policy="gnn", window=4, whole=True, demand=lambda item, store, t: 4 + t % 5)
    call = ("hdpo", "order", folder, "--state", state(tmp_path))
    code, out, err = run(*call)
    assert code == 0 and "orders for the week of 2023-12-04, after 4 weeks of demand" in out, err
    lines = (tmp_path / "demand.csv").read_text().splitlines(keepends=True)
    recent = tmp_path / "recent.csv"
    recent.write_text("".join([lines[0], *lines[-8:]]))
    (tmp_path / "net.yaml").unlink()
    assert run(*call, "--demand", recent)[1] == out
    code, _, err = run(*call)
    assert code == 1 and "net.yaml is not there any more: name a table with --demand" in err
    recent.write_text("".join([lines[0], *lines[-6:]]))
    assert "recent.csv has 3 periods of demand, and the policy sees the last 4" in run(*call, "--demand", recent)[2]
    recent.write_text("".join([lines[0], *(line.replace("b", "c") for line in lines[-8:])]))
    assert "recent.csv: store: row 1 is of 'c'; valid: a, b" in run(*call, "--demand", recent)[2]


def test_the_past_is_of_the_items_that_were_learned(tmp_path):
    folder = trained(
        tmp_path, policy="data_driven", window=2, items=("red", "blue"), demand=lambda item, store, t: 6 if item == "red" else 12
    )
    policy = planner.load(folder)
    assert policy.past().demand[:, 0].tolist() == [[6, 6], [12, 12]]
    text = (tmp_path / "demand.csv").read_text()
    (tmp_path / "other.csv").write_text("".join(line for line in text.splitlines(keepends=True) if "blue" not in line))
    with pytest.raises(ValueError, match="other.csv: item: no row is of 'blue'"):
        policy.past(tmp_path / "other.csv")
    (tmp_path / "other.csv").write_text(text.replace("blue", "blu"))
    with pytest.raises(ValueError, match="other.csv: item: is of 'blu'; did you mean blue?"):
        policy.past(tmp_path / "other.csv")
    with pytest.raises(ValueError, match="the policy sees the last 2 periods of demand: give them"):
        policy.orders(torch.ones(2, 3, 1))


def test_a_policy_from_a_file_is_the_one_that_was_trained(tmp_path):
    folder = trained(tmp_path, policy="gnn", window=4)
    policy, problem = (
        planner.load(folder),
        hdpo.problem_of(str(tmp_path / "net.yaml"), hdpo.resolve("net.yaml", overrides={"network": {"window": 4}})),
    )
    given = problem.scenario("test")
    seen = policy.agent.simulator.observe(given.initial + 3.0, given, 5)
    agent = hdpo.HDPO(policy.agent.config, problem.network, hdpo.Shape.of(given))
    assert torch.equal(policy.act(seen), agent.act(Checkpoints(folder / "best").latest().tree, seen))
    own = policy.act(seen._replace(values=policy.network.values, mean=policy.mean, std=policy.std))
    assert torch.equal(policy.act(seen), own)


def test_what_cannot_be_used_is_refused(tmp_path, run):
    folder = trained(tmp_path)
    about = read_json(folder / "run.json")
    for broken, message in [
        ({key: about[key] for key in about if key != "network"}, "trained by an earlier offrl"),
        (about | {"recipe": "bc"}, "is a run of bc"),
        (about | {"network": about["network"] | {"values": {}}}, "run.json is damaged"),
        (about | {"agent": about["agent"] | {"polcy": 1}}, "unknown key polcy; did you mean policy?"),
        (about | {"agent": about["agent"] | {"policy": "mlp"}}, "the checkpoint lacks"),
    ]:
        write_json(folder / "run.json", broken)
        code, _, err = run("hdpo", "order", folder, "--state", state(tmp_path))
        assert code == 1 and message in err, err
    write_json(folder / "run.json", about)
    assert "is a run of hdpo, which has commands of its own: offrl hdpo" in run("eval", folder)[2]
    shutil.rmtree(folder / "best")
    with pytest.raises(RunError, match="has not been evaluated yet"):
        planner.load(folder)
    assert "there is no run at" in run("hdpo", "report", tmp_path / "none")[2]


def test_a_report_is_what_is_found_by_hand(tmp_path, run):
    """Store a orders 6 up to 15 each week and has 3 left. b, with a level of 10, has 4 and then 6, so that it lacks 2 every other week.
    The depot ships 12 and 10 in turn and orders up to 30: it has 8 left."""
    folder = trained(tmp_path, levels=[5.0, 2.5, 10 / 6])
    code, out, err = run("hdpo", "report", folder, "--steps", 10)
    assert code == 0 and (folder / "report.md").read_text().startswith(out.partition("\n\nreport: ")[0]), err
    found = read_json(folder / "report.json")
    assert (found["periods"], found["dates"], found["error"]) == (20, ["2023-07-17", "2023-11-27"], None)
    assert found["stock"] == pytest.approx({"depot": 8, "a": 3, "b": 0}, abs=1e-5)
    assert found["stores"]["a"] == {"fill_rate": 1.0, "stock_outs": 0.0}
    assert found["stores"]["b"] == pytest.approx({"fill_rate": 10 / 12, "stock_outs": 0.5}, abs=1e-6)
    assert found["orders"] == pytest.approx({"supplier->depot": 11, "depot->a": 6, "depot->b": 5}, abs=1e-5)
    assert found["holding"] == pytest.approx({"depot": 0.4, "a": 1.5, "b": 0}, abs=1e-5)
    assert found["underage"] == pytest.approx({"a": 0, "b": 4.5}, abs=1e-5) and found["cost"] == pytest.approx(9.15, abs=1e-5)
    assert found["procurement"] == pytest.approx({"supplier->depot": 2.75, "depot->a": 0, "depot->b": 0}, abs=1e-5)
    others = {each["policy"]: each for each in found["others"]}
    assert list(others) == ["base stock", "echelon base stock", "foresight"]
    assert others["foresight"]["cost"] == pytest.approx(3.0, abs=1e-5) and others["foresight"]["difference"] == pytest.approx(
        2.05, abs=1e-5
    )
    assert 3.0 <= others["base stock"]["cost"] < 9.15 and "| costs 6.15 (205.0%) more" in out
    assert "| b     | 83.3%                 | 50.0%" in out
    for name in ("stock.png", "orders.png", "curve.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG" and f"]({name})" in (folder / "report.md").read_text()


def test_a_report_needs_what_was_trained_on(tmp_path):
    folder = trained(tmp_path)
    write(tmp_path, demand=lambda item, store, t: 7)
    with pytest.raises(RunError, match="net.yaml is not what .* was trained on any more"):
        planner_report.report(folder)
    (tmp_path / "net.yaml").unlink()
    with pytest.raises(RunError, match="net.yaml, which is not there any more"):
        planner_report.report(folder)


def test_a_report_on_profit_and_several_suppliers(tmp_path):
    folder = trained(tmp_path, policy="mlp", objective="profit", edges=[*EDGES, {"from": "supplier", "to": "a", "lead_time": 2}])
    _, text = planner_report.report(folder)
    found = read_json(folder / "report.json")
    assert f"**Profit {-found['cost']:.4f}**" in text and "none applies" in text and [x["policy"] for x in found["others"]] == ["foresight"]
    assert found["cost"] == pytest.approx(read_json(folder / "result.json")["cost"], rel=1e-6)


def test_a_published_setting_is_reported_beside_its_optimum(tmp_path, run):
    splits = {name: {"periods": 40, "warm_up": 20, "scenarios": 32} for name in ("train", "dev", "test")}
    agent = {"policy": "capped_base_stock", "hidden": [4]}
    (folder,) = hdpo.train(
        "one-store-lost", {"steps": 2, "eval_every": 1, "network": splits | {"lead_time": 2}, "agent": agent}, runs=tmp_path
    )
    code, out, err = run("hdpo", "report", folder)
    found, result = read_json(folder / "report.json"), read_json(folder / "result.json")
    assert code == 0 and found["cost"] == pytest.approx(result["cost"]) and "20 periods of 32 traces of demand" in out, err
    assert [each["policy"] for each in found["others"]] == ["optimum", "foresight"]
    assert found["others"][0]["difference"] == pytest.approx(result["cost"] / result["reference"]["cost"] - 1)
    store = state(tmp_path, "node,arrives_in,quantity\nstore,0,3\nstore,3,2\n")
    code, out, _ = run("hdpo", "order", folder, "--state", store)
    assert code == 0 and "supplier -> store: " in out and "arrives in 2 periods" in out
    assert json.loads((folder / "run.json").read_text())["items"] == [""]


def test_levels_want_one_supplier_a_node(tmp_path, run):
    with pytest.raises(ConfigError, match="several suppliers"):
        trained(tmp_path, edges=[*EDGES, {"from": "supplier", "to": "a", "lead_time": 2}])
    code, _, err = run("train", "hdpo", tmp_path / "net.yaml", "--agent.policy", "echelon_stock", "--runs", tmp_path)
    assert code == 1 and "offrl: net.yaml: a node has several suppliers" in err
