"""The model-based table: ways of being pessimistic, on the same data with the same budget; resumable.

    python benchmarks/mbrl.py --data hopper-medium=hopper-medium-n200000-s0.hdf5 --data halfcheetah-mixed=halfcheetah-mixed-n200000-s0.hdf5
    python benchmarks/mbrl.py --card

50,000 updates, of which every 1,000th is followed by 10,000 rollouts of 5 steps; ensembles train for 30 epochs at most; all in
bfloat16. What a run found is kept in results/mbrl with its ensemble's errors; the same command again goes on. TD3+BC on the same data is
benchmarks/offline.py's. `--card` writes the tables of cards/mbrl.md, benchmarks/mbrl_speed.py's among them.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from concurrent.futures import ThreadPoolExecutor

import mbrl_speed
import numpy as np
import offline

from offrl.core.checkpoint import load_file
from offrl.data.load import load_dataset
from offrl.recipes.config import resolve
from offrl.recipes.mbrl import model_file

RESULTS = offline.HERE / "results" / "mbrl"
HALF = ["--precision", "bf16"]
IMAGINED = [*HALF, "--imagine.starts", "10000", "--imagine.horizon", "5", "--imagine.every", "1000", "--model.max-epochs", "30"]
TWENTIETH = [*IMAGINED, "--imagine.real", "0.05"]  # of each batch is from the data, as MOPO has it
MOPO = ["--penalty.kind", "max_std_norm", "--penalty.units", "raw"]
# weights that OfflineRL-Kit suggests for the D4RL datasets that are most like these
WEIGHTS = {"hopper-medium": ["--penalty.weight", "5"], "halfcheetah-mixed": ["--penalty.weight", "0.5"]}
# name: recipe, flags, seeds
VARIANTS = {
    "unpenalised": ("mbrl", [*TWENTIETH, "--penalty.weight", "0"], 3),
    "penalised": ("mbrl", [*TWENTIETH, *MOPO], 3),  # and WEIGHTS, as below
    "half-real": ("mbrl", [*IMAGINED, *MOPO], 3),  # penalised, but for the share of real rows
    "default": ("mbrl", IMAGINED, 1),
    "morel": ("mbrl", [*TWENTIETH, "--penalty.weight", "0", "--penalty.kind", "max_pair_distance", "--penalty.halt", "1"], 1),
    "value-side": ("mbrl", [*TWENTIETH, "--penalty.weight", "0", "--agent.members", "10"], 1),
    "sac-n": ("sac", [*HALF, "--agent.members", "10"], 1),
    "combo": ("combo", IMAGINED, 1),
}


def train(recipe: str, name: str, source: str, seed: int, steps: int, variant: str, flags: list[str]) -> None:
    """Trains one seed, or goes on with it, and keeps what it found; and what its ensemble came to."""
    offline.run(recipe, name, source, seed, steps, variant, flags, RESULTS)
    if recipe == "sac":
        return
    data = load_dataset(source)
    config = resolve(recipe, name, overrides={"model": {"max_epochs": 30}, "precision": "bf16"})
    file = RESULTS / "ensembles" / f"{name.replace('/', '-')}--{seed}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    _, meta = load_file(model_file(data, config, seed, pathlib.Path("runs/benchmarks/models")))
    file.write_text(json.dumps({"dataset": name, **meta}, indent=1))


def scores() -> str:
    """The score of each variant, TD3+BC's beside it."""
    mine = offline.groups(RESULTS)
    known = {dataset for dataset, _ in mine}
    return offline.table(dict(sorted((mine | {k: r for k, r in offline.groups().items() if k[0] in known and k[1] == "td3bc"}).items())))


def ensembles() -> str:
    """Errors of each ensemble, averaged over its members and over the dimensions of the observation, and of the reward."""
    heads = "| dataset | ensembles | epochs | obs: ensemble | linear | no change | reward: ensemble | linear | its mean |"
    rows, found = [heads, "|---" * 9 + "|"], {}
    for path in sorted((RESULTS / "ensembles").glob("*.json")):
        each = json.loads(path.read_text())
        found.setdefault(each["dataset"], []).append(each["fitted"])
    for dataset, fits in found.items():
        columns = [
            np.mean([np.mean(fit["error"], 0) for fit in fits], 0),
            *(np.mean([fit[k] for fit in fits], 0) for k in ("linear", "unchanged")),
        ]
        errors = [f"{column[part].mean():.4f}" for part in (slice(-1), slice(-1, None)) for column in columns]
        epochs = ", ".join(str(fit["epochs"]) for fit in fits)
        rows.append(f"| {dataset} | {len(fits)} | {epochs} | " + " | ".join(errors) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", default=[], help="an id, or NAME=PATH")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--card", action="store_true", help="only write the card")
    args = parser.parse_args()
    if args.card:
        speeds = mbrl_speed.table(json.loads(mbrl_speed.RESULT.read_text()))
        return offline.fill("mbrl.md", {"scores": scores() + "\n", "ensembles": ensembles() + "\n", "speed": speeds})
    jobs = []
    for variant in args.variants:
        recipe, flags, seeds = VARIANTS[variant]
        for data in args.data:
            name, _, path = data.partition("=")
            more = WEIGHTS[name] if variant in ("penalised", "half-real") else []
            jobs += [(recipe, name, path or name, seed, args.steps, variant, [*flags, *more]) for seed in range(seeds)]
    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(lambda job: train(*job), jobs))


if __name__ == "__main__":
    main()
