"""The simulator as a Gymnasium environment: an episode is one scenario, an action the desired orders, a reward minus the period's cost."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch

from offrl.core.config import nearest
from offrl.envs.inventory.demand import Problem
from offrl.envs.inventory.faults import reached
from offrl.envs.inventory.network import Network
from offrl.envs.inventory.settings import SETTINGS
from offrl.envs.inventory.simulator import Simulator


def make(setting: str | Problem, split: str = "train", most: float = 4.0, **config: Any) -> Any:
    """A gymnasium.Env of a problem, or of a published setting by its name, as `gymnasium.make` calls it.

    Each episode is a scenario of the split, drawn by `reset(seed=...)` or chosen by `reset(options={"scenario": i})`, and is truncated
    after its last period. Observations are `Observation.flat()`. Actions are orders (E,) from 0 to `most` times the mean demand that the
    edge leads to. info: the period's cost by where it arose, what was shipped, and whether the period is past the warm-up.

    `gymnasium.register("Inventory-v0", "offrl.envs.inventory.gym:make", kwargs={"setting": "one-store-lost"})` makes it known by an id.
    Raises KeyError naming the nearest setting.
    """
    if isinstance(setting, str):
        if setting not in SETTINGS:
            raise KeyError(f"no setting {setting!r}{nearest(setting, SETTINGS)}")
        setting = SETTINGS[setting](**config).problem()
    return _environment()(setting, split, most)


def largest_orders(network: Network, mean: torch.Tensor, most: float) -> np.ndarray:
    """(E,): `most` times the mean demand (1|B, S), in the largest scenario, of all stores that an edge leads to."""
    largest = dict(zip(network.stores, mean.amax(0).tolist()))
    return np.array([most * sum(largest.get(node, 0.0) for node in reached([b], network.edges)) for _, b in network.edges], np.float32)


@cache
def _environment() -> type:
    try:
        import gymnasium
    except ImportError:
        raise ImportError('environments need gymnasium: pip install "offrl[envs]"') from None

    class Inventory(gymnasium.Env):
        metadata = {"render_modes": []}
        render_mode = None

        def __init__(self, problem: Problem, split: str, most: float):
            self.problem, self.split, self.horizon = problem, split, problem.horizon(split)
            self.simulator = Simulator(problem.network)
            first = problem.scenario(split, 0, 1)
            size = self.simulator.observe(first.initial, first, 0).flat().shape[1]
            highest = largest_orders(problem.network, problem.mean, most)
            self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float32)
            self.action_space = gymnasium.spaces.Box(np.zeros_like(highest), highest)

        def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
            super().reset(seed=seed)
            drawn = int(self.np_random.integers(self.horizon.scenarios))
            self.scenario = self.problem.scenario(self.split, (options or {}).get("scenario", drawn), 1)
            self.inventory, self.t = self.simulator.reset(self.scenario), 0
            return self._seen(), {}

        def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
            order = torch.as_tensor(np.asarray(action), dtype=self.inventory.dtype)[None]
            shipped = self.simulator.ship(self.inventory, order, self.scenario.values)
            demand = self.scenario.demand[..., self.t]
            self.inventory, cost = self.simulator.advance(self.inventory, shipped, demand, self.scenario.values)
            info = {name: part[0].numpy() for name, part in cost._asdict().items()}
            info |= {"shipped": shipped[0].numpy(), "scored": self.t >= self.horizon.warm_up}
            self.t += 1
            return self._seen(), -float(cost.total), False, self.t == self.horizon.periods, info

        def _seen(self) -> np.ndarray:
            return self.simulator.observe(self.inventory, self.scenario, self.t).flat()[0].float().numpy()

    return Inventory
