"""Datasets to files: NPZ, HDF5 in D4RL's layout, Minari folders. Each appears under its name whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5a, h5d, h5g, h5p, h5s, h5t

from offrl.core.space import Box, Discrete, Space
from offrl.data.dataset import DataError, Dataset
from offrl.data.minari import SERIES, check_id, minari_root

MINARI_VERSION = "0.5.0"  # the oldest version of the layout written here: every Minari from 0.5.0 on reads it


def save_minari(
    dataset: Dataset,
    dataset_id: str,
    root: Path | None = None,
    *,
    env_spec_json: str | None,
    metadata: dict[str, Any],
    overwrite: bool = False,
) -> Path:
    """Writes `<root>/<dataset_id>/data` as Minari 0.5 lays it out and returns `<root>/<dataset_id>`; root is Minari's own by default.

    `env_spec_json` is `gymnasium.spec(env_id).to_json()`, from which Minari makes the environment again. `metadata` is added to
    metadata.json: Minari's own words (author, algorithm_name, description, ...) and any other JSON values. An unterminated episode
    whose last observation is unknown loses its last row, with a warning: Minari stores T + 1 observations. Raises DataError for an id
    that Minari would not read, metadata that is set here, or next observations that are not the row below; FileExistsError where the
    dataset is there already, unless `overwrite`.
    """
    root = minari_root() if root is None else Path(root)
    target = root / check_id(dataset_id)
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} is there already; overwrite=True replaces it")
    if dataset.next_obs is not None:
        raise DataError(f"{dataset_id}: some next observations are not the row below, which Minari cannot hold; save_d4rl and save_npz can")
    about = _about(dataset, dataset_id, env_spec_json)
    if clash := sorted(set(about) & set(metadata)):
        raise DataError(f"{dataset_id}: {', '.join(clash)} in metadata.json follow from the dataset and cannot be given")
    authors = {key: [value] for key in ("author", "author_email") if isinstance(value := metadata.get(key), str)}
    with new_folder(target, root) as temporary:
        (temporary / "data").mkdir()
        steps, episodes = _write_episodes(dataset, temporary / "data" / "main_data.hdf5")
        about |= {"total_steps": steps, "total_episodes": episodes}
        about["dataset_size"] = round((temporary / "data" / "main_data.hdf5").stat().st_size / 1e6, 1)
        _write_json(temporary / "data" / "metadata.json", about | metadata | authors)
        add_namespaces(target, root)
    return target


def add_namespaces(target: Path, root: Path) -> None:
    """The file that Minari wants in each folder between its root and a dataset, where there is none."""
    for parent in list(target.relative_to(root).parents)[:-1]:
        namespace = root / parent / "namespace_metadata.json"
        if not namespace.exists():
            namespace.parent.mkdir(parents=True, exist_ok=True)
            _write_json(namespace, {})


def save_npz(dataset: Dataset, path: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Writes an archive that `load_dataset` reads back: obs, action, reward, terminated, truncated, next_obs. Returns its path."""
    with _file(Path(path), overwrite) as temporary, temporary.open("wb") as file:
        names = ("obs", "action", "reward", "terminated", "truncated", "next_obs")
        np.savez_compressed(file, **dict(zip(names, _rows(dataset, path), strict=False)))
    return Path(path)


def save_d4rl(dataset: Dataset, path: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Writes HDF5 in D4RL's layout with both flags and `next_observations`; attributes name the environment and the action bounds."""
    spec = dataset.spec
    names = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
    with _file(Path(path), overwrite) as temporary, h5py.File(temporary, "w") as file:
        for name, column in zip(names, _rows(dataset, path), strict=False):
            file.create_dataset(name, data=column, compression="gzip", compression_opts=4, shuffle=True, fletcher32=True)
        if spec.env_id is not None:
            file.attrs["env_id"] = spec.env_id
        if isinstance(spec.action, Box) and spec.action.bounded:
            file.attrs.update(action_low=spec.action.low, action_high=spec.action.high)
    return Path(path)


def _about(dataset: Dataset, dataset_id: str, env_spec_json: str | None) -> dict[str, Any]:
    spec = dataset.spec
    about = {"data_format": "hdf5", "dataset_id": dataset_id, "minari_version": MINARI_VERSION}
    about |= dict.fromkeys(("total_steps", "total_episodes", "dataset_size"), 0)  # known when the episodes are written
    about |= {"observation_space": _space_json(spec.obs), "action_space": _space_json(spec.action)}
    if env_spec_json is not None:
        about["env_spec"] = env_spec_json
    elif spec.env_id is not None:
        about["env_id"] = spec.env_id
    return about | {key: value for key, value in (("ref_min_score", spec.ref_min), ("ref_max_score", spec.ref_max)) if value is not None}


def _space_json(space: Space) -> str:
    if isinstance(space, Discrete):
        return json.dumps({"type": "Discrete", "dtype": "int64", "start": 0, "n": space.n})
    return json.dumps({"type": "Box", "dtype": "float32", "shape": [space.size], "low": space.low, "high": space.high})


def _write_episodes(dataset: Dataset, path: Path) -> tuple[int, int]:
    """Steps and episodes written. The low-level calls take half the time of h5py's own; short episodes are nothing but calls."""
    last = dataset.starts[1:] - 1
    lengths = dataset.lengths - (~dataset.last_known & ~dataset.terminated[last])
    if cut := int((lengths < dataset.lengths).sum()):
        warnings.warn(f"{cut} episodes lose their last row, whose next observation is not known", stacklevel=3)
    if not lengths.any():
        raise DataError("no row has a known next observation, and Minari stores the one after the last step of each episode")
    columns = dict(zip(SERIES[1:], (dataset.action, dataset.reward, dataset.terminated, dataset.truncated), strict=True))
    types = {dtype: h5t.py_create(dtype, logical=True) for dtype in {c.dtype for c in columns.values()} | {dataset.obs.dtype}}
    plan, scalar, written = h5p.create(h5p.DATASET_CREATE), h5s.create(h5s.SCALAR), 0
    plan.set_fill_time(h5d.FILL_TIME_NEVER)

    def put(group: h5g.GroupID, name: str, value: np.ndarray) -> None:
        kind = types[value.dtype]
        h5d.create(group, name.encode(), kind, h5s.create_simple(value.shape), plan).write(h5s.ALL, h5s.ALL, value, kind)

    with h5py.File(path, "w") as file:
        for e, length in enumerate(lengths):
            if length == 0:
                continue
            start, stop = dataset.starts[e], dataset.starts[e] + length
            group = h5g.create(file.id, b"episode_%d" % written)
            for name, value in (("id", written), ("total_steps", length)):
                h5a.create(group, name.encode(), h5t.NATIVE_INT64, scalar).write(np.asarray(value, np.int64), h5t.NATIVE_INT64)
            after = dataset.last_obs[e : e + 1] if length == dataset.lengths[e] else dataset.obs[stop : stop + 1]
            put(group, "observations", np.concatenate([dataset.obs[start:stop], after]))
            for name, column in columns.items():
                put(group, name, np.ascontiguousarray(column[start:stop]))
            h5g.create(group, b"infos")
            written += 1
    return int(lengths.sum()), written


def _rows(dataset: Dataset, path: str | os.PathLike[str]) -> tuple[np.ndarray, ...]:
    """obs, action, reward, terminated, truncated and, where it is known, next_obs, for a file of rows.

    Rows alone cannot say that an episode was cut where no flag is set, so the cut is written as a time limit. Where only some
    successors are known, rows without one are left out, with a warning.
    """
    last = dataset.starts[1:] - 1
    truncated = dataset.truncated.copy()
    truncated[last[:-1]] |= ~dataset.terminated[last[:-1]]
    columns = (dataset.obs, dataset.action, dataset.reward, dataset.terminated, truncated)
    if dataset.next_obs is None and not dataset.last_known.any():
        return columns
    unknown = last[~dataset.last_known & ~dataset.terminated[last]]
    if len(unknown) == 0:
        return (*columns, dataset.full_next_obs())
    warnings.warn(f"{path}: {len(unknown)} rows whose next observation is not known are left out", stacklevel=3)
    before = unknown[unknown > dataset.starts[:-1][np.searchsorted(last, unknown)]] - 1
    truncated[before] = True
    return tuple(np.delete(column, unknown, axis=0) for column in (*columns, dataset.full_next_obs()))


@contextlib.contextmanager
def new_folder(target: Path, root: Path) -> Iterator[Path]:
    """A hidden folder to fill; it takes the target's place when all went well, and leaves no trace when not."""
    root.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".offrl-", dir=root))
    try:
        (temporary / "new").mkdir()
        yield temporary / "new"
        for file in (temporary / "new").rglob("*"):
            _sync(file)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            target.rename(temporary / "old")
        try:
            (temporary / "new").rename(target)
        except OSError:
            if (temporary / "old").exists():
                (temporary / "old").rename(target)
            raise
        _sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _file(path: Path, overwrite: bool) -> Iterator[Path]:
    """A hidden file to write, in the same folder; it takes the path's place when all went well, and leaves no trace when not."""
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already; overwrite=True replaces it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".offrl-{secrets.token_hex(8)}.tmp")  # not mkstemp's, which nobody else may read
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
