"""The inventory table: policies trained through the simulated cost against optima and bounds that are known; resumable.

    python benchmarks/hdpo.py lost backlog              # 16 cells of lost sales, 24 of backlog, by a perceptron
    python benchmarks/hdpo.py serial transshipment
    python benchmarks/hdpo.py --card

A cell is trained in steps of 1,024 (or fewer) scenarios with the rate falling along a cosine; every 25 steps it is evaluated on the dev
scenarios, outside of what is timed. What counts is the test cost of the weights that were best there, with whole orders where demand is
whole. What a cell came to is kept in results/hdpo; the same command again goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import get_context

import numpy as np
import offline
import torch

from offrl.agents.hdpo import HDPO, Config, Shape
from offrl.envs.inventory.demand import Horizon
from offrl.envs.inventory.policies import rounded
from offrl.envs.inventory.rollout import evaluate
from offrl.envs.inventory.scenario import rows
from offrl.envs.inventory.settings import OneStoreBacklog, OneStoreLost, Serial, Transshipment
from offrl.recipes.hdpo import reference
from offrl.training.fit import fit
from offrl.training.scenarios import Scenarios

RESULTS = offline.HERE / "results" / "hdpo"
EVERY = 25  # steps between evaluations on dev
HORIZONS = {"dev": Horizon(100, 60, 4096), "test": Horizon(460, 60, 8192)}
MLP = Config(hidden=(32, 32, 32), lr=1e-2)
GNN = Config(policy="gnn", lr=3e-3, clip=1.0)


def cells(group: str) -> list[tuple]:
    """(name, setting, config, steps, batch size, periods of a training scenario)"""
    prices = (4.0, 9.0, 19.0, 39.0)
    if group == "lost":
        return [(f"lost-L{n}-p{p:g}", OneStoreLost(lead_time=n, underage=p), MLP, 1000, 1024, 50) for n in (1, 2, 3, 4) for p in prices]
    if group == "backlog":
        lead_times = (1, 4, 7, 10, 15, 20)
        periods = {n: 50 if n < 20 else 100 for n in lead_times}  # the first n are given
        return [
            (f"backlog-L{n}-p{p:g}", OneStoreBacklog(lead_time=n, underage=p), MLP, 1000, 1024, periods[n])
            for n in lead_times
            for p in prices
        ]
    if group == "serial":
        gnn = [(f"serial-{n}-gnn", Serial(nodes=n), replace(GNN, rounds=n - 1), 2000, 128, 50) for n in (3, 4, 5, 6, 7)]
        levels = Config(policy="echelon_stock", lr=0.1)  # 150 periods, since filling an empty line counts, too
        return [(f"serial-{n}-echelon", Serial(nodes=n), levels, 500, 1024, 150) for n in (3, 4, 5, 6, 7)] + gnn
    return [("transshipment-5-gnn", Transshipment(stores=5), GNN, 2000, 256, 50)]


def train(cell: tuple, seed: int = 0) -> dict:
    """Trains one cell on one thread and says what it came to, and when."""
    torch.set_num_threads(1)
    name, setting, config, steps, batch_size, periods = cell
    setting = replace(setting, train=Horizon(periods, 0, 8192), **HORIZONS)
    problem, whole = setting.problem(), isinstance(setting, OneStoreLost)
    given, (kind, least) = problem.scenario("train"), reference(setting)
    agent = HDPO(replace(config, lr_steps=steps), problem.network, Shape.of(given), "inductor")
    state, source = agent.init(seed), Scenarios(partial(rows, given), len(given.demand), batch_size, seed)

    def cost(state: dict, split: str) -> tuple[float, float]:
        policy = partial(agent.act, state)
        batches = problem.batches(split, 2048)
        found = evaluate(agent.simulator, rounded(policy) if whole else policy, batches, problem.horizon(split).warm_up)
        return found.cost, found.error

    begin = time.perf_counter()
    fit(agent, state, source, 1)
    compiling, seconds, curve, best = time.perf_counter() - begin, 0.0, [], None
    for step in range(0, steps, EVERY):
        begin = time.perf_counter()
        state = fit(agent, state, source, step + EVERY, start=step)
        seconds += time.perf_counter() - begin
        dev, _ = cost(state, "dev")
        curve.append([step + EVERY, seconds, dev])
        if best is None or dev < best[0]:
            best = (dev, state)
    test, error = cost(best[1], "test")
    return {
        "cell": name, "seed": seed, "config": asdict(agent.config), "steps": steps, "batch_size": batch_size, "periods": periods,
        "kind": kind, "least": least, "cost": test, "error": error, "gap": test / least - 1, "seconds": seconds, "compiling": compiling,
        "curve": curve, "commit": offline.commit(),
    }  # fmt: skip


def run(cell: tuple, seed: int) -> None:
    file = RESULTS / f"{cell[0]}--{seed}.json"
    if file.exists():
        return
    found = train(cell, seed)
    RESULTS.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found))
    print(f"{cell[0]} seed {seed}: {found['cost']:.4f}, {100 * found['gap']:+.3f} %, 1 % {within(found)}", flush=True)


def within(found: dict) -> str:
    """When the cost was first within 1 % of the optimum: that on dev, less what the best weights cost more there than on the test."""
    easier = found["cost"] - min(dev for _, _, dev in found["curve"])
    near = next(((step, seconds) for step, seconds, dev in found["curve"] if dev + easier <= 1.01 * found["least"]), None)
    return f"{near[1]:.0f} s ({near[0]:,} steps)" if near else "never"


def table() -> str:
    """A row for each cell, then the mean gaps of lost sales and of backlog."""
    heads = ["cell", "optimum", "cost", "gap", "1 % after", "steps", "training", "compiling"]
    lines, gaps = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"], {}
    for path in sorted(RESULTS.glob("*.json")):
        each = json.loads(path.read_text())
        bound = "at least " * (each["kind"] == "lower bound")
        cells = [
            each["cell"],
            f"{bound}{each['least']:.4f}",
            f"{each['cost']:.4f} ± {each['error']:.4f}",
            f"{100 * each['gap']:+.2f} %",
            within(each),
        ]
        cells += [f"{each['steps']:,}", f"{each['seconds']:.0f} s", f"{each['compiling']:.0f} s"]
        lines.append("| " + " | ".join(cells) + " |")
        gaps.setdefault(each["cell"].partition("-")[0], []).append(each["gap"])
    lines += [""] + [
        f"Mean gap of {len(gaps[k])} cells, {k}: {100 * np.mean(gaps[k]):+.3f} %, the largest {100 * max(gaps[k]):+.2f} %.  " for k in gaps
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", choices=["lost", "backlog", "serial", "transshipment", []])
    parser.add_argument("--only", help="a cell's name")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--card", action="store_true", help="only write the card")
    args = parser.parse_args()
    if args.card:
        return offline.fill("hdpo.md", {"optima": table()})
    todo = [(cell, seed) for group in args.groups for cell in cells(group) for seed in range(args.seeds) if args.only in (None, cell[0])]
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(run, *zip(*todo)))


if __name__ == "__main__":
    main()
