"""What the commands share: where they print, their bars, and the user's own files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from offrl.core.config import ConfigError, nearest
from offrl.envs.make import user_module


class _Console(Console):
    """Where nobody reads any more, as in `| head -1`, words are lost and the work goes on."""

    def on_broken_pipe(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


out = _Console(highlight=False, soft_wrap=True, markup=False)
err = _Console(stderr=True, highlight=False, soft_wrap=True, markup=False)

Imports = Annotated[tuple[Path, ...], tyro.conf.arg(name="import")]


def import_files(paths: Sequence[Path]) -> None:
    """Imports the user's own files, as named on their command line: they register agents and environments."""
    for path in paths:
        if path.suffix != ".py":
            raise ConfigError(f"--import {path}: name a Python file, which ends in .py")
        user_module(str(path))


def dispatch(verb: str, commands: Mapping[str, Callable[[Sequence[str]], int | None]], arguments: Sequence[str]) -> int:
    """Runs one of a verb's commands."""
    if not arguments or arguments[0] in ("-h", "--help"):
        out.print(f"offrl {verb} COMMAND, one of {', '.join(commands)}")
        return 0 if arguments else 2
    if arguments[0] not in commands:
        raise ConfigError(f"no command {verb} {arguments[0]!r}{nearest(arguments[0], commands)}")
    return commands[arguments[0]](arguments[1:]) or 0


def bars() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=err)


def reporter(progress: Progress, what: str) -> Callable[[Any, int, int], None]:
    """`report(name, done, total)`, which moves the bar of that name and makes it at its first call."""
    tasks: dict[Any, Any] = {}

    def report(name: Any, done: int, total: int) -> None:
        if name not in tasks:
            tasks[name] = progress.add_task(f"{what} {name}".strip(), total=total)
        progress.update(tasks[name], completed=done)

    return report
