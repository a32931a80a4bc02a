"""The naive A2PR against what can be worked out by hand: who feeds which bootstrap, ties, masks, gradients."""

from __future__ import annotations

import math
from copy import deepcopy

import a2pr_naive as a2pr
import pytest
import td3bc_naive as td3bc
import torch
from by_hand import B, D, a2pr_trainer, constant_, noise, rows, same, td3bc_trainer
from plain_nets import linears


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("online, target, lower", [(0.0, 10.0, 0.1), (0.0, -10.0, -10.0), (9.0, 4.0, 4.0)])
def test_a2pr_value_takes_the_lower_bootstrap_and_the_stepped_critics(online, target, lower):
    t = a2pr_trainer(critic_lr=0.1)  # Adam's first step is the rate itself, towards y
    for net, value in zip([*t.critics, *t.target_critics, t.value], (online, online, target, target, 7.0)):
        constant_(net, value)
    loss = a2pr.step(t, rows(reward=0.0, mask=1.0), noise())["value_loss"]
    assert loss.item() == pytest.approx((7 - 0.99 * lower) ** 2, rel=1e-6)


@pytest.mark.parametrize("q1, critic_lr, value_lr, seen", [
    (0.5, 0.0, 5.0, True),  # v is the one from before V's step, which takes V to 5
    (0.0, 0.0, 0.0, False),  # a tie is not better
    (-0.05, 0.1, 0.0, True),  # Q1 is the one that has just stepped up
    (-0.05, 0.0, 0.0, False),
])  # fmt: skip
def test_a2pr_vae_sees_only_better_actions(q1, critic_lr, value_lr, seen):
    t = a2pr_trainer(critic_lr=critic_lr, value_lr=value_lr, vae_weight=1.5)
    for net, value in zip([*t.critics, t.value, t.vae], (q1, 0.0, 0.0, 0.0)):
        constant_(net, value)  # the VAE then reconstructs 0 and its KL term is 0
    batch = rows(reward=9.0, mask=0.0)
    loss = a2pr.step(t, batch, noise())["vae_loss"].item()
    assert loss == pytest.approx(1.5 * (batch.action**2).mean().item() if seen else 0.0, abs=1e-12)
    assert (t.value(batch.obs) > 4).all() == (value_lr > 0)


@pytest.mark.parametrize("log_std, clamped", [(0.3, 0.3), (-9.0, -4.0)])
def test_a2pr_kl(log_std, clamped):
    t = a2pr_trainer(critic_lr=0.0)
    for net in (*t.critics, t.value, t.vae):
        constant_(net, 0.0)  # ties: no reconstruction, so the loss is half the KL term
    with torch.no_grad():
        t.vae.mean.bias.fill_(0.6)
        t.vae.log_std.bias.fill_(log_std)
    loss = a2pr.step(t, rows(), noise())["vae_loss"].item()
    assert loss == pytest.approx(-0.25 * (1 + 2 * clamped - 0.36 - math.exp(2 * clamped)))


def test_a2pr_choice_over_all_signs_and_ties():
    signs = [-1.0, 0.0, 1.0]
    pairs = torch.tensor([(x, y) for x in signs for y in signs], dtype=torch.float64)
    a_pi, a_data, v = pairs[:, :1], pairs[:, 1:], torch.full((9, 1), 4.0, dtype=torch.float64)
    abar, action = torch.ones(9, D, dtype=torch.float64), torch.zeros(9, D, dtype=torch.float64)
    target, weight = a2pr.choose(a_pi + v, a_data + v, v, abar, action, 0.4)
    assert target[:, 0].tolist() == [1, 0, 0, 1, 1, 0, 1, 1, 1]  # ties go to the VAE's action
    assert weight[:, 0].tolist() == [0, 0, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4]  # A_data = 0 alone does not count, A_pi = 0 does
    assert weight.shape == (9, 1)


@pytest.mark.parametrize("rho, detach", [(0.5, False), (0.5, True), (1.0, False)])
def test_a2pr_gradient_of_a_linear_reconstruction(rho, detach):
    t = a2pr_trainer(alpha=0.0, mask=0.8, detach_target=detach)
    constant_(t.critics[0], 1.0)
    pi = torch.randn(B, D, dtype=torch.float64, requires_grad=True)
    c = 0.3 if rho < 1 else 0.0
    t.actor, t.vae = lambda obs: pi, lambda obs, action, eps: (rho * action + c, None, None)
    loss, _ = a2pr.actor_loss(t, rows(), torch.zeros(B, 1, dtype=torch.float64), noise()["target"])
    (grad,) = torch.autograd.grad(loss, pi)
    through = 1.0 if detach else 1 - rho
    torch.testing.assert_close(grad, 2 * 0.8 * through * ((1 - rho) * pi.detach() - c) / (B * D))


@pytest.mark.parametrize("detach", [False, True])
def test_a2pr_actor_gradient_by_finite_differences(detach):
    t, batch, eps = a2pr_trainer(detach_target=detach, mask=30.0), rows(b=24), noise(b=24)["target"]
    with torch.no_grad():  # Q1 of both signs, so that lam cannot mistake |mean Q1| for mean |Q1|
        linears(t.critics[0])[-1].bias -= a2pr.q(t.critics[0], batch.obs, t.actor(batch.obs)).mean()
    v = a2pr.q(t.critics[0], batch.obs, batch.action).detach() + 0.05 * torch.randn(24, 1, dtype=torch.float64)
    loss, chosen = a2pr.actor_loss(t, batch, v, eps)
    grads = torch.autograd.grad(loss, list(t.actor.parameters()))
    first, took_data = chosen["target"], (chosen["target"] == batch.action).all(dim=1, keepdim=True)
    q_pi = a2pr.q(t.critics[0], batch.obs, t.actor(batch.obs))
    assert chosen["lam"].item() == pytest.approx(2.5 * 24 / sum(abs(x) for x in q_pi[:, 0].tolist()))
    assert set(chosen["weight"].unique().tolist()) == {0.0, 30.0} and 0 < took_data.sum() < 24
    assert (took_data & (chosen["weight"] > 0)).any() and (~took_data & (chosen["weight"] > 0)).any()

    @torch.no_grad()
    def frozen() -> float:  # lam and the choice stand still; abar only where it is detached
        pi = t.actor(batch.obs)
        target = first if detach else torch.where(took_data, batch.action, t.vae(batch.obs, pi, eps)[0])
        return (-chosen["lam"] * a2pr.q(t.critics[0], batch.obs, pi).mean() + (chosen["weight"] * (pi - target) ** 2).mean()).item()

    for p, grad in zip(t.actor.parameters(), grads):
        for i in range(0, p.numel(), 3):
            flat, old = p.data.view(-1), p.data.view(-1)[i].item()
            flat[i] = old + 1e-6
            up = frozen()
            flat[i] = old - 1e-6
            down = frozen()
            flat[i] = old
            assert grad.view(-1)[i].item() == pytest.approx((up - down) / 2e-6, rel=1e-5, abs=1e-8)


def test_a2pr_actor_weighs_with_v_before_its_step():
    t = a2pr_trainer(critic_lr=0.0, value_lr=5.0, policy_freq=1, mask=0.3)
    for net, value in zip([*t.critics, t.value], (0.5, 0.5, 0.0)):
        constant_(net, value)
    batch = rows(reward=9.0, mask=0.0)
    weight = a2pr.step(t, batch, noise())["weight"]
    assert (t.value(batch.obs) > 4).all() and (weight == 0.3).all()


@pytest.mark.parametrize("name, reached", [("policy", "critic_loss"), ("vae", "vae_loss"), ("target", "actor_loss")])
def test_a2pr_each_noise_has_its_place(name, reached):
    t, batch, eps = a2pr_trainer(policy_freq=1, vae_lr=0.0, critic_lr=0.0), rows(b=24, mask=1.0), noise(b=24)
    out, other = a2pr.step(deepcopy(t), batch, eps), a2pr.step(deepcopy(t), batch, eps | {name: -eps[name]})
    changed = {k for k in ("critic_loss", "vae_loss", "actor_loss") if out[k] != other[k]}
    assert changed == {reached}


def test_a2pr_gradients_that_spill_are_never_applied():
    one = a2pr_trainer()
    for _ in range(2):
        a2pr.step(one, rows(), noise())
    spilled = [p.grad.abs().sum() > 0 for net in (one.critics[0], one.vae) for p in net.parameters()]
    assert any(spilled)
    two = deepcopy(one)
    for net in (two.actor, two.critics, two.value, two.vae):
        net.zero_grad()
    for _ in range(2):
        batch, eps = rows(), noise()
        a2pr.step(one, batch, eps)
        a2pr.step(two, batch, eps)
    assert same(one.parameters(), two.parameters())


def test_a2pr_with_its_ideas_taken_out_is_td3bc(monkeypatch):
    monkeypatch.setattr(a2pr, "choose", lambda q_bar, q_data, v, abar, action, mask: (action, mask * torch.ones_like(v)))
    one, two = a2pr_trainer(mask=1.0), td3bc_trainer()
    two.load_({k: one.parameters()[k] for k in ("actor", "critic")})
    for _ in range(6):
        batch, eps = rows(), noise()
        assert a2pr.step(one, batch, eps)["critic_loss"].equal(td3bc.step(two, batch, eps)["critic_loss"])
    assert all(same(one.parameters()[k], two.parameters()[k]) for k in ("actor", "critic"))
    assert same(one.targets(), two.targets())
