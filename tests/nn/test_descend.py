"""The functional optimiser against torch.optim.Adam, the targets' average and the cosine against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offrl.core.tree import tree_map
from offrl.nn.descend import adam, adam_init, clip_norm, cosine, polyak


def params(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    drawn = {"weight": torch.randn(4, 3, generator=g), "bias": torch.randn(4, generator=g), "scale": torch.ones(())}
    return {k: v.to(dtype) for k, v in drawn.items()}


def gradients(step: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Of sizes from 1e-6 to 1e3, and zero at times."""
    g = torch.Generator().manual_seed(step + 1)
    size = 10.0 ** ((step * 7) % 10 - 6) * (step % 11 != 3)
    return {k: (size * torch.randn(v.shape, generator=g)).to(dtype) for k, v in params(dtype).items()}


def both(dtype: torch.dtype, steps: int, count: float = 0.0, lr: float = 1e-2):
    """(ours, torch's) parameters after `steps` steps of Adam that begin at step number `count` with equal moments."""
    ours, moments = params(dtype), adam_init(params(dtype))
    theirs = {k: torch.nn.Parameter(v.clone()) for k, v in ours.items()}
    optimiser = torch.optim.Adam(theirs.values(), lr=lr)
    if count:
        moments = {name: tree_map(lambda v: 0.1 + 0.2 * v**2, params(dtype)) for name in ("mean", "square")}
        moments["count"] = torch.tensor(count, dtype=dtype)
        for k, p in theirs.items():
            state = {"step": torch.tensor(count, dtype=torch.float64), "exp_avg": moments["mean"][k], "exp_avg_sq": moments["square"][k]}
            optimiser.state[p] = {name: leaf.clone() for name, leaf in state.items()}
    for step in range(steps):
        grads = gradients(step, dtype)
        ours, moments = adam(ours, grads, moments, lr)
        for k, p in theirs.items():
            p.grad = grads[k].clone()
        optimiser.step()
    assert moments["count"] == count + steps and moments["count"].dtype == dtype
    return ours, {k: p.detach() for k, p in theirs.items()}


@pytest.mark.parametrize("count", [0, 1, 999, 10**6 - 25, 10**6])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_fifty_steps_of_adam(dtype, tolerance, count):
    """fp32 differs by rounding alone: 50 steps of 1e-2 over numbers near 1, of which one carries 6e-8."""
    ours, theirs = both(dtype, 50, float(count))
    for k in ours:
        torch.testing.assert_close(ours[k], theirs[k], rtol=tolerance, atol=tolerance)
        assert (ours[k] - params(dtype)[k]).abs().max() > 1e-2


def test_the_first_steps_correction_is_exact_in_float32():
    """The first step is the rate itself, whatever the gradient; 1 - 0.999**t computed in float32 would be off by 1e-5."""
    for size in (1e-3, 1.0, 1e4):
        start, grads = {"x": torch.zeros(1)}, {"x": torch.full((1,), size)}
        stepped, _ = adam(start, grads, adam_init(start), 1.0)
        assert stepped["x"].item() == pytest.approx(-1.0, rel=2e-5 if size < 1e-2 else 3e-7)  # eps counts beside 1e-3


def test_a_rate_may_be_a_tensor_and_nothing_is_changed_in_place():
    start, grads = params(torch.float64), gradients(1, torch.float64)
    moments = adam_init(start)
    before = tree_map(torch.clone, {"p": start, "m": moments})
    by_tensor, _ = adam(start, grads, moments, torch.tensor(1e-2, dtype=torch.float64))
    by_float, _ = adam(start, grads, moments, 1e-2)
    assert all(torch.equal(by_tensor[k], by_float[k]) for k in start)
    tree_map(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), before, {"p": start, "m": moments})


@given(st.floats(0, 1), st.floats(-10, 10), st.floats(-10, 10))
def test_polyak_is_the_weighted_mean(tau, target, online):
    old, new = ({"x": torch.tensor(value, dtype=torch.float64)} for value in (target, online))
    assert polyak(old, new, tau)["x"].item() == pytest.approx((1 - tau) * target + tau * online, abs=1e-12)


def test_polyak_matches_by_name_and_ends_where_it_must():
    target, online = {"a": torch.tensor(1.0), "b": torch.tensor(2.0)}, {"b": torch.tensor(20.0), "a": torch.tensor(10.0)}
    assert polyak(target, online, 0.0) == target
    assert polyak(target, online, 1.0) == online


def test_cosine():
    rates = [cosine(torch.tensor(float(step)), 2.0, 100).item() for step in (0, 25, 50, 75, 100, 1000)]
    assert rates == pytest.approx([2, 1 + math.sqrt(0.5), 1, 1 - math.sqrt(0.5), 0, 0], abs=1e-6)
    p = torch.nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.SGD([p], lr=2.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 100)
    for step in range(100):
        assert cosine(torch.tensor(step, dtype=torch.float64), 2.0, 100).item() == pytest.approx(optimiser.param_groups[0]["lr"], abs=1e-12)
        optimiser.step()
        schedule.step()


@pytest.mark.parametrize("limit", [1e-3, 1.0, 1e6])
def test_gradients_are_cut_as_torch_cuts_them(limit):
    grads, expected = gradients(7, torch.float64), params(torch.float64)
    for key, p in expected.items():
        p.grad = grads[key].clone()
    torch.nn.utils.clip_grad_norm_(expected.values(), limit)
    for key, cut in clip_norm(grads, limit).items():
        torch.testing.assert_close(cut, expected[key].grad, rtol=1e-5, atol=0)
    none = {"x": torch.zeros(3)}
    assert torch.equal(clip_norm(none, limit)["x"], none["x"])
