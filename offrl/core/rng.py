"""Random numbers from outside: an agent says what an update consumes, a seed's own streams supply it.

A stream is counter-based: block b of the stream `name` of `seed` is drawn from a generator seeded with
sha256(seed, name, b). So the numbers of a step depend on the step alone: not on where the run was cut, nor on
which other seeds run beside it, and there is no generator state to save.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK = 64  # updates whose numbers are drawn at once, unless these are more than
ROOM = 1 << 24  # numbers


@dataclass(frozen=True)
class Normal:
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Uniform:
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Permutation:
    n: int


def generator(seed: int, name: str, block: int = 0, device: str | torch.device = "cpu") -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def draw(kind: Any, count: int, source: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """(count, ...) of what a Normal, Uniform or Permutation stands for, on the generator's device."""
    if isinstance(kind, Permutation):
        return torch.stack([torch.randperm(kind.n, generator=source, device=source.device) for _ in range(count)])
    sample = torch.randn if isinstance(kind, Normal) else torch.rand
    # always drawn in float32: a float64 run sees the same numbers
    return sample((count, *kind.shape), generator=source, device=source.device).to(dtype)


def numbers(kind: Any) -> int:
    """How many there are in one draw."""
    return kind.n if isinstance(kind, Permutation) else math.prod(kind.shape)


class Noise:
    """What each update consumes, for one seed or, with a leading axis, for several.

    `kinds` is what `Agent.noise` returns: one dict of distributions for each gradient step of an update.
    """

    def __init__(
        self,
        kinds: list[dict[str, Any]],
        seeds: int | Sequence[int],
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.kinds, self.device, self.dtype = kinds, device, dtype
        self.stacked = not isinstance(seeds, int)
        self.seeds = list(seeds) if self.stacked else [seeds]
        self.block = max(1, min(BLOCK, ROOM // max(1, sum(numbers(kind) for entry in kinds for kind in entry.values()))))
        self._number, self._block = -1, []

    def _one_seed(self, seed: int, number: int) -> list[dict[str, Tensor]]:
        source = generator(seed, "noise", number, self.device)
        return [{name: draw(kind, self.block, source, self.dtype) for name, kind in kinds.items()} for kinds in self.kinds]

    def __call__(self, update: int) -> list[dict[str, Tensor]]:
        """The numbers of the update with this index: a list of dicts of tensors, (S, ...) under several seeds."""
        number, row = divmod(update, self.block)
        if number != self._number:
            parts = [self._one_seed(seed, number) for seed in self.seeds]
            self._block = [
                {name: torch.stack([p[i][name] for p in parts], 1) if self.stacked else parts[0][i][name] for name in kinds}
                for i, kinds in enumerate(self.kinds)
            ]
            self._number = number
        return [{name: block[row] for name, block in entry.items()} for entry in self._block]


class Indices:
    """Uniform row numbers with replacement: (period, batch) int64 for each update, (S, period, batch) for several seeds."""

    def __init__(self, rows: int, shape: tuple[int, ...], seeds: int | Sequence[int], name: str = "replay", device: Any = "cpu"):
        self.rows, self.shape, self.name, self.device = rows, shape, name, device
        self.stacked = not isinstance(seeds, int)
        self.seeds = list(seeds) if self.stacked else [seeds]
        self._number, self._block = -1, torch.empty(0)

    def __call__(self, update: int) -> Tensor:
        number, row = divmod(update, BLOCK)
        if number != self._number:
            sources = [generator(seed, self.name, number, self.device) for seed in self.seeds]
            parts = [torch.randint(self.rows, (BLOCK, *self.shape), generator=g, device=self.device) for g in sources]
            self._block = torch.stack(parts, 1) if self.stacked else parts[0]
            self._number = number
        return self._block[row]
