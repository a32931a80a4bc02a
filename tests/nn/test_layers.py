"""Shapes and precision of the networks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from offrl.losses import expectile, gaussian_kl, gaussian_log_prob, twin_mse
from offrl.nn import normalize
from offrl.nn.actor import LOG_STD_MAX, LOG_STD_MIN, Categorical, Deterministic, Gaussian
from offrl.nn.critic import Q, V
from offrl.nn.layers import MLP
from offrl.nn.vae import ActionVAE


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


OBS, ACTION = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.rand(6, 2, generator=torch.Generator().manual_seed(1))
NETWORKS = {
    "deterministic": (lambda: Deterministic(3, 2, (8, 8)), (OBS,)),
    "gaussian": (lambda: Gaussian(3, 2, (8, 8)), (OBS,)),
    "categorical": (lambda: Categorical(3, 4, (8, 8)), (OBS,)),
    "q": (lambda: Q(3, 2, (8, 8)), (OBS, ACTION)),
    "q_norm": (lambda: Q(3, 2, (8, 8), layer_norm=True), (OBS, ACTION)),
    "v": (lambda: V(3, (8, 8)), (OBS,)),
    "vae": (lambda: ActionVAE(3, 2, (8, 8), 4), (OBS, ACTION, torch.zeros(6, 4))),
}


def leaves(output) -> tuple[torch.Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


@pytest.mark.parametrize("name", NETWORKS)
def test_heads_keep_float32_under_autocast(name):
    """Hidden layers run in bfloat16; what comes out is float32, from a product in float32: no value is rounded to 8 bits."""
    make, inputs = NETWORKS[name]
    net, seen = make(), {"hidden": [], "head": []}
    for path, layer in net.named_modules():
        if isinstance(layer, nn.Linear):
            kind = "head" if path.endswith("head") else "hidden"
            layer.register_forward_hook(lambda _, args, out, kind=kind: seen[kind].append((args[0].clone(), out.dtype)))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        low = leaves(net(*inputs))
    assert all(leaf.dtype == torch.float32 for leaf in low)
    assert {dtype for _, dtype in seen["hidden"]} == {torch.bfloat16} and {dtype for _, dtype in seen["head"]} == {torch.float32}
    with torch.no_grad():
        full = leaves(net(*inputs))
    worst = max((a - b).abs().max().item() for a, b in zip(low, full))
    assert 0 < worst < 0.05
    rounded = [leaf.bfloat16().float() for leaf in low]
    assert not any(torch.equal(a, b) for a, b in zip(low, rounded) if a.ndim > 1)


@pytest.mark.parametrize("name", NETWORKS)
def test_float64_in_float64_out(name):
    make, inputs = NETWORKS[name]
    assert all(leaf.dtype == torch.float64 for leaf in leaves(make().double()(*(x.double() for x in inputs))))


def test_mlp_is_its_formula():
    net = MLP((3, 5, 4, 2))
    x = OBS
    for layer in net.hidden:
        x = (x @ layer.weight.T + layer.bias).clamp(min=0)
    torch.testing.assert_close(net(OBS), x @ net.head.weight.T + net.head.bias)
    assert len(net.hidden) == 2 and net(OBS).shape == (6, 2)
    assert MLP((3, 2))(OBS).shape == (6, 2)  # without hidden layers it is one linear map


def test_layer_norm_stands_before_each_relu():
    net = MLP((3, 5, 2), layer_norm=True)
    hidden = torch.nn.functional.layer_norm(net.hidden[0](OBS), (5,)).relu()
    torch.testing.assert_close(net(OBS), net.head(hidden))


@pytest.mark.parametrize("members", [1, 2, 5])
def test_critics_have_no_trailing_axis(members):
    net = Q(3, 2, (8,), members)
    values = net(OBS, ACTION)
    assert values.shape == (members, 6)
    for j in range(members):
        torch.testing.assert_close(net(OBS, ACTION, member=j), values[j], rtol=0, atol=0)
        torch.testing.assert_close(net.members[j](torch.cat([OBS, ACTION], -1))[:, 0], values[j], rtol=0, atol=0)
    assert V(3, (8,))(OBS).shape == (6,)
    if members > 1:
        assert not torch.equal(values[0], values[1])  # members start apart


def test_actors():
    action = Deterministic(3, 2, (8,))(100 * OBS)
    assert action.shape == (6, 2) and (action.abs() <= 1).all()
    net = Gaussian(3, 2, (8,))
    mean, log_std = net(OBS)
    assert mean.shape == (6, 2) and log_std.tolist() == [0, 0]
    net.log_std.data = torch.tensor([99.0, -99.0])
    assert net(OBS)[1].tolist() == [LOG_STD_MAX, LOG_STD_MIN]
    assert Categorical(3, 4, (8,))(OBS[0]).shape == (4,)


def test_vae_encodes_and_decodes():
    net = ActionVAE(3, 2, (8,), 4)
    noise = torch.randn(6, 4)
    recon, mean, std = net(OBS, ACTION, noise)
    assert recon.shape == (6, 2) and mean.shape == std.shape == (6, 4)
    assert (recon.abs() <= 1).all() and (std > 0).all()
    torch.testing.assert_close(recon, net.decode(OBS, mean + std * noise))
    head = net.encoder(torch.cat([OBS, ACTION], -1))
    torch.testing.assert_close(mean, head[:, :4])
    torch.testing.assert_close(std, head[:, 4:].exp())


def test_vae_decodes_its_prior_without_encoding():
    net = ActionVAE(3, 2, (8,), 4)
    noise = torch.tensor([[-9.0, -0.5, 0.2, 7.0]]).expand(6, -1)
    torch.testing.assert_close(net(OBS, None, noise), net.decode(OBS, torch.tensor([[-0.5, -0.5, 0.2, 0.5]]).expand(6, -1)))


@pytest.mark.parametrize("said, kept", [(-50.0, -4.0), (50.0, 15.0), (1.0, 1.0)])
def test_vae_bounds_its_standard_deviation(said, kept):
    net = ActionVAE(3, 2, (8,), 4)
    with torch.no_grad():
        net.encoder.head.weight.zero_()
        net.encoder.head.bias[4:] = said
    torch.testing.assert_close(net(OBS, ACTION, torch.zeros(6, 4))[2], torch.full((6, 4), math.exp(kept)))


def test_losses_are_their_formulas():
    scale = torch.tensor([0.3, 2.0])
    want = Normal(ACTION, scale).log_prob(ACTION + 0.5).sum(1)
    torch.testing.assert_close(gaussian_log_prob(ACTION + 0.5, ACTION, scale.log()), want)
    mean, std = torch.randn(6, 4), torch.rand(6, 4) + 0.1
    torch.testing.assert_close(gaussian_kl(mean, std), kl_divergence(Normal(mean, std), Normal(0.0, 1.0)).mean())
    values, target = torch.tensor([[1.0, 2.0], [3.0, 5.0]]), torch.tensor([0.0, 1.0])
    assert twin_mse(values, target).item() == (1 + 1) / 2 + (9 + 16) / 2
    assert expectile(torch.tensor([-2.0, 1.0]), 0.75).item() == pytest.approx((0.25 * 4 + 0.75 * 1) / 2)


def test_expectile_keeps_the_precision_of_its_input():
    error = torch.tensor([1.0], dtype=torch.float64)
    assert expectile(error, 0.7).item() == 0.7  # the constant is not rounded to float32 on its way


def test_an_activation_of_ones_own_and_a_smaller_head():
    net, plain = (torch.manual_seed(0) and MLP((3, 5, 2), activation=torch.tanh, **options) for options in ({"head": 0.01}, {}))
    torch.testing.assert_close(net(OBS), 0.01 * plain.head(torch.tanh(plain.hidden[0](OBS))))


def test_moments_of_parts_are_those_of_the_whole():
    """Far from zero too; a column that never changes has none, and there is no memory of how they began."""
    rows = 1e4 + torch.randn(60, 3, generator=torch.Generator().manual_seed(0)).double() * torch.tensor([1.0, 100.0, 0.0])
    running = {key: leaf.double() for key, leaf in normalize.moments((3,)).items()}
    for part in rows.split([1, 7, 40, 12]):
        running = normalize.absorb(running, part)
    assert running["count"] == 60
    torch.testing.assert_close(running["mean"], rows.mean(0))
    torch.testing.assert_close(running["var"], rows.var(0, correction=0))
