"""COMBO against what can be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from stubs import draws, rows, spec, start, stubbed
from torch import nn

from offrl.agents.combo import COMBO
from offrl.agents.sac import SAC
from offrl.core.tree import tree_map
from offrl.core.types import Transitions
from offrl.testing import difference, identical
from offrl.training.accelerate import accelerate
from offrl.training.fit import stack, unstack

SMALL = {"hidden": (8, 8)}
HALF = torch.tensor([1.0, 1, 0, 0, 0]).double()  # two rows of the dataset, three imagined ones


class PerRow(nn.Module):
    """Critics with a value of their own for every row of the batch, whatever the action; observations begin with their row."""

    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.arange(10.0).double().view(2, 5))

    def forward(self, obs, action):
        return self.value[:, obs[..., 0].long()]


def sampled(agent, state, batch, seed: int = 0):
    """Rows at which values are lowered, candidates there and their densities."""
    lowered = agent.lowered(batch)
    return lowered, *agent.candidates(state, lowered, draws(agent, len(batch.mask), seed)[0])


def test_the_candidates_and_their_densities():
    agent = COMBO(COMBO.Config(**SMALL, samples=3), spec(3, 2))
    state, batch, (eps,) = start(agent), rows(5), draws(agent, 5)
    actions, density = agent.candidates(state, agent.lowered(batch), eps)
    assert actions.shape == (9, 5, 2) and density.shape == (9, 5)
    torch.testing.assert_close(actions[:3], 2 * eps["random"] - 1)
    np.testing.assert_allclose(density[:3], math.log(1 / 4))
    actor = agent.bind(state, "actor")
    for i in range(3):
        for at, obs, name in ((3, batch.obs, "here"), (6, batch.next_obs, "there")):
            action, log_prob = actor(obs, eps[name][i])
            torch.testing.assert_close(actions[at + i], action)
            torch.testing.assert_close(density[at + i], log_prob)


def test_the_loss_by_hand():
    """Two rows, one of them imagined; two candidates there; Q1 = 2 a1 and Q2 = 1."""
    agent = COMBO(COMBO.Config(**SMALL, conservative=3.0), spec(3, 2))
    agent.bind = lambda state, group: lambda obs, action: torch.stack([2 * action[..., 0], torch.ones_like(action[..., 0])])
    batch = rows(2, action=torch.tensor([[0.5, 0], [-0.25, 0]]).double(), is_demo=torch.tensor([1.0, 0]).double())
    candidates = torch.tensor([[[0.1, 0.0]], [[-0.3, 0.0]]]).double()  # (candidate, row, action)
    density = torch.tensor([[-0.1], [0.4]]).double()
    loss, metrics = agent.critic_loss({}, batch, torch.tensor([1.5, -0.5]).double(), agent.lowered(batch), candidates, density)
    error = (0.5**2 + 0.0**2) / 2 + (0.5**2 + 1.5**2) / 2
    gap1 = math.log((math.exp(0.2 + 0.1) + math.exp(-0.6 - 0.4)) / 2) - 1.0  # at the imagined row, less the data row's value
    gap2 = math.log((math.exp(1 + 0.1) + math.exp(1 - 0.4)) / 2) - 1.0
    assert metrics["critic/error"].item() == pytest.approx(error)
    assert metrics["critic/gap"].item() == pytest.approx((gap1 + gap2) / 2)
    assert loss.item() == pytest.approx(error + 3 * (gap1 + gap2))


@pytest.mark.parametrize("slope", [0.0, 2.0, -4.0])
def test_the_soft_maximum_estimates_the_integral_over_actions(slope):
    """The mean over all candidates of exp(Q - log density) is the integral of exp(slope a) over [-1, 1], whatever the policy."""
    agent, batch = COMBO(COMBO.Config(**SMALL, samples=1000), spec(3, 1)), rows(16, 3, 1)
    candidates = sampled(agent, start(agent), batch)
    agent.bind = lambda state, group: lambda obs, action: (slope * action[..., 0])[None]
    _, metrics = agent.critic_loss({}, batch, batch.reward, *candidates)
    integral = 2 * math.sinh(slope) / slope if slope else 2.0
    assert metrics["critic/gap"].item() + slope * batch.action.mean().item() == pytest.approx(math.log(integral), abs=0.01)


@pytest.mark.parametrize("rho, lowered, is_demo, push", [
    ("imagined", 1.0, HALF, [-1 / 2, -1 / 2, 1 / 3, 1 / 3, 1 / 3]),
    ("imagined", 0.5, HALF, [-1 / 2, -1 / 2, 1 / 3, 1 / 3, 1 / 3]),  # room for three rows
    ("imagined", 0.5, HALF.flip(0), [1 / 3, 1 / 3, 1 / 3, -1 / 2, -1 / 2]),
    ("imagined", 0.4, HALF, [-1 / 2, -1 / 2, 1 / 2, 1 / 2, 0]),  # for two: they stand for the third
    ("imagined", 0.5, torch.tensor([1.0, 1, 1, 1, 0]).double(), [-1 / 4, -1 / 4, -1 / 4, -1 / 4, 1]),
    ("mixed", 0.5, HALF, [1 / 5 - 1 / 2, 1 / 5 - 1 / 2, 1 / 5, 1 / 5, 1 / 5]),
    ("imagined", 0.5, None, [0.0] * 5),  # the data's states both ways
    ("imagined", 1.0, torch.ones(5).double(), [0.0] * 5),
    ("imagined", 1.0, torch.zeros(5).double(), [1 / 5] * 5),
])  # fmt: skip
def test_imagined_rows_are_pushed_down_and_the_datas_up(rho, lowered, is_demo, push):
    """The gradient of the conservative term on each row's value, the errors being zero."""
    config = COMBO.Config(**SMALL, rho=rho, lowered=lowered, conservative=2.0, samples=2)
    agent = stubbed(COMBO, config, spec(3, 2), critic=PerRow)
    state, batch = start(agent), rows(5)._replace(is_demo=is_demo)
    batch = batch._replace(obs=torch.cat([torch.arange(5.0, dtype=torch.float64)[:, None], batch.obs[:, 1:]], 1))
    actions = sampled(agent, state, batch)

    def of(tree):
        loss, metrics = agent.critic_loss(tree, batch, torch.zeros(5).double(), *actions)
        return loss - metrics["critic/error"]

    grad = torch.func.grad(of)(state)["params"]["critic"]["value"]
    np.testing.assert_allclose(grad, 2.0 * np.array([push, push]), atol=1e-12)


def test_candidates_of_greater_value_are_pushed_harder():
    """By the weights of the soft maximum, whichever kind they are of."""
    agent, batch = COMBO(COMBO.Config(**SMALL, samples=1, conservative=1.0), spec(3, 1)), rows(5, 3, 1, is_demo=HALF)
    nothing = torch.zeros(2, 5).double()

    def of(values):
        agent.bind = lambda state, group: lambda obs, action: nothing if obs.ndim == 2 else values
        candidates, density = torch.zeros(3, 3, 1).double(), torch.zeros(3, 3).double()  # at the three imagined rows
        return agent.critic_loss({}, batch, nothing[0], agent.lowered(batch), candidates, density)[0]

    values = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(torch.func.grad(of)(values), values.softmax(1) / 3)


@pytest.mark.parametrize("members", [2, 3])
def test_without_its_term_it_is_sac(members):
    shared = SMALL | {"members": members, "deterministic_backup": False, "actor_lr_steps": 100.0}
    combo, sac = COMBO(COMBO.Config(**shared, conservative=0.0), spec(3, 2)), SAC(SAC.Config(**shared), spec(3, 2))
    one, two = start(combo), start(sac)
    for step in range(3):
        eps, batch = draws(combo, 8, step), rows(8, seed=step)
        one, _ = combo.update(one, [batch], eps)
        two, _ = sac.update(two, [batch], [{name: eps[0][name] for name in ("next_action", "action")}])
    assert identical(one, two)


def test_marked_rows_compile_and_stack():
    """The contract's rows have no `is_demo`; here some of them are imagined."""
    agent = COMBO(COMBO.Config(**SMALL, samples=2), spec(3, 2))
    state, batch, eps = start(agent), rows(5, is_demo=HALF), draws(agent, 5)
    alone, _ = accelerate(agent.update)(state, [batch], eps)
    unmarked, _ = accelerate(agent.update)(state, [batch._replace(is_demo=None)], eps)
    assert difference(alone, unmarked) > 1e-4

    def twice(columns):
        return torch.stack([columns, columns])

    batches, noise = [Transitions(*(c if c is None else twice(c) for c in batch))], [tree_map(twice, eps[0])]
    both, _ = accelerate(agent.update, stacked=True)(stack([state, state]), batches, noise)
    assert max(difference(alone, unstack(both, i)) for i in range(2)) < 1e-12
    loss = torch.compile(agent.critic_loss, fullgraph=True, backend="eager")
    actions = sampled(agent, state, batch)
    assert loss(state, batch, batch.reward, *actions)[0] == agent.critic_loss(state, batch, batch.reward, *actions)[0]
