"""The command line: what it answers, refuses and suggests, and that its ways of training several seeds agree."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import offrl as library
from offrl.__main__ import COMMANDS
from offrl.cli.data import COMMANDS as DATA_COMMANDS
from offrl.cli.train import parse_seeds
from offrl.core.checkpoint import Checkpoints
from offrl.core.config import ConfigError
from offrl.core.log import read
from offrl.core.tree import flatten
from offrl.recipes.config import recipes
from offrl.training.run import Finished

TINY = ("--steps", 40, "--batch-size", 16, "--log-every", 10, "--checkpoint-every", 20, "--agent.hidden", 8, 8)
OWN = """
from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import offrl
from offrl.agents.bc import BC
from offrl.core.config import Log, Range


@dataclass(frozen=True)
class Config:
    actor_lr: Annotated[float, Log(1e-5, 1e-2)] = 1e-3
    hidden: tuple[int, ...] = (256, 256)
    scale: Annotated[float, Range(0, 10)] = 1.0
    "Factor of the loss."


class Mine(BC):
    Config = Config

    def actor_loss(self, state, batch):
        loss, metrics = super().actor_loss(state, batch)
        return self.config.scale * loss, metrics


offrl.register("mine", Mine)
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    path = tmp_path_factory.mktemp("mine") / "mine.py"
    path.write_text(OWN)
    return path


def folders(runs):
    return sorted(path.parent for path in Path(runs).glob("*/*/*/*/run.json"))


def same(one, other):
    a, b = (flatten(Checkpoints(folder / "checkpoints").latest().tree) for folder in (one, other))
    logs = [[{k: v for k, v in row.items() if not k.startswith("time/")} for row in read(folder)] for folder in (one, other)]
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) and logs[0] == logs[1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trian"], "no command 'trian'; did you mean train?"),
        (["data", "chekc"], "no command data 'chekc'; did you mean check?"),
        (["train", "iqll", "DATA"], "no agent 'iqll'; did you mean iql?"),
        (["train", "bc"], "usage: offrl train RECIPE DATASET [flags]; RECIPE is one of a2pr, bc, combo, iql, mbrl, sac, td3bc"),
        (["train"], "usage: offrl train RECIPE DATASET"),
        (["train", "a2pr", "DATA", "--preset", "papr"], "a2pr has no preset 'papr'; did you mean paper?"),
        (["train", "bc", "DATA", "--preset", "paper"], "bc has no preset 'paper', nor any other"),
        (["train", "bc", "halfcheetah-medim-v2"], "the nearest: halfcheetah-medium-v2"),
        (["train", "ppo", "DATA"], "ppo learns from rollouts of its own policy, not from a dataset"),
        (["train", "bc", "DATA", "--steps", "0"], "steps is 0; it must lie between 1 and inf"),
        (["train", "iql", "DATA", "--agent.gamma", "1.5"], "agent.gamma is 1.5; it must lie between 0 and 1"),
        (["train", "bc", "DATA", "--seeds", "0-1", "--workers", "0"], "workers is 0; it must lie between 1 and inf"),
        (["train", "bc", "DATA", "--seeds", "a"], "--seeds 'a': write 0-4 or 0,3,7"),
        (["train", "bc", "DATA", "--import", "nowhere.py"], "nowhere.py: there is no such file"),
        (["train", "bc", "DATA", "--import", "DATA"], "name a Python file, which ends in .py"),
        (["train", "bc", "DATA", "--device", "gpu"], "device 'gpu' cannot be used: "),
        (["train", "bc", "DATA", "--device", "cpu", "--mode", "cudagraph"], "mode cudagraph needs a GPU; the device is cpu"),
        (["train", "bc", "DATA", "--env", "Hoper-v5"], "Hoper"),
        (["train", "bc", "DATA", "--env", "CartPole-v1"], "the policy sees 3 numbers, the environment shows 4"),
        (["eval", "nowhere"], "there is no run at nowhere"),
        (["eval", "nowhere", "--episodes", "0"], "episodes is 0; it must lie between 1 and inf"),
        (["eval", "nowhere", "--time-limit", "0"], "time_limit is 0; it must lie between 1 and inf"),
        (["export", "nowhere"], "there is no run at nowhere"),
        (["data", "info", "nowhere.npz"], "nowhere.npz: no such file"),
    ],
)
def test_what_is_refused_in_one_line(run, data, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    code, _, complaint = run(*(data if arg == "DATA" else arg for arg in args))
    assert code == 1 and re.fullmatch(r"offrl: .+", complaint.strip()) and message in complaint, complaint
    assert not folders(tmp_path / "runs")


@pytest.mark.parametrize(("flag", "nearest"), [("--agent.alpa", "--agent.alpha"), ("--bach-size", "--batch-size"), ("--seed", "--seeds")])
def test_an_unknown_flag_is_answered_with_the_nearest(run, data, flag, nearest):
    code, out, err = run("train", "td3bc", data, flag, 3)
    assert code == 2 and nearest in out + err


def test_no_command_is_a_wrong_call_and_help_is_none(run):
    code, usage, _ = run()
    assert code == 2 and run("--help") == (0, usage, "") and all(name in usage for name in (*COMMANDS, *recipes()))
    assert run("--version")[:2] == (0, f"{library.__version__}\n")
    assert run("data")[0] == 2 and run("data", "--help")[0] == 0


@pytest.mark.parametrize(
    "command",
    [*((name,) for name in COMMANDS), *(("data", name) for name in DATA_COMMANDS), *(("train", name, "DATA") for name in recipes())],
)
def test_every_command_has_help(run, command):
    code, out, err = run(*command, "--help")
    assert code == 0 and err == "" and "offrl" in out
    if command[0] == "train":
        expected = {"bc": "--agent.hidden", "a2pr": "--agent.vae-weight", "iql": "--agent.expectile", "td3bc": "--agent.alpha"}
        expected |= {"sac": "--agent.members", "mbrl": "--penalty.kind", "combo": "--imagine.horizon"}
        for flag in (expected[command[1] if command[1:] else "bc"], "--seeds", "--skip-nonfinite"):
            assert flag in out


@pytest.mark.parametrize(
    ("text", "seeds"), [("0", [0]), ("0-4", [0, 1, 2, 3, 4]), ("0,3,7", [0, 3, 7]), ("5-6,1", [5, 6, 1]), ("3-3", [3])]
)
def test_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "-1", "1-", "4-0", "0-2-4", "0,0", "0-2,1", "1.5", "0;1"])
def test_seeds_that_are_none(text):
    with pytest.raises(ConfigError, match="write 0-4 or 0,3,7"):
        parse_seeds(text)


def test_data_without_an_environment_trains_and_waits_for_one(run, data, tmp_path):
    code, out, _ = run("train", "bc", data, "--runs", tmp_path, *TINY)
    (folder,) = folders(tmp_path)
    assert code == 0 and "no evaluation: this dataset names no environment; give one, as in Hopper-v5" in out and f"run: {folder}" in out
    assert not (folder / "result.json").exists() and read(folder)[-1]["step"] == 40
    code, _, err = run("eval", folder)
    assert code == 1 and "its data names no environment; give one with --env, a Gymnasium id or file.py:factory" in err
    code, out, _ = run("eval", folder, "--env", "Pendulum-v1", "--episodes", 2)
    assert code == 0 and "return (no reference scores are known for a normalised one) -" in out and "2 episodes of Pendulum-v1" in out
    found = json.loads((folder / "eval.json").read_text())
    assert found["episodes"] == 2 and found["step"] == 40 and "score" not in found
    code, out, _ = run("export", folder, "--onnx")
    assert code == 0 and (folder / "policy.onnx").exists() and "same actions as the policy" in out
    code, out, _ = run("train", "bc", data, "--runs", tmp_path, *TINY, "--env", "Pendulum-v1", "--final-episodes", 2)
    assert code == 0 and "over 2 episodes of Pendulum-v1 after 40 steps" in out, "what was left out is made up for"
    assert (folder / "result.json").exists() and (folder / "curve.png").exists()


def test_a_folder_of_several_runs_is_evaluated_seed_by_seed_and_not_exported(run, data, tmp_path):
    assert run("train", "bc", data, "--runs", tmp_path, *TINY, "--seeds", "0,2", "--how", "stacked")[0] == 0
    code, out, _ = run("eval", tmp_path, "--env", "Pendulum-v1", "--episodes", 1)
    assert code == 0 and [line.split(":")[0] for line in out.splitlines()] == [str(folder) for folder in folders(tmp_path)]
    code, _, err = run("export", tmp_path)
    assert code == 1 and "holds 2 runs; name one of them" in err


def test_stacked_seeds_leave_the_folders_that_single_ones_do(run, data, tmp_path):
    code, out, _ = run("train", "td3bc", data, "--runs", tmp_path / "stack", *TINY, "--seeds", "0-1", "--how", "stacked")
    assert code == 0 and "2 seeds as one stack" in out
    assert run("train", "td3bc", data, "--runs", tmp_path / "one", *TINY, "--seeds", "1")[0] == 0
    (one,), stack = folders(tmp_path / "one"), folders(tmp_path / "stack")
    assert [folder.relative_to(tmp_path / "stack") for folder in stack] == [
        one.relative_to(tmp_path / "one").with_name(name) for name in ("0", "1")
    ]
    names = sorted(path.name for path in one.rglob("*"))
    assert names == sorted(path.name for path in stack[1].rglob("*"))
    a, b = (Checkpoints(folder / "checkpoints").latest() for folder in (one, stack[1]))
    assert a.meta == b.meta and flatten(a.tree).keys() == flatten(b.tree).keys()
    for key, leaf in flatten(a.tree).items():
        torch.testing.assert_close(leaf, flatten(b.tree)[key], rtol=1e-4, atol=1e-5)
    # a stack goes on seed by seed, and single seeds as a stack
    code, _, err = run("train", "td3bc", data, "--runs", tmp_path / "stack", *TINY, "--seeds", "0-1", "--how", "stacked")
    assert code == 1 and "is finished at step 40" in err
    assert run("train", "td3bc", data, "--runs", tmp_path / "stack", *TINY, "--steps", 50, "--seeds", "0")[0] == 0
    code, _, err = run("train", "td3bc", data, "--runs", tmp_path / "stack", *TINY, "--steps", 60, "--seeds", "0-1", "--how", "stacked")
    assert code == 1 and "the seeds [0, 1] have come to different steps, [40, 50]: continue them unstacked" in err


def test_seeds_in_processes_equal_single_seeds_and_know_the_users_own_agent(offrl, run, data, mine, tmp_path):
    own = ("--import", mine, "--agent.scale", 2.0)
    ended = offrl("train", "mine", data, "--runs", tmp_path / "two", *TINY, *own, "--seeds", "0-1")
    assert ended.code == 0, ended.err
    assert re.search(r"2 seeds, \d at a time, each in a process of one thread", ended.out)
    for seed in (0, 1):
        assert run("train", "mine", data, "--runs", tmp_path / "one", *TINY, *own, "--seeds", seed)[0] == 0
    assert len(folders(tmp_path / "one")) == 2
    for one, two in zip(folders(tmp_path / "one"), folders(tmp_path / "two"), strict=True):
        assert same(one, two) and one.relative_to(tmp_path / "one") == two.relative_to(tmp_path / "two")


def test_the_users_own_agent(run, data, mine, tmp_path):
    code, _, err = run("train", "mine", data, "--runs", tmp_path, *TINY, "--import", mine, "--agent.scale", 11)
    assert code == 1 and "agent.scale is 11; it must lie between 0 and 10" in err
    assert run("train", "mine", data, "--runs", tmp_path, *TINY, "--import", mine)[0] == 0
    assert run("train", "mine", data, "--runs", tmp_path, *TINY, "--import", mine, "--agent.scale", 2.0)[0] == 0
    both = folders(tmp_path)
    assert len(both) == 2, "its settings name its folders"
    policy = library.load(both[0])
    assert type(policy.agent).__name__ == "Mine" and policy.predict(np.zeros((4, 3)))[0].shape == (4, 1)


@pytest.mark.parametrize("name", ["Mine", "mine"])
def test_a_run_of_an_agent_that_nobody_imported(offrl, data, mine, tmp_path, name):
    mine = mine.with_name(f"as_{name}.py")
    mine.write_text(OWN.replace('"mine"', f'"{name}"'))
    assert offrl("train", name, data, "--runs", tmp_path, *TINY, "--import", mine).code == 0
    (folder,) = folders(tmp_path)
    ended = offrl("eval", folder, "--env", "Pendulum-v1", "--episodes", 1)
    assert ended.code == 1 and f"offrl: no agent '{name}'" in ended.err
    assert offrl("eval", folder, "--env", "Pendulum-v1", "--episodes", 1, "--import", mine).code == 0


def test_checking_data_says_whether_it_can_be_used(run, data, write_data, tmp_path):
    code, out, _ = run("data", "check", data)
    assert code == 0 and "0 errors" in out
    reward = np.zeros(400)
    reward[7] = np.nan
    bad = write_data(tmp_path / "bad.npz", reward=reward)
    code, out, _ = run("data", "check", bad)
    assert code == 1 and "error: rewards: NaN or infinity (1 of 400 rows, the first is row 7)" in out
    code, _, err = run("train", "bc", bad, "--runs", tmp_path, *TINY)
    assert code == 1 and "rewards has 1 rows with NaN or infinity, the first is row 7" in err
    assert run("train", "bc", bad, "--runs", tmp_path, *TINY, "--on-bad", "drop")[0] == 0
    (tmp_path / "cut.npz").write_bytes(data.read_bytes()[:1000])
    code, out, _ = run("data", "check", tmp_path / "cut.npz")
    assert code == 1 and "error: file:" in out
    assert run("data", "info", data)[0] == 0


def test_some_seeds_of_several_may_be_finished(run, data, tmp_path):
    call = ("train", "bc", data, "--runs", tmp_path, *TINY)
    assert run(*call, "--seeds", "1")[0] == 0
    before = (folders(tmp_path)[0] / "log.jsonl").read_bytes()
    done = library.train("bc", data, config(), seeds=[0, 1], runs=tmp_path)
    assert done == folders(tmp_path) and len(done) == 2
    assert (done[1] / "log.jsonl").read_bytes() == before
    with pytest.raises(Finished, match="0 is finished at step 40"):
        library.train("bc", data, config(), seeds=[0, 1], runs=tmp_path)


def config():
    return {"steps": 40, "batch_size": 16, "log_every": 10, "checkpoint_every": 20, "agent": {"hidden": [8, 8]}}
