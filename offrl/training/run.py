"""The folder of one run of one seed: config.yaml, run.json, log.jsonl, checkpoints/, result.json, curve.png."""

from __future__ import annotations

import json
import platform
import shutil
from contextlib import ExitStack
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from offrl import __version__
from offrl.core.checkpoint import Checkpoints, atomic_write
from offrl.core.lock import RunLock
from offrl.core.log import Log

FORMAT = 1
ABOUT = ("format", "recipe", "agent", "seed", "spec", "env", "data")  # of run.json; more may follow
# checkpoints first: were the rest gone and they not, a run would go on from them
PARTS = (
    "checkpoints", "best", "config.yaml", "run.json", "log.jsonl", "log.csv", "result.json", "eval.json", "curve.png", "policy.onnx",
    "tensorboard", "report.md", "report.json", "stock.png", "orders.png",
)  # fmt: skip


class RunError(RuntimeError):
    """A run folder that cannot be used; the message says why and what to do."""


class Finished(RunError):
    """There is nothing left to do in a run."""


class Run:
    """An open run folder, locked against other processes for as long as the context lasts.

    about: what run.json says (recipe, seed, spec, data, versions). `fresh` removes what an earlier run left there.
    """

    def __init__(self, folder: Path, about: dict[str, Any], config: Any, fresh: bool = False, **log: Any):
        self.folder, self.about, self.config, self.fresh, self._log = folder, about, config, fresh, log
        spec = about["spec"]
        self.meta = {"algorithm": about.get("algorithm", about["recipe"]), "spec": spec, "seed": about["seed"]}
        self._stack = ExitStack()

    def __enter__(self) -> Run:
        with ExitStack() as stack:
            stack.enter_context(RunLock(self.folder))
            if self.fresh:
                remove(self.folder)
            self.log = stack.enter_context(Log(self.folder, **self._log))
            self.checkpoints = Checkpoints(self.folder / "checkpoints")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    def begin(self) -> None:
        """Writes what the run is: before its first step, and again when it goes on with other flags."""
        write_json(self.folder / "run.json", self.about)
        atomic_write(self.folder / "config.yaml", yaml.safe_dump(_plain(asdict(self.config)), sort_keys=False).encode())


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def write_json(path: Path, value: Any) -> None:
    atomic_write(path, json.dumps(value, indent=1, allow_nan=False).encode() + b"\n")


def read_json(path: Path) -> Any:
    """Raises RunError saying which file is missing or broken."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise RunError(f"{path} is missing: {path.parent} is not the folder of a run") from None
    except ValueError as error:
        raise RunError(f"{path} is not JSON: {error}") from None


def read_about(folder: Path) -> dict[str, Any]:
    """What run.json says of a run. Raises RunError where it is missing, damaged or of a later format."""
    about = read_json(folder / "run.json")
    missing = [key for key in ABOUT if key not in about] if isinstance(about, dict) else ABOUT
    if missing:
        raise RunError(f"{folder / 'run.json'} was not written by `offrl train`, or is damaged: it lacks {', '.join(missing)}")
    about.setdefault("algorithm", about["recipe"])  # earlier runs did not say: it was the same
    if about["format"] > FORMAT:
        raise RunError(f"{folder} is a run of format {about['format']}, this offrl reads up to {FORMAT}: install a newer offrl")
    return about


def remove(folder: Path) -> None:
    """Deletes the parts of an earlier run, and nothing else."""
    for part in PARTS:
        path = folder / part
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """Of offrl, Python and the libraries that can change a result."""
    found = {"offrl": __version__, "python": platform.python_version()}
    for name in ("torch", "numpy", "gymnasium", "mujoco"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def find_runs(path: Path) -> list[Path]:
    """The seeds' folders at or below a run's path. Raises RunError if there is none."""
    found = [path] if (path / "run.json").exists() else sorted(p.parent for p in path.glob("**/run.json"))
    if not found:
        raise RunError(f"there is no run at {path}: expected a folder with run.json, as `offrl train` leaves it")
    return found
