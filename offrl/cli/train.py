"""offrl train RECIPE DATASET: flags are the dotted paths of the config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import torch
import tyro

from offrl.cli.console import Imports, bars, import_files, out, reporter
from offrl.core.config import ConfigError, Range, merge, validate
from offrl.core.machine import cores
from offrl.data.build import describe
from offrl.data.dataset import DataError
from offrl.data.load import load_dataset
from offrl.recipes import common
from offrl.recipes.config import recipes
from offrl.recipes.parallel import train_in_processes
from offrl.recipes.search import flattened
from offrl.recipes.study import from_study
from offrl.training import report
from offrl.training.run import read_about

C = TypeVar("C")


@dataclass(frozen=True, kw_only=True)
class Call(Generic[C]):
    """What training and studies are told alike."""

    config: Annotated[C, tyro.conf.arg(name="")]
    preset: str | None = None
    """A named set of hyperparameters of the recipe."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    imports: Imports = ()
    """Your own Python files to run first: they register agents and environments."""
    action_space: str | None = None
    """discrete:N, continuous or box:LOW,HIGH, where the data does not say."""
    semantics: Literal["strict", "d4rl", "ogbench"] | None = None
    """How a file is read: every row as stored, as D4RL itself does, as OGBench means it; by default what the dataset's id stands for."""
    columns: Path | None = None
    """A YAML file that says what the columns of a CSV or Parquet file are; by default, the one beside it."""
    missing_rewards: float | None = None
    """What stands for rewards that are not stored, in OGBench's and robomimic's data."""
    on_bad: Literal["error", "drop"] = "error"
    """What rows with NaN or infinity do: stop, or be left out."""
    memory: Literal["auto", "ram", "map"] = "auto"
    """Where the dataset is: in memory, or in mapped files under $OFFRL_CACHE; auto maps what training could not hold in memory."""

    def reading(self) -> dict[str, Any]:
        """What `load_dataset` is to be called with."""
        given = {name: getattr(self, name) for name in ("on_bad", "semantics", "action_space", "columns", "memory")}
        return given | ({} if self.missing_rewards is None else {"missing_rewards": self.missing_rewards})


@dataclass(frozen=True, kw_only=True)
class Train(Call[C]):
    seeds: str = "0"
    """Seeds, as in 0-4 or 0,3,7. On a CPU each has a process of one thread, on a GPU they train as one stack."""
    from_study: str | None = None
    """The database of a study, as in sqlite:///study.db: what its best trial found holds where no flag says otherwise."""
    study: str | None = None
    """The study's name, where the database has several."""
    fresh: bool = False
    """Start anew where there is a run already."""
    how: Literal["auto", "processes", "stacked"] = "auto"
    """How several seeds train."""
    workers: Annotated[int | None, Range(1)] = None
    """Processes at once; one a core unless told otherwise."""


def called(command: str, arguments: Sequence[str]) -> tuple[str, str, list[str], Any]:
    """Recipe, dataset, flags and the config that the flags change; the user's own files are run. Raises ConfigError."""
    names = [a for a in arguments[:2] if not a.startswith("-")]
    if len(names) < 2 and not {"-h", "--help"} & set(arguments):
        raise ConfigError(f"usage: offrl {command} RECIPE DATASET [flags]; RECIPE is one of {', '.join(recipes())}")
    recipe, dataset = (*names, "bc", "DATASET")[:2] if len(names) != 1 else (names[0], "DATASET")
    flags = list(arguments[len(names) :])
    import_files([Path(file) for file in values_of(flags, "--import")])
    return recipe, dataset, flags, common.resolve(recipe, common.name_of(dataset), next(iter(values_of(flags, "--preset")), None))


# recipes that train on something else than a dataset have a command of their own
APART = {"hdpo": "offrl.cli.hdpo:train"}


def train(arguments: Sequence[str]) -> None:
    if arguments and arguments[0] in APART:
        module, _, function = APART[arguments[0]].partition(":")
        return getattr(import_module(module), function)(arguments[1:])
    recipe, dataset, flags, config = called("train", arguments)
    if url := values_of(flags, "--from-study"):
        layer, where = from_study(url[0], recipe, next(iter(values_of(flags, "--study")), None))
        config = merge(config, layer, where)
        out.print(f"from {where}: {', '.join(f'{path} {value}' for path, value in flattened(layer).items())}")
    kind = Train[type(config)[type(config.agent)]]
    args = tyro.cli(kind, default=Train(config=config), args=flags, prog=f"offrl train {recipe} {dataset}", description="Train a policy.")
    seeds = parse_seeds(validate(args, "offrl train").seeds)
    if args.study and not args.from_study:
        raise ConfigError("--study names one of the studies that --from-study is of, which is not given")
    on_gpu = args.config.device.startswith("cuda") or (args.config.device == "auto" and torch.cuda.is_available())
    how = ("stacked" if on_gpu else "processes") if args.how == "auto" else args.how
    options = {name: getattr(args, name) for name in ("runs", "fresh")}
    reading = args.reading()
    with bars() as progress:
        bar, stage = reporter(progress, f"{recipe} seed"), reporter(progress, "")
        data = load_dataset(dataset, progress=partial(reporter(progress, "reading"), dataset), **reading)
        if len(seeds) > 1 and how == "processes":
            workers = min(len(seeds), args.workers or cores())
            out.print(f"{len(seeds)} seeds, {workers} at a time, each in a process of one thread")
            prepare = partial(import_files, args.imports)
            options |= reading  # each process reads for itself; what is mapped has been kept by now
            folders = train_in_processes(
                recipe, dataset, args.config, seeds, workers, prepare=prepare, progress=bar, stage=stage, say=out.print, **options
            )
        else:
            if len(seeds) > 1:
                out.print(f"{len(seeds)} seeds as one stack")
            options |= {"name": common.name_of(dataset), "stacked": how == "stacked", "progress": partial(bar, args.seeds), "stage": stage}
            folders = common.train(recipe, data, args.config, seeds=seeds, say=out.print, **options)
    conclude(folders)


def conclude(folders: list[Path]) -> None:
    """Prints results beside the data's own, the runs' paths and a plot's; results only where there has been an evaluation."""
    evaluated = [folder for folder in folders if (folder / "result.json").exists()]
    for folder in evaluated:
        for line in report.lines(folder, behaviors(read_about(folder)["data"]["name"])):
            out.print(line)
    for folder in folders:
        out.print(f"run: {folder}")
    if evaluated:
        path = folders[0].parent / "curve.png" if len(folders) > 1 else folders[0] / "curve.png"
        try:
            out.print(f"learning curve: {report.plot(evaluated, path)}")
        except ImportError as error:
            out.print(f"no plot: {error}")


def behaviors(dataset: str) -> dict[str, float] | None:
    """The mean return of each policy that made the dataset, where it was built here and all of them are known."""
    try:
        made = describe(dataset)["behaviors"]
    except DataError:
        return None
    returns = {each["policy"]: each["return_mean"] for each in made}
    return None if None in returns.values() else returns


def parse_seeds(text: str) -> list[int]:
    """0-4 is 0, 1, 2, 3, 4; 0,3,7 is just these. Raises ConfigError."""
    try:
        parts = [[int(end) for end in part.split("-")] for part in text.split(",")]
        seeds = [seed for ends in parts for seed in range(ends[0], ends[-1] + 1)]
        if len(set(seeds)) != len(seeds) or not seeds or any(len(ends) > 2 for ends in parts):
            raise ValueError
    except ValueError:
        raise ConfigError(f"--seeds {text!r}: write 0-4 or 0,3,7") from None
    return seeds


def values_of(flags: Sequence[str], name: str) -> list[str]:
    """What follows a flag, up to the next flag: for flags that must be known before the others can be read."""
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
