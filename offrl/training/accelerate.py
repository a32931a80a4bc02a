"""Transformations of an agent's pure update: a seed axis, a precision, one compiled graph, one captured CUDA graph."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from offrl.core.graph import compiled
from offrl.core.tree import flatten, tree_map
from offrl.core.types import Transitions

MODES = ("eager", "compile", "cudagraph")
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}


def accelerate(
    update: Callable[..., Any],
    mode: str = "eager",
    precision: str = "fp32",
    stacked: bool = False,
    device: str | torch.device = "cpu",
    backend: str = "inductor",
) -> Callable[..., Any]:
    """`update(state, batches, noise) -> (state, metrics)`, the same function faster.

    mode: `compile` makes losses, gradients, optimiser and targets one graph (a graph break is an error); `cudagraph`
    also captures it on the GPU, and then returns the same tensors at every call, overwritten in place.
    precision: `bf16` runs hidden layers in bfloat16; parameters, heads, losses and optimiser stay as they are.
    stacked: state, batches and noise have a leading axis of seeds, each of which goes as if alone.
    """
    if mode not in MODES or precision not in PRECISIONS:
        raise ValueError(f"mode is one of {', '.join(MODES)} and precision of {', '.join(PRECISIONS)}, not {mode!r}, {precision!r}")
    if stacked:
        update = _stack(update)
    if PRECISIONS[precision] is not None:
        update = _autocast(update, PRECISIONS[precision], torch.device(device).type)
    if mode != "eager":
        update = compiled(update, backend, guarded=False)  # shapes and types of an update's arguments never change
    return Captured(update) if mode == "cudagraph" else torch.no_grad()(update)


def skipping(update: Callable[..., Any]) -> Callable[..., Any]:
    """The update with the old state in the place of a new one that is not finite, or whose metrics are not.

    The state has an entry more, `skipped`, in which such updates are counted; the metric `update/skipped` shows it.
    """

    def skip(state, batches, noise):
        old = {key: tree for key, tree in state.items() if key != "skipped"}
        new, metrics = update(old, batches, noise)
        sound = torch.stack([torch.isfinite(leaf).all() for leaf in (*metrics.values(), *flatten(new).values())]).all()
        skipped = state["skipped"] + ~sound
        return tree_map(partial(torch.where, sound), new, old) | {"skipped": skipped}, metrics | {"update/skipped": skipped}

    return skip


def best_mode(device: str | torch.device, updates: int) -> tuple[str, str]:
    """The fastest mode for so many updates on this machine, and why."""
    if torch.device(device).type == "cuda":
        return "cudagraph", "a GPU's cost is launching kernels"
    if updates < 20_000:
        return "eager", "too few updates to repay compiling"
    if shutil.which("g++") or shutil.which("c++") or shutil.which("clang++"):
        return "compile", "long enough to repay compiling"
    return "eager", "compiling needs a C++ compiler, and there is none: install g++"


def _stack(update):
    def stacked(state, batches, noise):
        # vmap takes no None, so absent columns are named in in_dims
        axes = [Transitions(*(None if column is None else 0 for column in batch)) for batch in batches]
        return torch.func.vmap(update, in_dims=(0, axes, 0))(state, batches, noise)

    return stacked


def _autocast(update, dtype, device):
    def cast(state, batches, noise):
        with torch.autocast(device, dtype, cache_enabled=False):
            return update(state, batches, noise)

    return cast


class Captured:
    """One update as a CUDA graph over fixed memory: inputs are copied in, the state is committed in place."""

    def __init__(self, update: Callable[..., Any], warmup: int = 3):
        self.update, self.warmup, self.graph = update, warmup, None

    @torch.no_grad()
    def __call__(self, state, batches, noise):
        if self.graph is None:
            self._capture(state, batches, noise)
        elif state is not self.state:
            tree_map(lambda kept, new: kept.copy_(new), self.state, state)
        for kept, new in zip(self.inputs, tree_leaves((batches, noise))):
            if new is not None:
                kept.copy_(new)
        self.graph.replay()
        return self.state, self.metrics

    def _capture(self, state, batches, noise):
        clone = torch.utils._pytree.tree_map(lambda x: x if x is None else x.clone(), (batches, noise))
        self.state, self.inputs = tree_map(torch.clone, state), tree_leaves(clone)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(self.warmup):
                self.update(self.state, *clone)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            new, self.metrics = self.update(self.state, *clone)
            tree_map(lambda kept, moved: kept.copy_(moved), self.state, new)
