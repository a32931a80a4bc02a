"""Observation and action spaces as plain values: hashable, comparable, written to JSON, free of gymnasium."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Box:
    """Flat real vectors of `size` entries with bounds per entry (infinite where there is none)."""

    low: tuple[float, ...]
    high: tuple[float, ...]

    @classmethod
    def of(cls, size: int, low: Any = -math.inf, high: Any = math.inf) -> Box:
        """A box of `size` entries; `low` and `high` are scalars or arrays with `size` entries in all."""
        bounds = (np.broadcast_to(np.asarray(b, np.float64).reshape(-1), (size,)) for b in (low, high))
        return cls(*(tuple(map(float, b)) for b in bounds))

    @property
    def size(self) -> int:
        return len(self.low)

    @property
    def bounded(self) -> bool:
        return all(map(math.isfinite, self.low + self.high))

    def clip(self, action: Any) -> Any:
        """The nearest point within the bounds to each row of a tensor (..., size)."""
        return action.clamp(action.new_tensor(self.low), action.new_tensor(self.high))


@dataclass(frozen=True)
class Discrete:
    """The integers 0 to n - 1."""

    n: int

    @property
    def size(self) -> int:
        return self.n


Space = Box | Discrete


def to_json(space: Space) -> dict[str, Any]:
    """A JSON value that `from_json` reads back; an infinite bound becomes null."""
    if isinstance(space, Discrete):
        return {"discrete": space.n}
    return {"low": [b if math.isfinite(b) else None for b in space.low], "high": [b if math.isfinite(b) else None for b in space.high]}


def from_json(value: dict[str, Any]) -> Space:
    if "discrete" in value:
        return Discrete(int(value["discrete"]))
    low = tuple(-math.inf if b is None else float(b) for b in value["low"])
    return Box(low, tuple(math.inf if b is None else float(b) for b in value["high"]))


def from_gym(space: Any) -> Space:
    """The same space as a value of ours. Raises TypeError for what is neither a Box nor a Discrete that starts at 0."""
    kind = type(space).__name__
    if kind == "Discrete" and int(space.start) == 0:
        return Discrete(int(space.n))
    if kind == "Box":
        return Box.of(int(np.prod(space.shape)), np.asarray(space.low).reshape(-1), np.asarray(space.high).reshape(-1))
    raise TypeError(f"offrl reads Box spaces and Discrete spaces that start at 0, not {space}")
