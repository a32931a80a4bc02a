"""A Dataset as one flat file a column, mapped into memory when it is opened: what data larger than memory is trained from.

A store is a folder with `index.json`, written last, in a folder of another name that takes its own when all is on the disk: what a full
disk or a kill leaves behind is never taken for a store. The index holds each column's type and shape and the dataset's fingerprint,
which is compared at each opening.
"""

from __future__ import annotations

import json
import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from offrl.core.types import Spec
from offrl.data.dataset import DataError, Dataset

FORMAT = 1
BLOCK = 1 << 24  # bytes copied at once
COLUMNS = tuple(each.name for each in fields(Dataset) if each.name != "spec")


class StoreError(Exception):
    """The folder is no store, or a damaged one; one line that says why."""


class Writer:
    """Makes a folder and fills it with the columns of datasets, one behind the other, in bounded memory; `close` makes it a store."""

    def __init__(self, folder: Path):
        folder.mkdir()
        self.folder, self.rows, self.episodes = folder, 0, 0
        self.spec: Spec | None = None
        self.next_obs = False  # whether some next observation is not the row below
        self.kinds: dict[str, tuple[str, tuple[int, ...]]] = {}

    def add(self, data: Dataset) -> None:
        columns = {name: getattr(data, name) for name in COLUMNS}
        columns["starts"] = data.starts[:-1] + self.rows
        if data.next_obs is not None and not self.next_obs:
            self._keep_next_obs(data.next_obs)
        if self.next_obs:
            columns["next_obs"] = data.full_next_obs()
        for name, column in columns.items():
            if column is not None:
                self._append(name, column)
        self.rows, self.episodes, self.spec = self.rows + len(data), self.episodes + data.episodes, data.spec

    def close(self, **about: Any) -> None:
        """Seals the store. Raises DataError where it holds no row."""
        if self.spec is None:
            raise DataError("no rows")
        self._append("starts", np.array([self.rows], np.int64))
        for name in self.kinds:
            sync(self.folder / f"{name}.bin")
        index = {"format": FORMAT, "spec": self.spec.to_json(), "columns": self._shapes()} | about
        data = _dataset(self.folder, index)
        (self.folder / "index.json").write_text(json.dumps(index | {"fingerprint": data.fingerprint}, indent=1), encoding="utf-8")
        sync(self.folder / "index.json")
        sync(self.folder)

    def _append(self, name: str, column: np.ndarray) -> None:
        kind = (column.dtype.str, column.shape[1:])
        if self.kinds.setdefault(name, kind) != kind:
            raise DataError(f"{name} are {kind[0]} {kind[1]} after {self.rows} rows of {self.kinds[name][0]} {self.kinds[name][1]}")
        with (self.folder / f"{name}.bin").open("ab") as file:
            file.write(np.ascontiguousarray(column).reshape(-1).view(np.uint8).data)

    def _shapes(self) -> dict[str, list[Any]]:
        lengths = {"starts": self.episodes + 1, "last_obs": self.episodes, "last_known": self.episodes}
        return {name: [dtype, [lengths.get(name, self.rows), *shape]] for name, (dtype, shape) in self.kinds.items()}

    def _keep_next_obs(self, like: np.ndarray) -> None:
        """From now on all next observations are kept: so far each was the row below, or the episode's last."""
        self.next_obs = True
        if self.rows == 0:
            return
        shapes = self._shapes() | {"starts": ["<i8", [self.episodes]]}
        obs, last_obs, starts = (_map(self.folder, name, *shapes[name]) for name in ("obs", "last_obs", "starts"))
        last = np.append(starts[1:], self.rows) - 1
        step = max(1, BLOCK // like[:1].nbytes)
        for row in range(0, self.rows, step):
            stop = min(row + step, self.rows)
            following = np.empty((stop - row, *like.shape[1:]), like.dtype)
            below = obs[row + 1 : stop + 1]
            following[: len(below)] = below
            first, end = np.searchsorted(last, (row, stop))
            following[last[first:end] - row] = last_obs[first:end]
            self._append("next_obs", following)


def open_store(folder: Path) -> tuple[Dataset, dict[str, Any]]:
    """The dataset, its columns mapped, and the index. Raises StoreError where the folder is not whole or not as it was written."""
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise StoreError(f"{folder} is of format {index['format']}, and {FORMAT} is the one that is read")
        data = _dataset(folder, index)
        whole = data.fingerprint == index["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{folder} is not a whole store ({error})") from error
    if not whole:
        raise StoreError(f"{folder} is damaged: its columns are not those that were written")
    return data, index


def in_memory(data: Dataset) -> Dataset:
    """The same dataset with its mapped columns copied into memory."""
    columns = {name: getattr(data, name) for name in COLUMNS}
    return replace(data, **{name: np.array(column) for name, column in columns.items() if isinstance(column, np.memmap)})


def _dataset(folder: Path, index: dict[str, Any]) -> Dataset:
    columns = {name: _map(folder, name, dtype, shape) for name, (dtype, shape) in index["columns"].items() if name in COLUMNS}
    return Dataset(**columns, spec=Spec.from_json(index["spec"]))


def _map(folder: Path, name: str, dtype: str, shape: list[int]) -> np.ndarray:
    return np.memmap(folder / f"{name}.bin", np.dtype(dtype), "r", shape=tuple(shape))


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
