"""What choosing a policy without an environment is worth: each objective's values of a study's policies against their true returns.

    python benchmarks/selection.py sqlite:///study.db mbrl-halfcheetah-mixed halfcheetah-mixed-n200000-s0.hdf5 --name halfcheetah-mixed
    python benchmarks/selection.py --card

The policies are those of complete trials, their true values the returns that their runs ended with. What is found, policy by policy, is
kept in results/selection/NAME.json; the same command again goes on with new trials. `--card` writes the table and plot of cards/mbrl.md.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context

import numpy as np
import offline
import optuna
import torch
import yaml
from scipy.stats import spearmanr

from offrl.data.load import load_dataset
from offrl.recipes.config import resolve
from offrl.recipes.objectives import OBJECTIVES
from offrl.stats import bootstrap
from offrl.training.hooks import Diverged
from offrl.training.run import read_json

RESULTS = offline.HERE / "results" / "selection"


def valued(run: str, source: str, objective: str) -> dict:
    """What the objective makes of one run, and how long that took."""
    torch.set_num_threads(1)
    folder, begin = pathlib.Path(run), time.monotonic()
    data = load_dataset(source)
    recipe = read_json(folder / "run.json")["recipe"]
    config = resolve(recipe, data.spec.dataset_id or "", overrides=yaml.safe_load((folder / "config.yaml").read_text()))
    try:
        value = OBJECTIVES[objective].value(folder, data, config)
    except Diverged as error:
        return {"value": None, "why": str(error), "seconds": time.monotonic() - begin}
    return {"value": value, "seconds": time.monotonic() - begin}


def correlation(pairs: np.ndarray) -> dict:
    """Spearman's, with the interval of a bootstrap over policies."""

    def rank(rows: np.ndarray) -> float:
        return float(spearmanr(rows[:, 0], rows[:, 1]).statistic)

    low, high = bootstrap(pairs, rank, 2000, 0, stratified=False)
    return {"value": rank(pairs), "low": low, "high": high, "policies": len(pairs)}


def valid(found: dict, objective: str) -> np.ndarray:
    """(policies, 2) of the objective's value and the true score, where the objective gave one."""
    pairs = [(each[objective]["value"], each["true"]) for each in found["policies"].values() if objective in each]
    return np.array([pair for pair in pairs if pair[0] is not None])


def table() -> str:
    lines = [
        "| study | objective | policies | Spearman (95 %) | the chosen one's score | best | mean | seconds a policy |",
        "|---" * 8 + "|",
    ]
    for path in sorted(RESULTS.glob("*.json")):
        found = json.loads(path.read_text())
        for objective in OBJECTIVES:
            if objective not in found:
                continue
            pairs, rho = valid(found, objective), found[objective]
            score, true = pairs[pairs[:, 0].argmax(), 1], [each["true"] for each in found["policies"].values()]
            seconds = np.mean([each[objective]["seconds"] for each in found["policies"].values()])
            cells = [path.stem, objective, str(rho["policies"]), f"{rho['value']:.2f} ({rho['low']:.2f} to {rho['high']:.2f})"]
            lines.append("| " + " | ".join([*cells, f"{score:.1f}", f"{max(true):.1f}", f"{np.mean(true):.1f}", f"{seconds:.0f}"]) + " |")
        lines += ["", f"![values and scores of the policies]({plot(path.stem, found).name})"]
    return "\n".join(lines) + "\n"


def plot(name: str, found: dict) -> pathlib.Path:
    """Each policy's value against its true score, a panel for each objective."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    objectives = [objective for objective in OBJECTIVES if objective in found]
    figure, panels = plt.subplots(1, len(objectives), figsize=(4 * len(objectives), 3), layout="constrained", squeeze=False)
    for axes, objective in zip(panels[0], objectives):
        axes.scatter(*valid(found, objective).T, color="#0072B2", s=18)
        axes.set(title=f"Spearman {found[objective]['value']:.2f}", xlabel=objective, ylabel="normalised score")
    path = offline.HERE / "cards" / f"selection_{name}.png"
    figure.savefig(path, dpi=110)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("storage", nargs="?")
    parser.add_argument("study", nargs="?")
    parser.add_argument("data", nargs="?")
    parser.add_argument("--name")
    parser.add_argument("--objectives", nargs="+", default=["fqe", "model"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--card", action="store_true", help="only write the card")
    args = parser.parse_args()
    if args.card:
        return offline.fill("mbrl.md", {"selection": table()})
    if not (args.data and args.name):
        parser.error("name the storage, the study, the data and --name")
    study = optuna.load_study(storage=args.storage, study_name=args.study)
    trials = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    path = RESULTS / f"{args.name}.json"
    RESULTS.mkdir(parents=True, exist_ok=True)
    found = json.loads(path.read_text()) if path.exists() else {"dataset": args.name, "policies": {}}
    todo = [(t, o) for o in args.objectives for t in trials if o not in found["policies"].get(str(t.number), {})]
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        runs, objectives = [trial.user_attrs["runs"][0] for trial, _ in todo], [objective for _, objective in todo]
        for (trial, objective), value in zip(todo, pool.map(valued, runs, repeat(args.data), objectives)):
            kept = found["policies"].setdefault(str(trial.number), {"params": trial.params, "true": trial.value})
            kept[objective] = value
            path.write_text(json.dumps(found, indent=1))
            print(trial.number, f"{trial.value:.1f}", objective, value, flush=True)
    for objective in args.objectives:
        found[objective] = correlation(valid(found, objective))
        print(objective, found[objective])
    path.write_text(json.dumps(found | {"commit": offline.commit()}, indent=1))


if __name__ == "__main__":
    main()
