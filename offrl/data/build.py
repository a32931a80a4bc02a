"""Datasets built on the spot: behaviour policies of known returns are rolled out, so that a start needs no download.

`datasets/manifest.yaml` lists the `offrl/...` ids with the policies that make them up. Rows are dealt to fixed parts with seeds of
their own, so that a dataset is the same whatever the number of processes that made it.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from offrl import __version__
from offrl.core.machine import cores
from offrl.core.resources import resource
from offrl.core.types import Spec
from offrl.data.dataset import DataError, Dataset
from offrl.data.formats.minari import check_id, minari_root
from offrl.data.info import transition_weighted_return
from offrl.data.rollouts.behavior import load_behavior
from offrl.data.rollouts.rollout import Part, Rows, roll_all, spec_of
from offrl.data.save import save_minari
from offrl.envs.make import make
from offrl.envs.scores import UnknownScore, normalize, reference

CHUNK = 10_000  # rows that one copy of an environment gives at most, and so the longest way between two cut episodes
LANES = 8  # copies that step together: measured to cost a fifth less time a row than one
PACKAGES = ("numpy", "gymnasium", "mujoco")


@dataclass(frozen=True)
class Ingredient:
    """A policy's part of a dataset: `share` of the rows, relative to the other shares.

    policy is a behaviour of the manifest or a source of `load_behavior`, whose keyword arguments are `epsilon` and `options`.
    """

    policy: str
    share: float = 1.0
    epsilon: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    dataset_id: str
    env_id: str
    mix: tuple[Ingredient, ...]
    rows: int = 1_000_000
    description: str = ""


@cache
def manifest() -> dict[str, Any]:
    """`datasets/manifest.yaml`: `behaviors` (name -> source, measured figures) and `datasets` (id -> env_id, rows, mix, description)."""
    return yaml.safe_load(resource("datasets", "manifest.yaml").read_text(encoding="utf-8"))


def embedded() -> list[str]:
    """The ids that `build` knows the recipe of."""
    return list(manifest()["datasets"])


def recipe(dataset_id: str) -> Recipe:
    """The recipe of an embedded id. Raises DataError naming the nearest ids."""
    known = manifest()["datasets"]
    if dataset_id not in known:
        near = difflib.get_close_matches(dataset_id, known, 3, 0.4) or list(known)
        raise DataError(f"no recipe builds {dataset_id!r}; near: {', '.join(near)}. Or build your own from policies and an env_id")
    entry = dict(known[dataset_id])
    mix = tuple(Ingredient(**part) for part in entry.pop("mix"))
    return Recipe(dataset_id, mix=mix, **entry)


def build(
    dataset: str | Recipe,
    rows: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    root: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    policies: Sequence[Ingredient | tuple] | None = None,
    env_id: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Rolls out the policies of `dataset` and saves exactly `rows` transitions as a Minari dataset; returns its folder.

    dataset: an embedded id, a Recipe, or with `policies` (tuples (policy, share, epsilon), the latter two optional) and `env_id` a
    new id of one's own. rows: by default the recipe's. workers: processes, by default one a core; the result does not depend on
    it. progress(rows done, rows in all) is called now and then. Rewards and returns are measured and kept in the metadata.

    Raises DataError for what cannot be built, FileExistsError where the dataset is there already, unless `overwrite`. A build that
    does not finish leaves nothing behind. A script calls this under `if __name__ == "__main__":`, since the processes import it.
    """
    what = _chosen(dataset, policies, env_id)
    root = minari_root() if root is None else Path(root)
    folder = root / check_id(what.dataset_id)
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{folder} is there already; overwrite it, or build under another id")
    rows = what.rows if rows is None else rows
    env = make(what.env_id)
    try:
        spec = _scored(spec_of(env, what.env_id), what)
        env_spec_json = _env_spec(env)
    finally:
        env.close()
    sources = [_source(ingredient.policy) for ingredient in what.mix]
    for ingredient, source in zip(what.mix, sources):  # a fault of the recipe shows here, before any process starts
        load_behavior(source, spec, epsilon=ingredient.epsilon, **ingredient.options)
    parts = _parts(what, sources, rows, seed)
    results = roll_all(parts, workers or cores(), progress)
    data = _assembled(results, spec)
    metadata = _metadata(what, data, _measured(what, sources, data, parts, results), seed)
    return save_minari(data, what.dataset_id, root, env_spec_json=env_spec_json, metadata=metadata, overwrite=overwrite)


def _chosen(dataset: str | Recipe, policies: Sequence[Ingredient | tuple] | None, env_id: str | None) -> Recipe:
    if isinstance(dataset, Recipe):
        what = dataset
    elif policies is None and env_id is None:
        what = recipe(dataset)
    elif dataset in embedded():
        raise DataError(f"{dataset} has a recipe of its own; give your dataset another id")
    elif not policies or env_id is None:
        raise DataError(f"{dataset}: a dataset of one's own needs both policies and an env_id")
    else:
        what = Recipe(dataset, env_id, tuple(p if isinstance(p, Ingredient) else Ingredient(*p) for p in policies))
    if not what.mix or not all(np.isfinite(part.share) and part.share > 0 for part in what.mix):
        raise DataError(f"{what.dataset_id}: shares must be positive numbers, not {[part.share for part in what.mix]}")
    return what


def _source(policy: str) -> str:
    source = manifest()["behaviors"].get(policy, {}).get("source", policy)
    return str(resource("datasets", *source.split("/"))) if policy != source != "random" else source


def _scored(spec: Spec, what: Recipe) -> Spec:
    try:
        low, high = reference(what.env_id)
    except UnknownScore:
        low = high = None
    return replace(spec, dataset_id=what.dataset_id, ref_min=low, ref_max=high)


def _env_spec(env: Any) -> str | None:
    """What Gymnasium needs to make the environment again; None for a factory's, or one whose arguments are not plain."""
    try:
        return env.spec.to_json()
    except (AttributeError, TypeError, ValueError):
        return None


def _even(total: int, pieces: int) -> list[int]:
    return [total // pieces + (i < total % pieces) for i in range(pieces)]


def _counts(shares: Sequence[float], rows: int) -> list[int]:
    """Whole rows for each share, summing to `rows`: what rounding down leaves goes to the largest remainders."""
    exact = np.asarray(shares, np.float64) * rows / sum(shares)
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: rows - counts.sum()]] += 1
    return counts.tolist()


def _parts(what: Recipe, sources: list[str], rows: int, seed: int) -> list[Part]:
    """The work, cut by the recipe, `rows` and `seed` alone."""
    counts = _counts([part.share for part in what.mix], rows)
    if min(counts) < 1:
        raise DataError(f"{what.dataset_id}: {rows} rows are too few for {len(counts)} policies with these shares")
    parts = []
    for place, (ingredient, source, count) in enumerate(zip(what.mix, sources, counts)):
        lanes = _even(count, -(-count // CHUNK))
        options = {"epsilon": ingredient.epsilon, **ingredient.options}
        for number, sizes in enumerate(np.array_split(lanes, -(-len(lanes) // LANES))):
            parts.append(Part(what.env_id, source, tuple(sizes.tolist()), seed, (place, number), options))
    return parts


def _assembled(results: list[Rows], spec: Spec) -> Dataset:
    obs, action, reward, terminated, truncated, lengths, last_obs, _ = map(np.concatenate, zip(*results))
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return Dataset(obs, action, reward, terminated, truncated, starts, last_obs, np.ones(len(last_obs), bool), spec)


def _measured(what: Recipe, sources: list[str], data: Dataset, parts: list[Part], results: list[Rows]) -> list[dict[str, Any]]:
    """What each policy of the mix earned, over the episodes that were not cut; None where there is none."""
    owner = np.repeat([part.key[0] for part in parts], [len(rows.lengths) for rows in results])
    complete = np.concatenate([rows.complete for rows in results])
    behaviors = []
    for place, (ingredient, source) in enumerate(zip(what.mix, sources)):
        returns = data.returns[(owner == place) & complete]
        mean = returns.mean(axis=0).tolist() if len(returns) else None
        entry = asdict(ingredient) | {"sha256": hashlib.sha256(Path(source).read_bytes()).hexdigest() if Path(source).is_file() else None}
        entry |= {"rows": int(data.lengths[owner == place].sum()), "complete_episodes": len(returns)}
        behaviors.append(entry | {"return_mean": mean, "score_mean": _score(mean, data.spec)})
    return behaviors


def _score(value: float | list[float] | None, spec: Spec) -> float | None:
    known = isinstance(value, float) and spec.ref_min is not None and spec.ref_max is not None
    return float(normalize(value, spec.ref_min, spec.ref_max)) if known else None


def _mean_return(behaviors: list[dict[str, Any]], weight: str) -> float | list[float] | None:
    """The policies' mean returns, weighted by how many rows of the data are theirs."""
    if any(b["return_mean"] is None for b in behaviors):
        return None
    return np.average([b["return_mean"] for b in behaviors], axis=0, weights=[b[weight] for b in behaviors]).tolist()


def _metadata(what: Recipe, data: Dataset, behaviors: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    mean, by_transition = _mean_return(behaviors, "rows"), transition_weighted_return(data)
    versions = {"python": platform.python_version(), "offrl": __version__}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "description": what.description,
        "algorithm_name": ", ".join(part.policy for part in what.mix),
        "offrl_build": {
            "env_id": what.env_id,
            "rows": len(data),
            "seed": seed,
            "behaviors": behaviors,
            "return_mean": mean,
            "score_mean": _score(mean, data.spec),
            "return_mean_by_transition": by_transition,
            "score_mean_by_transition": _score(by_transition, data.spec),
            "versions": versions,
        },
    }


def describe(dataset_id: str, root: str | Path | None = None) -> dict[str, Any]:
    """Who made a dataset: its env_id, rows and `behaviors`, each with policy, share, epsilon, return_mean and score_mean; and the
    means over all of them, weighted by rows. Figures are measured on the data where it was built under `root`, which then also has its own
    means by transition as `info` gives them; else they are the manifest's.

    Raises DataError for what is neither built nor embedded.
    """
    about = (minari_root() if root is None else Path(root)) / check_id(dataset_id) / "data" / "metadata.json"
    if about.is_file():
        built = json.loads(about.read_text(encoding="utf-8"))
        if "offrl_build" in built:
            return {"dataset_id": dataset_id, "description": built["description"]} | built["offrl_build"]
    what, known = recipe(dataset_id), manifest()["behaviors"]
    figures = [known.get(part.policy, {}) for part in what.mix]
    behaviors = [asdict(part) | {k: figure.get(k) for k in ("return_mean", "score_mean")} for part, figure in zip(what.mix, figures)]
    mean = _mean_return(behaviors, "share")
    spec = _scored(Spec(None, None, what.env_id), what)  # type: ignore[arg-type]
    facts = {"dataset_id": dataset_id, "env_id": what.env_id, "rows": what.rows, "description": what.description}
    return facts | {"behaviors": behaviors, "return_mean": mean, "score_mean": _score(mean, spec)}
