"""The network of a dynamics ensemble, the step that trains it, and how members are divided over threads."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from offrl.core.config import Log, Range
from offrl.core.graph import compiled
from offrl.core.tree import tree_map
from offrl.nn.descend import adam, adam_init


@dataclass(frozen=True)
class Config:
    members: Annotated[int, Range(1, 50)] = 7
    """Models in the ensemble."""
    elites: Annotated[int, Range(1, 50)] = 5
    """Members that imagine, those to whom rows held out are likeliest."""
    hidden: tuple[int, ...] = (200, 200, 200, 200)
    """Widths of the hidden layers of a member."""
    lr: Annotated[float, Log(1e-5, 1e-2)] = 1e-3
    """Learning rate of AdamW."""
    weight_decay: Annotated[float, Range(0, 1)] = 2.5e-5
    """Decay of AdamW, decoupled from the gradient."""
    batch_size: Annotated[int, Range(1)] = 256
    """Rows in a batch of each member."""
    bound_weight: Annotated[float, Range(0, 1)] = 0.01
    """Weight of the term that draws the bounds of the log-variances together."""
    holdout: Annotated[float, Range(0.01, 0.5)] = 0.1
    """Share of the rows that is held out, in whole trajectories."""
    patience: Annotated[int, Range(1)] = 5
    """Epochs after which training ends if held-out rows have become likelier to no member, by more than 0.01 nats a dimension."""
    max_epochs: Annotated[int, Range(1)] = 100
    """Epochs at most."""


class Ensemble(nn.Module):
    """x (members, B, in) or (B, in) -> mean and log-variance (members, B, out). Members are an axis of every weight."""

    def __init__(self, sizes: Sequence[int], members: int):
        super().__init__()
        pairs = list(zip(sizes[:-1], (*sizes[1:-1], 2 * sizes[-1])))
        self.weights = nn.ParameterList(nn.init.trunc_normal_(torch.empty(members, a, b), std=0.5 / math.sqrt(a)) for a, b in pairs)
        self.biases = nn.ParameterList(torch.zeros(members, 1, b) for _, b in pairs)
        self.max_log_var = nn.Parameter(torch.full((members, 1, sizes[-1]), 0.5))
        self.min_log_var = nn.Parameter(torch.full((members, 1, sizes[-1]), -10.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.expand(len(self.max_log_var), *x.shape[-2:])
        (*weights, head), (*biases, level) = self.weights, self.biases
        for weight, bias in zip(weights, biases):
            x = F.silu(torch.baddbmm(bias, x, weight), inplace=not torch.is_grad_enabled())  # half as much goes through the cache
        with torch.autocast(x.device.type, enabled=False):
            mean, log_var = torch.baddbmm(level, x.to(head.dtype), head).chunk(2, -1)
        log_var = self.max_log_var - F.softplus(self.max_log_var - log_var)
        return mean, self.min_log_var + F.softplus(log_var - self.min_log_var)


def surprise(mean: Tensor, log_var: Tensor, target: Tensor) -> Tensor:
    """(members,): twice the Gaussian negative log-likelihood without its constant, averaged over rows and dimensions."""
    return ((mean - target).square() * torch.exp(-log_var) + log_var).mean((-2, -1))


def ensemble_loss(net: Ensemble, params: Mapping[str, Tensor], x: Tensor, target: Tensor, bound_weight: float) -> Tensor:
    """Each member's `surprise` under `params`, summed, plus what draws the bounds of the log-variances together."""
    gap = params["max_log_var"] - params["min_log_var"]
    return surprise(*functional_call(net, params, (x,)), target).sum() + bound_weight * gap.sum() / len(gap)


def stepper(net: Ensemble, config: Config, mode: str, precision: str, x: Tensor, y: Tensor) -> Callable[[Tensor, Tensor], Any]:
    """What moves the weights of `net` a step of AdamW along the gradient on a batch such as x (members, B, in), y (members, B, out).

    As one compiled graph it is in C++ on a CPU, where threads need not wait for each other; it is compiled here, in this thread.
    """
    params = dict(net.named_parameters())

    def loss(params: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False):
            return ensemble_loss(net, params, x, y, config.bound_weight)

    if mode == "eager":
        optimizer = torch.optim.AdamW(params.values(), config.lr, weight_decay=config.weight_decay, fused=True)

        def step(x: Tensor, y: Tensor) -> None:
            optimizer.zero_grad(set_to_none=True)
            loss(params, x, y).backward()
            optimizer.step()

        return step

    def learn(state: dict[str, Any], x: Tensor, y: Tensor) -> None:
        grads = torch.func.grad(loss)(state["params"], x, y)
        decayed = {k: p * (1 - config.lr * config.weight_decay) for k, p in state["params"].items()}
        moved, moments = adam(decayed, grads, state["adam"], config.lr)
        tree_map(lambda kept, now: kept.copy_(now), state, {"params": moved, "adam": moments})

    weights = {k: p.detach() for k, p in params.items()}
    state = {"params": weights, "adam": adam_init(weights)}
    graph = compiled(learn, guarded=False, **({"cpp_wrapper": True} if x.device.type == "cpu" else {}))
    graph(tree_map(torch.clone, state), x, y)
    return partial(graph, state)


class Piece(NamedTuple):
    """What a thread does of an epoch: some members' steps, from one share of them to another."""

    members: tuple[int, int]  # from, to
    begin: Fraction
    end: Fraction


def divided(members: int, threads: int) -> list[list[Piece]]:
    """The pieces of each thread, in its order: all threads have as much to do, and none has more than there are members.

    By McNaughton's wrap-around rule (1959): a member that falls to two threads is the first thing that one does and the last of the next.
    Members learn nothing from each other, and threads with products of their own are faster than threads that share each product.
    """
    share = max(Fraction(1), Fraction(members, threads))
    found = []
    for i in range(math.ceil(members / share)):
        begin, end = i * share, (i + 1) * share
        first, last = math.ceil(begin), math.floor(end)
        pieces = [
            Piece((last, last + 1), Fraction(0), end - last),
            Piece((first, last), Fraction(0), Fraction(1)),
            Piece((first - 1, first), begin - (first - 1), Fraction(1)),
        ]
        found.append([piece for piece in pieces if piece.members[0] < piece.members[1] and piece.begin < piece.end])
    return found


def portion(net: Ensemble, first: int, last: int) -> Ensemble:
    """A network of some members, whose weights are those of `net`."""
    some = copy.deepcopy(net)
    for own, whole in zip(some.parameters(), net.parameters()):
        own.data = whole.data[first:last]
    return some
