"""Ordinary modules and trees of weights that the naive second writings in this folder share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Tree = dict[str, Any]  # nested plain dicts of tensors


def mlp(sizes: list[int], dtype: torch.dtype, *last: nn.Module) -> nn.Sequential:
    """Linear layers of the given sizes with ReLU between them, then `last`; torch's own initialisation."""
    layers: list[nn.Module] = []
    for n_in, n_out in zip(sizes[:-1], sizes[1:]):
        layers += [nn.Linear(n_in, n_out, dtype=dtype), nn.ReLU()]
    return nn.Sequential(*layers[:-1], *last)


def linears(net: nn.Module) -> list[nn.Linear]:
    return [m for m in net.modules() if isinstance(m, nn.Linear)]


def read(net: nn.Module) -> Tree:
    """{"0": {"weight": (out, in), "bias": (out,)}, "1": ...}: copies, the linear layers in order."""
    return {str(i): {"weight": m.weight.detach().clone(), "bias": m.bias.detach().clone()} for i, m in enumerate(linears(net))}


@torch.no_grad()
def write_(net: nn.Module, tree: Tree) -> None:
    """Copy what `read` gives into `net`; every layer must be there."""
    layers = linears(net)
    if set(tree) != {str(i) for i in range(len(layers))}:
        raise KeyError(f"expected the layers 0..{len(layers) - 1}, got {sorted(tree)}")
    for i, layer in enumerate(layers):
        for name in ("weight", "bias"):
            value, here = tree[str(i)][name], getattr(layer, name)
            if value.shape != here.shape:
                raise ValueError(f"layer {i} {name}: expected shape {tuple(here.shape)}, got {tuple(value.shape)}")
            here.copy_(value)


@torch.no_grad()
def polyak_(target: nn.Module, online: nn.Module, tau: float) -> None:
    for old, new in zip(target.parameters(), online.parameters(), strict=True):
        old.copy_((1 - tau) * old + tau * new)


def q(critic: nn.Module, obs: Tensor, action: Tensor) -> Tensor:
    """(B, 1)"""
    return critic(torch.cat([obs, action], dim=1))


def column(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B,) -> (B, 1), so that nothing broadcasts to (B, B)."""
    if x.ndim != 1:
        raise ValueError(f"expected one number a row, got shape {tuple(x.shape)}")
    return x.to(dtype)[:, None]
