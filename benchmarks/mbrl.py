"""The model-based table: ways of being pessimistic, on the same data with the same budget; resumable.

    python benchmarks/mbrl.py --data hopper-medium=hopper-medium-n200000-s0.hdf5 --data halfcheetah-mixed=halfcheetah-mixed-n200000-s0.hdf5

50,000 updates, of which every 1,000th is followed by 10,000 rollouts of 5 steps; ensembles train for 30 epochs at most. What a run
found is kept in results/mbrl; the same command again goes on. TD3+BC on the same data is benchmarks/offline.py's.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor

import offline

RESULTS = offline.HERE / "results" / "mbrl"
IMAGINED = ["--imagine.starts", "10000", "--imagine.horizon", "5", "--imagine.every", "1000", "--model.max-epochs", "30"]
# name: recipe, flags, seeds
VARIANTS = {
    "unpenalised": ("mbrl", [*IMAGINED, "--penalty.weight", "0"], 3),
    "penalised": ("mbrl", IMAGINED, 3),
    "morel": ("mbrl", [*IMAGINED, "--penalty.weight", "0", "--penalty.kind", "max_pair_distance", "--penalty.halt", "1"], 1),
    "value-side": ("mbrl", [*IMAGINED, "--penalty.weight", "0", "--agent.members", "10"], 1),
    "sac-n": ("sac", ["--agent.members", "10"], 1),
    "combo": ("combo", IMAGINED, 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", default=[], help="an id, or NAME=PATH")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    jobs = []
    for variant in args.variants:
        recipe, flags, seeds = VARIANTS[variant]
        for data in args.data:
            name, _, path = data.partition("=")
            jobs += [(recipe, name, path or name, seed, args.steps, variant, flags, RESULTS) for seed in range(seeds)]
    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(lambda job: offline.run(*job), jobs))


if __name__ == "__main__":
    main()
