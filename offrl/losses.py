"""Losses that more than one agent uses, over tensors of any leading shape."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over all entries."""
    return (prediction - target).square().mean()


def twin_mse(values: Tensor, target: Tensor) -> Tensor:
    """values (members, B), target (B,): the members' mean squared errors, summed."""
    return (values - target).square().mean(-1).sum(0)


def expectile(error: Tensor, tau: float) -> Tensor:
    """mean |tau - 1{error < 0}| error^2 (IQL, Eq. 5): its minimiser is the tau-expectile of what `error` is taken from."""
    return ((tau - (error < 0).to(error.dtype)).abs() * error.square()).mean()


def gaussian_log_prob(action: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """(...,): log density of a diagonal Gaussian at `action` (..., action)."""
    z = (action - mean) * torch.exp(-log_std)
    return (-0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def gaussian_entropy(log_std: Tensor) -> Tensor:
    """(...,): of a diagonal Gaussian with log standard deviations (..., action), in nats."""
    return (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


def discounted_sum(x: Tensor, decay: Tensor) -> Tensor:
    """y (T, ...) with y_t = x_t + decay_t y_{t+1}, and x_{T-1} at the end.

    By doubling (Hillis and Steele, 1986): log2 T steps over whole tensors, with no loop over time that a compiler would unroll.
    """
    reach = 1
    while reach < len(x):
        x = x + decay * torch.cat([x[reach:], torch.zeros_like(x[:reach])])
        decay = decay * torch.cat([decay[reach:], torch.zeros_like(decay[:reach])])
        reach *= 2
    return x


def tanh_log_slope(x: Tensor) -> Tensor:
    """log(1 - tanh(x)^2), finite and exact where tanh(x) rounds to 1."""
    return 2 * (math.log(2) - x + F.logsigmoid(2 * x))


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """values (..., B), weight (B,) of zeros and ones: the mean over the rows of weight 1, or 0 where there are none."""
    return (values * weight).sum(-1) / weight.sum(-1).clamp(min=1)


def gaussian_kl(mean: Tensor, std: Tensor) -> Tensor:
    """KL of N(mean, std^2) from the standard normal, averaged over all entries."""
    return -0.5 * (1 + 2 * torch.log(std) - mean.square() - std.square()).mean()
