"""The offline table: every agent on every dataset, several seeds, resumable; `--card` makes cards/offline.md from what is done.

    python benchmarks/offline.py --data hopper-medium=hopper-medium-n200000-s0.hdf5 --data offrl/walker2d-mixed-v0 --agents bc td3bc iql
    python benchmarks/offline.py --card

A dataset is an id, or NAME=PATH. Runs go to runs/benchmarks, `--workers` at a time in processes of one thread; what a run found is
kept in results/offline/AGENT--DATASET--SEED.json with its learning curve, versions and commit. The same command again goes on.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from offrl.envs.scores import normalize
from offrl.stats import mean_ci, mean_difference_ci
from offrl.training.report import summary

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results" / "offline"
STEPS = {"a2pr": 30_000}
SEEDS = {"a2pr": 2}


def run(agent: str, name: str, source: str, seed: int, steps: int, label: str, flags: list[str], results: pathlib.Path = RESULTS) -> None:
    """Train one seed in a process of its own, or go on with it, and keep what it found."""
    file = results / f"{label}--{name.replace('/', '-')}--{seed}.json"
    if file.exists() and json.loads(file.read_text())["result"]["step"] >= steps:
        return
    command = [sys.executable, "-m", "offrl", "train", agent, source, "--seeds", str(seed), "--steps", str(steps)]
    command += ["--runs", "runs/benchmarks", "--eval-every", "5000", "--checkpoint-every", "5000", *flags]
    start = time.time()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds, finished = round(time.time() - start), re.search("^offrl: (.+) is finished", done.stderr, re.M)
    if (folder := re.search("^run: (.+)$", done.stdout, re.M) or finished) is None:
        print(f"{label} {name} {seed}: {done.stdout[-500:]}{done.stderr[-800:]}", file=sys.stderr, flush=True)
        return
    found = summary(pathlib.Path(folder[1])) | {"dataset": name, "seconds": None if finished else seconds, "commit": commit()}
    results.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found, indent=1))
    estimate = found["result"].get("score", found["result"]["return"])
    print(f"{label} {name} seed {seed}: {estimate['mean']:.1f} after {steps} steps, {seconds} s", flush=True)


def commit() -> str:
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE).stdout.strip()


def groups(results: pathlib.Path = RESULTS) -> dict[tuple[str, str], list[dict]]:
    """What is done, by dataset and label."""
    found: dict[tuple[str, str], list[dict]] = {}
    for path in sorted(results.glob("*.json")):
        each = json.loads(path.read_text())
        found.setdefault((each["dataset"], path.name.split("--")[0]), []).append(each)
    return dict(sorted(found.items()))


def data_score(run: dict) -> float:
    spec = run["about"]["spec"]
    return float(normalize([run["about"]["data"]["return_mean"]], spec["ref_min"], spec["ref_max"])[0])


def fill(card: str, tables: dict[str, str]) -> None:
    """Puts each table below its mark in a card, in the place of what is there up to the next heading."""
    path = HERE / "cards" / card
    text = path.read_text()
    for name, table in tables.items():
        before, mark, after = text.partition(f"<!-- {name} -->\n")
        if not mark:
            raise ValueError(f"{path} has no mark <!-- {name} -->")
        _, heading, rest = after.partition("\n## ")
        text = before + mark + table + heading + rest
    path.write_text(text)
    print(path)


HEADS = ["dataset", "env", "agent", "updates", "seeds", "final score, mean (95 % interval over seeds)"]
HEADS += ["each seed", "mean of the last evaluations", "data"]


def table(done: dict[tuple[str, str], list[dict]]) -> str:
    """In Markdown: last and mean of the last evaluations, never the best one."""
    rows = ["| " + " | ".join(HEADS) + " |", "|---" * len(HEADS) + "|"]
    for (dataset, label), runs in done.items():
        finals = [each["result"]["score"]["mean"] for each in runs]
        late = [np.mean([row["eval/normalized_score_mean"] for row in each["curve"][-5:]]) for each in runs if each["curve"]]
        mean, low, high = mean_ci(finals)
        interval = f" ({low:.1f} to {high:.1f})" if len(runs) > 1 else ""
        steps = min(each["result"]["step"] for each in runs)
        cells = [dataset, runs[0]["result"]["env"], label, f"{steps:,}", len(runs), f"**{mean:.1f}**{interval}"]
        cells += [", ".join(f"{value:.1f}" for value in finals), f"{np.mean(late):.1f}" if late else "", f"{data_score(runs[0]):.1f}"]
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows)


def card() -> str:
    return table(groups()) + "\n\n" + precision() + "![learning curves](offline.png)\n"


def precision() -> str:
    """TD3+BC in bfloat16 against float32, seeds paired with seeds, where both were run."""
    done, lines = groups(), []
    for (dataset, label), half in done.items():
        if label.endswith("-bf16") and len(full := done.get((dataset, label.removesuffix("-bf16")), [])) > 1 and len(half) > 1:
            scores = [[run["result"]["score"]["mean"] for run in runs] for runs in (half, full)]
            mean, low, high = mean_difference_ci(*scores)
            counts = f"{len(half)} and {len(full)} seeds"
            lines.append(
                f"bfloat16 less float32, {label.removesuffix('-bf16')} on {dataset}: {mean:+.1f} ({low:+.1f} to {high:+.1f}), {counts}.  "
            )
    return "\n".join(lines) + "\n\n" * bool(lines)


def plot() -> None:
    """Learning curves: the mean over seeds, and the seeds themselves behind it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    done = {key: runs for key, runs in groups().items() if runs[0]["curve"] and "bf16" not in key[1]}
    datasets = sorted({dataset for dataset, _ in done})
    colours = dict(zip(["bc", "td3bc", "iql", "a2pr"], ["#000000", "#0072B2", "#E69F00", "#009E73"]))
    figure, panels = plt.subplots(1, len(datasets), figsize=(4 * len(datasets), 3), layout="constrained", sharey=True, squeeze=False)
    for axes, dataset in zip(panels[0], datasets):
        for (of, label), runs in done.items():
            if of != dataset:
                continue
            peer = label.startswith("d3rlpy-")
            style = {"color": colours[label.removeprefix("d3rlpy-")], "linestyle": "--" if peer else "-"}
            curves = [[(row["step"], row["eval/normalized_score_mean"]) for row in run["curve"]] for run in runs]
            for curve in curves:
                axes.plot(*zip(*curve), **style, linewidth=0.5, alpha=0.5)
            common = min(map(len, curves))
            steps, means = zip(*[(curves[0][i][0], np.mean([curve[i][1] for curve in curves])) for i in range(common)])
            axes.plot(steps, means, **style, linewidth=1.8, label=label)
            axes.axhline(data_score(runs[0]), color="#999999", linestyle=":", linewidth=1)
        axes.set(title=dataset, xlabel="updates")
    panels[0, 0].set_ylabel("normalised score")
    panels[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(HERE / "cards" / "offline.png", dpi=110)


def write_card() -> None:
    path = HERE / "cards" / "offline.md"
    before, mark, _ = path.read_text().partition("<!-- table -->\n") if path.exists() else ("", "<!-- table -->\n", "")
    path.write_text(before + (mark or "<!-- table -->\n") + card())
    plot()
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", default=[], help="an id, or NAME=PATH")
    parser.add_argument("--agents", nargs="+", default=["bc", "td3bc", "iql", "a2pr"])
    parser.add_argument("--seeds", type=int, help="seeds an agent; 3, for a2pr 2")
    parser.add_argument("--steps", type=int, help="updates; 50,000, for a2pr 30,000")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tag", default="", help="a suffix to the agents' names, for runs with other flags")
    parser.add_argument("--flags", default="", help="further flags of offrl train, in one string")
    parser.add_argument("--card", action="store_true", help="only write the card")
    args = parser.parse_args()
    jobs = []
    for agent in args.agents:
        for data in args.data:
            name, _, path = data.partition("=")
            for seed in range(args.seeds or SEEDS.get(agent, 3)):
                jobs.append((agent, name, path or name, seed, args.steps or STEPS.get(agent, 50_000), agent + args.tag, args.flags.split()))
    if not args.card:
        with ThreadPoolExecutor(args.workers) as pool:
            list(pool.map(lambda job: run(*job), jobs))
    write_card()


if __name__ == "__main__":
    main()
