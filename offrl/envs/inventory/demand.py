"""Where demand comes from: distributions that are sampled, or a history that is split by time; both make batches of scenarios.

Sampled scenarios come in blocks with random numbers of their own: the first n do not depend on how many are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Protocol

import numpy as np
import torch
from torch import Tensor

from offrl.core.config import Range
from offrl.core.rng import generator
from offrl.envs.inventory.network import Network
from offrl.envs.inventory.scenario import Scenario, rows, scenario

BLOCK = 64  # scenarios that share a stream of random numbers


@dataclass(frozen=True)
class Horizon:
    """Of training, of choosing between policies, or of a test."""

    periods: Annotated[int, Range(1)]
    """Periods of a scenario."""
    warm_up: Annotated[int, Range(0)]
    """Of these, the first ones that no reported figure counts."""
    scenarios: Annotated[int, Range(1)]
    """Demand traces."""


class Demand(Protocol):
    """Of S stores, independent from period to period."""

    mean: Tensor  # (S,)
    std: Tensor  # (S,)

    def sample(self, count: int, periods: int, source: torch.Generator) -> Tensor: ...  # (count, S, periods)


class NormalDemand:
    """Normal in each period, with correlation between stores, and clipped at 0 if asked for; mean and std are those before clipping."""

    def __init__(self, mean: Tensor, std: Tensor, correlation: float | Tensor = 0.0, clipped: bool = True):
        """mean and std (S,); correlation (S, S), or one number for all pairs. Raises ValueError if it is not positive definite."""
        self.mean, self.std, self.clipped = mean.float(), std.float(), clipped
        matrix = torch.as_tensor(correlation, dtype=torch.float64).expand(len(mean), len(mean)).clone()
        matrix.fill_diagonal_(1.0)
        root, failed = torch.linalg.cholesky_ex(matrix)
        if failed:
            raise ValueError(f"the correlation of {len(mean)} stores' demand is not positive definite")
        self.correlation, self.root = matrix, (self.std[:, None] * root).float()

    def sample(self, count: int, periods: int, source: torch.Generator) -> Tensor:
        demand = self.mean[:, None] + self.root @ torch.randn(count, len(self.mean), periods, generator=source)
        return demand.clamp_min(0) if self.clipped else demand

    @classmethod
    def fit(cls, demand: Tensor, clipped: bool = True) -> NormalDemand:
        """The means, deviations and correlations of demand (B, S, T) over scenarios and periods."""
        pooled = demand.movedim(1, 0).flatten(1).double()
        correlation = torch.corrcoef(pooled).nan_to_num(0.0) if len(pooled) > 1 else 0.0
        return cls(pooled.mean(1), pooled.std(1), correlation, clipped)


class PoissonDemand:
    """Poisson, independent between stores."""

    def __init__(self, mean: Tensor):
        self.mean, self.std = mean.float(), mean.float().sqrt()

    def sample(self, count: int, periods: int, source: torch.Generator) -> Tensor:
        return torch.poisson(self.mean[:, None].expand(count, -1, periods), generator=source)

    @classmethod
    def fit(cls, demand: Tensor) -> PoissonDemand:
        """The means of demand (B, S, T) over scenarios and periods."""
        return cls(demand.mean((0, 2)))


class EmpiricalDemand:
    """Periods of a history, drawn with replacement: all stores together, in no order."""

    def __init__(self, demand: Tensor):
        """demand (B, S, T)"""
        self.observed = demand.movedim(1, 0).flatten(1)
        self.mean, self.std = self.observed.mean(1), self.observed.std(1)

    def sample(self, count: int, periods: int, source: torch.Generator) -> Tensor:
        drawn = torch.randint(self.observed.shape[1], (count, periods), generator=source)
        return self.observed[:, drawn].movedim(0, 1)


class Problem(Protocol):
    """A network and its scenarios, by the names train, dev and test."""

    network: Network

    @property
    def mean(self) -> Tensor: ...  # (1|B, S) of a period's demand

    def horizon(self, split: str) -> Horizon: ...
    def scenario(self, split: str, first: int = 0, count: int | None = None) -> Scenario: ...
    def batches(self, split: str, size: int) -> Iterator[Scenario]: ...


@dataclass(frozen=True, eq=False)
class Sampled:
    """A network under sampled demand.

    Stores begin with a uniform share of their mean demand in each of `slots` inventory slots, all other nodes with nothing. The splits have
    streams of their own, so that the number of training scenarios changes none of the others.
    """

    network: Network
    demand: Demand
    horizons: Mapping[str, Horizon]
    slots: int = 1  # at least; the longest lead time if that is more
    seed: int = 0

    def __post_init__(self) -> None:
        if (count := max(map(len, self.network.values))) > 1:
            raise ValueError(f"{self.network.name}: sampled scenarios share one set of numbers, and the network has {count}")

    @property
    def mean(self) -> Tensor:
        return self.demand.mean[None]

    def horizon(self, split: str) -> Horizon:
        return self.horizons[split]

    def scenario(self, split: str, first: int = 0, count: int | None = None) -> Scenario:
        """`count` scenarios of a split from the `first` on; all, if left out."""
        horizon, net = self.horizons[split], self.network
        stop = horizon.scenarios if count is None else min(first + count, horizon.scenarios)
        slots, shares, demands = max(self.slots, net.longest), [], []
        for block in range(first // BLOCK, math.ceil(stop / BLOCK)):
            source = generator(self.seed, f"demand-{split}", block)
            shares.append(torch.rand(BLOCK, net.S, slots, generator=source))
            demands.append(self.demand.sample(BLOCK, horizon.periods, source))
        own = slice(first - first // BLOCK * BLOCK, stop - first // BLOCK * BLOCK)
        initial = torch.zeros(stop - first, net.N, slots)
        initial[:, net.W :] = torch.cat(shares)[own] * self.demand.mean[:, None]
        return scenario(net, torch.cat(demands)[own], initial=initial, mean=self.demand.mean[None], std=self.demand.std[None])

    def batches(self, split: str, size: int) -> Iterator[Scenario]:
        """All scenarios of a split in order, `size` at a time; only one batch is in memory."""
        return (self.scenario(split, first, size) for first in range(0, self.horizons[split].scenarios, size))


@dataclass(frozen=True, eq=False)
class History:
    """Demand that was observed: B items (each a scenario) in S stores over T periods."""

    demand: Tensor  # (B, S, T)
    stores: tuple[str, ...]
    dates: np.ndarray | None = None  # (T,) datetime64[D], the first day of each period
    items: tuple[str, ...] = ()

    @cached_property
    def calendar(self) -> Tensor:
        """(1, T, 1): years since the nearest Christmas, less than 0 before it; (1, T, 0) without dates."""
        if self.dates is None:
            return torch.zeros(1, self.demand.shape[-1], 0)
        days = self.dates.astype("datetime64[D]")
        eves = np.arange(days[0].astype("datetime64[Y]") - 1, days[-1].astype("datetime64[Y]") + 2).astype("datetime64[D]") - 7
        since = (days[:, None] - eves).astype(np.float32)
        nearest = np.take_along_axis(since, abs(since).argmin(1)[:, None], 1)
        return torch.from_numpy(nearest / 365)[None]


@dataclass(frozen=True, eq=False)
class Observed:
    """A network under a history that is split by time.

    spans: the periods [first, stop) of each split, its `window` of past demand included. mean and std of demand are those of the training
    periods, of each item. All nodes begin empty.
    """

    network: Network
    history: History
    spans: Mapping[str, tuple[int, int]]
    window: int = 16
    warm_up: int = 16

    @classmethod
    def split(
        cls, network: Network, history: History, fractions: tuple[float, float] = (0.6, 0.2), window: int = 16, warm_up: int = 16
    ) -> Observed:
        """Train, dev and test one after the other; `fractions` of all periods are for the first two.

        What dev and test see as past demand and run through as warm-up lies before what they score. Raises ValueError for a history that
        is too short.
        """
        total, lead = history.demand.shape[-1], window + warm_up
        first, second = round(fractions[0] * total), round((fractions[0] + fractions[1]) * total)
        if not lead < first < second < total:
            raise ValueError(f"{total} periods are too few for a window of {window}, a warm-up of {warm_up} and fractions {fractions}")
        return cls(network, history, {"train": (0, first), "dev": (first - lead, second), "test": (second - lead, total)}, window, warm_up)

    @property
    def seen(self) -> Tensor:
        """(B, S, T) demand of the training periods."""
        return self.history.demand[..., slice(*self.spans["train"])]

    @property
    def mean(self) -> Tensor:
        return self.seen.mean(-1)

    def horizon(self, split: str) -> Horizon:
        first, stop = self.spans[split]
        return Horizon(stop - first - self.window, self.warm_up, len(self.history.demand))

    def scenario(self, split: str, first: int = 0, count: int | None = None) -> Scenario:
        """`count` items from the `first` on; all, if left out."""
        (begin, stop), start = self.spans[split], self.spans[split][0] + self.window
        demand = self.history.demand
        made = scenario(
            self.network,
            demand[..., start:stop],
            mean=self.mean,
            std=self.seen.std(-1),
            past=demand[..., begin:start],
            calendar=self.history.calendar[:, start:stop],
        )
        return rows(made, slice(first, None if count is None else first + count))

    def batches(self, split: str, size: int) -> Iterator[Scenario]:
        whole = self.scenario(split)
        return (rows(whole, slice(first, first + size)) for first in range(0, len(whole.demand), size))
