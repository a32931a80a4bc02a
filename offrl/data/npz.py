"""NPZ archives of plain arrays. Headers are read first; an array of objects is a pickle and is never opened."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import IO

from numpy.lib import format as npy

from offrl.data.columns import Columns, afford, budget, cost, pick
from offrl.data.dataset import DataError


def read_npz(path: Path, limit_bytes: int | None = None) -> Columns:
    """The columns of an archive whose members are named as D4RL does (`observations`) or as here (`obs`)."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist() if info.filename.endswith(".npy")}
            found = {field: members[key] for field, key in pick(members, str(path)).items()}
            needed = 0
            for field, info in found.items():
                with archive.open(info) as member:
                    needed += cost(*_header(member, f"{path}: {field}"))
            afford(str(path), needed, budget(limit_bytes))
            arrays = {}
            for field, info in found.items():
                with archive.open(info) as member:
                    arrays[field] = npy.read_array(member, allow_pickle=False)
                    member.read()  # to the end, where the checksum is compared
    except DataError:
        raise
    except (OSError, ValueError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: cannot be read as NPZ; the file is cut short or damaged ({error})") from error
    return Columns(str(path), **arrays)


def _header(member: IO[bytes], name: str) -> tuple[tuple[int, ...], int]:
    version = npy.read_magic(member)
    if version not in ((1, 0), (2, 0)):
        raise DataError(f"{name} is stored in version {version} of the format, which plain arrays do not need")
    shape, _, dtype = npy.read_array_header_1_0(member) if version == (1, 0) else npy.read_array_header_2_0(member)
    if dtype.hasobject:
        raise DataError(f"{name} holds Python objects, which are pickles and are never opened; save plain arrays of numbers")
    return shape, dtype.itemsize
