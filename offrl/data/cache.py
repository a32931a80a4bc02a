"""Columns of slow formats, kept as one file each under $OFFRL_CACHE or ~/.cache/offrl. Losing the folder costs time only.

An entry belongs to one source file at one size and modification time and is sealed by a checksum. What does not match is made anew;
where the folder cannot be written, reading goes on without.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import torch

from offrl.core.checkpoint import CheckpointError, load_file, save_file
from offrl.data.columns import home_folder
from offrl.data.dataset import DataError

FORMAT = 1  # of what is cached; another one is made anew


def entry(source: Path) -> Path | None:
    """Where the columns of `source` are kept; None where there is no home folder."""
    try:
        root = home_folder("OFFRL_CACHE", "~/.cache/offrl")
    except DataError:
        return None
    return root / f"{hashlib.sha256(os.fsencode(source.resolve())).hexdigest()[:32]}.safetensors"


def recall(source: Path) -> dict[str, np.ndarray] | None:
    """The arrays that `remember` was given for this very state of `source`; None where there are none, or damaged ones."""
    path = entry(source)
    if path is None or not path.is_file():
        return None
    try:
        tree, meta = load_file(path)
    except CheckpointError as error:
        warnings.warn(f"the cache of {source} is made anew: {error}", stacklevel=2)
        return None
    return {key: tensor.numpy() for key, tensor in tree.items()} if meta.get("source") == _state(source) else None


def remember(source: Path, arrays: dict[str, np.ndarray]) -> None:
    """Keeps `arrays` for `source`, whole or not at all. Warns once where that cannot be done."""
    path = entry(source)
    if path is None:
        return _warn_once("there is no home folder; set OFFRL_CACHE to keep what was read")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(path, {key: torch.from_numpy(array) for key, array in arrays.items()}, {"source": _state(source)})
    except (OSError, CheckpointError) as error:
        _warn_once(f"what was read is not kept: {error}")


def _state(source: Path) -> list[str | int]:
    stat = source.stat()
    return [FORMAT, str(source.resolve()), stat.st_size, stat.st_mtime_ns]


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=3)
