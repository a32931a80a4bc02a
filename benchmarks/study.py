"""A study of the model-based recipe, and whether what it finds holds on seeds that it has not seen.

    offrl tune mbrl halfcheetah-mixed-n200000-s0.hdf5 --trials 30 --workers 2 --storage sqlite:///study.db \\
        --steps 20000 --eval-every 5000 --model.max-epochs 30 --imagine.real 0.05 \\
        --search penalty.kind model.members=2:10 imagine.horizon=1:20:log penalty.weight=0.05:100:log
    python benchmarks/study.py sqlite:///study.db halfcheetah-mixed=halfcheetah-mixed-n200000-s0.hdf5
    python benchmarks/study.py --card

The study's best and the default train on five fresh seeds for 50,000 updates, in bfloat16. Each seed has an ensemble of its own, of seven
members (the default's number), of which both use as many as they are to. Trials and runs are kept in results/study; the same command again
goes on.
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ThreadPoolExecutor

import offline
import optuna

from offrl.stats import mean_ci, mean_difference_ci

RESULTS = offline.HERE / "results" / "study"
SEEDS, STEPS = range(10, 15), 50_000
SHARED = ["--imagine.real", "0.05", "--model.max-epochs", "30", "--model.trained", "7", "--precision", "bf16"]


def keep_trials(url: str) -> None:
    study = optuna.load_study(storage=url, study_name=None)
    rows = []
    for t in study.trials:
        row = {"number": t.number, "state": t.state.name, "value": t.value, "params": t.params, "reports": t.intermediate_values}
        row |= {key: t.user_attrs.get(key) for key in ("episodes", "kind")}
        rows.append(row | {"seconds": t.duration.total_seconds() if t.duration else None})
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "trials.json").write_text(json.dumps({"study": study.study_name, "trials": rows}, indent=1))


def table() -> str:
    trials = json.loads((RESULTS / "trials.json").read_text())["trials"]
    states = {state: sum(t["state"] == state for t in trials) for state in ("COMPLETE", "PRUNED", "FAIL")}
    complete = sorted((t for t in trials if t["state"] == "COMPLETE"), key=lambda t: -t["value"])
    counts, episodes = ", ".join(f"{n} {s.lower()}" for s, n in states.items() if n), sum(t["episodes"] or 0 for t in trials)
    lines = [f"{len(trials)} trials: {counts}. Online episodes: {episodes:,}.", ""]
    lines.append("| trial | score | " + " | ".join(complete[0]["params"]) + " |")
    lines.append("|---" * (2 + len(complete[0]["params"])) + "|")
    for t in [*complete[:5], *(t for t in complete if t["number"] == 0 and t not in complete[:5])]:
        values = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in t["params"].values()]
        lines.append(f"| {t['number']}{' (the default)' * (t['number'] == 0)} | {t['value']:.1f} | " + " | ".join(values) + " |")
    lines += ["", "| on fresh seeds | after 20,000 updates, as in the study | after 50,000 | mean (95 % interval) |", "|---|---|---|---|"]
    scores, early = {}, {}
    for (_, label), runs in offline.groups(RESULTS / "runs").items():
        scores[label] = [each["result"]["score"]["mean"] for each in runs]
        early[label] = [row["eval/normalized_score_mean"] for each in runs for row in each["curve"] if row["step"] == 20_000]
        shown = [", ".join(f"{score:.1f}" for score in column[label]) for column in (early, scores)]
        lines.append(f"| {label} | {shown[0]} | {shown[1]} | {'{:.1f} ({:.1f} to {:.1f})'.format(*mean_ci(scores[label]))} |")
    if len(scores) == 2:
        apart = [mean_difference_ci(each["best"], each["default"], paired=True) for each in (early, scores)]
        then, now = ("{:+.1f} ({:+.1f} to {:+.1f})".format(*difference) for difference in apart)
        lines += ["", f"Best less default, by seed: after 20,000 updates {then}, after 50,000 {now}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("storage", nargs="?")
    parser.add_argument("data", nargs="?", help="NAME=PATH")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--card", action="store_true", help="only print the table")
    args = parser.parse_args()
    if not args.card:
        keep_trials(args.storage)
        name, _, path = args.data.partition("=")
        arms = {"best": ["--from-study", args.storage, *SHARED], "default": SHARED}
        jobs = [("mbrl", name, path, seed, STEPS, arm, flags, RESULTS / "runs") for seed in SEEDS for arm, flags in arms.items()]
        with ThreadPoolExecutor(args.workers) as pool:
            list(pool.map(lambda job: offline.run(*job), jobs))
    print(table())


if __name__ == "__main__":
    main()
