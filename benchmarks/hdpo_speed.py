"""Store-periods per second of HDPO's training, one thread, eager and compiled.

    python benchmarks/hdpo_speed.py
    python benchmarks/hdpo_speed.py --card

A store-period is one store simulated for one period, forward, backward and its share of Adam. Cases take turns in one process, a plain
PyTorch loop of one store among them: what the machine gives that day. The peer's figures are of the released code on another day on a
machine like this one, where such a loop made 1,850,185 a second in batches of 8,192 and 1,281,908 in batches of 1,024. Results go to
results/hdpo_speed.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable

import offline
import speed
import torch
import torch.nn.functional as F

from offrl.agents.hdpo import HDPO, Config, Shape
from offrl.envs.inventory.demand import Horizon
from offrl.envs.inventory.settings import OneStoreLost, OneWarehouse

RESULT = offline.HERE / "results" / "hdpo_speed.json"
CASES = {  # name: setting, config, scenarios in a batch, the released code's store-periods per second
    "one store, perceptron": (OneStoreLost(), Config(hidden=(32, 32, 32)), 8192, 1_057_984),
    "one store, perceptron, small batch": (OneStoreLost(), Config(hidden=(32, 32, 32)), 1024, 846_720),
    "5 stores, graph network": (OneWarehouse(stores=5), Config(policy="gnn"), 1024, 118_764),
    "50 stores, graph network": (OneWarehouse(stores=50), Config(policy="gnn"), 256, 64_959),
}


def make(setting, config: Config, batch: int, backend: str | None) -> tuple[Callable[[], float], float]:
    """A function that makes an update and returns its store-periods per second; and the seconds of the first update."""
    horizon = Horizon(50, 0, batch)
    problem = type(setting)(**vars(setting) | {"train": horizon}).problem()
    given = problem.scenario("train")
    agent = HDPO(config, problem.network, Shape.of(given), backend)
    box, update = [agent.init(0)], torch.no_grad()(agent.update)

    def step() -> float:
        begin = time.perf_counter()
        box[0], _ = update(box[0], [given], [{}])
        return batch * problem.network.S * horizon.periods / (time.perf_counter() - begin)

    begin = time.perf_counter()
    step()
    return step, time.perf_counter() - begin


def plain(batch: int) -> Callable[[], float]:
    """One store of lost sales with the released network, written out."""
    setting, sizes = OneStoreLost(), (4, 32, 32, 32, 1)
    demand = setting.problem().scenario("train", 0, batch).demand[:, 0]
    layers = [part for a, b in zip(sizes, sizes[1:]) for part in (torch.nn.Linear(a, b), torch.nn.ELU())]
    net = torch.nn.Sequential(*layers[:-1])
    adam = torch.optim.Adam(net.parameters(), 3e-3)

    def step() -> float:
        begin, stock, cost = time.perf_counter(), torch.zeros(batch, 4), torch.zeros(())
        for t in range(50):
            order, missing = F.softplus(net(stock) + 1), demand[:, t] - stock[:, 0]
            left = (-missing).relu()
            cost = cost + (setting.holding * left + setting.underage * missing.relu()).mean()
            stock = torch.cat([(left + stock[:, 1])[:, None], stock[:, 2:], order], 1)
        adam.zero_grad()
        cost.backward()
        adam.step()
        return batch * 50 / (time.perf_counter() - begin)

    return step


def table(found: dict) -> str:
    plains = {batch: found["cases"][f"plain loop of one store, {batch}"]["median"] for batch in (8192, 1024)}
    lines = [f"Machine: {found['machine']}; torch {found['torch']}; commit {found['commit']}; {found['rounds']} turns.", ""]
    heads = ["case", "batch", "store-periods/s, median [min, max]", "against the released code's", "against the plain loop", "first update"]
    lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for case, each in found["cases"].items():
        rates = "{median:,.0f} [{min:,.0f}, {max:,.0f}]".format(**each)
        if case.startswith("plain"):
            lines.append(f"| {case.rpartition(', ')[0]} | {int(case.rpartition(' ')[2]):,} x 50 | {rates} | | | |")
            continue
        _, _, batch, peer = CASES[case.rpartition(", ")[0]]
        against = f"{each['median'] / plains[batch]:.2f}" if "one store" in case else ""
        theirs = f"{each['median'] / peer:.2f} of {peer:,}"
        lines.append(f"| {case} | {batch:,} x 50 | {rates} | {theirs} | {against} | {each['first_s']:.0f} s |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--card", action="store_true", help="only write the card")
    args = parser.parse_args()
    if args.card:
        return offline.fill("hdpo.md", {"speed": table(json.loads(RESULT.read_text()))})
    torch.set_num_threads(1)
    made = {
        f"{name}, {mode}": make(*CASES[name][:3], backend)
        for name in CASES
        for mode, backend in (("eager", None), ("compiled", "inductor"))
    }
    made |= {f"plain loop of one store, {batch}": (plain(batch), 0.0) for batch in (8192, 1024)}
    slices: dict[str, list[dict]] = {case: [] for case in made}
    for _ in range(args.rounds):
        for case, (step, _) in made.items():
            slices[case].append({"rate": step()})
    found = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread",
        "torch": torch.__version__, "rounds": args.rounds, "commit": offline.commit(),
        "cases": {case: speed.middle(slices[case]) | {"first_s": first} for case, (_, first) in made.items()},
    }  # fmt: skip
    RESULT.write_text(json.dumps(found, indent=1))
    print(table(found))


if __name__ == "__main__":
    main()
