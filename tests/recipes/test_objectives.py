"""Objectives without an environment, where the values of policies are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import offrl
from offrl.core.space import Box
from offrl.models.dynamics import Dynamics
from offrl.recipes import objectives
from offrl.recipes.config import resolve
from offrl.recipes.objectives import GAMMA, HORIZON, OBJECTIVES

SHORT = {"steps": 200, "batch_size": 64, "mode": "eager", "agent": {"hidden": [32], "actor_lr": 1e-2}}


def logged(action, reward):
    """20 episodes of 50 steps in which the state turns, whatever is done: actions (1000, 1) and what each brings."""
    phase = np.arange(1001) / 5
    turning, cut = np.stack([np.cos(phase), np.sin(phase)], 1).astype(np.float32), np.arange(1000) % 50 == 49
    obs, following = turning[:-1], turning[1:]
    space = Box([-2.0], [2.0])
    return offrl.Dataset.from_arrays(obs, action.astype(np.float32), reward, np.zeros(1000), cut, following, action_space=space)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(objectives, "FITTED", replace(objectives.FITTED, gamma=0.9, steps=600, lr=3e-3, hidden=(32, 32), tau=0.2))
    monkeypatch.setattr(objectives, "MODEL", replace(objectives.MODEL, hidden=(32, 32), batch_size=32, lr=3e-3, max_epochs=60))


@pytest.mark.parametrize(("name", "total"), [("fqe", 10), ("model", (1 - GAMMA**HORIZON) / (1 - GAMMA))])
def test_a_better_policy_is_worth_more_and_by_as_much_as_it_is(name, total, quick, tmp_path):
    """Rewards are the actions: a clone of 1.5 gains 2 a step on one of -0.5."""
    action = np.random.default_rng(0).uniform(-2, 2, (1000, 1))
    data = logged(action, action[:, 0])
    values = []
    for better in (1.5, -0.5):
        cloned = logged(np.full((1000, 1), better), np.zeros(1000))
        (run,) = offrl.train("bc", cloned, SHORT, runs=tmp_path / "runs")
        values.append(OBJECTIVES[name].value(run, data, resolve("bc", "x")))
    good, bad = values
    assert good - bad == pytest.approx(2 * total, rel=0.1)
    assert not OBJECTIVES[name].online


def test_a_model_is_not_followed_beyond_the_data(quick, tmp_path, monkeypatch):
    """A model that runs away, and whose rewards are its observations: none is counted that the data does not hold."""
    action = np.zeros((1000, 1))
    data = logged(action, np.zeros(1000))
    (run,) = offrl.train("bc", data, SHORT, runs=tmp_path / "runs")
    step = Dynamics.step

    def away(model, obs, action, noise):
        found = step(model, obs, action, noise)
        return found._replace(next_obs=3 * obs, reward=obs[:, 0].abs(), mean=torch.zeros_like(found.mean), std=torch.zeros_like(found.std))

    monkeypatch.setattr(Dynamics, "step", away)
    value = OBJECTIVES["model"].value(run, data, resolve("bc", "x"))
    assert 0.9 < value * (1 - GAMMA) <= 1
