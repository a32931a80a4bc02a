"""The numbers of a run: one JSON object a line in `log.jsonl`, made into `log.csv` on close, and sent to TensorBoard or W&B where asked.

Every line is strict JSON: a number that is not finite is written as the string "NaN", "Infinity" or "-Infinity", and `read` turns it back.
What depends on the clock (`time/updates_per_s`, `time/seconds`) is named `time/...`; all other values are those of an uninterrupted run.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections import defaultdict
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from offrl.core.checkpoint import AnyPath, atomic_write, printable, sweep

ROWS, TABLE = "log.jsonl", "log.csv"
_WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class LogError(Exception):
    """A log that cannot be written or read; one line that says which and why."""


class Log:
    """Appends to the log of a run folder, which it makes if need be. A last line that was torn by a kill is cut off when it is opened.

    `wandb`: the keyword arguments of `wandb.init`. TensorBoard and W&B need `offrl[tensorboard]` and `offrl[wandb]`.
    """

    def __init__(self, folder: AnyPath, tensorboard: bool = False, wandb: dict[str, Any] | None = None):
        self.folder = Path(os.fsdecode(folder))
        self.path = self.folder / ROWS
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            content = self.path.read_bytes()
            os.ftruncate(self._file, content.rfind(b"\n") + 1)
            sweep(self.folder)
        except OSError as error:
            raise LogError(f"cannot write {printable(self.path)}: {error.strerror or error}") from error
        self._wandb = _import_wandb().init(**{"dir": os.fspath(self.folder), "resume": "allow"} | wandb) if wandb is not None else None
        self._board = _board(self.folder) if tensorboard else None

    def write(self, step: int, metrics: dict[str, float | Tensor]) -> None:
        """Appends one row of numbers and 0-d tensors; tensors of one device and dtype come to the host in one transfer.

        A row is written whole or, with a LogError, not at all.
        """
        values = _numbers(metrics)
        row = {"step": int(step)} | {key: value if math.isfinite(value) else _word(value) for key, value in values.items()}
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        start = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, line)
            if written != len(line):
                raise OSError(f"{written} of {len(line)} bytes were written: is the disk full?")
        except OSError as error:
            os.ftruncate(self._file, start)
            raise LogError(f"cannot write {printable(self.path)}: {error.strerror or error}") from error
        if self._board:
            for key, value in values.items():
                self._board.add_scalar(key, value, step)
        if self._wandb:
            self._wandb.log(values, step=int(step))

    def sync(self) -> None:
        """Brings the rows to the disk: before a checkpoint that they must not fall behind, even where the power fails."""
        try:
            os.fsync(self._file)
        except OSError as error:
            raise LogError(f"cannot write {printable(self.path)}: {error.strerror or error}") from error

    def truncate(self, step: int) -> None:
        """Removes the rows after `step`, that of the checkpoint which a run resumes from. W&B keeps what it has and ignores repeats."""
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [line for row, line in zip(_parse(lines, self.path), lines) if row["step"] <= step]
        atomic_write(self.path, b"".join(kept))
        (self.folder / TABLE).unlink(missing_ok=True)
        os.close(self._file)
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND)
        if self._board:
            self._board.close()
            self._board = _board(self.folder, purge_step=step + 1)

    def close(self) -> None:
        """Writes `log.csv` and ends. Closing twice does nothing."""
        if self._file < 0:
            return
        os.close(self._file)
        self._file = -1
        write_csv(self.folder)
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()


def read(folder: AnyPath) -> list[dict[str, Any]]:
    """The rows of a run folder, in the order in which they were written; a last line that is not complete is left out.

    Raises LogError where there is no log, and for a damaged line, by its number.
    """
    path = Path(os.fsdecode(folder)) / ROWS
    try:
        content = path.read_bytes()
    except OSError as error:
        raise LogError(f"cannot read {printable(path)}: {error.strerror or error}") from error
    lines = content[: content.rfind(b"\n") + 1].splitlines()
    return _parse(lines, path)


def write_csv(folder: AnyPath) -> None:
    """Makes `log.csv` of the rows so far: the step, then each metric in the order of its first appearance; blank where a row has none."""
    rows = read(folder)
    text = io.StringIO()
    table = csv.DictWriter(text, list(dict.fromkeys(key for row in [{"step": 0}, *rows] for key in row)), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    atomic_write(Path(os.fsdecode(folder)) / TABLE, text.getvalue().encode())


def _numbers(metrics: dict[str, float | Tensor]) -> dict[str, float]:
    values: dict[str, Any] = dict(metrics)  # fixes the order
    groups = defaultdict(list)
    for key, value in metrics.items():
        if key == "step":
            raise ValueError("a metric cannot be named 'step'")
        if isinstance(value, Tensor):
            if value.dim():
                raise TypeError(f"metric {key!r} is a tensor of shape {tuple(value.shape)}, not a number")
            groups[value.device, value.dtype].append(key)
        elif not isinstance(value, Real):
            raise TypeError(f"metric {key!r} is {type(value).__name__}, not a number")
    for keys in groups.values():
        values.update(zip(keys, torch.stack([metrics[key].detach() for key in keys]).tolist()))
    return {key: value if type(value) is int else float(value) for key, value in values.items()}


def _word(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _parse(lines: list[bytes], path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append(
                {"step": int(row["step"])} | {key: _WORDS[value] if isinstance(value, str) else value for key, value in row.items()}
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise LogError(f"{printable(path)}, line {number}, is damaged: {line[:80]!r}") from error
    return rows


def _board(folder: Path, **options: Any) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError('TensorBoard is not installed: pip install "offrl[tensorboard]"') from error
    return SummaryWriter(os.fspath(folder / "tensorboard"), **options)


def _import_wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ImportError('Weights & Biases is not installed: pip install "offrl[wandb]"') from error
    return wandb
