"""Weekly sales of 288 products in 21 stores: HDPO against the newsvendor and the oracle, on weeks that nothing was chosen by.

    python benchmarks/hdpo_real.py single --data favorita_21_stores.npz        # 6,048 stores by themselves
    python benchmarks/hdpo_real.py warehouses --data favorita_21_stores.npz    # three warehouses, 21 stores, a scenario for each product
    python benchmarks/hdpo_real.py --card

The file holds weekly_sales (products, stores, weeks) and week_start (weeks,) in days since 1970; sales below 0 count as 0. Rates are chosen
on the dev weeks, as are the weights. Figures are profit for each store and scored week. Results go to results/hdpo_real; training goes on
from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import offline
import torch

from offrl.agents.hdpo import HDPO, Config, Shape
from offrl.core.checkpoint import Checkpoints, restore
from offrl.envs.inventory.demand import History
from offrl.envs.inventory.forecast import rolling_normal
from offrl.envs.inventory.policies import JustInTime, Newsvendor
from offrl.envs.inventory.rollout import evaluate
from offrl.envs.inventory.scenario import rows
from offrl.envs.inventory.settings import RealOneStore, RealWarehouses
from offrl.envs.inventory.simulator import Simulator
from offrl.training.fit import fit
from offrl.training.scenarios import Scenarios

RESULTS = offline.HERE / "results" / "hdpo_real"
EVERY = 20  # steps between evaluations on dev
# name: setting, config, rates, steps, batch size
CASES = {
    "single": (RealOneStore, Config(policy="data_driven", hidden=(64, 64)), (1e-3, 3e-3, 1e-2), 300, 2048),
    "warehouses": (RealWarehouses, Config(policy="gnn", clip=1.0, rounds=2, width=64), (1e-3, 3e-3), 800, 72),
}


def history(path: str) -> History:
    with np.load(path) as file:
        sales, days = file["weekly_sales"], file["week_start"]
    dates = np.datetime64("1970-01-01") + days.astype(int)
    stores = tuple(f"store{i}" for i in range(sales.shape[1]))
    return History(torch.from_numpy(sales).clamp_min(0), stores, dates)


def profit(simulator: Simulator, policy, problem, split: str) -> float:
    return -evaluate(simulator, policy, problem.scenario(split), problem.horizon(split).warm_up).cost


def anchors(name: str, problem) -> dict[str, dict[str, float]]:
    """What needs no training: the oracle, and for single stores the newsvendor of the last 16 weeks' mean and deviation."""
    simulator, found = Simulator(problem.network), {}
    for split in ("dev", "test"):
        oracle = JustInTime(problem.network, problem.scenario(split), "fastest")
        found.setdefault("oracle", {})[split] = profit(simulator, oracle, problem, split)
        if name == "single":
            policies = {"newsvendor p/(p+h)": Newsvendor(problem.network, rolling_normal)}
            policies |= {f"newsvendor {q}": Newsvendor(problem.network, rolling_normal, "fixed", q) for q in (0.8, 0.7, 0.6, 0.5)}
            for label, policy in policies.items():
                found.setdefault(label, {})[split] = profit(simulator, policy, problem, split)
    return found


def train(name: str, problem, config: Config, steps: int, batch_size: int, folder: Path) -> dict:
    given = problem.scenario("train")
    agent = HDPO(config, problem.network, Shape.of(given), "inductor")
    source, checkpoints = Scenarios(partial(rows, given), len(given.demand), batch_size), Checkpoints(folder, keep=1)
    state, start, kept = agent.init(0), 0, {"curve": [], "seconds": 0.0, "dev": -np.inf, "test": None}
    if (saved := checkpoints.latest()) is not None:
        state, start, kept = restore(saved.tree, state), saved.step, saved.meta["kept"]
    while start < steps:
        begin = time.perf_counter()
        state = fit(agent, state, source, start + EVERY, start=start)
        start += EVERY
        kept["seconds"] += time.perf_counter() - begin
        policy = partial(agent.act, state)
        dev = profit(agent.simulator, policy, problem, "dev")
        kept["curve"].append([start, dev])
        if dev > kept["dev"]:
            kept |= {"dev": dev, "step": start, "test": profit(agent.simulator, policy, problem, "test")}
        checkpoints.save(start, state, {"kept": kept})
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []])
    parser.add_argument("--data", help="the NPZ file")
    parser.add_argument("--rates", nargs="+", type=float)
    parser.add_argument("--card", action="store_true", help="only write the card")
    args = parser.parse_args()
    if args.card:
        return offline.fill("hdpo.md", {"real": table()})
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in args.cases:
        setting, config, rates, steps, batch_size = CASES[name]
        problem = setting().problem(history(args.data))
        path = RESULTS / f"{name}.json"
        found = json.loads(path.read_text()) if path.exists() else {"anchors": anchors(name, problem), "runs": {}}
        for rate in args.rates or rates:
            folder = Path("runs/benchmarks/hdpo_real") / f"{name}-{rate:g}"
            found["runs"][f"{rate:g}"] = train(name, problem, replace(config, lr=rate, lr_steps=steps), steps, batch_size, folder)
            path.write_text(json.dumps(found | {"commit": offline.commit()}))


def table() -> str:
    lines = ["| case | policy | dev | test | test, share of the oracle |", "|---|---|---|---|---|"]
    for path in sorted(RESULTS.glob("*.json")):
        found = json.loads(path.read_text())
        oracle, best = found["anchors"]["oracle"]["test"], max(found["runs"].items(), key=lambda item: item[1]["dev"], default=None)
        rows_ = list(found["anchors"].items()) + ([(f"HDPO, rate {best[0]} chosen on dev", best[1])] if best else [])
        lines += [f"| {path.stem} | {p} | {e['dev']:.2f} | {e['test']:.2f} | {100 * e['test'] / oracle:.1f} % |" for p, e in rows_]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
