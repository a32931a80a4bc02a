"""The wiring of offline model-based RL: ensembles that are kept, batches that are mixed, runs that go on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import offrl
from offrl.core.checkpoint import Checkpoints
from offrl.core.log import read
from offrl.core.registry import agent_class
from offrl.core.tree import flatten
from offrl.data.dataset import DataError, Dataset
from offrl.envs import terminations
from offrl.recipes import mbrl
from offrl.recipes.config import resolve
from offrl.testing import toy
from offrl.training.run import RunError, read_about

SMALL = {
    "steps": 24, "batch_size": 40, "log_every": 6, "checkpoint_every": 12, "mode": "eager", "termination": "never",
    "agent": {"hidden": [8]},
    "model": {"members": 3, "elites": 2, "hidden": [8], "max_epochs": 2},
    "imagine": {"starts": 30, "every": 8, "horizon": 3, "keep": 2, "real": 0.25},
}  # fmt: skip


def small(**changes):
    return {key: SMALL.get(key, {}) | value if isinstance(value, dict) else value for key, value in (SMALL | changes).items()}


def train(folder, recipe="mbrl", data=None, **changes):
    return offrl.train(recipe, data or toy(), small(**changes), runs=folder)[0]


def saved(folder):
    return flatten(Checkpoints(folder / "checkpoints").latest().tree)


@pytest.mark.parametrize("recipe", ["mbrl", "combo"])
def test_a_run_goes_on_bit_for_bit(tmp_path, recipe):
    """Cut in the middle of a generation: what was imagined is in the checkpoint."""
    whole = train(tmp_path / "whole", recipe)
    train(tmp_path / "cut", recipe, steps=12)
    cut = train(tmp_path / "cut", recipe)
    a, b = saved(whole), saved(cut)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert any(key.startswith("source/") for key in a)
    assert [row["step"] for row in read(cut)] == [row["step"] for row in read(whole)]


def test_a_policy_is_read_back_without_what_it_learned_from(tmp_path):
    policy = offrl.load(train(tmp_path))
    assert policy.predict(np.zeros(5))[0].shape == (3,) and "source" not in policy.state


def test_the_log_tells_of_what_was_imagined(tmp_path):
    rows = read(train(tmp_path))
    assert {"imagine/reward", "imagine/penalty", "imagine/weight", "imagine/rows", "critic/loss"} <= rows[-1].keys()
    assert rows[-1]["imagine/rows"] == 90


def test_runs_share_an_ensemble_and_use_parts_of_it(tmp_path, monkeypatch):
    fits, fit = [], mbrl.Dynamics.fit
    monkeypatch.setattr(mbrl.Dynamics, "fit", lambda self, *args, **kw: fits.append(self.config.members) or fit(self, *args, **kw))
    model = SMALL["model"] | {"trained": 4, "seed": 0}
    said = []
    for members in (4, 2):
        changes = small(model=model | {"members": members})
        offrl.train("mbrl", toy(), changes, runs=tmp_path, say=said.append)
    assert fits == [4] and len(list(tmp_path.glob("models/*/model.safetensors"))) == 1
    data, config = toy(), resolve("mbrl", "x", overrides=small(model=model | {"members": 2}))
    part = mbrl.ensemble(data, config, 7, "cpu", tmp_path / "models", said.append)
    whole = mbrl.ensemble(data, resolve("mbrl", "x", overrides=small(model=model | {"members": 4})), 7, "cpu", tmp_path / "models", print)
    obs, action = torch.from_numpy(data.obs[:5]), torch.from_numpy(data.action[:5])
    torch.testing.assert_close(part.predict(obs, action)[0], whole.predict(obs, action)[0][:2])
    assert fits == [4] and any("held out" in line for line in said)


def test_seeds_have_ensembles_of_their_own_unless_one_is_named(tmp_path):
    offrl.train("mbrl", toy(), small(steps=2), seeds=[0, 1], runs=tmp_path / "own")
    assert len(list(tmp_path.glob("own/models/*"))) == 2
    offrl.train("mbrl", toy(), small(steps=2, model={"seed": 3}), seeds=[0, 1], runs=tmp_path / "one")
    assert len(list(tmp_path.glob("one/models/*"))) == 1


def source(tmp_path, data=None, **changes):
    data, config = data or toy(), resolve("mbrl", "x", overrides=small(**changes))
    agent = agent_class("sac")(config.agent, data.spec)
    made = mbrl.source(agent, data, config, 0, "cpu", "replay", models=tmp_path, say=lambda text: None, stage=lambda *args: None)
    state = agent.init(0)
    return made, data, lambda obs, noise=None: agent.act(state, obs, noise).detach()


def test_a_batch_has_its_share_of_real_rows(tmp_path):
    made, data, act = source(tmp_path)
    (batch,) = made(0, act)
    real = {tuple(row) for row in data.obs.tolist()}
    assert [tuple(row) in real for row in batch.obs[:10].tolist()] == [True] * 10 and made.batch_size == 40
    assert batch.is_demo.tolist() == [1] * 10 + [0] * 30  # as conservative critics need to know
    assert set(batch.reward[:10].tolist()) <= set(data.reward.tolist()) and not set(batch.reward[10:].tolist()) & set(data.reward.tolist())


def test_normalised_penalties_do_not_depend_on_units(tmp_path):
    """Rewards in other units: the same penalty in units of the rewards; raw ones are in squared or mixed units."""
    base = toy()
    columns = base.obs * 1000, base.action, base.reward * 10, base.terminated, base.truncated, base.next_obs * 1000
    other = Dataset.from_arrays(*columns, action_space=base.spec.action)
    found = {}
    for units in ("normalised", "raw"):
        for name, data in (("base", base), ("other", other)):
            made, _, act = source(tmp_path, data, penalty={"units": units}, imagine={"horizon": 1})
            made(0, act)
            found[units, name] = float(made.sources[1].rows.penalty.mean())
    assert found["normalised", "other"] == pytest.approx(10 * found["normalised", "base"], rel=0.1)
    assert found["raw", "other"] > 100 * found["raw", "base"]


def test_a_halt_is_measured_by_the_data(tmp_path):
    made, data, act = source(tmp_path, penalty={"halt": 0.2, "kind": "max_pair_distance"})
    rewards = torch.cat([made(step, act)[0].reward for step in range(8)])
    imagined = made.sources[1]
    halted = imagined.rows.penalty > imagined.halt
    assert halted.any() and imagined.halt_reward == pytest.approx(float(data.reward.min()) - 50)
    assert (rewards == imagined.halt_reward).any() and (rewards > imagined.halt_reward).any()


def test_where_episodes_end_a_rule_must_be_known(tmp_path, monkeypatch):
    monkeypatch.setattr(terminations, "_KNOWN", dict(terminations._KNOWN))
    with pytest.raises(RunError, match=r"no rule is known .* register one \(offrl.register_termination\).*--termination never"):
        train(tmp_path, termination="auto")
    named = Dataset(**{**toy().__dict__, "spec": toy().spec.__class__(**{**toy().spec.__dict__, "env_id": "Plant-v0"})})
    offrl.register_termination("Plant", lambda obs, action, next_obs: next_obs[:, 0] > 3)
    config = resolve("mbrl", "x", overrides=small(termination="auto"))
    assert mbrl.terminated(named, config) is terminations.termination_for("Plant-v0")
    endless = Dataset.from_arrays(np.zeros((20, 1)), np.zeros((20, 1)), np.zeros(20), np.zeros(20), np.arange(20) % 5 == 4)
    assert mbrl.terminated(endless, config) is terminations.never


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(RunError, match="leaves 0 rows of the data"):
        train(tmp_path, imagine={"real": 0.0})
    with pytest.raises(RunError, match="model.members is 3 and model.trained only 2"):
        train(tmp_path, model={"trained": 2})
    with pytest.raises(RunError, match="--how processes"):
        offrl.train("mbrl", toy(), small(), seeds=[0, 1], stacked=True, runs=tmp_path)
    with pytest.raises(TypeError, match="continuous actions"):
        train(tmp_path, data=toy(discrete=True))


def test_nan_and_a_single_episode(tmp_path):
    rows = np.random.default_rng(0).standard_normal((60, 2)).astype(np.float32)
    one = Dataset.from_arrays(rows, rows[:, :1], rows[:, 0], np.zeros(60), np.zeros(60), rows + 1)
    with pytest.warns(UserWarning, match="one episode alone"):
        train(tmp_path, data=one)
    broken = Dataset.from_arrays(rows.copy(), rows[:, :1], rows[:, 0], np.zeros(60), np.arange(60) % 10 == 9, rows + 1)
    broken.obs[7] = np.nan
    with pytest.raises(DataError, match="observations: 1 rows hold NaN or infinity, the first is row 7"):
        train(tmp_path, data=broken)


def test_what_is_known_of_a_run(tmp_path):
    about = read_about(train(tmp_path))
    assert (about["recipe"], about["algorithm"]) == ("mbrl", "sac")


@pytest.mark.parametrize("dataset, kind, units, weight, horizon, real", [
    ("hopper-medium-v2", "max_std_norm", "raw", 5.0, 5, 0.05),
    ("hopper-medium-replay-v2", "max_std_norm", "raw", 2.5, 5, 0.05),
    ("walker2d-medium-v2", "max_std_norm", "raw", 0.5, 5, 0.05),
    ("walker2d-medium-replay-v2", "max_std_norm", "raw", 2.5, 1, 0.05),
    ("halfcheetah-medium-expert-v2", "max_std_norm", "raw", 2.5, 5, 0.05),
    ("offrl/hopper-medium-v0", "ensemble_std", "normalised", 1.0, 5, 0.5),
])  # fmt: skip
def test_settings_are_the_published_ones_on_the_datasets_that_have_some(dataset, kind, units, weight, horizon, real):
    c = resolve("mbrl", dataset)
    assert (c.penalty.kind, c.penalty.units, c.penalty.weight, c.imagine.horizon, c.imagine.real) == (kind, units, weight, horizon, real)
