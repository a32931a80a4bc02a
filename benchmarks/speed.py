"""Updates per second of every agent x mode x precision x seeds, and d3rlpy's on the same machine in the same minutes.

    python benchmarks/speed.py                                          # ours alone
    python benchmarks/speed.py --d3rlpy runs/d3rlpy-env                 # and d3rlpy, from an environment that peers/d3rlpy_speed.py sets up
    python benchmarks/speed.py --only td3bc iql --pair                  # and two processes at once

Each case is a process of one thread that is kept alive; the driver asks them in turn for slices of a few seconds (A B A B), so that
a change of the machine's speed meets all alike. What counts is a whole training step: sampling the batch and the update. FLOPs are those of
the matrix products of an update, counted by torch; the machine's rate is that of 256x256x256 products measured among the slices.
Results go to results/speed.json and, as tables, to cards/speed.md below its mark.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).parent
SIZES = {"a2pr": (11, 3)}  # Hopper's, as A2PR's released code was measured; HalfCheetah's for the others
SETTINGS = {"sac-n": ("sac", {"members": 10, "hidden": (256, 256, 256)})}  # others are agents with their defaults
ROWS = 1_000_000


# --- in the worker's process ---------------------------------------------------------------------------------------------------------


def make_step(agent_name: str, mode: str, precision: str, seeds: int, device: str):
    import torch

    from offrl.core import registry
    from offrl.core.rng import Noise
    from offrl.core.space import Box
    from offrl.core.tree import tree_map
    from offrl.core.types import Spec
    from offrl.data.dataset import Dataset
    from offrl.training.accelerate import accelerate
    from offrl.training.fit import stack
    from offrl.training.sources import Replay

    obs, action = SIZES.get(agent_name, (17, 6))
    name, config = SETTINGS.get(agent_name, (agent_name, {}))
    kind = registry.agent_class(name)
    agent = kind(kind.Config(**config), Spec(Box.of(obs), Box.of(action, -1, 1)))
    draw = torch.Generator().manual_seed(0)
    columns = [torch.randn(ROWS, obs, generator=draw), torch.rand(ROWS, action, generator=draw) * 2 - 1, torch.randn(ROWS, generator=draw)]
    ends = (torch.arange(ROWS) % 1000 == 999).numpy()
    rows = [column.numpy() for column in (*columns, columns[0].roll(-1, 0))]
    data = Dataset.from_arrays(*rows[:3], ends & False, ends, rows[3], action_space=agent.spec.action)
    which = list(range(seeds)) if seeds > 1 else 0
    source = Replay(data, 256, which, period=agent.period, device=device)
    noise = Noise(agent.noise(256), which, device)
    state = stack([agent.init(seed) for seed in which]) if seeds > 1 else agent.init(0)
    box = [tree_map(lambda leaf: leaf.to(device), state), 0]
    update = accelerate(agent.update, mode, precision, seeds > 1, device)

    def step() -> int:
        batches = source(box[1] * agent.period)
        box[0], _ = update(box[0], batches, noise(box[1]))
        box[1] += 1
        return agent.period

    alone = source if seeds == 1 else Replay(data, 256, 0, period=agent.period, device=device)
    return step, lambda: flops(agent, alone, noise, device)


def flops(agent, source, noise, device) -> float:
    """Of the matrix products in one gradient step, forward and backward, of one seed."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    from offrl.core.rng import Noise
    from offrl.core.tree import tree_map

    class Counter(TorchDispatchMode):  # FlopCounterMode also follows modules, and fails on one that returns its parameter
        total = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if count := flop_registry.get(func._overloadpacket):
                self.total += count(*args, **(kwargs or {}), out_val=out)
            return out

    state = tree_map(lambda leaf: leaf.to(device), agent.init(0))
    with Counter() as counter, torch.no_grad():
        agent.update(state, source(0), Noise(agent.noise(256), 0, device)(0))
    return counter.total / agent.period


def make_product(dtype: str):
    import torch

    a = torch.randn(256, 256).to(getattr(torch, dtype))

    def step() -> int:
        torch.nn.functional.linear(a, a)
        return 1

    return step, lambda: 2.0 * 256**3


def work(case: str) -> None:
    """Answers each line, a number of seconds, with the rate over so long."""
    import torch

    torch.set_num_threads(1)
    kind, *rest = case.split(",")
    step, cost = make_product(rest[0]) if kind == "product" else make_step(kind, rest[0], rest[1], int(rest[2]), rest[3])
    start = time.perf_counter()
    step()
    first = time.perf_counter() - start
    for _ in range(5):
        step()
    print(json.dumps({"first_s": first, "flops": cost()}), flush=True)
    for line in sys.stdin:
        seconds, done = float(line), 0
        wall, cpu = time.perf_counter(), time.process_time()
        while time.perf_counter() - wall < seconds:
            done += step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps({"rate": done / wall, "cpu_rate": done / cpu}), flush=True)


# --- the driver ----------------------------------------------------------------------------------------------------------------------


class Worker:
    def __init__(self, case: str):
        environ = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--work", case]
        self.case, self.process = case, subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ)
        self.hello = json.loads(self.process.stdout.readline() or "{}")
        self.slices: list[dict] = []
        if not self.hello:
            raise SystemExit(f"{case} did not start")

    def start(self, seconds: float) -> None:
        print(seconds, file=self.process.stdin, flush=True)

    def finish(self) -> None:
        self.slices.append(json.loads(self.process.stdout.readline()))


class D3rlpy:
    """d3rlpy's worker behind the same two verbs."""

    def __init__(self, env: str, algo: str, what: str):
        from peers.d3rlpy_speed import ask, start_worker

        self.case, self.hello, self.slices, self._ask = f"d3rlpy-{algo},{what}", {"first_s": None, "flops": None}, [], ask
        self.process, _ = start_worker(pathlib.Path(env))
        self.algo, self.what = algo, what
        ask(self.process, algo, what, 1.0)

    def start(self, seconds: float) -> None:
        answer = self._ask(self.process, self.algo, self.what, seconds)
        self.slices.append({"rate": answer["steps"] / answer["wall_s"], "cpu_rate": answer["steps"] / answer["cpu_s"]})

    def finish(self) -> None:
        pass


def cases(only: list[str] | None, device: str) -> list[str]:
    names = only or ["bc", "td3bc", "iql", "a2pr"]
    if device == "cpu":
        ways = [("eager", "fp32", 1), ("compile", "fp32", 1), ("compile", "bf16", 1)]
    else:
        ways = [("eager", "fp32", 1), ("compile", "fp32", 1), *(("cudagraph", p, s) for p in ("fp32", "bf16") for s in (1, 5, 20))]
    return [f"{name},{mode},{precision},{seeds},{device}" for name in names for mode, precision, seeds in ways]


def middle(slices: list[dict], key: str = "rate") -> dict[str, float]:
    rates = [each[key] for each in slices]
    return {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}


def pair(case: str, rounds: int, seconds: float) -> float:
    """The updates of two processes at once over those of one alone, median of alternating slices."""
    two = [Worker(case), Worker(case)]
    ratios = []
    for _ in range(rounds):
        two[0].start(seconds)
        two[0].finish()
        for worker in two:
            worker.start(seconds)
        for worker in two:
            worker.finish()
        together = sum(worker.slices[-1]["rate"] for worker in two)
        ratios.append(together / two[0].slices[-2]["rate"])
    for worker in two:
        worker.process.kill()
    return statistics.median(ratios)


def table(found: dict) -> str:
    """The measured cases in Markdown."""
    lines = [f"Machine: {found['machine']}; torch {found['torch']}; commit {found['commit']}."]
    lines += [f"{found['rounds']} slices of {found['seconds']} s each.", ""]
    rates = {case: entry["rate"]["median"] for case, entry in found["cases"].items()}
    fp32, bf16 = (found["cases"].get(f"product,{d}") for d in ("float32", "bfloat16"))
    for label, entry in (("float32", fp32), ("bfloat16", bf16)):
        if entry:
            lines.append(f"Matrix products, {label}, 256x256x256: {entry['rate']['median'] * entry['flops'] / 1e9:.0f} GFLOP/s.")
    heads = ["case", "updates/s, median [min, max]", "GFLOP an update", "share of the product rate"]
    heads += ["against d3rlpy's whole step", "against its update alone", "first call"]
    lines += ["", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for case, entry in found["cases"].items():
        if case.startswith("product"):
            continue
        rate, cost = entry["rate"], entry["flops"]
        product = bf16 if "bf16" in case else fp32
        seeds = int(case.split(",")[3]) if case.count(",") >= 3 else 1
        share = f"{100 * rate['median'] * cost * seeds / (product['rate']['median'] * product['flops']):.0f} %" if cost and product else ""
        peers = [rates.get(f"d3rlpy-{case.split(',')[0]},{what}") for what in ("step", "update")]
        ratios = [f"{rate['median'] / peer:.2f}" if peer and not case.startswith("d3rlpy") else "" for peer in peers]
        first = "" if entry["first_s"] is None else f"{entry['first_s']:.0f} s"
        cells = [case.replace(",", " "), "{median:.1f} [{min:.1f}, {max:.1f}]".format(**rate), f"{cost / 1e9:.3f}" if cost else ""]
        cells += [share, *ratios, first]
        lines.append("| " + " | ".join(cells) + " |")
    for case, ratio in found.get("pairs", {}).items():
        lines.append(f"\nTwo processes make {ratio:.2f} times the updates of one: {case.replace(',', ' ')}.")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="agents")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--d3rlpy", help="the folder of its virtual environment")
    parser.add_argument("--pair", action="store_true", help="also two processes at once")
    parser.add_argument("--out", type=pathlib.Path, default=HERE / "results" / "speed.json")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args.work)
    import torch

    workers: list = [Worker(case) for case in [*cases(args.only, args.device), "product,float32", "product,bfloat16"]]
    if args.d3rlpy:
        workers += [D3rlpy(args.d3rlpy, algo, what) for algo in ("td3bc", "iql") for what in ("step", "update")]
    for _ in range(args.rounds):
        for worker in workers:
            worker.start(args.seconds)
            worker.finish()
    found = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread a process, {args.device}",
        "torch": torch.__version__, "rounds": args.rounds, "seconds": args.seconds,
        "commit": subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout.strip(),
        "cases": {w.case: w.hello | {"rate": middle(w.slices), "cpu_rate": middle(w.slices, "cpu_rate")} for w in workers},
    }  # fmt: skip
    for worker in workers:
        worker.process.kill()
    if args.pair:
        chosen = [case for case in cases(args.only, args.device) if case.split(",")[1] == "compile"]
        found["pairs"] = {case: pair(case, args.rounds, args.seconds) for case in chosen}
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1))
    path, mark = HERE / "cards" / "speed.md", "<!-- table -->\n"
    before = path.read_text().partition(mark)[0] if path.exists() else ""
    path.write_text(before + mark + table(found))
    print(table(found))


if __name__ == "__main__":
    main()
