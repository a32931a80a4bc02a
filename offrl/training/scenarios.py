"""Batches of scenarios for an agent that simulates them in its update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from offrl.core.rng import generator
from offrl.core.types import Act
from offrl.training.sources import Stateless


class Scenarios(Stateless):
    """Batches without replacement, in a new order each epoch; the last ones of an epoch, too few for a batch, are left out.

    rows: (index (b,) int64) -> the batch of these scenarios, of `count`. Fewer than a batch are all of them, each time.
    """

    def __init__(self, rows: Callable[[torch.Tensor], Any], count: int, batch_size: int, seed: int = 0):
        self.rows, self.count, self.seed = rows, count, seed
        self.batch_size = min(batch_size, count)
        self.epoch, self.order = -1, torch.empty(0)

    def __call__(self, step: int, act: Act | None = None) -> list[Any]:
        epoch, batch = divmod(step, self.count // self.batch_size)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, torch.randperm(self.count, generator=generator(self.seed, "scenarios", epoch))
        return [self.rows(self.order[batch * self.batch_size : (batch + 1) * self.batch_size])]
