"""What happens to a network, what a policy sees of it and what it costs: batches of B scenarios, as plain tuples of tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from offrl.envs.inventory.network import Network, Values


class Scenario(NamedTuple):
    """B demand traces of T periods and all else that a policy does not decide; 1|B: shared by all, or one for each.

    `scenario(network, demand)` makes one: it checks shapes and fills in what is left out.
    """

    demand: Tensor  # (B, S, T)
    initial: Tensor  # (B, N, M) inventory before the first period
    values: Values
    mean: Tensor  # (1|B, S) of a period's demand, as far as a policy may know it
    std: Tensor  # (1|B, S)
    past: Tensor  # (B, S, window) demand before the first period, latest last; window may be 0
    calendar: Tensor  # (1|B, T, C) features of each period; C may be 0


class Observation(NamedTuple):
    """What a policy sees at the start of period t."""

    inventory: Tensor  # (B, N, M)
    values: Values
    mean: Tensor  # (1|B, S)
    std: Tensor  # (1|B, S)
    past: Tensor  # (B, S, window), latest last
    calendar: Tensor  # (1|B, C)
    t: int

    def flat(self) -> Tensor:
        """(B, K): inventory, past demand, calendar, then values (capacities apart), mean and std, in this order."""
        parts = [self.inventory, self.past, self.calendar, *self.values[:-1], self.mean, self.std]
        rows = len(self.inventory)
        return torch.cat([part.flatten(1).expand(rows, -1).to(self.inventory.dtype) for part in parts], 1)

    def node_features(self) -> Tensor:
        """(B, N, M + 4 + window + C): inventory, holding, underage, mean, std, past demand, calendar; 0 where a node has no demand."""
        rows, nodes = self.inventory.shape[:2]
        stores = torch.cat([torch.stack([x.expand(rows, -1) for x in (self.values.underage, self.mean, self.std)], -1), self.past], -1)
        stores = F.pad(stores, (0, 0, nodes - stores.shape[1], 0))
        holding, calendar = self.values.holding[..., None].expand(rows, -1, -1), self.calendar[:, None].expand(rows, nodes, -1)
        return torch.cat([self.inventory, holding, stores, calendar], -1)

    def edge_features(self) -> Tensor:
        """(1|B, E, 2): lead time and procurement cost."""
        lead_time, procurement = torch.broadcast_tensors(self.values.lead_time.to(self.inventory.dtype), self.values.procurement)
        return torch.stack([lead_time, procurement], -1)


class Cost(NamedTuple):
    """Of a period or of a sum of periods, by where it arose."""

    holding: Tensor  # (B, N)
    underage: Tensor  # (B, S); where profit is sought, minus the revenue
    procurement: Tensor  # (B, E)

    @property
    def total(self) -> Tensor:
        """(B,)"""
        return self.holding.sum(1) + self.underage.sum(1) + self.procurement.sum(1)

    def __add__(self, other: Cost) -> Cost:  # type: ignore[override]
        return Cost(*(a + b for a, b in zip(self, other)))


def scenario(
    network: Network,
    demand: Tensor,
    *,
    initial: Tensor | None = None,
    values: Values | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    past: Tensor | None = None,
    calendar: Tensor | None = None,
) -> Scenario:
    """A batch of scenarios from demand (B, S, T) and whatever else is known; shapes are those of Scenario.

    Left out: initial, nothing on hand or in transit; values, the network's; mean and std, those of `demand` over batch and time; past and
    calendar, empty. Raises ValueError for a shape that does not fit and for a lead time that the inventory has no slot for.
    """
    rows, stores, periods = demand.shape
    pooled = demand.movedim(1, 0).flatten(1)
    made = Scenario(
        demand,
        demand.new_zeros(rows, network.N, network.longest) if initial is None else initial,
        network.values if values is None else values,
        pooled.mean(1)[None] if mean is None else mean,
        pooled.std(1, correction=0)[None] if std is None else std,
        demand.new_zeros(rows, stores, 0) if past is None else past,
        demand.new_zeros(1, periods, 0) if calendar is None else calendar,
    )
    _check_shapes(network, made)
    slots, longest = made.initial.shape[-1], int(made.values.lead_time.max())
    if not 1 <= int(made.values.lead_time.min()) <= longest <= slots:
        raise ValueError(
            f"{network.name}: lead times up to {longest} need as many inventory slots, and none is below 1; initial has {slots}"
        )
    return made


def _check_shapes(network: Network, made: Scenario) -> None:
    rows, _, periods = made.demand.shape
    own = {"demand": network.S, "initial": network.N, "past": network.S}
    shared = {"mean": network.S, "std": network.S, "calendar": periods} | {
        key: column.shape[1] for key, column in network.values._asdict().items()
    }
    tensors = made.values._asdict() | made._asdict()
    for key, width in (own | shared).items():
        shape, counts = tuple(tensors[key].shape), (rows,) if key in own else (1, rows)
        if shape[0] not in counts or shape[1] != width:
            raise ValueError(f"{network.name}: {key} has shape {shape}, not ({' or '.join(map(str, counts))}, {width}, ...)")


def each(fn: Any, given: Scenario) -> Scenario:
    """The scenario with `fn(tensor)` in the place of each of its tensors, those of `values` among them."""
    return Scenario(*(Values(*map(fn, part)) if isinstance(part, Values) else fn(part) for part in given))


def rows(given: Scenario, index: Tensor | slice) -> Scenario:
    """Some of its B scenarios, as a batch; `index` (b,) int64 or a slice. What all share stays shared."""
    shared = each(lambda x: x if len(x) == 1 else x[index], given)
    return shared._replace(demand=given.demand[index], initial=given.initial[index], past=given.past[index])


def cast(given: Scenario, dtype: torch.dtype | None = None, device: str | torch.device | None = None) -> Scenario:
    """On another device, or with another type of its floating-point numbers."""
    return each(lambda x: x.to(device=device, dtype=dtype if x.is_floating_point() else None), given)
