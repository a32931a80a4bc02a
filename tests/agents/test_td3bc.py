"""TD3+BC against what can be worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stubs import Linear, Table, draws, rows, spec, start, stubbed

from offrl.agents.td3bc import TD3BC
from offrl.core.space import Box
from offrl.core.types import Spec
from offrl.nn.actor import Deterministic

SMALL = {"hidden": (8, 8)}


def constant_actor(action: float):
    return lambda: Table(torch.full((4, 2), action, dtype=torch.float64))


def test_the_actors_optimum_in_closed_form():
    """A linear critic: pi(s) = mean action at s + d alpha k / (2 mean|Q|), mean|Q| being that of pi itself."""
    k, b, alpha = np.array([0.4, -0.6]), 1.5, 0.8
    config = TD3BC.Config(alpha=alpha, actor_lr=1e-2)
    agent = stubbed(TD3BC, config, spec(2, 2), critic=lambda: Linear(k, (b, 9.0)), actor=lambda: Deterministic(2, 2, ()))
    state, batch = start(agent), rows(8, n=2, obs=torch.eye(2).double().repeat(4, 1))
    batch = batch._replace(action=batch.action / 2)
    for _ in range(600):
        state, _ = agent.descend(state, "actor", agent.actor_loss, batch)
    mean = np.stack([batch.action[i::2].mean(0) for i in range(2)])
    scale = b
    for _ in range(100):
        pi = mean + 2 * alpha * k / (2 * scale)
        scale = np.abs(pi @ k + b).mean()
    np.testing.assert_allclose(agent.act(state, torch.eye(2).double()), pi, atol=1e-4)


@pytest.mark.parametrize("factor", [1e-2, 1.0, 1e3])
def test_the_loss_by_hand_at_any_scale_of_q(factor):
    """Q = factor * 0.5 at pi: -alpha Q / |Q| + mean (pi - a)^2, whatever the factor; the second critic has no say."""
    agent = stubbed(TD3BC, TD3BC.Config(alpha=2.0), spec(3, 2), critic=lambda: Linear([factor, 0.0], (0.0, 7.0)), actor=constant_actor(0.5))
    batch = rows(4)
    loss, metrics = agent.actor_loss(start(agent), batch)
    cloning = ((0.5 - batch.action) ** 2).mean().item()
    assert loss.item() == pytest.approx(-2 + cloning, rel=1e-12)
    assert metrics["actor/cloning"].item() == pytest.approx(cloning, rel=1e-12)


def test_q_is_normalised_by_the_mean_of_its_size_not_the_size_of_its_mean():
    pi = torch.tensor([[0.5, 0], [-0.25, 0], [0, 0], [0.25, 0]]).double()  # Q = 1, -0.5, 0, 0.5
    agent = stubbed(TD3BC, TD3BC.Config(alpha=3.0), spec(3, 2), critic=lambda: Linear([2.0, 0.0]), actor=lambda: Table(pi))
    batch = rows(4, action=pi)
    assert agent.actor_loss(start(agent), batch)[0].item() == pytest.approx(-3.0 * 0.25 / 0.5, rel=1e-12)


def test_a_critic_at_zero_gives_a_finite_step():
    agent = stubbed(TD3BC, TD3BC.Config(), spec(3, 2), critic=lambda: Linear([0.0, 0.0]), actor=constant_actor(0.5))
    assert torch.isfinite(agent.actor_loss(start(agent), rows(4))[0])


@pytest.mark.parametrize("eps, action", [(-1.0, 0.7), (-100.0, 0.4), (1.0, 1.0), (0.25, 0.95)])
def test_smoothing_is_scaled_and_clipped_and_so_is_the_action(eps, action):
    """The target policy says 0.9: noise of 0.2 eps, clipped at 0.5, and the sum at 1."""
    agent = stubbed(TD3BC, TD3BC.Config(gamma=0.9), spec(3, 2), critic=lambda: Linear([1.0, 0.0]), actor=constant_actor(0.9))
    noise = {"policy": torch.full((4, 2), eps).double()}
    target = agent.backup(start(agent), rows(4, reward=2, mask=1), noise)
    np.testing.assert_allclose(target, 2 + 0.9 * action, rtol=1e-12)


def test_the_backup_takes_the_lower_target_critic_and_stops_at_the_end():
    agent = stubbed(TD3BC, TD3BC.Config(gamma=0.9), spec(3, 2), critic=lambda: Linear([0.0, 0.0], (50.0, 60.0)), actor=constant_actor(0.0))
    state = start(agent)
    state["target"]["critic"] = state["target"]["critic"] | {"level": torch.tensor([4.0, -1.0]).double()}
    batch = rows(4, reward=2, mask=torch.tensor([1.0, 0, 1, 0]).double())
    np.testing.assert_allclose(agent.backup(state, batch, draws(agent, 4)[0]), [1.1, 2, 1.1, 2], rtol=1e-12)


def test_the_critic_loss_is_the_sum_of_both_errors():
    agent = stubbed(TD3BC, TD3BC.Config(), spec(3, 2), critic=lambda: Linear([0.0, 0.0], (0.5, 3.0)))
    target = torch.full((4,), 2.0).double()
    assert agent.critic_loss(start(agent), rows(4), target)[0].item() == pytest.approx(1.5**2 + 1.0**2)


def test_two_critic_steps_to_one_of_the_actor_and_the_targets():
    agent = TD3BC(TD3BC.Config(**SMALL), spec(3, 2))
    state = start(agent)
    after, _ = agent.update(state, [rows(8, seed=0), rows(8, seed=1)], draws(agent, 8))
    assert {group: moments["count"].item() for group, moments in after["adam"].items()} == {"actor": 1, "critic": 2}
    for group in ("actor", "critic"):
        for name, leaf in after["target"][group].items():
            want = 0.995 * state["params"][group][name] + 0.005 * after["params"][group][name]
            torch.testing.assert_close(leaf, want, rtol=1e-12, atol=1e-15)


def test_the_actor_steps_on_the_second_batch_with_the_critic_just_stepped():
    agent = TD3BC(TD3BC.Config(**SMALL, critic_lr=1e-2), spec(3, 2))
    state, batches, eps = start(agent), [rows(8, seed=0), rows(8, seed=1)], draws(agent, 8)
    after, metrics = agent.update(state, batches, eps)
    mixed = state | {"params": state["params"] | {"critic": after["params"]["critic"]}}
    assert torch.equal(metrics["actor/loss"], agent.actor_loss(mixed, batches[1])[0])


def test_actions_are_in_the_environments_units_outside_and_scaled_inside():
    agent = stubbed(TD3BC, TD3BC.Config(**SMALL), Spec(Box.of(3), Box((0.0, -4.0), (2.0, 4.0))), actor=constant_actor(0.5))
    state = start(agent)
    assert agent.act(state, torch.zeros(4, 3).double())[0].tolist() == [1.5, 2.0]
    batch = rows(1, action=torch.tensor([[1.5, 2.0]]).double())
    assert agent.normalize(state, batch).action.tolist() == [[0.5, 0.5]]
