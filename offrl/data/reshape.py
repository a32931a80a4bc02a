"""Several datasets as one, and episodes chosen out of one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from offrl.core.space import Box
from offrl.data.dataset import DataError, Dataset


def merge(datasets: Sequence[Dataset], names: Sequence[str] = ()) -> Dataset:
    """All episodes of all datasets, in the order given; `names` stand for the datasets in messages.

    Sizes, action spaces, env_id and reference scores must be equal; bounds of observations become those around all, dataset_id is kept
    where it is equal. Raises DataError naming all that differs.
    """
    if not datasets:
        raise DataError("a merge needs at least one dataset")
    names = names or [f"dataset {i}" for i in range(len(datasets))]
    first = datasets[0]
    clashes = []
    for other, name in zip(datasets[1:], names[1:], strict=True):
        if first.spec.obs.size != other.spec.obs.size:
            clashes.append(f"observations are {first.spec.obs.size} wide in {names[0]} and {other.spec.obs.size} in {name}")
        for field in ("action", "env_id", "ref_min", "ref_max"):
            here, there = getattr(first.spec, field), getattr(other.spec, field)
            if here != there:
                clashes.append(f"{field} is {_shown(here)} in {names[0]} and {_shown(there)} in {name}")
        if first.reward.shape[1:] != other.reward.shape[1:]:
            clashes.append(f"{_objectives(first)} in {names[0]} and {_objectives(other)} in {name}")
    if clashes:
        raise DataError(f"these are not of one kind: {'; '.join(clashes)}. What a source does not say can be given when it is read")
    rows = ("obs", "action", "reward", "terminated", "truncated", "last_obs", "last_known")
    columns = {field: np.concatenate([getattr(each, field) for each in datasets]) for field in rows}
    starts = np.concatenate([[0], np.cumsum(np.concatenate([each.lengths for each in datasets]))])
    simple = all(each.next_obs is None for each in datasets)
    next_obs = None if simple else np.concatenate([each.full_next_obs() for each in datasets])
    ids = {each.spec.dataset_id for each in datasets}
    lows, highs = (zip(*(getattr(each.spec.obs, end) for each in datasets), strict=True) for end in ("low", "high"))
    spec = replace(first.spec, obs=Box(tuple(map(min, lows)), tuple(map(max, highs))), dataset_id=ids.pop() if len(ids) == 1 else None)
    return Dataset(**columns, starts=starts, next_obs=next_obs, spec=spec)


def choose(
    dataset: Dataset,
    *,
    episodes: Sequence[int] | None = None,
    first: int | None = None,
    last: int | None = None,
    min_length: int = 1,
    top: float | None = None,
) -> np.ndarray:
    """The indices, ascending, of the episodes that meet every condition, for `Dataset.subset`.

    episodes, first, last: these, so many from the start, or so many from the end. min_length: of so many rows or more. top: of what is
    left, this share (rounded up) with the highest undiscounted returns. Raises DataError where none is left, or one is not there.
    """
    if episodes is not None and (wrong := [e for e in episodes if not 0 <= e < dataset.episodes]):
        raise DataError(f"there is no episode {wrong[0]}; there are episodes 0 to {dataset.episodes - 1}")
    if min([each for each in (first, last, min_length) if each is not None]) < 1 or (top is not None and not 0 < top <= 1):
        raise DataError("first, last and min_length are whole numbers from 1, and top is a share above 0, at most 1")
    chosen = np.unique(np.arange(dataset.episodes) if episodes is None else np.asarray(episodes, np.int64))
    for part in (slice(first), slice(None if last is None else -last, None)):
        chosen = np.intersect1d(chosen, np.arange(dataset.episodes)[part])
    chosen = chosen[dataset.lengths[chosen] >= min_length]
    if len(chosen) == 0:
        raise DataError("no episode meets these conditions")
    if top is None:
        return chosen
    if dataset.reward.ndim > 1:
        raise DataError(f"which episodes are best is not said by {_objectives(dataset)}")
    best = np.argsort(-dataset.returns[chosen], kind="stable")[: math.ceil(top * len(chosen) - 1e-9)]
    return np.sort(chosen[best])


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _objectives(dataset: Dataset) -> str:
    return "one reward" if dataset.reward.ndim == 1 else f"{dataset.reward.shape[1]} objectives"
