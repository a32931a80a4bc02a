"""Trainers small enough to work out by hand, networks that give constants, and draws."""

from __future__ import annotations

import a2pr_naive as a2pr
import iql_naive as iql
import td3bc_naive as td3bc
import torch
from plain_nets import linears
from torch import nn

from offrl.core.types import Transitions

N, D, B = 3, 2, 4
SMALL = {"actor_hidden": (5, 5), "critic_hidden": (5, 5)}


def a2pr_trainer(**config) -> a2pr.Trainer:
    return a2pr.Trainer(N, D, a2pr.Config(**SMALL | {"vae_hidden": (7, 7)} | config))


def td3bc_trainer(**config) -> td3bc.Trainer:
    return td3bc.Trainer(N, D, td3bc.Config(**SMALL | config))


def iql_trainer(**config) -> iql.Trainer:
    return iql.Trainer(N, D, iql.Config(**{"hidden": (5, 5)} | config))


def rows(b: int = B, d: int = D, reward: float | None = None, mask: float | None = None) -> Transitions:
    def flat(value, draw):
        return draw if value is None else torch.full((b,), value, dtype=torch.float64)

    obs, next_obs, action = (torch.randn(b, k, dtype=torch.float64) for k in (N, N, d))
    reward_, mask_ = flat(reward, torch.randn(b, dtype=torch.float64)), flat(mask, (torch.rand(b) < 0.7).double())
    return Transitions(obs, action.tanh(), reward_, next_obs, mask_)


def noise(b: int = B, d: int = D) -> dict[str, torch.Tensor]:
    return {k: torch.randn(b, n, dtype=torch.float64) for k, n in (("policy", d), ("vae", 2 * d), ("target", 2 * d))}


@torch.no_grad()
def constant_(net: nn.Module, value: float) -> None:
    """Make `net` give `value` everywhere, before its last activation; only its last bias then has a gradient."""
    for p in net.parameters():
        p.zero_()
    linears(net)[-1].bias.fill_(value)


@torch.no_grad()
def first_action_(critic: nn.Module) -> None:
    """Make `critic` give max(first action, 0)."""
    constant_(critic, 0.0)
    for i, layer in enumerate(linears(critic)):
        layer.weight[0, N if i == 0 else 0] = 1.0


def values(tree) -> list[torch.Tensor]:
    return [x for v in tree.values() for x in (values(v) if isinstance(v, dict) else [v])]


def same(tree, other) -> bool:
    return all(torch.equal(x, y) for x, y in zip(values(tree), values(other), strict=True))
