"""Checkpoints: one safetensors file that holds everything, written atomically, sealed by a checksum, read without executing anything.

A file is a safetensors file whose metadata has one entry, "offrl": a JSON object with `format` (this layout's version), `meta` (the
caller's JSON), `empty` (the branches of the tree that hold no tensor) and `sha256` (over the other entries and over every tensor's name,
type, shape and bytes). Any safetensors reader opens it. In a folder of checkpoints `manifest.json` lists those that are kept, newest last.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import reprlib
import secrets
import warnings
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from offrl.core.tree import flatten, tree_map, unflatten

FORMAT = 1  # of the file; a reader refuses a higher one
TEMPORARY = ".offrl-*.tmp"
MANIFEST = "manifest.json"
AnyPath = str | bytes | os.PathLike[Any]
Tree = dict[str, Any]


class CheckpointError(Exception):
    """A checkpoint that cannot be written, read or used here; one line that says which and why."""


class NewerFormatError(CheckpointError):
    """A sound file of a later release: nothing to fall back from."""


class Saved(NamedTuple):
    step: int
    tree: Tree  # on the CPU
    meta: dict[str, Any]  # as saved, and its "step" and "format"


def printable(path: AnyPath) -> str:
    """The path for a message: bytes that are not UTF-8 are shown as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def atomic_write(path: AnyPath, data: bytes) -> None:
    """Replaces the file whole: whoever reads, and whatever fails or is killed, finds the old content or the new.

    Raises CheckpointError where the disk is full or the folder is missing or read-only; the old file is then intact.
    """
    path = Path(os.fsdecode(path))
    temporary = path.with_name(TEMPORARY.replace("*", secrets.token_hex(8)))
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system that knows no sync of folders
                raise
        finally:
            os.close(folder)
    except OSError as error:
        raise CheckpointError(f"cannot write {printable(path)}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            os.unlink(temporary)


def sweep(folder: Path) -> None:
    """Deletes the temporary files of writers that were killed; for the one process that writes in this folder."""
    for path in folder.glob(TEMPORARY):
        path.unlink(missing_ok=True)


def save_file(path: AnyPath, tree: Tree, meta: dict[str, Any]) -> None:
    """Writes the tree of tensors and its JSON meta as one sealed file."""
    atomic_write(path, _encode(tree, meta))


def load_file(path: AnyPath) -> tuple[Tree, dict[str, Any]]:
    """The tree, on the CPU, and the meta of a file that `save_file` or `Checkpoints` wrote; `meta["format"]` is the file's version.

    Raises CheckpointError for anything else, and for a damaged file. Nothing in the file is executed.
    """
    return _decode(_read(path), printable(path))


class Checkpoints:
    """The last `keep` checkpoints of one run in one folder. One writer at a time (see `RunLock`)."""

    def __init__(self, folder: AnyPath, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        self.folder = Path(os.fsdecode(folder))
        self.keep = keep

    def save(self, step: int, state_tree: Tree, meta: dict[str, Any]) -> Path:
        """Writes the checkpoint, then lists it, then deletes what is listed no longer. Later steps, if any, are of a past that was left."""
        name = f"step-{step:09d}.safetensors"
        data = _encode(state_tree, meta | {"step": step})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot make the folder {printable(self.folder)}: {error.strerror or error}") from error
        atomic_write(self.folder / name, data)
        new = {"file": name, "step": step, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        entries = [*(entry for entry in self._listed() or () if entry["step"] < step), new][-self.keep :]
        atomic_write(self.folder / MANIFEST, json.dumps({"checkpoints": entries}, indent=1).encode())
        kept = {entry["file"] for entry in entries}
        for path in self._files():
            if path.name not in kept:
                path.unlink(missing_ok=True)
        sweep(self.folder)
        return self.folder / name

    def latest(self) -> Saved | None:
        """The newest sound checkpoint, None where there is none at all.

        A damaged one is passed over with a warning that says why. When the manifest leads to none, the files speak for themselves.
        Raises CheckpointError if there are checkpoints and none is sound, or if the newest is of a later format.
        """
        listed, files = self._listed(), self._files()
        candidates = [(self.folder / entry["file"], entry) for entry in reversed(listed or [])]
        faults: dict[Path, str] = {}
        for path, entry in candidates + [(path, None) for path in reversed(files)]:
            try:
                return self._load(path, entry)
            except NewerFormatError:
                raise
            except CheckpointError as error:
                if path not in faults:
                    faults[path] = str(error)
                    warnings.warn(f"{error}; looking for another checkpoint", stacklevel=2)
        if listed is None and not files:
            return None
        raise CheckpointError(f"no sound checkpoint in {printable(self.folder)}: {'; '.join(faults.values()) or 'the manifest is damaged'}")

    def _files(self) -> list[Path]:
        """The checkpoints in the folder, oldest first."""
        return sorted((path for path in self.folder.glob("step-*") if _step(path.name) is not None), key=lambda path: _step(path.name))

    def _listed(self) -> list[dict[str, Any]] | None:
        """The manifest's entries, newest last; None where there is no manifest, nothing but a warning where it is damaged."""
        path = self.folder / MANIFEST
        if not os.path.lexists(path):
            return None
        try:
            entries = json.loads(_read(path))["checkpoints"]
            for entry in entries:
                if set(entry) != {"file", "step", "bytes", "sha256"} or entry["step"] is None or _step(entry["file"]) != entry["step"]:
                    raise ValueError(f"entry {entry!r}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            warnings.warn(f"{printable(path)} is damaged ({type(error).__name__}: {error}): ignored", stacklevel=3)
            return []
        return entries

    def _load(self, path: Path, entry: dict[str, Any] | None) -> Saved:
        data, name = _read(path), printable(path)
        if entry and len(data) != entry["bytes"]:
            raise CheckpointError(f"{name} is damaged: {len(data)} bytes where the manifest says {entry['bytes']}")
        if entry and hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise CheckpointError(f"{name} is damaged: its sha256 is not the manifest's")
        tree, meta = _decode(data, name)
        if meta.get("step") != _step(path.name):
            raise CheckpointError(f"{name} holds step {meta.get('step')!r}: it was renamed, or is no checkpoint of a run")
        return Saved(meta["step"], tree, meta)


def restore(saved_tree: Tree, like: Tree) -> Tree:
    """A copy of `saved_tree` on the devices, in the memory layout and in the key order of `like`, say the tree of `agent.init(seed)`.

    Raises CheckpointError that names the first key that is missing, unknown, or of another shape or dtype.
    """
    saved, wanted = flatten(saved_tree), flatten(like)
    for key in [*wanted, *saved]:
        if key not in saved:
            raise CheckpointError(f"the checkpoint lacks {key!r} of shape {tuple(wanted[key].shape)}{_nearest(key, saved)}")
        if key not in wanted:
            raise CheckpointError(f"the checkpoint holds {key!r} of shape {tuple(saved[key].shape)}, unknown here{_nearest(key, wanted)}")
        for what, have, want in (
            ("shape", tuple(saved[key].shape), tuple(wanted[key].shape)),
            ("dtype", saved[key].dtype, wanted[key].dtype),
        ):
            if have != want:
                raise CheckpointError(f"{key!r} has {what} {have} in the checkpoint and {want} here")
    try:
        return tree_map(lambda new, old: torch.empty_like(new, requires_grad=False).copy_(old), like, saved_tree)
    except ValueError as error:  # an empty branch of one that the other lacks
        raise CheckpointError(f"the checkpoint does not fit: {error}") from error


def check_meta(meta: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raises CheckpointError unless `meta` is of a format that is read here and says what `expected` says, key by key, dicts in dicts too.

    The keys are the caller's: "algorithm", "obs_size", "action_size" and what else must agree before the weights can be used.
    """
    if meta.get("format", FORMAT) > FORMAT:
        raise NewerFormatError(f"the checkpoint is of format {meta['format']}, this offrl reads up to {FORMAT}: install a newer offrl")
    _check(meta, json.loads(json.dumps(expected)), "")


def _check(meta: dict[str, Any], expected: dict[str, Any], path: str) -> None:
    for key, want in expected.items():
        what = path + {"obs_size": "observation size", "action_size": "action size"}.get(key, key)
        if key not in meta:
            raise CheckpointError(f"the checkpoint does not say its {what}; {_shown(want)} is expected{_nearest(key, meta)}")
        if isinstance(want, dict) and isinstance(meta[key], dict):
            _check(meta[key], want, f"{what}/")
        elif meta[key] != want:
            raise CheckpointError(f"the checkpoint is of another {what}: {_shown(meta[key])}, where this run has {_shown(want)}")


def _shown(value: Any) -> str:
    return reprlib.repr(value) + (f" ({len(value)} entries)" if isinstance(value, list) else "")


def _nearest(key: str, known: Any) -> str:
    near = get_close_matches(key, known, 1, 0)
    if not near:
        return ""
    return f"; the nearest key is {near[0]!r}" + (f" of shape {tuple(known[near[0]].shape)}" if isinstance(known[near[0]], Tensor) else "")


def _step(name: Any) -> int | None:
    match = re.fullmatch(r"step-(\d{9,18})\.safetensors", name) if isinstance(name, str) else None
    return int(match[1]) if match else None


def _read(path: AnyPath) -> bytes:
    try:
        return Path(os.fsdecode(path)).read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {printable(path)}: {error.strerror or error}") from error


def _seal(head: dict[str, Any], flat: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(head).encode())
    for key in sorted(flat):
        digest.update(f"{key} {flat[key].dtype} {tuple(flat[key].shape)}\n".encode())
        digest.update(flat[key].reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _empty(tree: Tree, path: str = "") -> list[str]:
    branches = {f"{path}{key}": value for key, value in tree.items() if isinstance(value, dict)}
    return [found for name, branch in branches.items() for found in (_empty(branch, f"{name}/") if branch else [name])]


def _encode(tree: Tree, meta: dict[str, Any]) -> bytes:
    try:
        flat = {key: torch.empty(leaf.shape, dtype=leaf.dtype, device="cpu").copy_(leaf.detach()) for key, leaf in flatten(tree).items()}
        if "__metadata__" in flat:
            raise ValueError("'__metadata__' is a name that safetensors keeps for itself")
        # what is sealed is what a reader will parse
        head = json.loads(json.dumps({"format": FORMAT, "meta": meta, "empty": _empty(tree)}))
        return safetensors.torch.save(flat, {"offrl": json.dumps({"sha256": _seal(head, flat)} | head)})
    except (TypeError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"cannot be saved: {error}") from error


def _decode(data: bytes, name: str) -> tuple[Tree, dict[str, Any]]:
    if not data:
        raise CheckpointError(f"{name} is empty")
    try:
        size = int.from_bytes(data[:8], "little")
        head = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["offrl"])
        version = int(head["format"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        other = "a zip archive (of torch.save?)" if data.startswith(b"PK") else "a pickle" if data.startswith(b"\x80") else ""
        reason = f"looks like {other}, which could run code and is not opened" if other else "is damaged, or no checkpoint of offrl"
        raise CheckpointError(f"{name} {reason}") from error
    if version > FORMAT:
        raise NewerFormatError(f"{name} is of format {version}, this offrl reads up to {FORMAT}: install a newer offrl")
    try:
        flat = safetensors.torch.load(data)
        sound = head.pop("sha256") == _seal(head, flat)
        # cloned, for the tensors of a safetensors file are not aligned
        tree = unflatten({key: tensor.clone() for key, tensor in flat.items()} | {branch: {} for branch in head["empty"]})
        meta = head["meta"] | {"format": version}
    except (SafetensorError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise CheckpointError(f"{name} is damaged: {str(error) or type(error).__name__}") from error
    if not sound:
        raise CheckpointError(f"{name} is damaged: its content does not match its checksum")
    return tree, meta
