"""How fast ensembles are trained and imagine, and SAC-N learns, with two threads.

    python benchmarks/mbrl_speed.py [--jax ENV]

Cases take turns in one process, so that a change of the machine's speed meets all alike: products of 256 x 256 matrices, which say what
the machine gives that day (a step of the ensemble is 1.4 GFLOP of products, an update of SAC-N about 4.5); an epoch of `Dynamics.fit`
(members of 4x200, batch 256, 23 inputs, 18 outputs; the evaluation on rows held out included); five steps of SAC's policy from 50,000
starts with a penalty; and SAC with ten critics of 3x256. Beside the ensemble the same step as it is mostly written, a plain loop with
torch's own threads, and with `--jax` in JAX (peers/jax_ensemble.py says how to make its environment). Results go to
results/mbrl_speed.json and, through benchmarks/mbrl.py --card, into cards/mbrl.md.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import subprocess
import time

import offline
import speed
import torch

from offrl.agents.sac import SAC, Config
from offrl.core.machine import threads_of_their_own
from offrl.core.space import Box
from offrl.core.types import Spec
from offrl.data.dataset import Dataset
from offrl.envs.terminations import never
from offrl.models import ensemble as ensembles
from offrl.models.dynamics import Config as Model
from offrl.models.dynamics import Dynamics
from offrl.models.imagine import rollout
from offrl.models.penalty import ensemble_std

RESULT = offline.HERE / "results" / "mbrl_speed.json"
OBS, ACTION, ROWS, STARTS, HORIZON = 17, 6, 57_000, 50_000, 5
PEERS = {  # measured on another day, with two threads on a machine like this one
    "ensemble 7 fp32, steps/s": "61 (OfflineRL-Kit), 82 (unifloral)",
    "ensemble 7 bf16, steps/s": "61 (OfflineRL-Kit), 82 (unifloral), both fp32",
    "imagination 5, transitions/s": "66,600 (unifloral, 5 elites)",
    "imagination 7, transitions/s": "21,700 (OfflineRL-Kit)",
    "SAC-N 10 fp32, updates/s": "20.6 (CORL), 34.4 (unifloral)",
    "SAC-N 10 bf16, updates/s": "20.6 (CORL), 34.4 (unifloral), both fp32",
}


def dataset() -> Dataset:
    draw = torch.Generator().manual_seed(0)
    obs, reward = torch.randn(ROWS, OBS, generator=draw), torch.randn(ROWS, generator=draw)
    action = torch.rand(ROWS, ACTION, generator=draw) * 2 - 1
    ends = (torch.arange(ROWS) % 1000 == 999).numpy()
    columns = [column.numpy() for column in (obs, action, reward)]
    return Dataset.from_arrays(*columns, ends & False, ends, obs.roll(-1, 0).numpy())


def products():
    """GFLOP/s of matrix products, in threads of their own."""

    def work(_) -> None:
        x = torch.randn(256, 256)
        for _ in range(2000):
            x @ x

    def measure() -> float:
        count, begin = torch.get_num_threads(), time.perf_counter()
        with threads_of_their_own(count) as pool:
            list(pool.map(work, range(count)))
        return count * 2000 * 2 * 256**3 / 1e9 / (time.perf_counter() - begin)

    return measure


def ensemble(data: Dataset, mode: str, precision: str):
    """The rate of steps over the second epoch of a fit: the first holds what is made once."""

    def measure() -> float:
        times = []
        model = Dynamics(Model(max_epochs=2))
        fitted = model.fit(data, mode=mode, precision=precision, progress=lambda *_: times.append(time.perf_counter()))
        return (ROWS - fitted.rows) // 256 / (times[1] - times[0])

    return measure


def plain(data: Dataset):
    """The step as it is mostly written: products over all members by torch's own threads."""
    t = data.transitions()
    x, y = torch.cat([t.obs, t.action], 1), torch.cat([t.next_obs - t.obs, t.reward[:, None]], 1)
    net = ensembles.Ensemble((OBS + ACTION, *[200] * 4, OBS + 1), 7)
    adam = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=2.5e-5)

    def measure() -> float:
        rows, begin = torch.randint(len(x), (200, 7, 256)), time.perf_counter()
        for chosen in rows:
            adam.zero_grad()
            ensembles.ensemble_loss(net, dict(net.named_parameters()), x[chosen], y[chosen], 0.01).backward()
            adam.step()
        return len(rows) / (time.perf_counter() - begin)

    return measure


def jax(env: pathlib.Path):
    worker = offline.HERE / "peers" / "jax_ensemble.py"
    process = subprocess.Popen([env / "bin" / "python", worker], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    version = process.stdout.readline().strip()

    def measure() -> float:
        print(file=process.stdin, flush=True)
        return float(process.stdout.readline())

    return version, measure


def imagination(data: Dataset, members: int):
    model = Dynamics(Model(members=members, elites=5, max_epochs=1))
    model.fit(data)
    agent = SAC(Config(), Spec(Box.of(OBS), Box.of(ACTION, -1, 1)))
    state, starts = agent.init(0), torch.randn(STARTS, OBS)

    def act(obs: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        return agent.act(state, obs, noise)

    def measure() -> float:
        begin = time.perf_counter()
        rows = rollout(model, act, starts, HORIZON, never, lambda s: ensemble_std(s.mean, s.std), torch.Generator().manual_seed(0))
        return len(rows.obs) / (time.perf_counter() - begin)

    return measure


def learning(precision: str, seconds: float):
    step, _ = speed.make_step("sac-n", "compile", precision, 1, "cpu")
    step()

    def measure() -> float:
        begin, done = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            done += step()
        return done / (time.perf_counter() - begin)

    return measure


def table(found: dict) -> str:
    lines = [f"Machine: {found['machine']}; torch {found['torch']}; commit {found['commit']}; {found['rounds']} turns.", ""]
    lines += ["| case | median [min, max] | peers, on another day |", "|---|---|---|"]
    for case, rates in found["cases"].items():
        digits = 0 if "transitions" in case else 1
        shown = "{median:,.{d}f} [{min:,.{d}f}, {max:,.{d}f}]".format(**rates, d=digits)
        lines.append(f"| {case} | {shown} | {PEERS.get(case, '')} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--jax", type=pathlib.Path, metavar="ENV")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = dataset()
    cases = {"products fp32, GFLOP/s": products(), "ensemble 7 fp32, a plain loop, steps/s": plain(data)}
    if args.jax:
        version, measure = jax(args.jax)
        cases[f"ensemble 7 fp32, JAX {version}, steps/s"] = measure
    for mode, name in (("eager", ", eager"), ("compile", "")):
        cases |= {f"ensemble 7 {precision}{name}, steps/s": ensemble(data, mode, precision) for precision in ("fp32", "bf16")}
    cases |= {f"imagination {members}, transitions/s": imagination(data, members) for members in (5, 7)}
    cases |= {f"SAC-N 10 {precision}, updates/s": learning(precision, 3.0) for precision in ("fp32", "bf16")}
    slices: dict[str, list[dict]] = {case: [] for case in cases}
    for _ in range(args.rounds):
        for case, measure in cases.items():
            slices[case].append({"rate": measure()})
    found = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {args.threads} threads",
        "torch": torch.__version__, "rounds": args.rounds, "commit": offline.commit(),
        "cases": {case: speed.middle(rates) for case, rates in slices.items()},
    }  # fmt: skip
    RESULT.write_text(json.dumps(found, indent=1))
    print(table(found))


if __name__ == "__main__":
    main()
