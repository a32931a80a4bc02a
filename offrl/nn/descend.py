"""Functional optimisers and target averaging over trees of tensors: no hidden state, so they compile, stack and resume."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Tree = dict[str, Tensor]


def adam_init(params: Tree) -> dict[str, Any]:
    """Zero moments for `params` and a 0-d step count of the same dtype."""
    first = next(iter(params.values()))
    moments = {name: {k: torch.zeros_like(v) for k, v in params.items()} for name in ("mean", "square")}
    return moments | {"count": torch.zeros((), dtype=first.dtype, device=first.device)}


def adam(params: Tree, grads: Tree, moments: dict[str, Any], lr: float | Tensor, beta1=0.9, beta2=0.999, eps=1e-8):
    """One step of Adam (Kingma and Ba, 2015, algorithm 1): (new parameters, new moments)."""
    count = moments["count"] + 1
    mean = {k: m.lerp(grads[k], 1 - beta1) for k, m in moments["mean"].items()}
    square = {k: beta2 * s + (1 - beta2) * grads[k].square() for k, s in moments["square"].items()}
    step, scale = lr / _bias(count, beta1), _bias(count, beta2).rsqrt()
    params = {k: p - step * mean[k] / (square[k].sqrt() * scale + eps) for k, p in params.items()}
    return params, {"mean": mean, "square": square, "count": count}


def clip_norm(grads: Tree, limit: float) -> Tree:
    """The gradients, scaled down together where their Euclidean norm is above `limit` (Pascanu et al., 2013, arXiv 1211.5063)."""
    norm = torch.stack([grad.square().sum() for grad in grads.values()]).sum().sqrt()
    scale = (limit / norm).clamp(max=1.0)
    return {k: grad * scale for k, grad in grads.items()}


def _bias(count: Tensor, beta: float) -> Tensor:
    """1 - beta**count, exact in float32 too. Inductor keeps an exp, and would compute expm1 anew beside every few parameters."""
    x = count * math.log(beta)
    return torch.tanh(-x / 2) * (1 + torch.exp(x))


def polyak(target: Tree, online: Tree, tau: float) -> Tree:
    """The target moved the fraction `tau` of the way towards the online parameters."""
    return {k: t.lerp(online[k], tau) for k, t in target.items()}


def cosine(count: Tensor, lr: float, total: float) -> Tensor:
    """Learning rate that falls from `lr` to 0 along half a cosine over `total` steps (Loshchilov and Hutter, 2017, without restarts)."""
    return 0.5 * lr * (1 + torch.cos(math.pi * (count / total).clamp(max=1.0)))
