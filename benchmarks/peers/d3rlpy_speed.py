"""Update rates of d3rlpy's TD3+BC and IQL (its defaults: 2x256 networks, batch 256) on one CPU thread, through its public objects.

d3rlpy needs gymnasium 1.0.0, so it lives in an environment of its own:

    python benchmarks/peers/d3rlpy_speed.py setup ENV         # torch first, then d3rlpy, both pinned
    python benchmarks/peers/d3rlpy_speed.py measure ENV       # slices of every case in turn, medians as JSON
    ENV/bin/python benchmarks/peers/d3rlpy_speed.py worker    # the process that another driver interleaves with its own

The worker says hello in one JSON line, then answers each line `{"algo": "td3bc", "what": "step", "seconds": 2.0}` with steps, wall_s,
cpu_s and rate (steps a second of wall time); `algo` is td3bc or iql. A `step` samples a batch from the replay buffer and updates; an
`update` takes a batch sampled beforehand. `steps / cpu_s` is the better number where other processes hold the cores.
Data: 1,000,000 rows, obs 17, action 6, episodes of 1,000 rows cut by a time limit (d3rlpy makes no transition of an episode's last row).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from itertools import cycle
from pathlib import Path

PINS = ["torch==2.13.0", "d3rlpy==2.8.1"]
ALGOS, WHATS = ("td3bc", "iql"), ("step", "update")
OBS, ACTION, ROWS, EPISODE, BATCH = 17, 6, 1_000_000, 1_000, 256


def setup(env: Path) -> None:
    """Make the environment. pip's configuration says where packages come from: PIP_EXTRA_INDEX_URL with torch's CPU wheels saves space."""
    subprocess.run([sys.executable, "-m", "venv", env], check=True)
    for pin in PINS:  # torch first, so that d3rlpy's requirement is met by the pinned one
        subprocess.run([env / "bin" / "python", "-m", "pip", "install", pin], check=True)


def dataset(rows: int):
    import numpy as np
    from d3rlpy.dataset import MDPDataset

    rng = np.random.default_rng(0)
    timeouts = np.zeros(rows, np.float32)
    timeouts[EPISODE - 1 :: EPISODE] = 1
    return MDPDataset(
        observations=rng.standard_normal((rows, OBS), dtype=np.float32),
        actions=np.tanh(rng.standard_normal((rows, ACTION), dtype=np.float32)),
        rewards=rng.standard_normal((rows, 1), dtype=np.float32),
        terminals=np.zeros(rows, np.float32),
        timeouts=timeouts,
    )


def run_slice(algo, data, batches, what: str, seconds: float) -> dict[str, float]:
    """Steps until the time is over, two at a time: TD3+BC's actor moves in every second one."""
    steps, cpu, start = 0, time.process_time(), time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(2):
            algo.update(data.sample_transition_batch(BATCH) if what == "step" else next(batches))
        steps += 2
    wall, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {"steps": steps, "wall_s": wall, "cpu_s": cpu, "rate": steps / wall}


def worker(rows: int) -> None:
    """Requests on stdin, answers on stdout, one JSON object a line, until stdin ends. d3rlpy's own messages go to stderr."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # before torch is imported
    import d3rlpy
    import torch

    torch.set_num_threads(1)
    d3rlpy.seed(0)
    start = time.perf_counter()
    data = dataset(rows)
    built = time.perf_counter() - start
    configs = {"td3bc": d3rlpy.algos.TD3PlusBCConfig, "iql": d3rlpy.algos.IQLConfig}
    algos = {name: configs[name](batch_size=BATCH).create(device="cpu:0") for name in ALGOS}
    batches = cycle([data.sample_transition_batch(BATCH) for _ in range(16)])
    for algo in algos.values():
        algo.build_with_dataset(data)
        run_slice(algo, data, batches, "step", 1.0)  # warm
    versions = {"peer": f"d3rlpy {d3rlpy.__version__}", "torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps(versions | {"transitions": data.transition_count, "build_s": round(built, 1)}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        if request.get("algo") not in ALGOS or request.get("what") not in WHATS:
            print(json.dumps({"error": f"algo is one of {ALGOS} and what one of {WHATS}, got {request}"}), file=answers)
            continue
        result = run_slice(algos[request["algo"]], data, batches, request["what"], request["seconds"])
        print(json.dumps({"algo": request["algo"], "what": request["what"]} | result), file=answers)


def start_worker(env: Path, rows: int = ROWS) -> tuple[subprocess.Popen, dict]:
    """The worker's process and its hello; ask it with `ask`, end it by closing its stdin."""
    python = env / "bin" / "python"
    if not python.exists():
        raise FileNotFoundError(f"no environment at {env}: make it with `python {Path(__file__).name} setup {env}`")
    command = [python, Path(__file__).resolve(), "worker", "--rows", str(rows)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    hello = process.stdout.readline()
    if not hello:
        raise RuntimeError(f"the worker in {env} did not start (exit status {process.wait()}); its own message is above")
    return process, json.loads(hello)


def ask(process: subprocess.Popen, algo: str, what: str, seconds: float) -> dict:
    print(json.dumps({"algo": algo, "what": what, "seconds": seconds}), file=process.stdin, flush=True)
    answer = json.loads(process.stdout.readline())
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer


def measure(env: Path, slices: int, seconds: float, rows: int) -> dict:
    process, hello = start_worker(env, rows)
    seen: dict[tuple[str, str], list[dict]] = {(algo, what): [] for algo in ALGOS for what in WHATS}
    for _ in range(slices):
        for (algo, what), answers in seen.items():
            answers.append(ask(process, algo, what, seconds))
    process.stdin.close()
    process.wait()
    load = [round(x, 1) for x in os.getloadavg()]
    table = {}
    for (algo, what), answers in seen.items():
        rates, per_cpu = [a["rate"] for a in answers], [a["steps"] / a["cpu_s"] for a in answers]
        table[f"{algo}/{what}"] = {
            kind: {"median": round(statistics.median(x), 1), "min": round(min(x), 1), "max": round(max(x), 1)}
            for kind, x in (("per_wall_s", rates), ("per_cpu_s", per_cpu))
        }
    return hello | {"slices": slices, "seconds": seconds, "cores": os.cpu_count(), "load_average": load, "rates": table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("setup").add_argument("env", type=Path)
    for verb in (verbs.add_parser("measure"), verbs.add_parser("worker")):
        verb.add_argument("--rows", type=int, default=ROWS)
    driver = verbs.choices["measure"]
    driver.add_argument("env", type=Path)
    driver.add_argument("--slices", type=int, default=5)
    driver.add_argument("--seconds", type=float, default=2.0)
    args = parser.parse_args()
    if args.verb == "setup":
        setup(args.env)
    elif args.verb == "worker":
        worker(args.rows)
    else:
        print(json.dumps(measure(args.env, args.slices, args.seconds, args.rows), indent=1))


if __name__ == "__main__":
    main()
