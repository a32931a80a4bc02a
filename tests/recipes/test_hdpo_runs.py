"""Training for a setting or a network of one's own: the weights that are kept, what is reported, and going on."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
import yaml

from offrl.core.checkpoint import Checkpoints
from offrl.core.config import ConfigError
from offrl.core.log import read
from offrl.core.tree import flatten
from offrl.recipes import hdpo
from offrl.training.run import Finished, RunError, read_json

SPLITS = {name: {"periods": 12, "warm_up": 4, "scenarios": 64} for name in ("train", "dev", "test")}
QUICK = {"steps": 30, "eval_every": 10, "log_every": 10, "checkpoint_every": 10, "batch_size": 32, "agent": {"hidden": [8], "lr": 0.3}}


def train(folder, name="one-store-lost", **changes):
    (run,) = hdpo.train(name, QUICK | {"network": SPLITS} | changes, runs=folder)
    return run


def test_the_weights_that_cost_least_on_dev_are_reported(tmp_path):
    run = train(tmp_path)
    result, rows = read_json(run / "result.json"), [row for row in read(run) if "dev/cost" in row]
    assert [row["step"] for row in rows] == [10, 20, 30]
    least = min(rows, key=lambda row: row["dev/cost"])
    assert (result["best_step"], result["dev"], result["step"]) == (least["step"], least["dev/cost"], 30)
    parts = sum(sum(result[part].values()) for part in ("holding", "underage", "procurement"))
    assert result["cost"] == pytest.approx(parts, rel=1e-5)
    assert result["reference"] == {"kind": "optimum", "cost": pytest.approx(6.83594, abs=1e-4)}


def test_an_unfinished_run_goes_on_and_a_finished_one_is_left(tmp_path):
    whole, cut = train(tmp_path / "whole"), train(tmp_path / "cut", steps=10)
    cut = train(tmp_path / "cut")
    a, b = (flatten(Checkpoints(run / "checkpoints").latest().tree) for run in (whole, cut))
    assert all(torch.equal(a[key], b[key]) for key in a) and read_json(whole / "result.json") == read_json(cut / "result.json")
    with pytest.raises(Finished, match="is finished at step 30"):
        train(tmp_path / "cut")


def test_a_run_that_is_cut_keeps_the_weights_that_an_uncut_one_would(tmp_path):
    """Killed after an evaluation that found better ones and before the next checkpoint."""
    whole = train(tmp_path / "whole", checkpoint_every=20)
    cut = train(tmp_path / "cut", checkpoint_every=20, steps=20)
    shutil.rmtree(cut / "best")  # what a later evaluation left there is not relied on
    assert read_json(train(tmp_path / "cut", checkpoint_every=20) / "result.json") == read_json(whole / "result.json")


def test_orders_are_whole_where_demand_is(tmp_path):
    config = hdpo.resolve("one-store-lost")
    assert config.whole and not hdpo.resolve("one-store-backlog").whole
    assert hdpo.resolve("serial").network.nodes == 4


def own_network(folder, demand):
    """A depot and a shop in a file, with a hundred weeks of demand."""
    network = {
        "nodes": {"depot": {"holding": 0.1}, "shop": {"kind": "store", "holding": 1.0, "underage": 9.0}},
        "edges": [{"from": "supplier", "to": "depot", "lead_time": 2}, {"from": "depot", "to": "shop", "lead_time": 1}],
        "demand": "demand.csv",
    }
    (folder / "net.yaml").write_text(yaml.safe_dump(network))
    dates = np.datetime64("2022-01-03") + 7 * np.arange(100)
    (folder / "demand.csv").write_text("date,store,demand\n" + "".join(f"{d},shop,{x}\n" for d, x in zip(dates, demand)))
    return {"name": str(folder / "net.yaml"), "network": {"window": 4, "warm_up": 4}, "agent": {"policy": "gnn", "width": 4}}


def test_a_network_of_ones_own_is_trained_and_split_by_time(tmp_path):
    run = train(tmp_path / "runs", **own_network(tmp_path, [5 + i % 3 for i in range(100)]), steps=6)
    result = read_json(run / "result.json")
    assert result["holding"].keys() == {"depot", "shop"} and "reference" not in result and run.parts[-3] == "net"
    other = train(tmp_path / "runs", **own_network(tmp_path, [5 + i % 3 for i in range(99)] + [9]), steps=6)
    assert other.parent != run.parent  # other demand, if only in the last week


def test_a_store_that_sells_nothing_while_training_is_named(tmp_path):
    with pytest.raises(RunError, match="net.yaml: nothing is asked for in the periods that are trained on"):
        train(tmp_path / "runs", **own_network(tmp_path, [0] * 60 + [5] * 40))


def test_an_unknown_setting_is_refused_by_its_nearest_name(tmp_path):
    with pytest.raises(ConfigError, match="no setting 'one-store-lots'; did you mean one-store-lost"):
        hdpo.resolve("one-store-lots")
    with pytest.raises(ConfigError, match="unknown key network.leed_time; did you mean network.lead_time"):
        hdpo.resolve("one-store-lost", overrides={"network": {"leed_time": 3}})


def test_the_commands(run, tmp_path):
    code, out, _ = run("hdpo", "solve", "one-store-backlog", "--lead-time", 1, "--underage", 4)
    assert code == 0 and "optimum: 3.1674 for each period and store" in out
    code, out, _ = run("hdpo", "solve", "one-warehouse")
    assert code == 0 and "nothing is known" in out
    flags = ("--steps", 4, "--network.train.scenarios", 32, "--network.dev.scenarios", 8, "--network.test.scenarios", 8, "--runs", tmp_path)
    code, out, err = run("train", "hdpo", "one-store-lost", "--network.lead-time", 2, *flags)
    assert code == 0 and "optimum: 6.0936" in out and "of the weights of step 4" in out, err
    code, _, err = run("train", "hdpo", "one-store-lost", "--network.lead-time", 2, *flags)
    assert code == 1 and "is finished at step 4" in err
    (tmp_path / "net.yaml").write_text("nodes: {a: {holding: 1}}\nedges: [{from: supplier, to: a, lead_time: 1}]\n")
    code, out, _ = run("hdpo", "check", tmp_path / "net.yaml")
    assert code == 1 and "no-stores: net.yaml: nodes: no node is a store" in out
    for words, message in [
        (("train", "hdpo"), "usage: offrl train hdpo NETWORK [flags]"),
        (("train", "hdpo", "serail"), "no setting 'serail'; did you mean serial?"),
        (("hdpo", "sovle"), "no command hdpo 'sovle'; did you mean solve?"),
        (("train", "hdpo", tmp_path / "net.yaml"), "no node is a store"),
    ]:
        code, _, err = run(*words)
        assert code == 1 and message in err, err
