"""IQL against what can be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from stubs import Fixed, Level, Linear, draws, rows, spec, start, stubbed

from offrl.agents.iql import IQL
from offrl.losses import gaussian_log_prob
from offrl.training.fit import fit

SMALL = {"hidden": (8, 8)}
REWARDS = np.array([-1.0, 0.0, 0.0, 0.25, 3.0])  # of a bandit's five equally frequent actions


def expectile_of(rewards: np.ndarray, tau: float) -> float:
    """Where tau E[(r - e)+] = (1 - tau) E[(e - r)+]."""
    return brentq(lambda e: tau * np.maximum(rewards - e, 0).sum() - (1 - tau) * np.maximum(e - rewards, 0).sum(), -9, 9, xtol=1e-12)


@pytest.mark.parametrize("tau", [0.5, 0.7, 0.9, 0.99])
def test_the_value_is_the_expectile_of_what_the_data_earned(tau):
    assert expectile_of(REWARDS, 0.5) == pytest.approx(REWARDS.mean())
    agent = stubbed(IQL, IQL.Config(expectile=tau, value_lr=0.05), spec(3, 2), value=Level)
    state, batch, q = start(agent), rows(5), torch.tensor(REWARDS)
    for _ in range(400):
        state, _ = agent.descend(state, "value", agent.value_loss, batch, q)
    assert state["params"]["value"]["level"].item() == pytest.approx(expectile_of(REWARDS, tau), abs=1e-3)


def test_a_bandit_learned_from_its_rewards():
    """Critics, value and policy from the rewards alone: the advantage-weighted mean of the actions."""
    beta, tau = 2.0, 0.7
    actions = torch.tensor([[-0.8], [-0.4], [0.0], [0.4], [0.8]]).double()
    batch = rows(5, 1, 1, obs=torch.zeros(5, 1).double(), action=actions, reward=torch.tensor(REWARDS), mask=0)
    config = IQL.Config(expectile=tau, beta=beta, tau=0.2, actor_lr=1e-2, critic_lr=1e-2, value_lr=1e-2, hidden=(32,))
    agent = IQL(config, spec(1, 1))
    state = fit(agent, start(agent), Fixed(batch, 1), 500)
    np.testing.assert_allclose(agent.bind(state, "critic")(batch.obs, batch.action), [REWARDS] * 2, atol=0.02)
    v = agent.bind(state, "value")(batch.obs)[0].item()
    assert v == pytest.approx(expectile_of(REWARDS, tau), abs=0.02)
    weights = np.minimum(np.exp(beta * (REWARDS - v)), 100)
    mean = (weights @ actions[:, 0].numpy()) / weights.sum()
    assert agent.act(state, torch.zeros(1).double()).item() == pytest.approx(mean, abs=0.01)
    std = math.sqrt(weights @ (actions[:, 0].numpy() - mean) ** 2 / weights.sum())
    assert state["params"]["actor"]["log_std"].exp().item() == pytest.approx(std, rel=0.05)


def levels(online=(0.5, 3.0), target=(1.0, 4.0), value=0.0, **config):
    """(agent, state) with critics and value that are the same everywhere."""
    agent = stubbed(IQL, IQL.Config(**SMALL | config), spec(3, 2), critic=lambda: Linear([0.0, 0.0], online), value=lambda: Level(value))
    state = start(agent)
    state["target"]["critic"] = state["target"]["critic"] | {"level": torch.tensor(target, dtype=torch.float64)}
    return agent, state


@pytest.mark.parametrize(
    "target, weight", [((0.5, 7.0), math.exp(1.5)), ((-2.0, 1.0), math.exp(-6)), ((1.6, 9.0), 100.0), ((900.0, 900.0), 100.0)]
)
def test_weights_are_exponential_in_the_lower_target_critic_and_clipped(target, weight):
    agent, state = levels(target=target, beta=3.0)
    batch = rows(6)
    _, metrics = agent.update(state, [batch], draws(agent, 6))
    assert metrics["actor/weight"].item() == pytest.approx(weight)
    log_prob = gaussian_log_prob(batch.action, *agent.bind(state, "actor")(batch.obs)).mean().item()
    assert metrics["actor/loss"].item() == pytest.approx(-weight * log_prob)
    normal = torch.distributions.Normal(agent.bind(state, "actor")(batch.obs)[0], 1.0)  # log_std starts at 0
    assert log_prob == pytest.approx(normal.log_prob(batch.action).sum(1).mean().item(), rel=1e-12)


def test_the_order_of_steps():
    """V moves by 5 in its step. Backup and weights read V from before it; the actor's critics are the targets from before theirs."""
    agent, state = levels(value=0.0, value_lr=5.0, critic_lr=0.1, tau=0.5, gamma=0.9, beta=1.0, expectile=0.7)
    after, metrics = agent.update(state, [rows(6, reward=2, mask=1)], draws(agent, 6))
    assert after["params"]["value"]["level"].item() == pytest.approx(5.0)
    assert metrics["value/loss"].item() == pytest.approx(0.7)  # 0.7 (1 - 0)^2, of the lower target
    assert metrics["critic/loss"].item() == pytest.approx(((0.5 - 2) ** 2 + (3.0 - 2) ** 2) / 2)  # y = 2 + 0.9 * 0
    assert metrics["actor/weight"].item() == pytest.approx(math.e)  # exp(1 - 0)
    np.testing.assert_allclose(after["params"]["critic"]["level"], [0.6, 2.9], rtol=1e-6)  # Adam's first step is the rate
    np.testing.assert_allclose(after["target"]["critic"]["level"], [0.8, 3.45], rtol=1e-6)  # half way to the stepped critics


def test_no_value_beyond_the_end():
    agent, state = levels(value=10.0, gamma=0.9)
    batch = rows(2, reward=2, mask=torch.tensor([1.0, 0]).double())
    _, metrics = agent.update(state, [batch], draws(agent, 2))
    want = np.mean([[(q - y) ** 2 for y in (11.0, 2.0)] for q in (0.5, 3.0)])
    assert metrics["critic/loss"].item() == pytest.approx(want)


def test_the_actors_rate_falls_along_a_cosine_and_the_others_do_not():
    agent = IQL(IQL.Config(**SMALL, actor_lr=1e-3, actor_lr_steps=10), spec(3, 2))
    rate = [agent.learning_rate("actor", torch.tensor(float(count))).item() for count in (1, 6, 11, 50)]
    assert rate == pytest.approx([1e-3, 5e-4, 0, 0], abs=1e-10)
    assert [agent.learning_rate(group, torch.tensor(9.0)) for group in ("critic", "value")] == [3e-4, 3e-4]
    state = start(agent)
    history = []
    for i in range(12):
        state, _ = agent.update(state, [rows(8, seed=i)], draws(agent, 8))
        history.append(state["params"])
    still = [torch.equal(history[10][g][k], history[11][g][k]) for g in ("actor", "critic", "value") for k in history[10][g]]
    assert still == [True] * len(history[0]["actor"]) + [False] * (len(still) - len(history[0]["actor"]))


def test_acting_samples_around_the_mean_within_the_bounds():
    agent = IQL(IQL.Config(**SMALL), spec(3, 2))
    state, obs = start(agent), torch.zeros(3).double()
    state["params"]["actor"]["log_std"] = torch.tensor([0.1, 0.2]).double().log()
    mean = agent.act(state, obs)
    np.testing.assert_allclose(agent.act(state, obs, torch.tensor([1.0, -2.0]).double()), mean + torch.tensor([0.1, -0.4]), rtol=1e-12)
    assert agent.act(state, obs, torch.tensor([99.0, -99.0]).double()).tolist() == [1, -1]
