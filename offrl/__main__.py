"""The command line: offrl train, eval, export and data. Flags are the dotted paths of the config."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from offrl import __version__
from offrl.core import registry
from offrl.core.checkpoint import CheckpointError
from offrl.core.config import ConfigError, nearest
from offrl.core.interrupt import EXIT_DIVERGED, EXIT_INTERRUPTED
from offrl.core.lock import LockError
from offrl.core.log import LogError
from offrl.data.dataset import DataError
from offrl.envs.make import EnvError
from offrl.recipes import common
from offrl.train.evaluate import EvaluationError
from offrl.train.hooks import Diverged, Interrupted
from offrl.train.run import RunError

A = TypeVar("A")
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)
REFUSALS = (ConfigError, DataError, RunError, CheckpointError, LockError, LogError, EnvError, EvaluationError, KeyError, TypeError, ImportError)

USAGE = """offrl COMMAND

  train RECIPE DATASET   train a policy and evaluate it; RECIPE is one of {recipes}
  eval RUN               evaluate a trained policy
  export RUN             write a trained policy as ONNX
  data build ID          build a dataset by rolling out policies
  data info DATASET      what is in a dataset
  data check DATASET     what is wrong with a dataset
  data list              the datasets that can be built here

DATASET is an id or a path (HDF5, NPZ, a Minari folder). `offrl COMMAND --help` lists the flags of a command."""


@dataclass(frozen=True)
class Train(Generic[A]):
    config: Annotated[common.Config[A], tyro.conf.arg(name="")]
    seeds: str = "0"
    """Seeds, as in 0-4 or 0,3,7. On a CPU each has a process of one thread, on a GPU they train as one stack."""
    preset: str | None = None
    """A named set of hyperparameters of the recipe."""
    fresh: bool = False
    """Start anew where there is a run already."""
    how: Literal["auto", "processes", "stacked"] = "auto"
    """How several seeds train."""
    workers: int | None = None
    """Processes at once; one a core unless told otherwise."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    imports: Annotated[tuple[Path, ...], tyro.conf.arg(name="import")] = ()
    """Your own Python files to run first: they register agents and environments."""
    action_space: str | None = None
    """discrete:N, continuous or box:LOW,HIGH, where the data does not say."""
    semantics: Literal["strict", "d4rl"] | None = None
    """How a D4RL file is read."""
    on_bad: Literal["error", "drop"] = "error"
    """What rows with NaN or infinity do: stop, or be left out."""


def train(arguments: Sequence[str]) -> None:
    if len(arguments) < 2 or arguments[0].startswith("-") or arguments[1].startswith("-"):
        raise ConfigError(f"usage: offrl train RECIPE DATASET [flags]; RECIPE is one of {', '.join(registry.agents())}")
    recipe, dataset, *flags = arguments
    import_files([Path(f) for f in _values(flags, "--import")])
    preset = next(iter(_values(flags, "--preset")), None)
    config = common.resolve(recipe, common.name_of(dataset), preset)
    kind = Train[type(config.agent)]
    args = tyro.cli(kind, default=Train(config=config), args=flags, prog=f"offrl train {recipe} {dataset}", description="Train a policy.")
    seeds = parse_seeds(args.seeds)
    cuda = args.config.device.startswith("cuda") or (args.config.device == "auto" and torch.cuda.is_available())
    how = args.how if args.how != "auto" else ("stacked" if cuda else "processes")
    options = {"runs": args.runs, "fresh": args.fresh, "on_bad": args.on_bad, "semantics": args.semantics, "action_space": args.action_space}
    with bars() as progress:
        if len(seeds) > 1 and how == "processes":
            from offrl.recipes.parallel import train_in_processes

            workers = args.workers or len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            workers = min(len(seeds), workers)
            out.print(f"{len(seeds)} seeds, {workers} at a time, each in a process of one thread")
            report = seed_bars(progress, recipe)
            folders = train_in_processes(
                recipe, dataset, args.config, seeds, workers, prepare=partial(import_files, args.imports), progress=report, say=out.print, **options
            )
        else:
            if len(seeds) > 1:
                out.print(f"{len(seeds)} seeds as one stack")
            bar = seed_bars(progress, recipe)
            folders = common.train(
                recipe, dataset, args.config, seeds=seeds, stacked=how == "stacked", progress=partial(bar, args.seeds), say=out.print, **options
            )
    conclude(folders)


def conclude(folders: list[Path]) -> None:
    """Prints results, the runs' paths and a plot's, where there has been an evaluation."""
    from offrl.data.build import behavior_returns
    from offrl.train import report

    for folder in folders:
        out.print(f"run: {folder}")
        if (folder / "result.json").exists():
            name = report.read_json(folder / "run.json")["data"]["name"]
            for line in report.lines(folder, behavior_returns(name)):
                out.print(line)
    if (folders[0] / "result.json").exists():
        path = folders[0].parent / "curve.png" if len(folders) > 1 else folders[0] / "curve.png"
        try:
            out.print(f"learning curve: {report.plot(folders, path)}")
        except ImportError as error:
            out.print(f"no plot: {error}")


def parse_seeds(text: str) -> list[int]:
    """0-4 is 0, 1, 2, 3, 4; 0,3,7 is just these. Raises ConfigError."""
    try:
        parts = [part.split("-") for part in text.split(",")]
        seeds = [s for ends in parts for s in range(int(ends[0]), int(ends[-1]) + 1)]
        if not seeds or len(set(seeds)) != len(seeds) or any(len(ends) > 2 for ends in parts):
            raise ValueError
    except ValueError:
        raise ConfigError(f"--seeds {text!r}: write 0-4 or 0,3,7") from None
    return seeds


def _values(flags: Sequence[str], name: str) -> list[str]:
    """What follows a flag, up to the next flag: what must be known before the other flags can be read."""
    found: list[str] = []
    for i, flag in enumerate(flags):
        if flag.startswith(f"{name}="):
            found.append(flag.partition("=")[2])
        elif flag == name:
            for value in flags[i + 1 :]:
                if value.startswith("-"):
                    break
                found.append(value)
    return found


def import_files(paths: Sequence[Path]) -> None:
    """Runs the user's own files, as named on their command line."""
    import runpy

    for path in paths:
        if not path.exists():
            raise ConfigError(f"--import {path}: there is no such file")
        runpy.run_path(str(path))


def bars() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=err)


def seed_bars(progress: Progress, what: str) -> Callable[[Any, int, int], None]:
    tasks: dict[Any, Any] = {}

    def report(seed: Any, done: int, total: int) -> None:
        if seed not in tasks:
            tasks[seed] = progress.add_task(f"{what} seed {seed}", total=total)
        progress.update(tasks[seed], completed=done)

    return report


@dataclass(frozen=True)
class Eval:
    run: Annotated[Path, tyro.conf.Positional]
    """A run folder, of one seed or of several."""
    episodes: int = 100
    """Episodes a seed."""
    env: str | None = None
    """Environment, where the run's data named none: a Gymnasium id, or file.py:factory."""
    fresh: bool = False
    """Draw new seeds for the episodes; otherwise they are the same each time."""
    seed: int = common.FINAL_SEED
    """First of the episodes' fixed seeds."""
    time_limit: int | None = None
    """Steps after which an episode is cut, instead of the environment's own limit."""
    video: Path | None = None
    """Also record one episode to this MP4 file."""
    imports: Annotated[tuple[Path, ...], tyro.conf.arg(name="import")] = ()
    """Your own Python files to run first: they register agents and environments."""


def evaluate(arguments: Sequence[str]) -> None:
    from offrl.train import hooks, policy
    from offrl.train.evaluate import record
    from offrl.train.run import find_runs, read_json, write_json

    args = tyro.cli(Eval, args=list(arguments), prog="offrl eval", description="Evaluate a trained policy.")
    import_files(args.imports)
    for folder in find_runs(args.run):
        loaded, env = policy.load(folder), args.env or read_json(folder / "run.json")["env"]
        if env is None:
            raise RunError(f"{folder}: its data names no environment; give one with --env, a Gymnasium id or file.py:factory")
        with bars() as progress:
            report = seed_bars(progress, "episodes")
            played = hooks.evaluate_state(
                loaded.agent, loaded.state, env, args.episodes, seed=args.seed, fresh=args.fresh, time_limit=args.time_limit,
                progress=partial(report, folder.name),
            )  # fmt: skip
        found = common.result(played, loaded.spec, env, loaded.step)
        write_json(folder / "eval.json", found)
        what = "score" if "score" in found else "return"
        interval = found[what]["interval"]
        between = "" if interval is None else f" (95 % interval {interval[0]:.1f} to {interval[1]:.1f})"
        label = "normalised score" if what == "score" else "return (no reference scores are known for a normalised one)"
        out.print(f"{folder}: {label} {found[what]['mean']:.1f}{between}, IQM {found[what]['iqm']:.1f}, {args.episodes} episodes of {env}")
        if args.video is not None:
            out.print(f"video: {record(loaded.act, env, args.video, seed=args.seed)}")


@dataclass(frozen=True)
class Export:
    run: Annotated[Path, tyro.conf.Positional]
    """The run folder of one seed."""
    onnx: Path | None = None
    """File to write; policy.onnx in the run's folder unless told otherwise."""
    imports: Annotated[tuple[Path, ...], tyro.conf.arg(name="import")] = ()
    """Your own Python files to run first."""


def export(arguments: Sequence[str]) -> None:
    from offrl.train.export import export_onnx
    from offrl.train.policy import load

    args = tyro.cli(Export, args=list(arguments), prog="offrl export", description="Write a trained policy as ONNX.")
    import_files(args.imports)
    path, error = export_onnx(load(args.run), args.onnx or args.run / "policy.onnx")
    out.print(f"{path}: same actions as the policy to {error:.1e}")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"train": train, "eval": evaluate, "export": export}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0, 1 for what was refused, 2 for a wrong call, 75 when stopped by a signal, 76 when training diverged."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    torch.set_num_threads(1)  # two threads collapse when another process holds a core
    if not arguments or arguments[0] in ("-h", "--help"):
        out.print(USAGE.format(recipes=", ".join(registry.agents())))
        return 0 if arguments else 2
    if arguments[0] == "--version":
        out.print(__version__)
        return 0
    try:
        if arguments[0] == "data":
            from offrl import data_commands

            return data_commands.main(arguments[1:])
        if arguments[0] not in COMMANDS:
            raise ConfigError(f"no command {arguments[0]!r}{nearest(arguments[0], [*COMMANDS, 'data'])}")
        COMMANDS[arguments[0]](arguments[1:])
    except Interrupted as error:
        err.print(str(error))
        return EXIT_INTERRUPTED
    except Diverged as error:
        err.print(str(error))
        return EXIT_DIVERGED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone (`| head`): nothing to say any more
        return 0
    except REFUSALS as error:
        err.print(f"offrl: {error.args[0] if isinstance(error, KeyError) and error.args else error}", style="red", markup=False)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
