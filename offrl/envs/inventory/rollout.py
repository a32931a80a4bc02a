"""A policy in a simulated network: total costs to be differentiated, trajectories to be looked at, and the figure that is reported."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from offrl.envs.inventory.scenario import Cost, Observation, Scenario
from offrl.envs.inventory.simulator import Simulator

Policy = Callable[[Observation], Tensor]  # -> desired orders (B, E)


class Trajectory(NamedTuple):
    """All periods of a rollout."""

    inventory: Tensor  # (B, T, N, M) as it was seen
    order: Tensor  # (B, T, E) as it was shipped
    sales: Tensor  # (B, T, S) demand less what was lost; backlogged demand is sold, if late
    cost: Cost  # (B, T, ...)


class Rollout(NamedTuple):
    """Sums over periods, and the last inventory."""

    warm_up: Cost  # of the first periods, which are not reported
    scored: Cost  # of all others
    inventory: Tensor  # (B, N, M)
    trajectory: Trajectory | None

    @property
    def total(self) -> Tensor:
        """(B,) cost of all periods."""
        return self.warm_up.total + self.scored.total


def rollout(simulator: Simulator, policy: Policy, scenario: Scenario, warm_up: int = 0, trajectory: bool = False) -> Rollout:
    """All T periods of the scenarios under a policy, differentiable throughout; of these the first `warm_up` are summed apart."""
    inventory, steps = simulator.reset(scenario), []
    nothing = Cost(*(inventory.new_zeros(len(inventory), n) for n in (simulator.network.N, simulator.network.S, simulator.network.E)))
    sums = [nothing, nothing]
    for t in range(scenario.demand.shape[-1]):
        shipped = simulator.ship(inventory, policy(simulator.observe(inventory, scenario, t)), scenario.values)
        demand = scenario.demand[..., t]
        following, cost = simulator.advance(inventory, shipped, demand, scenario.values)
        sums[t >= warm_up] = sums[t >= warm_up] + cost
        if trajectory:
            steps.append((inventory, shipped, simulator.sales(inventory, demand), *cost))
        inventory = following
    seen = [torch.stack(column, 1) for column in zip(*steps)]
    return Rollout(*sums, inventory, Trajectory(*seen[:3], Cost(*seen[3:])) if trajectory else None)


class Evaluation(NamedTuple):
    """Costs for each scored period and store, warehouses' costs included: the mean over scenarios and its standard error."""

    cost: float
    error: float
    holding: dict[str, float]  # by node; with the next two it adds up to `cost`
    underage: dict[str, float]  # by store; where profit is sought, minus the revenue
    procurement: dict[str, float]  # by edge, as "from->to"
    scenarios: Tensor  # (B,) the cost of each scenario


def evaluate(
    simulator: Simulator,
    policy: Policy,
    scenarios: Iterable[Scenario],
    warm_up: int = 0,
    watch: Callable[[Scenario, Trajectory], None] | None = None,
) -> Evaluation:
    """The mean cost of a policy over batches of scenarios, without gradients; memory holds one batch, whatever the horizon.

    watch: is shown all periods of each batch, warm-up included, which memory then holds too.
    """
    net, parts = simulator.network, []
    for batch in [scenarios] if isinstance(scenarios, Scenario) else scenarios:
        periods = batch.demand.shape[-1] - warm_up
        if periods < 1:
            raise ValueError(f"{periods + warm_up} periods leave none to score after {warm_up} of warm-up")
        with torch.no_grad():
            seen = rollout(simulator, policy, batch, warm_up, trajectory=watch is not None)
        parts.append(Cost(*(x.double().cpu() / (periods * net.S) for x in seen.scored)))
        if watch is not None:
            watch(batch, seen.trajectory)
    cost = Cost(*(torch.cat(column) for column in zip(*parts)))
    total = cost.total
    error = float(total.std() / math.sqrt(len(total))) if len(total) > 1 else math.nan
    names = (net.nodes, net.stores, [f"{a}->{b}" for a, b in net.edges])
    shares = (dict(zip(keys, column.mean(0).tolist())) for keys, column in zip(names, cost))
    return Evaluation(float(total.mean()), error, *shares, total)
