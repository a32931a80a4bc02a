"""What a planner wants to know of an ordering policy: costs, service and stock on the test scenarios, beside other ways to order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from offrl.agents.hdpo import HDPO, Config, Shape
from offrl.core.checkpoint import atomic_write
from offrl.core.log import read
from offrl.core.types import Metrics, State
from offrl.envs.inventory.demand import Observed, Problem
from offrl.envs.inventory.policies import JustInTime, rounded
from offrl.envs.inventory.rollout import Evaluation, Policy, Trajectory, evaluate
from offrl.envs.inventory.scenario import Scenario, rows
from offrl.envs.inventory.simulator import Simulator
from offrl.recipes import hdpo, planner
from offrl.recipes.planner_page import plot, written
from offrl.training.fit import fit
from offrl.training.run import RunError, find_runs, write_json
from offrl.training.scenarios import Scenarios

ROOM = 2**25  # numbers of a batch's inventories in all periods that memory is to hold
HEURISTICS = {"base_stock": "base stock", "echelon_stock": "echelon base stock"}
SHORT = 1e-4  # of a store's mean demand: what rounding may leave unmet
Progress = Callable[[str, int, int], None]


def problem_of(about: Mapping[str, Any], folder: Path) -> tuple[hdpo.Config, Problem]:
    """What a run was trained on. Raises RunError where it is gone or another by now."""
    source = about["data"]["path"]
    try:
        config = hdpo.resolve(source, overrides=yaml.safe_load((folder / "config.yaml").read_text()))
    except OSError as error:
        raise RunError(f"{folder / 'config.yaml'} is missing: {error.strerror}") from None
    if isinstance(config.network, hdpo.FromFile) and not Path(source).exists():
        raise RunError(f"a report simulates the test periods of {source}, which is not there any more")
    problem = hdpo.problem_of(source, config)
    if hdpo.fingerprint(problem) != about["data"]["fingerprint"]:
        raise RunError(f"{source} is not what {folder} was trained on any more: train anew, or bring back its network and demand")
    return config, problem


class Watch:
    """Sums of what matters beside costs over the scored periods of all scenarios, and the first scenario itself."""

    def __init__(self, simulator: Simulator, warm_up: int):
        self.simulator, self.warm_up, self.first, self.count = simulator, warm_up, None, 0
        self.sums: dict[str, Tensor] = {}

    def __call__(self, batch: Scenario, seen: Trajectory) -> None:
        net = self.simulator.network
        on_hand, order = seen.inventory[:, self.warm_up :, :, 0].double(), seen.order[:, self.warm_up :].double()
        demand = batch.demand[..., self.warm_up :].movedim(-1, 1).double()  # (B, T, S)
        if self.first is None:
            self.first = on_hand[0], order[0]
        at_stores = on_hand[..., net.W :]
        left = [(at_stores - demand).relu()]
        if net.W:
            left = [(on_hand[..., : net.W] - order[..., net.K :] @ self.simulator.leaves.double()).relu(), *left]
        found = {
            "demand": demand.clamp_min(0),
            "met": torch.minimum(demand, at_stores).clamp_min(0),
            "short": (demand - at_stores > SHORT * batch.mean[:, None].double()).double(),
            "stock": torch.cat(left, -1),
            "order": order,
        }
        self.count += demand.shape[0] * demand.shape[1]
        self.sums = {key: self.sums.get(key, 0) + column.sum((0, 1)) for key, column in found.items()}

    def figures(self) -> dict[str, Any]:
        net, sums = self.simulator.network, {key: column.tolist() for key, column in self.sums.items()}
        stock = dict(zip(net.nodes, (x / self.count for x in sums["stock"])))
        service = zip(net.stores, sums["met"], sums["demand"], sums["short"])
        return {
            "stores": {
                s: {"fill_rate": met / demand if demand else None, "stock_outs": short / self.count} for s, met, demand, short in service
            },
            "stock": stock,
            "orders": {f"{a}->{b}": x / self.count for (a, b), x in zip(net.edges, sums["order"])},
        }


def batches(problem: Problem, split: str) -> Iterator[Scenario]:
    """All scenarios of a split, as many at once as there is room for with all their periods."""
    first, periods = problem.scenario(split, 0, 1), problem.horizon(split).periods
    return problem.batches(split, max(1, min(hdpo.CHUNK, ROOM // (first.initial[0].numel() * periods))))


def learned(kind: str, problem: Problem, config: hdpo.Config, steps: int, progress: Callable[[int, int], None]) -> Policy:
    """A heuristic with the levels that cost least on the dev scenarios while they were learned from the training scenarios."""
    whole = problem.scenario("train")
    agent, best = HDPO(Config(policy=kind, lr=0.05), problem.network, Shape.of(whole)), (math.inf, None)

    def policy(state: State) -> Policy:
        return rounded(partial(agent.act, state)) if config.whole else partial(agent.act, state)

    def keep(step: int, state: State, metrics: Metrics) -> None:
        nonlocal best
        cost = evaluate(agent.simulator, policy(state), batches(problem, "dev"), problem.horizon("dev").warm_up).cost
        best = min(best, (cost, state), key=lambda each: each[0])
        progress(step, steps)

    source = Scenarios(partial(rows, whole), len(whole.demand), config.batch_size)
    fit(agent, agent.init(0), source, steps, [(max(1, steps // 10), keep)])
    return policy(best[1])


def others(config: hdpo.Config, problem: Problem, steps: int, progress: Progress) -> Iterator[tuple[str, float, float | None]]:
    """(name, cost, standard error) of what the policy is compared with."""
    simulator, warm_up = Simulator(problem.network), problem.horizon("test").warm_up
    if (least := hdpo.reference(config.network)) is not None:
        yield *least, None
    elif problem.network.E == problem.network.N:  # every node has one supplier
        for kind, name in HEURISTICS.items():
            policy = learned(kind, problem, config, steps, partial(progress, name))
            found = evaluate(simulator, policy, batches(problem, "test"), warm_up)
            yield name, found.cost, _finite(found.error)
    costs = [evaluate(simulator, JustInTime(problem.network, b), b, warm_up).scenarios for b in batches(problem, "test")]
    every = torch.cat(costs)
    yield "foresight", float(every.mean()), _finite(float(every.std() / math.sqrt(len(every))) if len(every) > 1 else math.nan)


def figures(policy: planner.Planner, problem: Problem) -> tuple[dict[str, Any], Watch]:
    """Costs for each scored period and store by where they arise, service by store, and each period's mean stock and orders."""
    simulator, horizon = policy.agent.simulator, problem.horizon("test")
    watch = Watch(simulator, horizon.warm_up)
    found: Evaluation = evaluate(simulator, policy.act, batches(problem, "test"), horizon.warm_up, watch)
    about = {"name": policy.about["data"]["name"], "objective": policy.network.objective, "step": policy.step}
    dates = scored(problem)
    about |= {"period": policy.period or "period", "periods": horizon.periods - horizon.warm_up, "scenarios": horizon.scenarios}
    about |= {"dates": None if dates is None else [str(dates[0]), str(dates[-1])]}
    costs = {key: getattr(found, key) for key in ("cost", "holding", "underage", "procurement")} | {"error": _finite(found.error)}
    return about | costs | watch.figures(), watch


def scored(problem: Problem) -> np.ndarray | None:
    """The dates of the test's scored periods, where they have any."""
    if not isinstance(problem, Observed) or problem.history.dates is None:
        return None
    first, stop = problem.spans["test"]
    return problem.history.dates[first + problem.window + problem.warm_up : stop]


def report(path: str | Path, steps: int = 200, progress: Progress = lambda name, done, steps: None) -> tuple[Path, str]:
    """Writes report.md, report.json and the plots stock.png, orders.png and curve.png into a run's folder; report.md's path, and its text.

    steps: of learning the levels of heuristics to compare with. Raises RunError, also where the network or its data are gone.
    """
    policy = planner.load(path)
    (folder,) = find_runs(Path(path))
    config, problem = problem_of(policy.about, folder)
    found, watch = figures(policy, problem)
    found["others"] = [
        {"policy": name, "cost": cost, "error": error, "difference": (found["cost"] - cost) / abs(cost) if cost else None}
        for name, cost, error in others(config, problem, steps, progress)
    ]
    write_json(folder / "report.json", found)
    text = written(found)
    try:
        curve = {row["step"]: row["dev/cost"] for row in read(folder) if "dev/cost" in row}
        pictures = plot(folder, found, *(column.T.tolist() for column in watch.first), curve, scored(problem))
    except ImportError as error:
        pictures, missing = {}, f"\nNo pictures: {error}\n"
    else:
        missing = "\n## Pictures\n"
    page = "".join([text, missing, *(f"\n{what}\n\n![{what}]({name})\n" for name, what in pictures.items())])
    atomic_write(folder / "report.md", page.encode())
    return folder / "report.md", text


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None
