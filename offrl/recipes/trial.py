"""One trial of a study, in a process of its own: it trains, tells of its evaluations, and says in the end what it is worth."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import yaml

from offrl.core.config import merge
from offrl.core.lock import InUse
from offrl.data.load import load_dataset
from offrl.recipes.common import folder_of, resolve, train
from offrl.recipes.objectives import EVALUATION, evaluation, objective
from offrl.recipes.parallel import follow
from offrl.recipes.search import flattened
from offrl.training.hooks import Diverged, Interrupted
from offrl.training.run import Finished, RunError

# of a config, what a trial's value does not depend on
ASIDE = ("log_every", "checkpoint_every", "mode", "device", "tensorboard", "wandb")


@dataclass(frozen=True)
class Plan:
    """What all trials of a study share."""

    study: str
    recipe: str
    dataset: Any
    name: str
    config: dict[str, Any]  # plain: the class of a user's own agent is known only once `prepare` has run
    seeds: tuple[int, ...]
    objective: str
    last: int
    runs: Path
    reading: dict[str, Any]
    prepare: Callable[[], None] | None = None


class Pruned(Exception):
    pass


class Line:
    """The connection to the study's process. When that one is no more, words are lost: `follow` sees to the end."""

    def __init__(self, connection: Connection):
        self.connection = connection

    def say(self, kind: str, value: Any = None) -> None:
        with contextlib.suppress(OSError):
            self.connection.send((kind, value))

    def ask(self, kind: str, value: Any) -> Any:
        self.say(kind, value)
        with contextlib.suppress(OSError, EOFError):
            return self.connection.recv()


def run_trial(connection: Connection, plan: Plan, number: int, overrides: dict[str, Any]) -> None:
    """The process of trial `number`, whose searched values are `overrides`; its last word is value, pruned, interrupted or failed."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches every process; the parent's word counts
    Thread(target=follow, daemon=True).start()
    line = Line(connection)
    try:
        line.say("value", _value(plan, number, overrides, line))
    except Pruned:
        line.say("pruned")
    except Interrupted:
        line.say("interrupted")
    except Diverged as error:
        line.say("failed", ("diverged", str(error)))
    except Exception as error:
        line.say("failed", ("error", f"{type(error).__name__}: {error}".removesuffix(": ")))


def _value(plan: Plan, number: int, overrides: dict[str, Any], line: Line) -> float:
    if plan.prepare is not None:
        plan.prepare()
    data = load_dataset(plan.dataset, **plan.reading)
    config = merge(resolve(plan.recipe, plan.name, None, plan.config), overrides, f"trial {number}")
    folder = folder_of(plan.runs, plan.recipe, plan.name, config, data)
    runs = [folder / str(seed) for seed in plan.seeds]
    line.say("runs", [os.path.abspath(run) for run in runs])
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "trials.jsonl", "a") as file:
        print(json.dumps({"study": plan.study, "trial": number}), file=file)
    for i, seed in enumerate(plan.seeds):
        _train(plan, data, config, seed, Watch(runs[i], line, i * config.steps, len(runs) * config.steps))
    worth = objective(plan.objective).value
    if plan.last:
        worth = partial(worth, last=plan.last)
    begin = time.monotonic()
    values = [float(worth(run, data, config)) for run in runs]
    line.say("seconds", time.monotonic() - begin)
    return sum(values) / len(runs)


def _train(plan: Plan, data: Any, config: Any, seed: int, watch: Watch) -> None:
    """Trains one seed; where another process trains the very same run, waits for it and takes its result."""
    while True:
        try:
            train(plan.recipe, data, config, seeds=[seed], runs=plan.runs, name=plan.name, progress=watch)
            return watch.look()
        except InUse:
            time.sleep(0.5)
        except Finished:
            there = yaml.safe_load((watch.run / "config.yaml").read_text())
            if other := differences(counting(there), counting(asdict(config)), "there", "in this study"):
                raise RunError(f"{watch.run} is finished, by other rules: {other}; name another folder with --runs") from None
            return watch.look()


class Watch:
    """The `progress` of a training: tells of steps done and of each new evaluation in the run's log, and ends it where it is pruned.

    before, of: gradient steps of the seeds trained earlier, and of all of them.
    """

    def __init__(self, run: Path, line: Line, before: int, of: int):
        self.run, self.line, self.before, self.of, self.read = run, line, before, of, 0

    def __call__(self, done: int, steps: int) -> None:
        self.line.say("progress", (min(self.before + done, self.of), self.of))
        self.look(steps)

    def look(self, steps: int = 0) -> None:
        """Raises Pruned where an evaluation before the last of `steps` is answered so."""
        for row in self._news():
            report = (self.before + row["step"], evaluation(row))
            if row["step"] < steps and self.line.ask("report", report):
                raise Pruned
            if row["step"] >= steps:
                self.line.say("final report", report)

    def _news(self) -> list[dict[str, Any]]:
        rows = []
        with open(self.run / "log.jsonl", "rb") as log:
            log.seek(self.read)
            for text in log:
                self.read += len(text)
                if EVALUATION[-1].encode() in text:
                    rows.append(json.loads(text))
        return rows


def counting(config: dict[str, Any]) -> dict[str, Any]:
    """The flat part of a plain config on which a trial's value depends."""
    return {path: value for path, value in flattened(config).items() if path.split(".")[0] not in ASIDE}


def differences(a: dict[str, Any], b: dict[str, Any], where_a: str, where_b: str) -> str:
    """What is not the same in two flat dicts, in words; "" where all is."""
    other = [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
    return "; ".join(f"{key} is {a.get(key, 'absent')} {where_a}, {b.get(key, 'absent')} {where_b}" for key in other)
