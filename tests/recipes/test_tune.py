"""Studies: suggestions with a known answer, what a study leaves behind, and how its best is trained."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import optuna
import pytest
import yaml

from offrl.core.checkpoint import load_file
from offrl.core.config import Log, Range
from offrl.core.log import read
from offrl.recipes.config import resolve
from offrl.recipes.search import space
from offrl.recipes.study import aim, from_study, open_storage, open_study, sampler

optuna.logging.set_verbosity(optuna.logging.ERROR)
TINY = ("--agent.hidden", 8, 8, "--mode", "eager", "--log-every", 50, "--eval-episodes", 1, "--final-episodes", 2)
# the nearer an action is to 1.5, the better
NEAR = """
import gymnasium
import numpy as np


class Near(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-9, 9, (3,))
    action_space = gymnasium.spaces.Box(-2, 2, (1,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.normal(size=3).astype(np.float32), {}

    def step(self, action):
        return self.np_random.normal(size=3).astype(np.float32), -abs(float(action[0]) - 1.5), False, False, {}


def make():
    return gymnasium.wrappers.TimeLimit(Near(), 5)
"""


@dataclass(frozen=True)
class Agent:
    kind: Literal["a", "b", "c"] = "a"
    count: Annotated[int, Range(1, 15)] = 1
    share: Annotated[float, Range(0, 1)] = 0.5
    rate: Annotated[float, Log(1e-4, 1)] = 1e-2


@dataclass(frozen=True)
class Config:
    learns: ClassVar[tuple[str, ...]] = ("agent",)
    agent: Agent = field(default_factory=Agent)


KINDS = space(Config(), ["agent.kind", "agent.count", "agent.share", "agent.rate"])


def planted(values):
    """A problem of four dimensions whose optimum, 0, is at b, 11, 0.3 and 10^-2.5."""
    kind = {"a": 0.5, "b": 0.0, "c": 1.0}[values["agent.kind"]]
    count, share, rate = (values["agent.count"] - 11) / 7, values["agent.share"] - 0.3, math.log10(values["agent.rate"]) + 2.5
    return -(kind + count**2 + 4 * share**2 + rate**2 / 2)


def suggested(study, trials, noise=None):
    """The values of so many more trials on the planted problem."""
    found = []
    for _ in range(trials):
        trial = study.ask(KINDS)
        study.tell(trial, planted(trial.params) + (noise.normal(0, 0.1) if noise else 0))
        found.append(trial.params)
    return found


def best_of(kind, seed, trials, noise=None):
    study = optuna.create_study(direction="maximize", sampler=sampler(kind, seed))
    return max(planted(values) for values in suggested(study, trials, noise))


def test_the_gaussian_process_finds_a_planted_optimum_that_chance_misses():
    gp, chance = ([best_of(kind, seed, 20) for seed in range(3)] for kind in ("gp", "random"))
    assert min(gp) > -0.02 and max(chance) < -0.1, (gp, chance)


def test_the_gaussian_process_learns_from_pruned_trials():
    """Trials below the median end early. Not knowing of them, the sampler would suggest the like again, and find nothing."""
    study = optuna.create_study(direction="maximize", sampler=sampler("gp", 1))
    for _ in range(22):
        trial, values = study.ask(KINDS), [each.value for each in study.trials if each.value is not None]
        trial.report(value := planted(trial.params), 1)
        pruned = len(values) > 4 and value < np.median(values)
        study.tell(trial, None if pruned else value, state=optuna.trial.TrialState.PRUNED if pruned else None)
    states = [trial.state.name for trial in study.trials]
    assert "PRUNED" in states and max(trial.value for trial in study.trials) > -0.02


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "margin"), [("gp", 0.2), ("tpe", 0.05)])
def test_each_sampler_beats_chance_under_noise_too(kind, margin):
    found, chance = ([best_of(name, seed, 40, np.random.default_rng(seed)) for seed in range(8)] for name in (kind, "random"))
    assert np.mean(found) > np.mean(chance) + margin, (found, chance)


@pytest.mark.parametrize("kind", ["gp", "tpe"])
def test_a_seed_gives_the_same_suggestions_however_often_the_study_is_cut(kind, tmp_path):
    """Also after the tenth trial, from which the Gaussian process suggests them."""
    whole = suggested(optuna.create_study(direction="maximize", sampler=sampler(kind, 3)), 13)
    parts = []
    for trials in (4, 7, 2):
        study = open_study(open_storage(f"sqlite:///{tmp_path}/study.db"), "parts", {}, sampler=sampler(kind, 3))
        parts += suggested(study, trials)
    assert parts == whole and len({json.dumps(values) for values in whole}) == 13
    assert suggested(optuna.create_study(sampler=sampler(kind, 4)), 2) != whole[:2]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Each test has a folder of its own, with an environment in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "near.py").write_text(NEAR)


def the(study):
    return optuna.load_study(study_name=study, storage="sqlite:///study.db")


@pytest.fixture(scope="session")
def near(write_data, tmp_path_factory):
    """Data whose every action is 1.5."""
    return write_data(tmp_path_factory.mktemp("near") / "data.npz", action=np.full((400, 1), 1.5, np.float32))


def test_a_study_from_the_command_line(run, near, tmp_path):
    flags = (*TINY, "--env", "near.py:make", "--batch-size", 16)
    call = ("tune", "td3bc", near, "--storage", "sqlite:///study.db", *flags, "--steps", 40, "--eval-every", 20, "--seeds", "0-1")
    code, out, err = run(*call, "--trials", 3, "--search", "agent.alpha", "agent.layer_norm", "--workers", 2)
    assert code == 0, err
    study, trials = the("td3bc-data"), the("td3bc-data").trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 3
    assert "study td3bc-data in sqlite:///study.db: 3 trials, 3 complete" in out
    assert trials[0].params == {"agent.alpha": 2.5, "agent.layer_norm": False}, "the first is the config as it was"
    assert len({trial.params["agent.alpha"] for trial in trials}) == 3
    for trial in trials:
        runs = [Path(folder) for folder in trial.user_attrs["runs"]]
        assert [folder.name for folder in runs] == ["0", "1"]
        assert trial.value == pytest.approx(np.mean([json.loads((run / "result.json").read_text())["return"]["mean"] for run in runs]))
        # of each seed two evaluations of an episode, and two episodes at its end
        assert trial.user_attrs["episodes"] == 2 * (2 * 1 + 2)
        rows = {i * 40 + row["step"]: row for i, run in enumerate(runs) for row in read(run) if "eval/return_mean" in row}
        assert trial.intermediate_values == {step: row["eval/return_mean"] for step, row in rows.items()} and len(rows) == 4
        assert json.loads((runs[0].parent / "trials.jsonl").read_text()) == {"study": "td3bc-data", "trial": trial.number}
    assert f"online episodes that the selection used: {3 * 8}" in out
    assert f"best: return {study.best_value:.4g} of trial {study.best_trial.number}, agent.alpha " in out
    for plot in ("history", "slices", "importance"):
        assert (tmp_path / f"runs/studies/td3bc-data/{plot}.png").stat().st_size > 1000
    # one more; what it searches need not be said again
    code, out, err = run(*call, "--trials", 1)
    assert code == 0 and "4 trials, 4 complete" in out and the("td3bc-data").trials[:3] == trials, err
    best = the("td3bc-data").best_trial
    code, out, err = run("train", "td3bc", near, *TINY, "--steps", 50, "--from-study", "sqlite:///study.db", "--batch-size", 17)
    assert code == 0 and f"from study td3bc-data, trial {best.number} (return {best.value:.4g} on data): " in out, err
    config = yaml.safe_load(Path(out.partition("run: ")[2].split()[0], "config.yaml").read_text())
    assert config["agent"]["alpha"] == best.params["agent.alpha"] and config["batch_size"] == 17 and config["env"] is None


def test_a_trial_below_the_median_ends_early_and_the_others_go_on_as_they_would(run, near):
    call = ("tune", "bc", near, *TINY, "--env", "near.py:make", "--batch-size", 16, "--steps", 120, "--eval-every", 100, "--trials", 9)
    call += ("--search", "agent.actor_lr=1e-5:1e-3", "--sampler", "random", "--storage", "sqlite:///study.db")
    for more in (("--study", "pruned"), ("--study", "whole", "--pruner", "none", "--workers", 2)):
        code, _, err = run(*call, *more)
        assert code == 0, err
    trials, complete = the("pruned").trials, []
    for trial in trials:
        value = trial.intermediate_values[100]
        worse = len(complete) >= 5 and value < np.median(complete)
        assert trial.state.name == ("PRUNED" if worse else "COMPLETE"), trial
        assert trial.user_attrs["episodes"] == (1 if worse else 3)
        complete += [] if worse else [value]
    assert 0 < len(complete) < 9
    for one, other in zip(trials, the("whole").trials, strict=True):
        assert one.params == other.params and one.intermediate_values == other.intermediate_values
        assert other.state.name == "COMPLETE"


def test_equal_trials_are_one_run_and_cost_its_episodes_once(run, near):
    call = ("tune", "bc", near, *TINY, "--env", "near.py:make", "--batch-size", 16, "--eval-every", 50, "--storage", "sqlite:///study.db")
    call += ("--search", "agent.actor_lr=3e-4,1e-3", "--sampler", "random")
    code, out, err = run(*call, "--steps", 50, "--trials", 6, "--workers", 3)
    assert code == 0 and "6 trials, 6 complete" in out and "online episodes that the selection used: 6" in out, err
    trials = the("bc-data").trials
    assert len({(trial.params["agent.actor_lr"], trial.value, *trial.user_attrs["runs"]) for trial in trials}) == 2
    assert all(len(trial.intermediate_values) == 1 and trial.user_attrs["episodes"] == 3 for trial in trials)
    # what has been trained further since is no trial of fifty steps
    assert run(*call, "--steps", 60, "--trials", 1, "--study", "longer")[0] == 0
    code, out, err = run(*call, "--steps", 50, "--trials", 1, "--study", "shorter")
    why = "is finished, by other rules: steps is 60 there, 50 in this study; name another folder with --runs"
    assert code == 1 and why in out and "no trial of the study shorter is complete" in err


def test_trials_of_a_model_based_recipe_share_one_ensemble_at_its_largest_size(run, near):
    small = ("--model.hidden", 8, "--model.max-epochs", 2, "--imagine.starts", 20, "--imagine.horizon", 2, "--termination", "never")
    call = ("tune", "mbrl", near, *TINY, "--env", "near.py:make", "--steps", 4, "--storage", "sqlite:///study.db", *small)
    code, out, err = run(*call, "--trials", 3, "--search", "model.members=2:9", "penalty.weight=0.1:10:log", "--model.elites", 2)
    assert code == 0 and "3 trials, 3 complete" in out, err
    (model,) = Path("runs/models").glob("*/model.safetensors")
    assert len(load_file(model)[0]["weights.0"]) == 9
    trials = the("mbrl-data").trials
    assert trials[0].params["model.members"] == 7 and len({trial.params["model.members"] for trial in trials}) > 1
    assert all(trial.user_attrs["seconds"] >= 0 for trial in trials)
    overrides, _ = from_study("sqlite:///study.db", "mbrl")
    assert overrides["model"].keys() == {"members", "elites", "hidden", "max_epochs"}, "a run of its own trains as many as it uses"


def best_study(recipe, term, value, name, **identity):
    """A study whose best trial has this value of what the term names."""
    identity = {"recipe": recipe, "dataset": "data", "unit": "return", "told": {}} | identity
    study = open_study(open_storage("sqlite:///study.db"), name, identity)
    for number in (1.0, 2.0):
        trial = study.ask(space(resolve(recipe, "data"), [term]))
        study.tell(trial, number)
    study.enqueue_trial({term.partition("=")[0]: value})
    study.tell(study.ask(space(resolve(recipe, "data"), [term])), 3.0)


def test_a_studys_best_holds_below_the_flags_and_above_the_yaml(run, near, tmp_path):
    """Default < YAML < its block for the dataset < study < command line, each seen in one field."""
    best_study("iql", "agent.expectile=0.5:0.99", 0.625, "mine", told={"agent.tau": 0.01, "batch_size": 8})
    shutil.copy(near, tmp_path / "antmaze-mine.npz")  # a name for which iql's YAML has a block
    call = ("train", "iql", "antmaze-mine.npz", "--from-study", "sqlite:///study.db", "--agent.hidden", 8, 8, "--steps", 2)
    code, out, err = run(*call, "--batch-size", 9)
    assert code == 0, err
    config = yaml.safe_load(next(tmp_path.glob("runs/*/*/*/0/config.yaml")).read_text())
    assert config["agent"]["expectile"] == 0.625, "the study's, not the block's"
    assert config["agent"]["tau"] == 0.01, "what the study was told"
    assert config["batch_size"] == 9, "the flag, not what the study was told"
    assert config["agent"]["beta"] == 10 and config["reward"] == "antmaze_minus_one", "the block's"
    assert config["agent"]["gamma"] == 0.99
    assert from_study("sqlite:///study.db", "iql")[0] == {"agent": {"expectile": 0.625, "tau": 0.01}, "batch_size": 8}


def test_a_study_that_cannot_be_taken_from(run, near, tmp_path):
    for name in ("a", "b"):
        best_study("iql", "agent.expectile=0.5:0.99", 0.6, name)
    open_study(open_storage("sqlite:///study.db"), "empty", {"recipe": "iql"})
    for recipe, url, more, message in [
        ("iql", "sqlite:///study.db", (), "holds several studies, choose one with --study: a, b, empty"),
        ("iql", "sqlite:///study.db", ("--study", "bb"), "holds no study 'bb'; did you mean b?"),
        ("td3bc", "sqlite:///study.db", ("--study", "b"), "the study b is of iql, not of td3bc"),
        ("iql", "sqlite:///study.db", ("--study", "empty"), "no trial of the study empty is complete"),
        ("iql", "sqlite:///nowhere.db", (), "there is no study in sqlite:///nowhere.db"),
        ("iql", "study.db", (), "study.db is no database: name an SQLite file, as in sqlite:///study.db"),
    ]:
        code, _, err = run("train", recipe, near, "--from-study", url, *more)
        assert code == 1 and message in err and len(err.splitlines()) == 1, err
    code, _, err = run("train", "iql", near, "--study", "a")
    assert code == 1 and "--study names one of the studies that --from-study is of, which is not given" in err
    assert not (tmp_path / "nowhere.db").exists() and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "usage: offrl tune RECIPE DATASET [flags]"),
        (("--search", "agent.alpa"), "search: unknown field agent.alpa; did you mean agent.alpha?"),
        (("--search", "batch_size"), "search: batch_size has no upper bound: narrow it, as in batch_size=1:100"),
        (("--trials", 0), "trials is 0; it must lie between 1 and inf"),
        (("--objective", "onlin"), "objective: there is no 'onlin'; did you mean online?"),
        (("--last", 3), "--last 3: a run of 200 steps has 2 evaluations before the final one"),
        (("--storage", "journal.log"), "journal.log is no database: name an SQLite file, as in sqlite:///study.db"),
        (("--storage", "redis://host"), "redis://host is no database: name an SQLite file"),
        (("--storage", "sqlite:///:memory:"), "a study in sqlite:///:memory: cannot be continued: name a file"),
        (("--storage", "sqlite:///near.py"), "sqlite:///near.py: file is not a database"),
        (("--storage", "sqlite:////nowhere/study.db"), "sqlite:////nowhere/study.db: unable to open database file"),
        (("--env", "Hoper-v5"), "--objective online plays episodes, and"),
        ((), "--objective online plays episodes, and this dataset names no environment; give one"),
    ],
)
def test_what_is_refused_before_any_trial(run, near, tmp_path, args, message):
    names = () if message.startswith("usage") else ("td3bc", near)
    env = () if "--env" in args or "names no" in message else ("--env", "near.py:make")
    code, _, err = run("tune", *names, *((*TINY, "--steps", 200, "--eval-every", 100, *env) if names else ()), *args)
    assert code == 1 and message in err and len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "runs").exists()


def test_how_many_trials_a_study_is_to_have():
    study = optuna.create_study(direction="maximize", sampler=sampler("random", 0))
    assert aim(study, 4, 0) == 4
    suggested(study, 3)
    assert aim(study, 4, 0) == 4, "the same call again"
    assert aim(study, 2, 0) == 6, "another adds to what is left"
    assert aim(study, 2, 0) == 6
    suggested(study, 3)
    assert aim(study, 2, 0) == 8, "the same call again, and nothing is left"
