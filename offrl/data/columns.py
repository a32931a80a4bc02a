"""What every reader hands over: named columns as they were stored. Here they are checked and become a Dataset."""

from __future__ import annotations

import difflib
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from offrl.core.space import Space
from offrl.data.dataset import DataError, Dataset

FIELDS = {  # D4RL's name -> every name it is read under
    "observations": ("observations", "obs"),
    "actions": ("actions", "action"),
    "rewards": ("rewards", "reward"),
    "terminals": ("terminals", "terminated", "terminations"),
    "timeouts": ("timeouts", "truncated", "truncations"),
    "next_observations": ("next_observations", "next_obs"),
}
OPTIONAL = ("timeouts", "next_observations")
ON_BAD = ("error", "drop", "report")


@dataclass
class Columns:
    """N rows in time order, as stored; `name` stands for the source in messages.

    ends (N,) bool marks episode ends that the format knows without a flag; last_obs (E, obs) then holds the observation
    after each of them. Only formats that store whole episodes have these two.
    """

    name: str
    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminals: np.ndarray
    timeouts: np.ndarray | None = None
    next_observations: np.ndarray | None = None
    ends: np.ndarray | None = None
    last_obs: np.ndarray | None = None
    action_space: Space | None = None
    env_id: str | None = None
    dataset_id: str | None = None
    ref_min: float | None = None
    ref_max: float | None = None

    def __len__(self) -> int:
        return len(self.observations)

    def fields(self) -> Iterator[tuple[str, np.ndarray]]:
        """The stored columns that are there, under D4RL's names."""
        return ((field, getattr(self, field)) for field in FIELDS if getattr(self, field) is not None)

    def flag(self, field: str) -> np.ndarray:
        """(N,) bool of `terminals` or `timeouts`; NaN counts as set, a missing column as never."""
        column = getattr(self, field)
        return np.zeros(len(self), bool) if column is None else column.reshape(len(self)) != 0


def pick(keys: Iterable[str], name: str) -> dict[str, str]:
    """Which of a file's `keys` holds each field. Raises DataError naming what is missing, what is there and what is near."""
    keys, found, missing = sorted(keys), {}, []
    for field, aliases in FIELDS.items():
        present = [alias for alias in aliases if alias in keys]
        if len(present) > 1:
            raise DataError(f"{name}: both {present[0]!r} and {present[1]!r} are there, and they mean the same; keep one")
        if present:
            found[field] = present[0]
        elif field not in OPTIONAL:
            near = [near[0] for alias in aliases if (near := difflib.get_close_matches(alias, keys, 1))]
            missing.append(" or ".join(map(repr, aliases)) + (f" (nearest: {near[0]!r})" if near else ""))
    if missing:
        raise DataError(f"{name}: no {', no '.join(missing)}; its keys are {', '.join(keys) or 'none'}")
    return found


def home_folder(variable: str, default: str) -> Path:
    """The folder that an environment variable names, or `default` (under ~). Raises DataError where there is no home folder."""
    named = os.environ.get(variable)
    try:
        return Path(named) if named else Path(default).expanduser()
    except RuntimeError as error:
        raise DataError(f"there is no home folder for {default}; set {variable}") from error


def budget(limit_bytes: int | None) -> tuple[float, str]:
    """How many bytes may be allocated, and in what sense: as `limit_bytes` says, else the memory available where that is known."""
    if limit_bytes is not None:
        return limit_bytes, "allowed by limit_bytes"
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), math.inf), "available"


def afford(name: str, needed: int, budget: tuple[float, str]) -> None:
    """Raises DataError where `needed` bytes are more than the budget."""
    if needed > budget[0]:
        raise DataError(f"{name}: its header claims {needed / 2**30:,.2f} GiB of arrays, and {budget[0] / 2**30:,.2f} GiB are {budget[1]}")


def cost(shape: tuple[int, ...], itemsize: int) -> int:
    """Bytes to hold an array of that header, once as stored and once as float32 where that is another size."""
    count = 1
    for size in shape:
        count *= int(size)
    return count * (itemsize if itemsize == 4 else itemsize + 4)


def checked(columns: Columns) -> Columns:
    """The same with real numbers in float32; raises DataError naming each field of another kind, length or shape."""
    n, changed, wrong = len(columns), {}, []
    for field, column in columns.fields():
        if column.dtype.kind not in "fiub":
            wrong.append(f"{field} must be numbers, not {column.dtype}")
        elif column.ndim == 0 or len(column) != n:
            wrong.append(f"{field} has {len(column) if column.ndim else 'no'} rows, observations have {n}")
        elif field in ("terminals", "timeouts") and column.size != n:
            wrong.append(f"{field} must be one flag a row, not {column.shape}")
        elif field in ("observations", "next_observations") and (column.ndim != 2 or column.shape != columns.observations.shape):
            wrong.append(f"{field} must have shape (N, size), and both kinds of observations the same one, not {column.shape}")
        elif column.dtype.kind == "f" or field in ("observations", "next_observations"):
            with np.errstate(over="ignore"):
                changed[field] = np.ascontiguousarray(column, np.float32)
    if wrong or n == 0:
        raise DataError(f"{columns.name}: {'; '.join(wrong) or 'no rows'}")
    return replace(columns, **changed)


def unflagged(columns: Columns) -> np.ndarray:
    """(N,) bool: rows that end an episode of theirs with neither flag set; all False where only flags tell."""
    if columns.ends is None:
        return np.zeros(len(columns), bool)
    return columns.ends & ~columns.flag("terminals") & ~columns.flag("timeouts")


def bad_rows(columns: Columns) -> dict[str, np.ndarray]:
    """field -> (N,) bool, for the fields of checked columns in which some row holds NaN or infinity."""
    n, bad = len(columns), {}
    for field, column in columns.fields():
        if column.dtype.kind == "f":
            rows = ~np.isfinite(column).reshape(n, -1).all(axis=1)
            if rows.any():
                bad[field] = rows
    if columns.last_obs is not None:
        wrong = ~np.isfinite(columns.last_obs).all(axis=1)
        if wrong.any():
            bad["next_observations"] = np.zeros(n, bool)
            bad["next_observations"][np.flatnonzero(columns.ends)[wrong]] = True
    return bad


def describe(bad: dict[str, np.ndarray]) -> str:
    return "; ".join(
        f"{field} has {int(rows.sum())} rows with NaN or infinity, the first is row {int(rows.argmax())}" for field, rows in bad.items()
    )


def without(columns: Columns, drop: np.ndarray) -> Columns:
    """The rows not in `drop` (N,); an episode that loses rows is cut there, and no row follows one it did not follow."""
    if columns.last_obs is not None:
        following = np.concatenate([columns.observations[1:], columns.observations[-1:]])
        following[columns.ends] = columns.last_obs
        drop = drop | ~np.isfinite(following).all(axis=1)
        columns = replace(columns, next_observations=following, last_obs=None)
    keep = ~drop
    if not keep.any():
        raise DataError(f"{columns.name}: every row holds NaN or infinity")
    ends = np.append(drop[1:], False)
    ends = ends if columns.ends is None else ends | columns.ends
    return replace(columns, **{field: column[keep] for field, column in columns.fields()}, ends=ends[keep])


def to_dataset(columns: Columns, keep_bad: bool = False) -> Dataset:
    """The Dataset of checked columns. `keep_bad` lets NaN and infinity through, for looking at them."""
    n = len(columns)
    stored = dict(columns.fields())
    clean = {k: np.nan_to_num(v, posinf=0.0, neginf=0.0) for k, v in stored.items()} if keep_bad else stored
    flags = clean.get("timeouts", np.zeros(n, bool))
    borders = flags if columns.ends is None else np.where(columns.ends, 1, flags.reshape(n))
    names = ("action_space", "env_id", "dataset_id", "ref_min", "ref_max", "name")
    fields = (clean[k] for k in ("observations", "actions", "rewards", "terminals"))
    dataset = Dataset.from_arrays(*fields, borders, clean.get("next_observations"), **{k: getattr(columns, k) for k in names})
    if columns.ends is not None:
        dataset = replace(dataset, truncated=flags.reshape(n).astype(bool))
    if columns.last_obs is not None:
        if dataset.episodes != len(columns.last_obs):
            raise DataError(f"{columns.name}: {dataset.episodes} episodes end by their flags, {len(columns.last_obs)} are stored")
        dataset = replace(dataset, last_obs=columns.last_obs, last_known=np.ones(dataset.episodes, bool))
    if keep_bad and (following := stored.get("next_observations")) is not None:
        last = dataset.starts[1:] - 1
        dataset = replace(dataset, last_obs=following[last], next_obs=None if dataset.next_obs is None else following)
    if keep_bad:
        float_actions = {"action": stored["actions"].reshape(dataset.action.shape)} if dataset.action.dtype.kind == "f" else {}
        dataset = replace(dataset, obs=stored["observations"], reward=stored["rewards"].reshape(dataset.reward.shape), **float_actions)
    return dataset


def settle(columns: Columns, on_bad: str) -> tuple[Columns, bool]:
    """Checked columns after `on_bad` had its say, and whether some NaN or infinity is still inside."""
    bad = bad_rows(columns)
    if not bad:
        return columns, False
    if on_bad == "error":
        raise DataError(f"{columns.name}: {describe(bad)}; on_bad='drop' leaves those rows out")
    if on_bad == "report":
        warnings.warn(f"{columns.name}: {describe(bad)}; kept", stacklevel=3)
        return columns, True
    rest = without(columns, np.logical_or.reduce(list(bad.values())))
    lost = len(columns) - len(rest)
    warnings.warn(f"{columns.name}: {describe(bad)}; {lost} of {len(columns)} rows dropped, episodes cut there", stacklevel=3)
    return rest, False
