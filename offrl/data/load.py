"""One `load_dataset` for every source: D4RL files and ids, Minari folders and ids, NPZ archives, plain arrays."""

from __future__ import annotations

import difflib
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from offrl.core.space import Box, Discrete, Space, from_gym
from offrl.data.columns import ON_BAD, Columns, checked, home_folder, pick, settle, to_dataset, unflagged
from offrl.data.d4rl import qlearning
from offrl.data.dataset import DataError, Dataset
from offrl.data.hdf5 import read_hdf5
from offrl.data.minari import check_id, minari_root, read_minari
from offrl.data.npz import read_npz
from offrl.envs import scores

URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"
SEMANTICS = ("strict", "d4rl")
# Tasks whose actions are [-1, 1] in every entry: MuJoCo's robots, and Adroit as D4RL and gymnasium-robotics scale it.
_UNIT_ACTIONS = re.compile(r"(hopper|halfcheetah|walker2d|ant|adroithand(door|hammer|pen|relocate)|door|hammer|pen|relocate)-.*")


def load_dataset(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    semantics: str | None = None,
    action_space: Any = None,
    env_id: str | None = None,
    on_bad: str = "error",
    limit_bytes: int | None = None,
) -> Dataset:
    """The dataset that `source` names.

    source: a path (HDF5 in D4RL's layout, NPZ, a Minari folder); a D4RL id (`hopper-medium-v2`, a file in $D4RL_DATASET_DIR or
    ~/.d4rl/datasets); a Minari id (`mujoco/hopper/medium-v0`, a folder in $MINARI_DATASETS_PATH or ~/.minari/datasets), an `offrl/...`
    id among them; or a mapping of arrays under the names of an NPZ.
    semantics: "strict" keeps every row, the stored next observations and both kinds of ends; "d4rl" gives D4RL's own
    `qlearning_dataset`, and is what a D4RL id means unless said otherwise.
    action_space: "discrete:N", "continuous", "box:LOW,HIGH" or a space, needed where actions are integers.
    env_id: the environment, where the source does not say; it selects the reference scores.
    on_bad: what NaN and infinity do: "error"; "drop" those rows, cutting their episodes there; "report" them and keep them.
    limit_bytes: refuse sources that claim to be larger; by default, than the memory available.

    Raises DataError naming the source and what is wrong with it.
    """
    if semantics not in (None, *SEMANTICS):
        raise ValueError(f"semantics is {' or '.join(SEMANTICS)}, not {semantics!r}")
    if on_bad not in ON_BAD:
        raise ValueError(f"on_bad is {', '.join(ON_BAD)}, not {on_bad!r}")
    columns, kept = prepare(source, action_space, env_id, limit_bytes), False
    if open_ends := int(unflagged(columns).sum()):
        warnings.warn(
            f"{columns.name}: {open_ends} of {columns.ends.sum()} episodes end without a flag; taken as cut off there", stacklevel=2
        )
    as_d4rl = semantics == "d4rl" or (semantics is None and columns.dataset_id in scores.d4rl())
    if on_bad == "error" or not as_d4rl:
        columns, kept = settle(columns, on_bad)
    if as_d4rl:  # before rows are dropped: the row below must be the file's
        columns, kept = settle(qlearning(columns), on_bad)
    return to_dataset(columns, kept)


def prepare(source: Any, action_space: Any = None, env_id: str | None = None, limit_bytes: int | None = None) -> Columns:
    """The columns of a source before NaN is looked for: checked for kinds and lengths, with the space and scores that are known."""
    columns = checked(read(source, limit_bytes))
    if env_id is not None:
        columns.env_id = env_id
    if action_space is not None:
        columns.action_space = _space(action_space, int(np.prod(columns.actions.shape[1:])))
    return _complete(columns)


def read(source: str | os.PathLike[str] | Mapping[str, Any], limit_bytes: int | None = None) -> Columns:
    """The columns of a source as they are stored; see `load_dataset`."""
    if isinstance(source, Mapping):
        arrays = {field: np.asarray(source[key]) for field, key in pick(source, "arrays").items()}
        return Columns("arrays", **arrays)
    text = os.fsdecode(source)
    if not text or "\0" in text:
        raise DataError(f"{text!r} names no dataset")
    if text in scores.d4rl():
        return replace(_read_file(_d4rl_path(text), limit_bytes), dataset_id=text)
    path = Path(text)
    if os.path.exists(text):  # Path.exists raises for names that are too long
        return _read_file(path, limit_bytes)
    if path.suffix in (".hdf5", ".h5", ".npz"):
        raise DataError(f"{text}: no such file{_nearest(path.name, _names(path.parent))}")
    folder = _minari_path(text)
    return replace(read_minari(folder, limit_bytes), dataset_id=text)


def parse_action_space(text: str, size: int) -> Space:
    """`discrete:N`, `continuous` (no bounds) or `box:LOW,HIGH` (the same bounds for each of the `size` entries)."""
    if match := re.fullmatch(r"discrete:([1-9]\d{0,8})", text):
        return Discrete(int(match[1]))
    if text == "continuous":
        return Box.of(size)
    number = r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"
    if (match := re.fullmatch(rf"box:{number},{number}", text)) and float(match[1]) < float(match[2]):
        return Box.of(size, float(match[1]), float(match[2]))
    raise DataError(f"an action space is discrete:N, continuous or box:LOW,HIGH with LOW < HIGH, not {text!r}")


def _space(value: Any, size: int) -> Space:
    if isinstance(value, str):
        return parse_action_space(value, size)
    return value if isinstance(value, Box | Discrete) else from_gym(value)


def _complete(columns: Columns) -> Columns:
    """The same with the reference scores and action bounds that its dataset id or environment id stands for."""
    names = [name for name in (columns.env_id, columns.dataset_id) if name is not None]
    changed: dict[str, Any] = {}
    if columns.action_space is None and any(_UNIT_ACTIONS.fullmatch(name.lower()) for name in names):
        changed["action_space"] = Box.of(int(np.prod(columns.actions.shape[1:])), -1, 1)
    if columns.ref_min is None or columns.ref_max is None:
        for name in names:
            try:
                changed["ref_min"], changed["ref_max"] = scores.reference(name)
                break
            except scores.UnknownScore:
                continue
    return replace(columns, **changed)


def _d4rl_path(dataset_id: str) -> Path:
    url = URL + scores.d4rl()[dataset_id]["url_path"]
    path = home_folder("D4RL_DATASET_DIR", "~/.d4rl/datasets") / url.rsplit("/", 1)[1]
    if not path.is_file():
        raise DataError(
            f"{dataset_id} is not on this machine: download {url} to {path} (the folder is $D4RL_DATASET_DIR, or ~/.d4rl/datasets)"
        )
    return path


def _read_file(path: Path, limit_bytes: int | None) -> Columns:
    if path.is_dir():
        return read_minari(path, limit_bytes)
    if not path.is_file():
        raise DataError(f"{path}: not a regular file")
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error.strerror})") from error
    if not start:
        raise DataError(f"{path}: the file is empty")
    if start.startswith(b"PK"):
        return read_npz(path, limit_bytes)
    if start == b"\x89HDF\r\n\x1a\n" or h5py.is_hdf5(path):
        return read_hdf5(path, limit_bytes)
    raise DataError(f"{path}: neither an HDF5 file nor an NPZ archive (it starts with {start!r})")


def _minari_path(text: str) -> Path:
    from offrl.data.build import embedded

    known = [*scores.d4rl(), *embedded(), *installed()]
    try:
        folder = minari_root() / check_id(text)
    except DataError as error:
        raise DataError(f"{error}, and there is no such file{_nearest(text, known)}") from None
    if folder.is_dir():
        return folder
    if text in embedded():
        raise DataError(f"{text} is not built yet: `offrl data build {text}` puts it into {folder}")
    if "/" in text and not text.startswith("offrl/"):
        way = f"`minari download {text}`, after `pip install 'minari[hf]'`, puts it into {folder}"
        raise DataError(f"{text} is not on this machine: {way}{_nearest(text, known)}")
    raise DataError(f"{text!r} is neither a file nor a known dataset, nor is it in {folder.parent}{_nearest(text, known)}")


def installed() -> list[str]:
    """The ids of the Minari datasets, `offrl/...` among them, on this machine."""
    root = minari_root()
    return sorted(str(data.parent.parent.relative_to(root)) for data in root.glob("**/data/metadata.json")) if root.is_dir() else []


def _names(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()] if folder.is_dir() else []


def _nearest(text: str, known: list[str]) -> str:
    near = difflib.get_close_matches(text, known, n=3)
    return f"; the nearest: {', '.join(near)}" if near else ""
