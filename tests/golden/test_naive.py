"""The naive second writings against what can be worked out by hand on networks that give constants."""

from __future__ import annotations

import math

import a2pr_naive as a2pr
import iql_naive as iql
import pytest
import td3bc_naive as td3bc
import torch
from by_hand import B, D, a2pr_trainer, constant_, first_action_, iql_trainer, noise, rows, same, td3bc_trainer, values
from plain_nets import linears


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("make, module, order", [
    (a2pr_trainer, a2pr, ["critic", "value", "vae"] * 2 + ["actor"]),
    (td3bc_trainer, td3bc, ["critic"] * 2 + ["actor"]),
    (iql_trainer, iql, ["value", "critic", "actor"] * 2),
])  # fmt: skip
def test_who_steps_when_and_on_what(make, module, order):
    t, seen = make(), []
    groups = {name[:-4]: opt for name, opt in vars(t).items() if name.endswith("_opt")}
    owned = [id(p) for opt in groups.values() for g in opt.param_groups for p in g["params"]]
    assert len(owned) == len(set(owned)), "two optimisers share a parameter"
    before = {}
    for name, opt in groups.items():
        opt.register_step_pre_hook(lambda *_: before.update(t.parameters()))

        def stepped(*_, name=name):
            now = t.parameters()
            assert {k for k in now if not same(before[k], now[k])} == {name}
            seen.append(name)

        opt.register_step_post_hook(stepped)
    targets = t.targets()
    module.step(t, rows(), noise())
    assert same(targets, t.targets()) == (module is not iql)  # TD3's targets wait for the actor
    module.step(t, rows(), noise())
    assert seen == order
    assert not same(targets["critic"], t.targets()["critic"])
    for _ in range(8):
        module.step(t, rows(), noise())
    assert [seen.count(k) for k in ("actor", "critic")] == ([10, 10] if module is iql else [5, 10])


@pytest.mark.parametrize("make, module", [(a2pr_trainer, a2pr), (td3bc_trainer, td3bc), (iql_trainer, iql)])
def test_weights_transplant_both_ways(make, module):
    one, two = make(), make()
    module.step(one, rows(), noise())
    assert not same(one.parameters(), two.parameters())
    two.load_(one.parameters(), one.targets())
    assert same(one.parameters(), two.parameters()) and same(one.targets(), two.targets())
    assert not same({"critic": two.parameters()["critic"]}, {"critic": two.targets()["critic"]})
    batch, eps = rows(), noise()
    one_opt = make()  # fresh moments on both sides
    one_opt.load_(one.parameters(), one.targets())
    first, second = module.step(one_opt, batch, eps), module.step(two, batch, eps)
    assert same(first, second) and same(one_opt.parameters(), two.parameters())


@pytest.mark.parametrize("make, module", [(a2pr_trainer, a2pr), (td3bc_trainer, td3bc)])
def test_polyak_after_the_second_step(make, module):
    t, old = make(), make()
    old.load_(t.parameters())
    for _ in range(2):
        module.step(t, rows(), noise())
    for name in ("actor", "critic"):
        for target, start, now in zip(values(t.targets()[name]), values(old.parameters()[name]), values(t.parameters()[name])):
            torch.testing.assert_close(target, 0.995 * start + 0.005 * now, rtol=0, atol=1e-15)


@pytest.mark.parametrize("make, module", [(a2pr_trainer, a2pr), (td3bc_trainer, td3bc)])
@pytest.mark.parametrize("eps, action", [(-1.0, 0.7), (-100.0, 0.4), (1.0, 1.0)])  # noise 0.2 eps, clipped at 0.5; action clipped at 1
def test_smoothed_target_action(make, module, eps, action):
    t = make()
    constant_(t.target_actor, math.atanh(0.9))
    for online, target in zip(t.critics, t.target_critics):
        constant_(online, 0.0)
        first_action_(target)
    draw = noise() | {"policy": torch.full((B, D), eps, dtype=torch.float64)}
    loss = module.step(t, rows(reward=2.0, mask=1.0), draw)["critic_loss"]
    assert loss.item() == pytest.approx(2 * (2 + 0.99 * action) ** 2)


@pytest.mark.parametrize("make, module", [(a2pr_trainer, a2pr), (td3bc_trainer, td3bc)])
@pytest.mark.parametrize("mask, y", [(1.0, 2 + 0.99 * -1), (0.0, 2.0)])
def test_critics_follow_the_lower_target_and_stop_at_the_end(make, module, mask, y):
    t = make()
    for net, value in zip([*t.critics, *t.target_critics], (0.5, 3.0, 4.0, -1.0)):
        constant_(net, value)
    loss = module.step(t, rows(reward=2.0, mask=mask), noise())["critic_loss"]
    assert loss.item() == pytest.approx((0.5 - y) ** 2 + (3 - y) ** 2)


def test_td3bc_actor_by_hand():
    t, batch = td3bc_trainer(alpha=2.0), rows()
    constant_(t.actor, math.atanh(0.5))
    first_action_(t.critics[0])  # Q1 = 0.5, so lam = 4 and its gradient is -4 / B a row, on the first action alone
    loss = td3bc.actor_loss(t, batch)
    assert loss.item() == pytest.approx(-2 + ((0.5 - batch.action) ** 2).mean().item())
    (grad,) = torch.autograd.grad(loss, linears(t.actor)[-1].bias)
    by_action = 2 * (0.5 - batch.action).mean(dim=0) / D - torch.tensor([4.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(grad, by_action * (1 - 0.25))  # tanh' = 1 - 0.5^2


@pytest.mark.parametrize("v, loss, moved", [(0.0, 0.7 * 1, True), (2.0, 0.3 * 1, True), (1.0, 0.0, False)])
def test_iql_value_loss_by_hand(v, loss, moved):
    t, batch = iql_trainer(value_lr=0.1), rows()
    for net, value in zip([*t.target_critics, t.value], (3.0, 1.0, v)):
        constant_(net, value)  # the lower target critic says 1
    assert iql.step(t, batch)["value_loss"].item() == pytest.approx(loss)
    assert (t.value(batch.obs) != v).all() == moved


def test_iql_value_rests_at_the_expectile():
    t, batch = iql_trainer(), rows()
    for critic in t.target_critics:
        first_action_(critic)
    constant_(t.value, 0.7)  # of 0 and 1, half and half
    iql.value_step(t, batch._replace(action=torch.tensor([[0.0, 0], [1, 0], [0, 0], [1, 0]], dtype=torch.float64)))
    assert linears(t.value)[-1].bias.grad.item() == pytest.approx(0.0, abs=1e-15)


@pytest.mark.parametrize("q_target, weight", [(0.5, math.exp(1.5)), (10.0, 100.0)])
def test_iql_critic_and_actor_read_v_before_its_step(q_target, weight):
    t, batch = iql_trainer(value_lr=5.0), rows(reward=2.0, mask=1.0)
    for net, value in zip([*t.critics, *t.target_critics, t.value, t.actor.net], (0.5, 3.0, q_target, q_target, 0.0, 0.0)):
        constant_(net, value)
    out = iql.step(t, batch)
    assert (t.value(batch.obs) > 4).all()
    assert out["critic_loss"].item() == pytest.approx((1.5**2 + 1.0**2) / 2)  # y = 2 + 0.99 * 0
    minus_log_likelihood = (0.5 * batch.action**2 + 0.5 * math.log(2 * math.pi)).sum(dim=1)  # Normal(0, 1)
    assert out["actor_loss"].item() == pytest.approx(weight * minus_log_likelihood.mean().item())
    moved = [linears(net)[-1].bias.item() for net in t.target_critics]
    assert moved == pytest.approx([0.995 * q_target + 0.005 * linears(net)[-1].bias.item() for net in t.critics])


def test_iql_log_std_is_clipped_and_the_rate_decays():
    t = iql_trainer(max_steps=10)
    with torch.no_grad():
        t.actor.log_std.copy_(torch.tensor([3.0, 0.0]))
    assert t.actor(rows().obs).scale[0].tolist() == pytest.approx([math.exp(2), 1.0])
    for k in range(1, 11):
        iql.step(t, rows())
        assert t.actor_opt.param_groups[0]["lr"] == pytest.approx(3e-4 * (1 + math.cos(math.pi * k / 10)) / 2, abs=1e-18)
    assert t.actor.log_std[0] == 3.0 and t.actor.log_std[1] != 0.0
