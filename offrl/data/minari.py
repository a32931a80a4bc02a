"""Minari datasets (the HDF5 layout of Minari 0.5), read without minari, gymnasium or an environment.

A dataset is a folder `<root>/<id>/data` with `metadata.json` and `main_data.hdf5`; episode i of T steps is a group `episode_<i>` of
T + 1 observations and T actions, rewards, terminations and truncations.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5d, h5g, h5s

from offrl.core.space import Box, Discrete, Space
from offrl.data import cache
from offrl.data.columns import Columns, afford, budget, cost, home_folder
from offrl.data.dataset import DataError
from offrl.data.hdf5 import opened, own

ID = re.compile(r"(?![A-Za-z0-9_-]/[^/]*$)(?:[A-Za-z0-9_-]+/)*[A-Za-z0-9_-]+-v\d{1,9}", re.ASCII)
SERIES = ("observations", "actions", "rewards", "terminations", "truncations")


def check_id(dataset_id: str) -> str:
    """The id itself; raises DataError where it is not one that Minari takes, or not plain ASCII of a sane length."""
    if len(dataset_id) > 200 or not ID.fullmatch(dataset_id):
        shown = repr(dataset_id if len(dataset_id) <= 80 else dataset_id[:80] + "...")
        raise DataError(f"{shown} is no dataset id; those are written namespace/name-v0, in ASCII letters, digits, - and _")
    return dataset_id


def minari_root() -> Path:
    """$MINARI_DATASETS_PATH, or ~/.minari/datasets."""
    return home_folder("MINARI_DATASETS_PATH", "~/.minari/datasets")


def read_minari(folder: Path, limit_bytes: int | None = None) -> Columns:
    """The columns of a dataset folder, or of the `data` folder in it; `ends` and `last_obs` say where its episodes end.

    The first reading leaves the columns in the cache (see data/cache.py). Raises DataError where the folder is half written, or holds
    observations that are not a Box or actions that are neither a Box nor Discrete.
    """
    data = _data(folder)
    if data is None:
        raise DataError(f"{folder}: no data/metadata.json in it; a folder whose writing was interrupted is not read")
    about = _metadata(data / "metadata.json")
    if about.get("data_format", "hdf5") != "hdf5":
        raise DataError(f"{folder}: its data is in the {about['data_format']} format, and hdf5 is the one that is read")
    observations = _space(about, "observation_space", folder)
    if isinstance(observations, Discrete):
        raise DataError(f"{folder}: its observations are a Discrete space, and Box is the one that is read")
    main = data / "main_data.hdf5"
    if not main.is_file():
        raise DataError(f"{folder}: no data/main_data.hdf5 in it; a folder whose writing was interrupted is not read")
    kept, room = cache.entry(main), budget(limit_bytes)
    if kept is not None and kept.is_file():
        afford(str(folder), kept.stat().st_size, room)
    arrays = cache.recall(main)
    if arrays is None:
        arrays = _read(main, about.get("total_episodes"), room)
        cache.remember(main, arrays)
    dataset_id = about.get("dataset_id")
    scores = [float(s) if isinstance(s := about.get(key), int | float) else None for key in ("ref_min_score", "ref_max_score")]
    return Columns(
        str(folder), **arrays, action_space=_space(about, "action_space", folder), env_id=_env_id(about),
        dataset_id=dataset_id if isinstance(dataset_id, str) else None, ref_min=scores[0], ref_max=scores[1],
    )  # fmt: skip


def _data(folder: Path) -> Path | None:
    return next((data for data in (folder / "data", folder) if (data / "metadata.json").is_file()), None)


def _metadata(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a JSON object")
    return value


def _space(about: dict[str, Any], key: str, folder: Path) -> Space | None:
    if key not in about:
        return None
    try:
        value = json.loads(about[key])
        kind = value["type"]
        if kind == "Discrete" and value["start"] == 0:
            return Discrete(int(value["n"]))
        if kind == "Box":
            return Box.of(int(np.prod(value["shape"])), value["low"], value["high"])
    except (TypeError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: {key} in metadata.json cannot be read ({error!r})") from error
    inside = f" of {', '.join(value['subspaces'])}" if isinstance(value.get("subspaces"), dict) else ""
    kind = f"Discrete from {value['start']}" if kind == "Discrete" else kind
    raise DataError(f"{folder}: its {key} is {kind}{inside}; Box observations and Box or Discrete (from 0) actions are what is read")


def _env_id(about: dict[str, Any]) -> str | None:
    try:
        value = json.loads(about["env_spec"])["id"]
    except (KeyError, TypeError, ValueError):
        value = about.get("env_id")
    return value if isinstance(value, str) else None


def _read(main: Path, count: Any, room: tuple[float, str]) -> dict[str, np.ndarray]:
    with opened(main) as file:
        if count != len(file) or not count:
            raise DataError(f"{main}: metadata.json counts {count} episodes, the file holds {len(file)}; its writing was interrupted")
        parts: dict[str, list[np.ndarray]] = {key: [] for key in SERIES}
        needed = 0
        for i in range(count):
            episode = _episode(file, main, i)
            steps = _steps(main, i, {key: series.shape for key, (series, _) in episode.items()})
            needed += sum(cost(series.shape, dtype.itemsize) for series, dtype in episode.values())
            afford(str(main), needed, room)
            for key, (series, dtype) in episode.items():
                array = np.empty(series.shape, dtype)
                series.read(h5s.ALL, h5s.ALL, array)
                array = array.reshape(len(array), -1) if key == "observations" or array.ndim > 2 else array
                if parts[key] and parts[key][0].shape[1:] != array.shape[1:]:
                    raise DataError(
                        f"{main}: {key} of episode {i} are {array.shape[1:]} wide, those of episode 0 {parts[key][0].shape[1:]}"
                    )
                parts[key].append(array)
            for key in SERIES[3:]:
                if parts[key][-1][: steps - 1].any():
                    raise DataError(f"{main}: episode {i} goes on after its {key} end it at step {int(parts[key][-1].argmax())}")
    return _columns(parts)


def _episode(file: h5py.File, main: Path, i: int) -> dict[str, tuple[h5d.DatasetID, np.dtype]]:
    """Its series and their types, none of it stored in another file. Low-level calls: short episodes cost nothing but calls."""
    found, missing = {}, "group"
    try:
        group = h5g.open(file.id, b"episode_%d" % i)
        for missing in SERIES:
            series = h5d.open(group, missing.encode())
            found[missing] = (series, series.dtype)
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{main}: episode {i} has no {missing}; its writing was interrupted, or they are stored as a dictionary") from error
    for key, (series, dtype) in found.items():
        plan = series.get_create_plist()
        if plan.get_layout() == h5d.VIRTUAL or plan.get_external_count() or dtype.kind not in "fiub":
            own(h5py.Dataset(series), main, f"{key} of episode {i}")
    return found


def _steps(main: Path, i: int, shapes: dict[str, tuple[int, ...]]) -> int:
    steps = shapes["rewards"][0] if shapes["rewards"] else 0
    rows = {key: shape[0] if shape else 0 for key, shape in shapes.items()}
    if steps == 0:
        raise DataError(f"{main}: episode {i} has no steps")
    if rows != dict.fromkeys(SERIES, steps) | {"observations": steps + 1}:
        listed = ", ".join(f"{rows[key]} {key}" for key in SERIES)
        raise DataError(f"{main}: episode {i} has {listed}; there must be one observation more than steps and one of each other a step")
    return steps


def _columns(parts: dict[str, list[np.ndarray]]) -> dict[str, np.ndarray]:
    lengths = np.array([len(rewards) for rewards in parts["rewards"]])
    observations = parts.pop("observations")
    columns = {key: np.concatenate(arrays) for key, arrays in parts.items()}
    columns["terminals"], columns["timeouts"] = columns.pop("terminations"), columns.pop("truncations")
    columns["observations"] = np.concatenate([o[:-1] for o in observations])
    columns["last_obs"] = np.stack([o[-1] for o in observations])
    columns["ends"] = np.zeros(len(columns["rewards"]), bool)
    columns["ends"][np.cumsum(lengths) - 1] = True
    floats = {
        key: column.astype(np.float32) for key, column in columns.items() if column.dtype.kind == "f" or key in ("observations", "last_obs")
    }
    return columns | floats
