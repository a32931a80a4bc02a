"""A trained ordering policy on its own: today's orders from today's stock, without the network's file or the data it learned from."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from offrl.agents.hdpo import HDPO, Config, Shape
from offrl.core.checkpoint import Checkpoints, check_meta, restore
from offrl.core.config import merge, nearest
from offrl.core.types import State
from offrl.envs.inventory import files
from offrl.envs.inventory.demand import History, Problem
from offrl.envs.inventory.faults import PERIOD_DAYS, NetworkError, fault
from offrl.envs.inventory.network import Network, Values
from offrl.envs.inventory.policies import rounded, ship_whole
from offrl.envs.inventory.scenario import Observation, Scenario
from offrl.training.run import RunError, find_runs, read_about

COLUMNS = ("item", "from", "to", "quantity", "arrives_in")
SEEING = ("data_driven", "gnn")  # the policies that look at more than inventories


def described(problem: Problem, scenario: Scenario, whole: bool) -> dict[str, Any]:
    """What run.json says of a network and of what its policy sees, as plain values; a capacity that is no limit is None."""
    net, history = problem.network, getattr(problem, "history", None)
    values = {
        key: [[x if math.isfinite(x) else None for x in row] for row in column.tolist()] for key, column in net.values._asdict().items()
    }
    parts = {key: getattr(net, key) for key in ("name", "nodes", "kinds", "edges", "unmet", "objective")}
    days = None if history is None or history.dates is None else int((history.dates[1] - history.dates[0]).astype(int))
    return {
        "network": parts | {"values": values},
        "observation": Shape.of(scenario)._asdict() | {"mean": scenario.mean.tolist(), "std": scenario.std.tolist()},
        "items": ("",) if history is None or not history.items else history.items,
        "period": next((name for name, length in PERIOD_DAYS.items() if length == days), None),
        "whole": whole,
    }


class Past(NamedTuple):
    """What came before today."""

    demand: Tensor  # (items, S, window)
    calendar: Tensor  # (1, C) of today's period
    date: np.datetime64 | None  # on which it begins; None where nothing says


class Planner:
    """An ordering policy with its network and all that it has to know."""

    def __init__(self, agent: HDPO, state: State, about: dict[str, Any], step: int):
        self.agent, self.state, self.step = agent, state, step
        self.network: Network = agent.network
        self.about, self.items, self.period, self.whole = about, tuple(about["items"]), about["period"], about["whole"]
        self.mean, self.std = (torch.tensor(about["observation"][key]) for key in ("mean", "std"))
        self.sees_past = agent.config.policy in SEEING and agent.shape.window + agent.shape.calendar > 0

    def act(self, obs: Observation) -> Tensor:
        """Desired orders (B, E), rounded where they are to be whole."""
        policy = partial(self.agent.act, self.state)
        with torch.no_grad():
            return (rounded(policy) if self.whole else policy)(obs)

    def orders(self, inventory: Tensor, past: Past | None = None) -> Tensor:
        """What is to be shipped along each edge (items, E) from an inventory (items, N, slots): never more than there is.

        past: for policies that see it (`sees_past`). Raises ValueError where it is missing.
        """
        if self.sees_past and past is None:
            raise ValueError(f"the policy sees the last {self.agent.shape.window} periods of demand: give them")
        _, window, calendar = self.agent.shape
        rows, values = len(inventory), self.network.values
        if past is None:  # what is not looked at
            past = Past(inventory.new_zeros(rows, self.network.S, window), inventory.new_zeros(1, calendar), None)
        order = self.act(Observation(inventory, values, self.mean, self.std, past.demand, past.calendar, 0))
        simulator = self.agent.simulator
        return ship_whole(simulator, inventory, order, values) if self.whole else simulator.ship(inventory, order, values)

    def rows(self, orders: Tensor) -> list[tuple[Any, ...]]:
        """orders (items, E) as rows of COLUMNS, all edges of all items, to four digits of a fraction."""
        made = [[int(x) if x.is_integer() else x for x in (round(x, 4) for x in row)] for row in orders.tolist()]
        periods = self.network.values.lead_time.expand(len(orders), -1).tolist()
        edges = self.network.edges
        return [(item, *edges[e], made[i][e], periods[i][e]) for i, item in enumerate(self.items) for e in range(len(edges))]

    def past(self, table: Path | None = None) -> Past:
        """Of a table like the network's own; of that one, where it is still there, if left out. Raises RunError, NetworkError."""
        history, name = self._history(table)
        window = self.agent.shape.window
        if (length := history.demand.shape[-1]) < window:
            raise RunError(f"{name} has {length} periods of demand, and the policy sees the last {window}")
        date = history.dates[-1] + PERIOD_DAYS[self.period]
        today = History(history.demand[..., :1], history.stores, np.array([date]))
        return Past(history.demand[..., length - window :], today.calendar[:, 0], date)

    def _history(self, table: Path | None) -> tuple[History, str]:
        if table is not None:
            history, name = files.read_demand(table, self.network.stores, self.period), table.name
        else:
            name = self.about["data"]["path"]
            if not Path(name).exists():
                raise RunError(f"the policy sees past demand, and {name} is not there any more: name a table with --demand")
            history = files.load(name).history
            if history is None or history.stores != self.network.stores:
                raise RunError(f"{name} is not the network any more that the policy was trained for: name a table with --demand")
        found = [
            fault("demand-item", f"{name}: item", f"is of {item!r}{nearest(item, self.items)}")
            for item in history.items
            if item not in self.items
        ]
        found += [fault("demand-item", f"{name}: item", f"no row is of {item!r}") for item in self.items if item not in history.items]
        if found:
            raise NetworkError(found[:1])
        return History(history.demand[[history.items.index(item) for item in self.items]], history.stores, history.dates, self.items), name


def load(path: str | Path) -> Planner:
    """The policy of an HDPO run, the folder of one seed or one above it that holds a single seed, with the weights that cost least on dev.

    Nothing is executed, and neither the network's file nor the data is needed. Raises RunError or CheckpointError saying what is wrong.
    """
    folders = find_runs(Path(path))
    if len(folders) > 1:
        raise RunError(f"{path} holds {len(folders)} runs; name one of them, for example {folders[0]}")
    (folder,) = folders
    about = read_about(folder)
    if about["recipe"] != "hdpo":
        raise RunError(f"{folder} is a run of {about['recipe']}, and orders are what hdpo learns")
    if "network" not in about:
        raise RunError(f"{folder} does not say its network: it was trained by an earlier offrl; train it anew with --fresh")
    saved = Checkpoints(folder / "best").latest()
    if saved is None:
        raise RunError(f"{folder} has not been evaluated yet: let it train up to --eval-every steps")
    check_meta(saved.meta, {"algorithm": about["algorithm"], "spec": about["spec"]})
    try:
        agent = HDPO(merge(Config(), about["agent"], f"{folder / 'run.json'}: agent"), _network(about["network"]), _shape(about))
        restored = restore(saved.tree, {"params": agent.init(0)["params"]})
        return Planner(agent, restored, about, saved.step)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{folder / 'run.json'} is damaged: {type(error).__name__}: {error}") from error


def _shape(about: dict[str, Any]) -> Shape:
    return Shape(*(about["observation"][key] for key in Shape._fields))


def _network(parts: dict[str, Any]) -> Network:
    numbers = {key: [[math.inf if x is None else x for x in row] for row in rows] for key, rows in parts["values"].items()}
    dtypes = {"lead_time": torch.int64}
    values = Values(*(torch.tensor(numbers[key], dtype=dtypes.get(key, torch.float32)) for key in Values._fields))
    names = {key: tuple(parts[key]) for key in ("nodes", "kinds")} | {"edges": tuple(map(tuple, parts["edges"]))}
    return Network(**names, values=values, **{key: parts[key] for key in ("unmet", "objective", "name")})
