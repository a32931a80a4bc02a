"""The simulator as a batched environment, on which agents learn that know rewards alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from offrl.core.space import Box
from offrl.core.types import Spec
from offrl.envs.batched import Simulated
from offrl.envs.inventory.demand import Problem
from offrl.envs.inventory.gym import largest_orders
from offrl.envs.inventory.scenario import Scenario, rows
from offrl.envs.inventory.simulator import Simulator


def simulated(problem: Problem, count: int, split: str = "train", most: float = 4.0, seed: int = 0) -> Simulated:
    """`count` scenarios of a split at once, drawn anew for each episode; an episode is cut after its last period.

    Observations are `Observation.flat()`; actions orders (E,) from 0 to `most` times the mean demand that the edge leads to; the reward is
    minus the period's cost for each store.
    """
    simulator, whole, horizon = Simulator(problem.network), problem.scenario(split), problem.horizon(split)
    first = rows(whole, slice(0, 1))
    size = simulator.observe(first.initial, first, 0).flat().shape[1]
    highest = largest_orders(problem.network, problem.mean, most).tolist()
    spec = Spec(Box.of(size), Box([0.0] * len(highest), highest))

    def at(state: dict[str, Tensor]) -> tuple[Scenario, int]:
        return rows(whole, state["row"]), int(state["t"][0])  # all episodes have one length, so they keep step

    def start(count: int, source: torch.Generator) -> dict[str, Tensor]:
        row = torch.randint(horizon.scenarios, (count,), generator=source)
        return {"row": row, "t": torch.zeros(count, dtype=torch.int64), "inventory": whole.initial[row]}

    def observe(state: dict[str, Tensor]) -> Tensor:
        given, t = at(state)
        return simulator.observe(state["inventory"], given, min(t, horizon.periods - 1)).flat()

    def advance(state: dict[str, Tensor], action: Tensor, source: torch.Generator) -> tuple[dict[str, Any], Tensor, Tensor]:
        given, t = at(state)
        inventory, cost = simulator.step(state["inventory"], action, given, t)
        reward = -cost.total / problem.network.S
        return state | {"inventory": inventory, "t": state["t"] + 1}, reward, torch.zeros(len(reward), dtype=torch.bool)

    return Simulated(spec, count, start, observe, advance, horizon.periods, seed)
