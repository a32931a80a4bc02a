"""What choosing a policy without an environment is worth: each objective's values of a study's policies against their true returns.

    python benchmarks/selection.py sqlite:///study.db mbrl-halfcheetah-mixed halfcheetah-mixed-n200000-s0.hdf5 --name halfcheetah-mixed

The policies are those of complete trials, their true values the returns that their runs ended with. What is found, policy by policy, is
kept in results/selection/NAME.json; the same command again goes on with new trials.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("storage")
    parser.add_argument("study")
    parser.add_argument("data")
    parser.add_argument("--name", required=True)
    parser.add_argument("--objectives", nargs="+", default=["fqe", "model"])
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
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
        pairs = [(each[objective]["value"], each["true"]) for each in found["policies"].values() if each[objective]["value"] is not None]
        found[objective] = correlation(np.array(pairs))
        print(objective, found[objective])
    path.write_text(json.dumps(found | {"commit": offline.commit()}, indent=1))


if __name__ == "__main__":
    main()
