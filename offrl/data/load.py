"""One `load_dataset` for every source: D4RL files and ids, Minari folders and ids, NPZ archives, tables, plain arrays."""

from __future__ import annotations

import difflib
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from offrl.core.space import Box, Discrete, Space, from_gym
from offrl.data.about import SAID, described, parse_action_space
from offrl.data.assemble import Pieces
from offrl.data.cache import CacheError, Entry, files
from offrl.data.columns import ON_BAD, Columns, afford, available_memory, budget, checked, cost, home_folder, pick
from offrl.data.dataset import DataError, Dataset
from offrl.data.hdf5 import open_hdf5
from offrl.data.minari import check_id, minari_root, read_minari
from offrl.data.npz import open_npz
from offrl.data.store import in_memory
from offrl.data.table import TableColumns, find_columns, is_table, open_table
from offrl.envs import scores

URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"
SEMANTICS = ("strict", "d4rl")
MEMORY = ("auto", "ram", "map")
TRAINING = 4  # times its columns: what training on a dataset takes that is in memory
RATIO = 100  # times its size: more is not in a file of real measurements, compressed as it may be
# Tasks whose actions are [-1, 1] in every entry: MuJoCo's robots, and Adroit as D4RL and gymnasium-robotics scale it.
_UNIT_ACTIONS = re.compile(r"(hopper|halfcheetah|walker2d|ant|adroithand(door|hammer|pen|relocate)|door|hammer|pen|relocate)-.*")


def load_dataset(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    semantics: str | None = None,
    action_space: Any = None,
    env_id: str | None = None,
    columns: TableColumns | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    on_bad: str = "error",
    limit_bytes: int | None = None,
    memory: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """The dataset that `source` names.

    source: a path (HDF5 in D4RL's layout, NPZ, CSV, Parquet, a Minari folder); a D4RL id (`hopper-medium-v2`, a file in
    $D4RL_DATASET_DIR or ~/.d4rl/datasets); a Minari id (`mujoco/hopper/medium-v0`, a folder in $MINARI_DATASETS_PATH or
    ~/.minari/datasets), an `offrl/...` id among them; or a mapping of arrays under the names of an NPZ.
    semantics: "strict" keeps every row, the stored next observations and both kinds of ends; "d4rl" gives D4RL's own
    `qlearning_dataset`, and is what a D4RL id means unless said otherwise.
    action_space: "discrete:N", "continuous", "box:LOW,HIGH" or a space, needed where actions are integers.
    env_id: the environment, where the source does not say; it selects the reference scores.
    columns: what the columns of a CSV or Parquet file are, a `TableColumns`, a mapping of its fields, or a YAML file of them; by
    default, the YAML file beside it, of the same name.
    on_bad: what NaN and infinity do: "error"; "drop" those rows, cutting their episodes there; "report" them and keep them.
    limit_bytes: refuse sources that claim to be larger.
    memory: "ram" reads all of it into memory; "map" keeps its columns in files under $OFFRL_CACHE (or ~/.cache/offrl), made once and
    mapped from then on, in bounded memory as long as one episode fits; "auto" maps what training could not hold in memory.
    progress: called with the rows read and their number, where there is more than one block to read.

    Raises DataError naming the source and what is wrong with it.
    """
    for name, value, known in (("semantics", semantics, (None, *SEMANTICS)), ("on_bad", on_bad, ON_BAD), ("memory", memory, MEMORY)):
        if value not in known:
            raise ValueError(f"{name} is {', '.join(map(str, known))}, not {value!r}")
    place = locate(source, columns)
    as_d4rl = semantics == "d4rl" or (semantics is None and place.dataset_id in scores.d4rl())
    reading = {"d4rl": as_d4rl, "action_space": repr(action_space), "env_id": env_id, "on_bad": on_bad, "id": place.dataset_id}
    reading |= {} if place.table is None else {"columns": asdict(place.table)}
    entry = _entry(place, reading)
    found = entry and entry.recall()
    if found is None:
        with opened(place, limit_bytes, gaps=on_bad != "error") as raw:
            stored = prepared(raw, action_space, env_id)
            found = _read(stored, Pieces(stored, as_d4rl, on_bad, progress), entry, _maps(stored, memory, limit_bytes))
    data, about = found
    for remark in about["remarks"]:
        warnings.warn(remark, stacklevel=2)
    stays = memory == "map" or (memory == "auto" and TRAINING * data.nbytes > available_memory())
    if data.mapped and (limit_bytes is not None or not stays):
        afford(place.name, data.nbytes, budget(limit_bytes))
    return data if stays or not data.mapped else in_memory(data)


def _read(columns: Columns, pieces: Pieces, entry: Entry | None, mapped: bool) -> tuple[Dataset, dict[str, Any]]:
    """The dataset, its columns mapped files where it is `mapped` or slow to read again, and what is to be said of it."""
    if mapped and entry is None:
        raise DataError(f"{columns.name} is larger than memory, and there is no home folder for its mapped files; set OFFRL_CACHE")
    if entry is not None and (mapped or columns.slow):
        try:
            return entry.build(pieces, pieces.about, columns.cost)
        except CacheError as error:
            if mapped:
                raise DataError(f"{columns.name} is larger than memory, and {error}; set OFFRL_CACHE to a folder with room") from error
            _warn_once(f"what was read is not kept: {error}")
    (data,) = pieces.within(len(columns))
    return data, pieces.about


def _maps(columns: Columns, memory: str, limit_bytes: int | None) -> bool:
    """Whether the columns are to be mapped. Raises DataError where they are larger than what is allowed, there, or believable."""
    needed, room = columns.cost, available_memory()
    if limit_bytes is not None or memory == "ram":
        afford(columns.name, needed, budget(limit_bytes))
    if memory == "map" or (memory == "auto" and TRAINING * needed > room):
        afford(columns.name, needed, (columns.stored * RATIO, f"the most that a file of {columns.stored:,} bytes is believed to hold"))
        return True
    return False


def prepare(
    source: Any, action_space: Any = None, env_id: str | None = None, columns: Any = None, limit_bytes: int | None = None
) -> Columns:
    """The columns of a source, in memory, before NaN is looked for; see `prepared`."""
    with opened(locate(source, columns), limit_bytes, gaps=True) as raw:
        columns = prepared(raw, action_space, env_id)
        afford(columns.name, columns.cost, budget(limit_bytes))
        return columns.load()


@dataclass(frozen=True)
class Place:
    """Where a dataset is: a file or folder, or arrays; and what the columns of a table are."""

    name: str
    path: Path | None = None
    arrays: Mapping[str, Any] | None = None
    dataset_id: str | None = None
    table: TableColumns | None = None


def locate(source: str | os.PathLike[str] | Mapping[str, Any], columns: Any = None) -> Place:
    """The place that a source of `load_dataset` names. Raises DataError where there is none, naming near ones."""
    place = _locate(source)
    if place.path is not None and place.path.is_file() and is_table(place.path):
        return replace(place, table=find_columns(place.path, columns))
    if columns is not None:
        raise DataError(f"{place.name}: columns are given, and this is neither a CSV (.csv, .csv.gz) nor a Parquet file")
    return place


def _locate(source: str | os.PathLike[str] | Mapping[str, Any]) -> Place:
    if isinstance(source, Mapping):
        return Place("arrays", arrays=source)
    text = os.fsdecode(source)
    if not text or "\0" in text:
        raise DataError(f"{text!r} names no dataset")
    if text in scores.d4rl():
        return Place(text, _d4rl_path(text), dataset_id=text)
    path = Path(text)
    if os.path.exists(text):  # Path.exists raises for names that are too long
        return Place(text, path)
    if path.suffix in (".hdf5", ".h5", ".npz", ".csv", ".gz", ".parquet"):
        raise DataError(f"{text}: no such file{_nearest(path.name, _names(path.parent))}")
    return Place(text, _minari_path(text), dataset_id=text)


@contextmanager
def opened(place: Place, limit_bytes: int | None = None, gaps: bool = False) -> Iterator[Columns]:
    """The columns of a place as they are stored, most of them still in their file, which stays open meanwhile.

    `gaps`: what is missing in a table is NaN, and not an error that names its column and line.
    """
    if place.path is None:
        arrays = {field: np.asarray(place.arrays[key]) for field, key in pick(place.arrays, "arrays").items()}
        yield described(Columns("arrays", **arrays), {name: np.asarray(place.arrays[name]) for name in SAID if name in place.arrays})
        return
    with open_table(place.path, place.table, gaps) if place.table else _open_file(place.path, limit_bytes) as columns:
        columns.dataset_id = place.dataset_id or columns.dataset_id
        columns.stored = sum(path.stat().st_size for path in files(place.path))
        yield columns


def prepared(columns: Columns, action_space: Any = None, env_id: str | None = None) -> Columns:
    """The same, checked for kinds and lengths, with its flags in memory and the space and scores that are known."""
    flags = {field: column for field, column in checked(columns).fields() if field in ("terminals", "timeouts")}
    afford(columns.name, sum(cost(column.shape, column.dtype.itemsize) for column in flags.values()), budget(None))
    columns = replace(columns, **{field: column[:] for field, column in flags.items()})
    if env_id is not None:
        columns.env_id = env_id
    if action_space is not None:
        columns.action_space = _space(action_space, math.prod(columns.actions.shape[1:]))
    return _complete(columns)


def _space(value: Any, size: int) -> Space:
    if isinstance(value, str):
        return parse_action_space(value, size)
    return value if isinstance(value, Box | Discrete) else from_gym(value)


def _complete(columns: Columns) -> Columns:
    """The same with the reference scores and action bounds that its dataset id or environment id stands for."""
    names = [name for name in (columns.env_id, columns.dataset_id) if name is not None]
    changed: dict[str, Any] = {}
    if columns.action_space is None and any(_UNIT_ACTIONS.fullmatch(name.lower()) for name in names):
        changed["action_space"] = Box.of(math.prod(columns.actions.shape[1:]), -1, 1)
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


def _open_file(path: Path, limit_bytes: int | None) -> AbstractContextManager[Columns]:
    if path.is_dir():
        return nullcontext(replace(read_minari(path, limit_bytes), slow=True))
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
        return open_npz(path)
    if start == b"\x89HDF\r\n\x1a\n" or h5py.is_hdf5(path):
        return open_hdf5(path)
    raise DataError(f"{path}: neither an HDF5 file nor an NPZ archive, nor a table by its name (it starts with {start!r})")


def _entry(place: Place, reading: dict[str, Any]) -> Entry | None:
    """Where the dataset is kept in mapped form, or would be; None where nothing can be kept."""
    try:
        return None if place.path is None else Entry(place.path, reading)
    except (DataError, OSError):  # no home folder; a place that cannot be read, of which the reader says more
        return None


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


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
