"""Networks and demand that are wrong, through the command line: each is refused by name, with its place and what to do."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import yaml

SOUND = {
    "nodes": {"depot": {"holding": 0.1}, "shop": {"kind": "store", "holding": 1.0, "underage": 9.0}},
    "edges": [{"from": "supplier", "to": "depot", "lead_time": 2}, {"from": "depot", "to": "shop", "lead_time": 1}],
    "demand": "demand.csv",
}
PERIODS = 100


def write(folder, network=SOUND, cells=None):
    """The network's file and its demand, 5 each week but for `cells`, {row: text}."""
    (folder / "net.yaml").write_text(yaml.safe_dump(network))
    dates = np.datetime64("2022-01-03") + 7 * np.arange(PERIODS)
    rows = "".join(f"{date},shop,{(cells or {}).get(i, 5)}\n" for i, date in enumerate(dates))
    (folder / "demand.csv").write_text("date,store,demand\n" + rows)
    return folder / "net.yaml"


def refused(run, path, name, message):
    code, out, _ = run("hdpo", "check", path)
    assert code == 1 and f"{name}: " in out and message in out, out
    code, out, err = run("train", "hdpo", path, "--steps", 1, "--runs", path.parent / "runs")
    assert code == 1 and message in err and "Traceback" not in err, err
    assert not (path.parent / "runs").exists()


@pytest.mark.parametrize(
    ("change", "name", "message"),
    [
        (lambda n: n["edges"].append({"from": "hub", "to": "depot", "lead_time": 1}), "unknown-node", "edges.hub->depot: no node 'hub'"),
        (
            lambda n: (n["nodes"].update(hub={"holding": 1}),
                       n["edges"].extend([{"from": "depot", "to": "hub", "lead_time": 1}, {"from": "hub", "to": "depot", "lead_time": 1}])),
            "cycle", "net.yaml: edges: depot -> hub -> depot",
        ),
        (lambda n: n["edges"].pop(), "unreachable-store", "net.yaml: nodes.shop: no path leads from the supplier to the store shop"),
        (lambda n: n["nodes"]["shop"].update(holding=-1), "cost", "net.yaml: nodes.shop.holding: is -1"),
        (lambda n: n["nodes"]["shop"].update(underage=float("nan")), "cost", "net.yaml: nodes.shop.underage: is nan"),
        (lambda n: n["edges"][0].update(procurement=-0.5), "cost", "net.yaml: edges.supplier->depot.procurement: is -0.5"),
        (lambda n: n["edges"][0].update(lead_time=PERIODS), "beyond-horizon", "supplier->depot.lead_time: 100 periods, in data of 100"),
        (lambda n: n["edges"][0].update(lead_time=0), "lead-time", "edges.supplier->depot.lead_time: is 0"),
        (lambda n: n["edges"][0].update(lead_time="10 days"), "lead-time", "edges.supplier->depot.lead_time: is 1.42857"),
        (lambda n: n["edges"][0].update(lead_time="3 fortnights"), "unknown-unit", "no unit 'fortnight'; valid: day, week"),
        (lambda n: n.update(period="wek"), "unknown-unit", "net.yaml: period: no unit 'wek'; did you mean week?"),
        (lambda n: n["nodes"]["shop"].update(kind="shop"), "unknown-key", "net.yaml: nodes.shop.kind: no kind 'shop'"),
        (lambda n: n["nodes"]["depot"].update(holdng=1), "unknown-key", "unknown key 'holdng'; did you mean holding?"),
    ],
)  # fmt: skip
def test_a_network(run, tmp_path, change, name, message):
    network = copy.deepcopy(SOUND)
    change(network)
    refused(run, write(tmp_path, network), name, message)


@pytest.mark.parametrize(
    ("cell", "shown"),
    [("nan", "'nan'"), ("-3", "'-3'"), ("", "''"), ("inf", "'inf'"), ("many", "'many'")],
    ids=["nan", "less", "empty", "inf", "text"],
)
def test_demand(run, tmp_path, cell, shown):
    message = f"demand.csv: demand: 2 rows are no demand, the first is row 7: {shown}"
    refused(run, write(tmp_path, cells={7: cell, 9: cell}), "demand-value", message)


def test_demand_that_is_not_there(run, tmp_path):
    path = write(tmp_path)
    (tmp_path / "demand.csv").unlink()
    refused(run, path, "unreadable", "demand.csv")
    path = write(tmp_path, {key: SOUND[key] for key in ("nodes", "edges")})
    code, _, err = run("train", "hdpo", path, "--steps", 1)
    assert code == 1 and "names no demand" in err


def test_demand_that_is_too_short(run, tmp_path):
    network = copy.deepcopy(SOUND)
    network["edges"][1]["lead_time"] = 40
    words = ("train", "hdpo", write(tmp_path, network), "--steps", 1, "--runs", tmp_path / "runs")
    code, _, err = run(*words)
    assert code == 1 and "what is ordered with a lead time of 40 never arrives in dev, which has 36 periods" in err
    code, _, err = run(*words, "--network.window", 50)
    assert code == 1 and "100 periods are too few for a window of 50" in err


def test_a_sound_one_is_found_sound(run, tmp_path):
    code, out, _ = run("hdpo", "check", write(tmp_path))
    assert code == 0 and "nothing is wrong" in out
    code, out, _ = run("hdpo", "check", tmp_path / "none.yaml")
    assert code == 1 and "unreadable" in out
