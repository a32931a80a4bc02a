"""A function as one compiled graph."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch


def compiled(function: Callable[..., Any], backend: str = "inductor", guarded: bool = True, **options: Any) -> Callable[..., Any]:
    """The same function of tensors whose shapes and types never change, as one graph; a graph break is an error.

    guarded: each call asks whether it still fits; these questions, a few for each tensor, can be a tenth of a call.
    Graphs are kept by code object, and so many at most: a function shared by many objects would run out of them, or find another's. Each
    call of `compiled` therefore makes a code object of its own.
    """

    def step(*args: Any) -> Any:
        return function(*args)

    own = FunctionType(step.__code__.replace(), step.__globals__, step.__name__, None, step.__closure__)
    if not guarded:
        options["guard_filter_fn"] = lambda guards: [False] * len(guards)
    return torch.compile(own, fullgraph=True, dynamic=False, backend=backend, options=options or None)
