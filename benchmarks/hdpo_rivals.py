"""HDPO, PPO and REINFORCE on the same simulator at equal simulated periods: one store, and one warehouse with five stores.

    python benchmarks/hdpo_rivals.py
    python benchmarks/hdpo_rivals.py --card

Rivals know rewards alone; each tries three learning rates, and so does HDPO. A period of a scenario counts as one, however many stores it
has. Policies are evaluated on the dev scenarios at equal distances, by their likeliest orders; the test is of the weights that were best
there. Results go to results/hdpo_rivals; the same command again goes on with what is missing.
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

from offrl.agents import hdpo
from offrl.agents.hdpo import HDPO, Shape
from offrl.agents.ppo import PPO, Config
from offrl.envs.inventory.batched import simulated
from offrl.envs.inventory.demand import Horizon
from offrl.envs.inventory.policies import rounded
from offrl.envs.inventory.rollout import evaluate
from offrl.envs.inventory.scenario import rows
from offrl.envs.inventory.settings import OneStoreLost, OneWarehouse
from offrl.envs.inventory.simulator import Simulator
from offrl.recipes.hdpo import reference
from offrl.training.fit import fit
from offrl.training.onpolicy import OnPolicy
from offrl.training.scenarios import Scenarios

RESULTS = offline.HERE / "results" / "hdpo_rivals"
HORIZONS = {"train": Horizon(50, 0, 8192), "dev": Horizon(100, 60, 2048), "test": Horizon(460, 60, 4096)}
PROBLEMS = {"one-store": (OneStoreLost(lead_time=4, underage=9.0), True), "one-warehouse": (OneWarehouse(stores=5), False)}
PERIODS, LOOKS = 5_000_000, 25  # simulated, and evaluations on the way
RATES = {"hdpo": (1e-3, 3e-3, 1e-2), "ppo": (1e-4, 3e-4, 1e-3), "reinforce": (3e-4, 1e-3, 3e-3)}


def learner(method: str, rate: float, problem: Any, seed: int) -> tuple[Any, Any, Any, int]:
    """Agent, source, a function from a state to a policy, and the periods that an update simulates."""
    if method == "hdpo":
        given = problem.scenario("train")
        config = hdpo.Config(hidden=(32, 32, 32), lr=rate) if problem.network.W == 0 else hdpo.Config(policy="gnn", lr=rate, clip=1.0)
        agent: Any = HDPO(config, problem.network, Shape.of(given), "inductor")
        return agent, Scenarios(partial(rows, given), 8192, 256, seed), lambda state: partial(agent.act, state), 256 * 50
    env = simulated(problem, 256, seed=seed)
    config = Config(epochs=4, minibatches=8, actor_lr=rate)
    if method == "reinforce":
        config = replace(config, epochs=1, minibatches=1, lam=1.0, max_grad_norm=None, critic_lr=1e-3)
    agent = PPO(config, env.spec)
    return agent, OnPolicy(env, 50, seed), lambda state: lambda obs: agent.act(state, obs.flat()), 256 * 50


def run(name: str, method: str, rate: float, seed: int = 0) -> None:
    file = RESULTS / f"{name}--{method}--{rate:g}--{seed}.json"
    if file.exists():
        return
    torch.set_num_threads(1)
    setting, whole = PROBLEMS[name]
    setting = replace(setting, **HORIZONS)
    problem = setting.problem()
    simulator, (agent, source, policy_of, periods) = Simulator(problem.network), learner(method, rate, problem, seed)

    def cost(state: Any, split: str) -> float:
        policy = rounded(policy_of(state)) if whole else policy_of(state)
        with torch.no_grad():
            return evaluate(simulator, policy, problem.batches(split, 2048), problem.horizon(split).warm_up).cost

    state, start, curve, best, seconds = agent.init(seed), 0, [], None, 0.0
    for look in range(1, LOOKS + 1):
        steps = PERIODS * look // LOOKS // periods * agent.period
        begin = time.perf_counter()
        state = fit(agent, state, source, steps, start=start, seeds=seed)
        seconds, start, dev = seconds + time.perf_counter() - begin, steps, cost(state, "dev")
        curve.append([steps // agent.period * periods, dev])
        if best is None or dev < best[0]:
            best = (dev, state)
    least = reference(setting)
    found = {"problem": name, "method": method, "rate": rate, "cost": cost(best[1], "test"), "least": least and least[1]}
    RESULTS.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found | {"seconds": seconds, "curve": curve, "commit": offline.commit()}))
    print(file.stem, f"{found['cost']:.4f}", f"{seconds:.0f} s", flush=True)


def table() -> str:
    lines = ["| problem | method | rate | test cost | training |", "|---|---|---|---|---|"]
    for path in sorted(RESULTS.glob("*.json")):
        each = json.loads(path.read_text())
        gap = f" ({100 * (each['cost'] / each['least'] - 1):+.1f} %)" if each["least"] else ""
        lines.append(f"| {each['problem']} | {each['method']} | {each['rate']:g} | {each['cost']:.4f}{gap} | {each['seconds']:.0f} s |")
    return "\n".join(lines) + "\n"


def plot() -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    colours = {"hdpo": "#0072B2", "ppo": "#E69F00", "reinforce": "#009E73"}
    for axes, name in zip(figure.subplots(1, len(PROBLEMS)), PROBLEMS):
        for path in sorted(RESULTS.glob(f"{name}--*.json")):
            each = json.loads(path.read_text())
            periods, costs = zip(*each["curve"])
            style = {1: "-", 0: "--", 2: ":"}[RATES[each["method"]].index(each["rate"])]
            axes.plot(periods, costs, style, color=colours[each["method"]], label=f"{each['method']} {each['rate']:g}")
        axes.set(title=name, xlabel="simulated periods", ylabel="dev cost", yscale="log")
        axes.legend(fontsize=7)
    figure.savefig(offline.HERE / "cards" / "hdpo_rivals.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--card", action="store_true", help="only write the card and draw its curves")
    args = parser.parse_args()
    if args.card:
        plot()
        return offline.fill("hdpo.md", {"rivals": table() + "\n![dev cost over simulated periods](hdpo_rivals.png)\n"})
    todo = [(name, method, rate) for name in PROBLEMS for method, rates in RATES.items() for rate in rates]
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(run, *zip(*todo)))


if __name__ == "__main__":
    main()
