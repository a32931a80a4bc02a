"""offrl tune RECIPE DATASET: a hyperparameter study; flags are those of `offrl train`, and the study's own."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.progress import Progress

from offrl.cli.console import bars, import_files, out, reporter
from offrl.cli.train import C, Call, called, parse_seeds
from offrl.core.config import validate
from offrl.data.load import load_dataset
from offrl.recipes.objectives import objective
from offrl.recipes.study import best, done, draw, patiently, shown, summary, told
from offrl.recipes.tune import Options
from offrl.recipes.tune import tune as run
from offrl.training.run import RunError

SHOWN = 5  # failures


@dataclass(frozen=True, kw_only=True)
class Tune(Call[C]):
    options: Annotated[Options, tyro.conf.arg(name="")] = Options()
    seeds: str = "0"
    """Seeds of each trial, as in 0-4 or 0,3,7; its value is the mean of theirs."""
    plots: Path | None = None
    """Folder of the study's plots; by default its own in the folder of the recipe's runs."""


def tune(arguments: Sequence[str]) -> None:
    recipe, dataset, flags, config = called("tune", arguments)
    kind, about = (
        Tune[type(config)[type(config.agent)]],
        {"prog": f"offrl tune {recipe} {dataset}", "description": "Search hyperparameters."},
    )
    args = tyro.cli(kind, default=Tune(config=config), args=flags, **about)
    seeds, options = parse_seeds(validate(args, "offrl tune").seeds), args.options
    with told(options.storage):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with bars() as progress:
            data = load_dataset(dataset, progress=partial(reporter(progress, "reading"), dataset), **args.reading())
            how = {"runs": args.runs, "prepare": partial(import_files, args.imports), "watcher": Bars(progress), "say": out.print}
            study = run(recipe, dataset, args.config, options, seeds=seeds, data=data, **how, **args.reading())
        conclude(study, options, args.plots or args.runs / "studies" / re.sub(r"[^\w.-]+", "-", study.study_name))
    out.print(f"to train with it: offrl train {recipe} {dataset} --from-study {shown(options.storage)} --study {study.study_name}")


class Bars:
    """A bar of the study with the best value so far, and one of each trial that runs."""

    def __init__(self, bars: Progress):
        self.bars, self.trials = bars, {}

    def begun(self, study: Any, target: int, retries: int) -> None:
        self.retries = retries
        self.all = self.bars.add_task("trials", total=target)
        self._show(study)

    def progress(self, number: int, done: int, of: int) -> None:
        if number not in self.trials:
            self.trials[number] = self.bars.add_task(f"trial {number}", total=of)
        self.bars.update(self.trials[number], completed=done)

    def ended(self, study: Any, number: int) -> None:
        if number in self.trials:
            self.bars.remove_task(self.trials.pop(number))
        self._show(study)

    def _show(self, study: Any) -> None:
        top, trials = best(study), patiently(study.get_trials, deepcopy=False)
        said = "trials" if top is None else f"trials, best {top.value:.4g} of trial {top.number}"
        self.bars.update(self.all, completed=done(trials, self.retries), description=said)


def conclude(study: Any, options: Options, plots: Path) -> None:
    """Prints what has come of a study, and what it cost. Raises RunError where no trial is complete."""
    found = summary(study)
    counts = ", ".join(f"{count} {state}" for state, count in sorted(found.states.items()))
    out.print(f"study {study.study_name} in {shown(options.storage)}: {sum(found.states.values())} trials, {counts}")
    for number, why in list(found.failures.items())[:SHOWN]:
        out.print(f"  trial {number} failed: {why}")
    if len(found.failures) > SHOWN:
        out.print(f"  and {len(found.failures) - SHOWN} more")
    used = "that the selection used" if objective(options.objective).online else "played, none of which the selection used"
    out.print(f"online episodes {used}: {found.episodes}; seconds that the objective took: {found.seconds:.0f}")
    if found.best is None:
        raise RunError(f"no trial of the study {study.study_name} is complete")
    values = ", ".join(
        f"{path} {value:.4g}" if isinstance(value, float) else f"{path} {value}" for path, value in found.best.params.items()
    )
    out.print(f"best: {found.unit} {found.best.value:.4g} of trial {found.best.number}, {values}")
    if found.first not in (None, found.best):
        out.print(f"as the config was before: {found.unit} {found.first.value:.4g} of trial {found.first.number}")
    for folder in found.best.user_attrs["runs"]:
        out.print(f"run: {os.path.relpath(folder)}")
    try:
        out.print(f"plots: {', '.join(map(str, draw(study, plots)))}")
    except ImportError as error:
        out.print(f"no plots: {error}")
