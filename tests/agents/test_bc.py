"""Behaviour cloning against what can be worked out by hand, and what continuous agents say to discrete actions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stubs import rows, spec, start

from offrl.agents.bc import BC
from offrl.core import registry
from offrl.core.space import Box, Discrete
from offrl.core.types import Spec

EYE = torch.eye(2, dtype=torch.float64)


def trained(spec: Spec, state_of_row: list[int], action: torch.Tensor, steps: int = 300):
    """A table (no hidden layer, one-hot states), descended on all rows."""
    agent = BC(BC.Config(actor_lr=0.05, hidden=()), spec)
    state, batch = start(agent), rows(len(action), n=2, obs=EYE[state_of_row], action=action)
    for _ in range(steps):
        state, metrics = agent.update(state, [batch], [{}])
    return agent, state, metrics


def test_the_conditional_mean():
    """In the environment's units, whatever the bounds."""
    action = torch.tensor([[0.5, 3.0], [1.5, -3.0], [0.2, 0], [1.0, 0], [1.4, 3]]).double()
    bounds = Spec(Box.of(2), Box((0.0, -4.0), (2.0, 4.0)))
    agent, state, metrics = trained(bounds, [0, 0, 1, 1, 1], action)
    np.testing.assert_allclose(agent.act(state, EYE), [[1.0, 0.0], [2.6 / 3, 1.0]], atol=1e-4)
    inside = (action - torch.tensor([1.0, 0.0])) / torch.tensor([1.0, 4.0])
    means = torch.stack([inside[:2].mean(0)] * 2 + [inside[2:].mean(0)] * 3)
    assert metrics["actor/loss"].item() == pytest.approx(((inside - means) ** 2).mean().item(), rel=1e-4)


def test_the_frequencies_of_discrete_actions():
    """Cross-entropy ends at the conditional frequencies, and its value at their entropy."""
    agent, state, metrics = trained(Spec(Box.of(2), Discrete(3)), [0] * 4 + [1] * 4, torch.tensor([0, 1, 1, 1, 0, 0, 2, 1]), steps=500)
    chances = agent.bind(state, "actor")(EYE).softmax(-1)
    np.testing.assert_allclose(chances, [[0.25, 0.75, 0], [0.5, 0.25, 0.25]], atol=0.01)
    entropy = np.mean([-(0.25 * np.log(0.25) + 0.75 * np.log(0.75)), 0.5 * np.log(2) + 0.5 * np.log(4)])
    assert metrics["actor/loss"].item() == pytest.approx(entropy, abs=0.01)
    assert agent.act(state, EYE).tolist() == [1, 0]
    noise = torch.rand(20000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = agent.act(state, EYE[1].expand(20000, 2), noise)
    frequency = torch.bincount(drawn, minlength=3) / 20000
    np.testing.assert_allclose(frequency, chances[1], atol=4 * np.sqrt(0.25 / 20000))  # four standard errors


@pytest.mark.parametrize("name, said", [("td3bc", "TD3BC"), ("iql", "IQL"), ("a2pr", "A2PR")])
def test_continuous_agents_refuse_discrete_actions(name, said):
    kind = registry.agent_class(name)
    with pytest.raises(TypeError, match=f"{said} needs continuous actions; the data has 4 discrete ones"):
        kind(kind.Config(), Spec(Box.of(2), Discrete(4)))
    assert kind(kind.Config(), spec(2, 1)).continuous
