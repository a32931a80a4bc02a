"""How much demand a graph network and a perceptron need: 128, 1,024 or 8,192 training scenarios, and the same test.

    python benchmarks/hdpo_data.py
    python benchmarks/hdpo_data.py --card

One warehouse with 10 stores at lead times of 2 to 5, and 2 warehouses with 10 stores; minibatches of 128, 3,000 steps. Each learning rate
is tried for 500 steps, and the one that is then best on the dev scenarios goes on. What counts is the test cost of the weights that were
best on dev. Results go to results/hdpo_data; the same command again goes on with what is missing.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from typing import Any

import offline
import torch

from offrl.agents.hdpo import HDPO, Config, Shape
from offrl.envs.inventory.demand import Horizon
from offrl.envs.inventory.rollout import evaluate
from offrl.envs.inventory.scenario import rows
from offrl.envs.inventory.settings import ManyWarehouses, OneWarehouse
from offrl.training.fit import fit
from offrl.training.scenarios import Scenarios

RESULTS = offline.HERE / "results" / "hdpo_data"
PROBLEMS = {"one-warehouse": OneWarehouse(stores=10, longest=5), "many-warehouses": ManyWarehouses(warehouses=2, stores=10)}
POLICIES = {"gnn": Config(policy="gnn", clip=1.0), "mlp": Config(hidden=(256, 256, 256))}
SIZES, RATES, BATCH = (128, 1024, 8192), (1e-3, 3e-3, 1e-2), 128
TRIED, STEPS, EVERY = 500, 3000, 100
DEV, TEST = Horizon(100, 60, 1024), Horizon(460, 60, 2048)
PUBLISHED = {  # excess over the best found in %, at 128, 1,024 and 8,192 scenarios
    ("one-warehouse", "gnn"): (1.42, 0.16, 0.0), ("one-warehouse", "mlp"): (4.56, 1.21, 0.31),
    ("many-warehouses", "gnn"): (0.57, 0.12, 0.0), ("many-warehouses", "mlp"): (3.76, 1.75, 1.07),
}  # fmt: skip


class Run:
    """One learning rate's training: its state, and the weights that were best on dev so far."""

    def __init__(self, problem: Any, config: Config, seed: int):
        given = problem.scenario("train")
        self.problem, self.agent = problem, HDPO(config, problem.network, Shape.of(given), "inductor")
        self.source = Scenarios(partial(rows, given), len(given.demand), BATCH, seed)
        self.state, self.step, self.curve, self.best, self.seconds = self.agent.init(seed), 0, [], (float("inf"), None), 0.0

    def cost(self, state: Any, split: str) -> tuple[float, float]:
        batches, warm_up = self.problem.batches(split, 1024), self.problem.horizon(split).warm_up
        found = evaluate(self.agent.simulator, partial(self.agent.act, state), batches, warm_up)
        return found.cost, found.error

    def until(self, steps: int) -> None:
        while self.step < steps:
            begin = time.perf_counter()
            self.state = fit(self.agent, self.state, self.source, self.step + EVERY, start=self.step)
            self.seconds += time.perf_counter() - begin
            self.step += EVERY
            dev, _ = self.cost(self.state, "dev")
            self.curve.append([self.step, dev])
            self.best = min(self.best, (dev, self.state), key=lambda each: each[0])


def run(name: str, policy: str, size: int, seed: int = 0) -> None:
    file = RESULTS / f"{name}--{policy}--{size}--{seed}.json"
    if file.exists():
        return
    torch.set_num_threads(1)
    setting = PROBLEMS[name]
    problem = replace(setting, train=replace(setting.train, scenarios=size), dev=DEV, test=TEST).problem()
    tried = {}
    for rate in RATES:
        tried[rate] = Run(problem, replace(POLICIES[policy], lr=rate), seed)
        tried[rate].until(TRIED)
    rate, chosen = min(tried.items(), key=lambda item: item[1].best[0])
    chosen.until(STEPS)
    cost, error = chosen.cost(chosen.best[1], "test")
    found = {
        "problem": name, "policy": policy, "scenarios": size, "seed": seed, "rate": rate, "cost": cost, "error": error,
        "tried": {f"{r:g}": each.curve for r, each in tried.items()}, "seconds": chosen.seconds, "commit": offline.commit(),
    }  # fmt: skip
    RESULTS.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found))
    print(file.stem, f"{cost:.4f} ± {error:.4f}, rate {rate:g}, {chosen.seconds:.0f} s", flush=True)


def table() -> str:
    """Test costs, and by how much they exceed the least of the same problem, the published excess beside it."""
    found = {(e["problem"], e["policy"], e["scenarios"]): e for e in map(json.loads, (p.read_text() for p in RESULTS.glob("*.json")))}
    lines = ["| problem | policy | scenarios | rate | test cost | excess | published |", "|---|---|---|---|---|---|---|"]
    for (problem, policy), published in PUBLISHED.items():
        least = min((e["cost"] for key, e in found.items() if key[0] == problem), default=None)
        for size, theirs in zip(SIZES, published):
            if (e := found.get((problem, policy, size))) is not None:
                cost, excess = f"{e['cost']:.4f} ± {e['error']:.4f}", f"{100 * (e['cost'] / least - 1):.2f} %"
                lines.append(f"| {problem} | {policy} | {size:,} | {e['rate']:g} | {cost} | {excess} | {theirs:.2f} % |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--card", action="store_true", help="only write the card")
    args = parser.parse_args()
    if args.card:
        return offline.fill("hdpo.md", {"data": table()})
    jobs = [(name, policy, size) for size in SIZES for name in PROBLEMS for policy in POLICIES]
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(run, *zip(*jobs)))


if __name__ == "__main__":
    main()
