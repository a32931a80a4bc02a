"""A2PR against what can be worked out by hand: fixed points, the selection's table, gradients, counters, reductions, invariances."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stubs import Fixed, Level, Linear, Table, draws, rows, spec, start, stubbed
from torch import nn

from offrl.agents import a2pr
from offrl.agents.a2pr import A2PR, select
from offrl.agents.td3bc import TD3BC
from offrl.core.tree import tree_map
from offrl.nn.actor import Deterministic
from offrl.training.fit import fit

SMALL = {"actor_hidden": (8, 8), "critic_hidden": (8, 8), "vae_hidden": (16, 16)}
FROZEN = {"critic_lr": 0.0, "value_lr": 0.0}


def small(**config) -> A2PR.Config:
    return A2PR.Config(**SMALL | config)


class Bandit(nn.Module):
    """Q(a) = 0.5 + a on the actions -0.5 and 0.5 of the data, 0 and 1; beyond 0.9, where there is no data, 10 more."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, obs, action, member=None):
        value = 0.5 + action[:, 0] + 10 * (action[:, 0] > 0.9)
        return value.expand(2, -1) if member is None else value


class Tempted(Deterministic):
    """An actor that starts at 0.95."""

    def __init__(self):
        super().__init__(1, 1, (8, 8))
        nn.init.zeros_(self.mlp.head.weight)
        nn.init.constant_(self.mlp.head.bias, math.atanh(0.95))


FAST = {"alpha": 0.0, "actor_lr": 1e-2, "critic_lr": 1e-2, "value_lr": 1e-2, "vae_lr": 5e-3}


def bandit_rows():
    action = torch.tensor([[-0.5], [0.5]] * 16, dtype=torch.float64)
    return rows(32, 1, 1, obs=torch.zeros(32, 1).double(), action=action, reward=(action[:, 0] > 0).double(), mask=0)


@pytest.mark.parametrize("proposal", ["reconstruct", "prior"])
def test_a_bandit_learned_from_its_rewards(proposal):
    """Everything is learned: Q(-0.5) = 0, Q(0.5) = 1, V = 0.5; the pull alone ends at 0.5, and TD3+BC's at the mean, 0."""
    agent, batch = A2PR(small(**FAST, vae_action=proposal), spec(1, 1)), bandit_rows()
    state = fit(agent, start(agent), Fixed(batch, 2), 240)
    np.testing.assert_allclose(agent.bind(state, "critic")(batch.obs[:2], batch.action[:2]), [[0, 1]] * 2, atol=1e-3)
    np.testing.assert_allclose(agent.bind(state, "value")(batch.obs), 0.5, atol=1e-3)
    assert agent.act(state, torch.zeros(1).double()).item() == pytest.approx(0.5, abs=0.005)
    plain = TD3BC(TD3BC.Config(alpha=0.0, actor_lr=1e-2, hidden=(8, 8)), spec(1, 1))
    assert plain.act(fit(plain, start(plain), Fixed(batch, 2), 240), torch.zeros(1).double()).item() == pytest.approx(0.0, abs=1e-3)


def test_an_inflated_action_outside_the_data_is_not_proposed():
    """The actor starts where the critic promises 10 more; the VAE knows the good data alone, so the target stays there."""
    config = small(**FAST | FROZEN)
    agent = stubbed(A2PR, config, spec(1, 1), critic=Bandit, value=lambda: Level(0.5), actor=Tempted)
    batch, state = bandit_rows(), start(agent)
    pi = agent.bind(state, "actor")(batch.obs)
    assert agent.q(state, batch.obs, pi)[0].item() == pytest.approx(11.45)
    source = Fixed(batch, 2)
    learned = state | {"params": state["params"] | {"vae": fit(agent, state, source, 300)["params"]["vae"]}}
    everywhere = torch.linspace(-1, 1, 32).double()[:, None]
    for eps in (draws(agent, 32, seed)[1] for seed in range(5)):
        np.testing.assert_allclose(agent.propose(learned, batch.obs, everywhere, eps), 0.5, atol=0.05)
    state = fit(agent, learned, source, 240)
    assert agent.act(state, torch.zeros(1).double()).item() == pytest.approx(0.5, abs=0.005)


class Offered(nn.Module):
    """A VAE that proposes scale * action + shift(s), with shift a linear map of obs, and encodes nothing."""

    def __init__(self, scale: float, shift):
        super().__init__()
        self.scale, self.shift, self.unused = scale, shift, nn.Parameter(torch.zeros(1))

    def forward(self, obs, action, noise):
        return self.scale * action + obs @ torch.tensor(self.shift, dtype=obs.dtype), noise, noise


@pytest.mark.parametrize("detach", [True, False])
def test_the_policys_optimum_in_closed_form(detach):
    """A linear critic and a constant proposal e(s): pi = e + d alpha k / (2 mask mean|Q|), mean|Q| being that of pi itself."""
    e, k, b, alpha, mask = np.array([[0.1, -0.2], [-0.3, 0.4], [0.0, 0.2]]), np.array([0.3, -0.5]), 2.0, 0.5, 0.8
    config = small(alpha=alpha, mask=mask, actor_lr=1e-2, detach_target=detach)
    networks = {"critic": lambda: Linear(k, (b, b)), "vae": lambda: Offered(0.0, e.tolist()), "actor": lambda: Deterministic(3, 2, ())}
    agent = stubbed(A2PR, config, spec(3, 2), **networks)
    batch, state, scale = rows(3, obs=torch.eye(3).double()), start(agent), 1.0
    value, advantage = torch.full((3,), -9.0).double(), torch.full((3,), -99.0).double()  # the proposal wins everywhere
    for _ in range(400):
        state, metrics = agent.descend(state, "actor", agent.actor_loss, batch, value, advantage, draws(agent, 3)[1])
    assert metrics["actor/proposed"] == metrics["actor/pulled"] == 1
    for _ in range(100):  # the scalar fixed point
        pi = e + 2 * alpha * k / (2 * mask * scale)
        scale = np.abs(pi @ k + b).mean()
    np.testing.assert_allclose(agent.act(state, batch.obs), pi, atol=1e-5)
    assert abs(pi - e).min() > 0.05


SIGNS = (-1.0, 0.0, 1.0)


def test_selection_table():
    """All signs of (A_proposal, A_data); ties go to the proposal, and a data advantage of 0 alone is not pulled to."""
    pairs = torch.tensor(list(itertools.product(SIGNS, SIGNS)))
    target, weight = select(torch.ones(9, 2), pairs[:, 0], torch.zeros(9, 2), pairs[:, 1], 0.4)
    took = {(-1, -1): 1, (-1, 0): 0, (-1, 1): 0, (0, -1): 1, (0, 0): 1, (0, 1): 0, (1, -1): 1, (1, 0): 1, (1, 1): 1}
    pulled = {pair: pair not in {(-1, -1), (-1, 0)} for pair in took}
    assert target.tolist() == [[took[tuple(p)]] * 2 for p in pairs.tolist()]
    assert weight.tolist() == [torch.tensor(0.4 * pulled[tuple(p)]).item() for p in pairs.tolist()]
    assert weight.shape == (9,)


@given(st.lists(st.tuples(st.floats(-2, 2), st.floats(-2, 2)), min_size=1, max_size=8), st.floats(0.1, 9))
def test_selection_is_the_rule_row_by_row(pairs, mask):
    a, d = torch.tensor(pairs, dtype=torch.float64).T
    target, weight = select(torch.ones(len(pairs), 3).double(), a, torch.zeros(len(pairs), 3).double(), d, mask)
    for row, w, (x, y) in zip(target.tolist(), weight.tolist(), pairs):
        assert row == [float(x >= y)] * 3
        assert w == (mask if x >= 0 or y > 0 else 0.0)


def actor_gradient(detach: bool, rho: float, c: float, pi: torch.Tensor, value: float = -9.0):
    agent = stubbed(
        A2PR,
        small(alpha=0.0, mask=0.8, detach_target=detach),
        spec(3, 2),
        critic=lambda: Linear([1.0, 1.0]),
        vae=lambda: Offered(rho, [[c, c]] * 3),
        actor=lambda: Table(pi),
    )
    batch, state = rows(len(pi), obs=torch.eye(3).double()[:1].expand(len(pi), -1)), start(agent)
    args = torch.full((len(pi),), value).double(), torch.full((len(pi),), -99.0).double(), draws(agent, len(pi))[1]

    def loss(tree):
        return agent.actor_loss(state | {"params": state["params"] | {"actor": tree}}, batch, *args)[0]

    return torch.func.grad(loss)(state["params"]["actor"])["action"] * pi.numel()  # of one entry, not of the mean


@pytest.mark.parametrize("rho, c", [(0.5, 0.3), (0.9, -0.2), (0.0, 0.1), (1.0, 0.0)])
def test_gradient_through_the_proposal(rho, c):
    """abar = rho pi + c. Official: 2 w (1 - rho) ((1 - rho) pi - c); detached: 2 w ((1 - rho) pi - c)."""
    pi = 2 * torch.rand(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
    residual = (1 - rho) * pi - c
    torch.testing.assert_close(actor_gradient(False, rho, c, pi), 2 * 0.8 * (1 - rho) * residual, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(actor_gradient(True, rho, c, pi), 2 * 0.8 * residual, rtol=1e-12, atol=1e-15)
    if rho == 1 and c == 0:
        assert not actor_gradient(False, rho, c, pi).any()  # a perfect autoencoder does not pull
    assert not actor_gradient(False, rho, c, pi, value=99.0).any()  # nor does a row whose weight is 0


@pytest.mark.parametrize("delta", [0.0, 3.0, -3.0])
def test_value_of_a_constant_reward(delta):
    """Critics at r / (1 - gamma): V follows them, also where the targets promise more; where they promise less, V takes that."""
    gamma, reward = 0.9, 0.7
    level = reward / (1 - gamma)
    config = small(gamma=gamma, tau=0.0, value_lr=0.1, critic_lr=0.0)
    agent = stubbed(A2PR, config, spec(3, 2), critic=lambda: Linear([0.0, 0.0], (level, level)), value=lambda: Level(5.0))
    state = start(agent)
    state["target"]["critic"]["level"] += delta
    state = fit(agent, state, Fixed(rows(4, reward=reward, mask=1), 2), 200)
    assert state["params"]["value"]["level"].item() == pytest.approx(level + gamma * min(delta, 0), abs=1e-3)


def test_advantages_are_over_v_from_before_its_step():
    """V falls to -5 in the first gradient step and rises above the critics' -4.3 in the second, whose advantages are 0.7 all the same."""
    config = small(critic_lr=0.0, value_lr=5.0)
    agent = stubbed(A2PR, config, spec(3, 2), critic=lambda: Linear([0.0, 0.0], (-4.3, -4.3)), value=Level)
    state, metrics = agent.update(start(agent), [rows(4, reward=-9, mask=0), rows(4, reward=9, mask=0)], draws(agent, 4))
    assert state["params"]["value"]["level"] > -4
    assert metrics["vae/good"] == metrics["actor/pulled"] == metrics["actor/proposed"] == 1


def vae_gradient(agent, state, batch, advantage, eps):
    def loss(tree):
        return agent.vae_loss(state | {"params": state["params"] | {"vae": tree}}, batch, advantage, eps)

    grads, metrics = torch.func.grad(lambda tree: loss(tree)[0])(state["params"]["vae"]), loss(state["params"]["vae"])[1]
    return grads, metrics, loss(state["params"]["vae"])[0]


def test_vae_learns_good_actions_alone():
    """No good action: the loss is half the KL term and the decoder has no gradient. A tie is not good; some: theirs alone."""
    agent = A2PR(small(vae_weight=1.5), spec(3, 2))
    batch, state, eps = rows(6), start(agent), draws(agent, 6)[0]
    recon, mean, std = agent.bind(state, "vae")(batch.obs, batch.action, eps["vae"])
    kl = -0.5 * (1 + (std**2).log() - mean**2 - std**2).mean()
    error = (recon - batch.action) ** 2
    for advantage, good in [
        (torch.full((6,), -1.0), []),
        (torch.zeros(6), []),
        (torch.full((6,), 1.0), range(6)),
        (torch.tensor([1.0, -1, 0, 1, -1, -1]), [0, 3]),
    ]:
        grads, metrics, loss = vae_gradient(agent, state, batch, advantage.double(), eps)
        want = 1.5 * sum(error[i].sum() for i in good) / error.numel() + 0.5 * kl
        torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
        assert metrics["vae/good"].item() == pytest.approx(len(good) / 6)
        decoder = [g.abs().max().item() for name, g in grads.items() if name.startswith("decoder")]
        assert (max(decoder) > 0) == bool(good)
    alone = batch._replace(action=torch.where(torch.arange(6)[:, None] % 3 == 0, batch.action, 0.123))
    some, other = (vae_gradient(agent, state, b, torch.tensor([1.0, -1, -1, 1, -1, -1]).double(), eps)[0] for b in (batch, alone))
    torch.testing.assert_close(some["decoder.head.bias"], other["decoder.head.bias"], rtol=1e-12, atol=0)


def test_vae_collapses_where_nothing_is_good():
    agent = A2PR(small(vae_lr=1e-2), spec(3, 2))
    batch, state = rows(16), start(agent)
    before = state["params"]["vae"]
    for i in range(300):
        state, _ = agent.descend(state, "vae", agent.vae_loss, batch, -torch.ones(16).double(), draws(agent, 16, i)[0])
    _, mean, std = agent.bind(state, "vae")(batch.obs, batch.action, draws(agent, 16)[0]["vae"])
    assert mean.abs().max() < 0.02 and (std - 1).abs().max() < 0.02
    assert all(torch.equal(leaf, before[k]) for k, leaf in state["params"]["vae"].items() if k.startswith("decoder"))


def test_threshold():
    agent = A2PR(small(threshold=0.5), spec(3, 2))
    batch, state, eps = rows(4), start(agent), draws(agent, 4)[0]
    assert agent.vae_loss(state, batch, torch.tensor([0.4, 0.5, 0.6, -1]).double(), eps)[1]["vae/good"] == 0.25


def test_counters():
    """In 2 n gradient steps the actor and the targets move n times, critics, V and VAE 2 n times."""
    agent = A2PR(small(), spec(3, 2))
    state, source = start(agent), Fixed(rows(8), 2)
    for i in range(3):
        before = state
        state, _ = agent.update(state, source(0), draws(agent, 8, i))
        for group in agent.targets:
            for name, leaf in state["target"][group].items():
                online, old = state["params"][group][name], before["target"][group][name]
                torch.testing.assert_close(leaf, 0.995 * old + 0.005 * online, rtol=1e-12, atol=1e-15)
    assert {group: moments["count"].item() for group, moments in state["adam"].items()} == {"actor": 3, "critic": 6, "value": 6, "vae": 6}


def plain(agent_loss, state, *args):
    """(loss, gradient with respect to the actor)"""

    def of(tree):
        return agent_loss(state | {"params": state["params"] | {"actor": tree}}, *args)[0]

    return of(state["params"]["actor"]), torch.func.grad(of)(state["params"]["actor"])


def pair(**config):
    """A2PR and TD3+BC with the same actor and critics, in both states."""
    ours = A2PR(small(mask=1.0, **config), spec(3, 2))
    theirs = TD3BC(TD3BC.Config(hidden=(8, 8), **config), spec(3, 2))
    mine = start(ours)
    shared = {part: {group: mine[part][group] for group in ("actor", "critic")} for part in ("params", "target", "adam")}
    return ours, mine, theirs, start(theirs) | shared


def test_without_its_ideas_it_is_td3bc(monkeypatch):
    """Weights forced to 1 and targets to the data: losses, and then whole updates, are TD3+BC's bit for bit."""
    monkeypatch.setattr(a2pr, "select", lambda proposal, proposed, action, advantage, mask: (action, mask * torch.ones_like(advantage)))
    ours, mine, theirs, other = pair()
    batch, eps = rows(24), draws(ours, 24)
    extra = torch.zeros(24).double(), torch.zeros(24).double(), eps[1]
    a, b = plain(ours.actor_loss, mine, batch, *extra), plain(theirs.actor_loss, other, batch)
    assert torch.equal(a[0], b[0]) and all(torch.equal(a[1][k], b[1][k]) for k in b[1])
    for i in range(3):
        batches, eps = [rows(24, seed=2 * i), rows(24, seed=2 * i + 1)], draws(ours, 24, i)
        mine, metrics = ours.update(mine, batches, eps)
        other, more = theirs.update(other, batches, eps)
        assert torch.equal(metrics["critic/loss"], more["critic/loss"]) and torch.equal(metrics["actor/loss"], more["actor/loss"])
        for part, group in itertools.product(("params", "target"), ("actor", "critic")):
            assert all(torch.equal(leaf, other[part][group][k]) for k, leaf in mine[part][group].items())


def test_without_a_pull_it_is_td3_with_normalised_q():
    agent = A2PR(small(mask=0.0, alpha=1.7), spec(3, 2))
    batch, state, eps = rows(24), start(agent), draws(agent, 24)[1]
    extra = torch.zeros(24).double(), torch.zeros(24).double(), eps
    loss, grads = plain(agent.actor_loss, state, batch, *extra)
    actor, critic = agent.bind(state, "actor", "critic")
    scale = 1.7 / critic(batch.obs, actor(batch.obs), member=0).abs().mean()

    def td3(tree):
        pi = torch.func.functional_call(agent.modules["actor"], tree, (batch.obs,))
        return -scale * critic(batch.obs, pi, member=0).mean()

    assert torch.equal(loss, td3(state["params"]["actor"]))
    want = torch.func.grad(td3)(state["params"]["actor"])
    for name, grad in grads.items():
        torch.testing.assert_close(grad, want[name], rtol=1e-12, atol=1e-18)


def lifted(state, by: float):
    """Critics and V with a constant added."""
    params = state["params"]
    critic = {k: v + by if k.endswith("head.bias") else v for k, v in params["critic"].items()}
    value = {k: v + by if k.endswith("head.bias") else v for k, v in params["value"].items()}
    return state | {"params": params | {"critic": critic, "value": value}}


def actor_step(agent, state, batch, eps):
    value = agent.bind(state, "value")(batch.obs)
    return agent.actor_loss(state, batch, value, agent.q(state, batch.obs, batch.action) - value, eps)


def centred(state, agent, batch):
    """V moved so that its advantages have both signs."""
    gap = (agent.q(state, batch.obs, batch.action) - agent.bind(state, "value")(batch.obs)).mean()
    value = {k: v + gap if k == "mlp.head.bias" else v for k, v in state["params"]["value"].items()}
    return state | {"params": state["params"] | {"value": value}}


@pytest.mark.parametrize("kind", ["q1", "min", "mean"])
def test_a_constant_added_to_q_and_v_changes_no_choice(kind):
    agent, batch = A2PR(small(advantage=kind, alpha=0.0), spec(3, 2)), rows(64)
    state, eps = centred(start(agent), agent, batch), draws(agent, 64)[1]
    (loss, metrics), (moved, more) = actor_step(agent, state, batch, eps), actor_step(agent, lifted(state, 3.0), batch, eps)
    assert 0 < metrics["actor/proposed"] < 1 and 0 < metrics["actor/pulled"] < 1
    assert torch.equal(loss, moved) and metrics == more


def test_the_order_of_rows_does_not_matter():
    agent, batch = A2PR(small(), spec(3, 2)), rows(64)
    state, eps = centred(start(agent), agent, batch), draws(agent, 64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    shuffled, noise = type(batch)(*(None if c is None else c[order] for c in batch)), [{k: v[order] for k, v in e.items()} for e in eps]
    after, again = agent.update(state, [batch] * 2, eps)[0], agent.update(state, [shuffled] * 2, noise)[0]
    tree_map(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=1e-12), after, again)


def test_the_scale_of_rewards_does_not_matter_to_the_value_term():
    agent, batch = A2PR(small(mask=0.0), spec(3, 2)), rows(24)
    state, eps = start(agent), draws(agent, 24)[1]
    critic = {k: 7 * v if ".head." in k else v for k, v in state["params"]["critic"].items()}
    scaled = state | {"params": state["params"] | {"critic": critic}}
    torch.testing.assert_close(actor_step(agent, state, batch, eps)[0], actor_step(agent, scaled, batch, eps)[0], rtol=1e-12, atol=0)


def test_advantages_of_one_critic_of_the_lower_and_of_the_mean():
    batch = rows(4)
    for kind, value in (("q1", 3.0), ("min", 1.0), ("mean", 2.0)):
        agent = stubbed(A2PR, small(advantage=kind), spec(3, 2), critic=lambda: Linear([0.0, 0.0], (3.0, 1.0)))
        assert agent.q(start(agent), batch.obs, batch.action).tolist() == [value] * 4


def test_the_prior_mode_does_not_look_at_the_policy():
    agent, batch = A2PR(small(vae_action="prior"), spec(3, 2)), rows(4)
    state, eps = start(agent), draws(agent, 4)[1]
    proposals = [agent.propose(state, batch.obs, action, eps) for action in (batch.action, -batch.action)]
    assert torch.equal(*proposals)
    far = agent.propose(state, batch.obs, batch.action, {"proposal": 100 * eps["proposal"].sign()})
    edge = agent.propose(state, batch.obs, batch.action, {"proposal": 0.5 * eps["proposal"].sign()})
    assert torch.equal(far, edge)  # samples of the prior are clipped to half a standard deviation


def test_a_critic_at_zero_gives_a_finite_step():
    agent = stubbed(A2PR, small(), spec(3, 2), critic=lambda: Linear([0.0, 0.0]))
    loss, _ = actor_step(agent, start(agent), rows(4), draws(agent, 4)[1])
    assert torch.isfinite(loss)


def test_values_keep_one_number_a_row():
    """A (B, 1) beside a (B,) would broadcast to (B, B) and average to nearly the right loss."""
    agent, batch = A2PR(small(advantage="mean"), spec(3, 2)), rows(5)
    state, eps = start(agent), draws(agent, 5)
    next_action = agent.next_action(state, batch, eps[0])
    for value in (
        agent.backup(state, batch, next_action, of="target"),
        agent.q(state, batch.obs, batch.action),
        agent.bind(state, "value")(batch.obs),
    ):
        assert value.shape == (5,)
