"""Hyperparameter studies: Optuna suggests, trials train in processes of their own, and what came of them is in a database.

This process alone asks and tells: it answers evaluations with whether to go on, and sees how every trial ended, an exception, a value
that is not finite, too long a time and a kill among the ways. A study may be helped by the same command elsewhere.
"""

from __future__ import annotations

import math
import multiprocessing
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Annotated, Any, Literal

from offrl.core.config import ConfigError, Range
from offrl.core.interrupt import Interrupt
from offrl.data.load import load_dataset
from offrl.envs.make import EnvError, env_for, make
from offrl.recipes import study as studies
from offrl.recipes.common import name_of
from offrl.recipes.config import family, resolve, searched
from offrl.recipes.objectives import episodes_played, objective
from offrl.recipes.search import described, flattened, nested, space
from offrl.recipes.study import patiently
from offrl.recipes.trial import Plan, counting, run_trial
from offrl.training.hooks import Interrupted
from offrl.training.run import RunError

IMPORTED = ["offrl.recipes.trial", "torch._dynamo", "gymnasium"]  # once, by the process that trials are forked from


@dataclass(frozen=True)
class Options:
    """How a study goes on. Of these only `search`, `objective` and `last` must stay as they were when it began."""

    trials: Annotated[int, Range(1)] = 40
    """How many more trials; after an interruption, the same number again runs those that were left."""
    storage: str = "sqlite:///studies.db"
    """The database that studies are in: an SQLite file, or another that SQLAlchemy knows."""
    study: str | None = None
    """The study's name; by default RECIPE-DATASET."""
    search: tuple[str, ...] = ()
    """What to search: dotted paths of the config, alone or as PATH=LOW:HIGH, PATH=LOW:HIGH:log or PATH=A,B,C. By default, what the
    study has begun with, or what the recipe's YAML names."""
    objective: str = "online"
    """What is maximised: online, the mean score of the final evaluation; without an environment, fqe, the policy's value by fitted Q
    evaluation, or model, its penalised return in a dynamics model; or one of your own."""
    last: Annotated[int, Range(0)] = 0
    """In place of the final evaluation, so many last ones during training."""
    sampler: Literal["gp", "tpe", "random"] = "gp"
    """What suggests values: a Gaussian process, a tree-structured Parzen estimator, or chance."""
    seed: int = 0
    """Of the suggestions."""
    pruner: Literal["auto", "median", "none"] = "auto"
    """Whether a trial ends where its evaluations are below the median of the others'; auto: if evaluations are what is maximised."""
    workers: Annotated[int, Range(1)] = 1
    """Trials at once, each in a process of one thread."""
    timeout: Annotated[float | None, Range(0)] = None
    """Seconds after which a trial has failed."""
    retries: Annotated[int, Range(0)] = 2
    """How often a trial goes on whose process was killed."""
    grace: Annotated[float, Range(1)] = 60.0
    """Seconds without a sign of life after which another process's trial is taken over."""


class Quiet:
    """Who watches a study; the command line shows bars."""

    def begun(self, study: Any, target: int, retries: int) -> None: ...

    def progress(self, number: int, done: int, of: int) -> None: ...

    def ended(self, study: Any, number: int) -> None: ...


def tune(
    recipe: str,
    dataset: Any,
    config: Any,
    options: Options,
    *,
    seeds: Sequence[int] = (0,),
    runs: str | Path = "runs",
    prepare: Callable[[], None] | None = None,
    watcher: Any = None,
    say: Callable[[str], None] = lambda text: None,
    data: Any = None,
    **reading: Any,
) -> Any:
    """Run a study of a recipe on a dataset to the end, and return it, an `optuna.Study`.

    dataset: an id or a path, which every trial's process reads for itself (`reading` as for `load_dataset`); `data` is what has been
    read of it already. config: resolved; what it says of learning is the same in all trials, but for what is searched. seeds: those of
    each trial, whose values are averaged. prepare: runs first in every process.

    Raises ConfigError and RunError for what cannot be searched, evaluated or continued, and Interrupted after a signal.
    """
    name, data = name_of(dataset), load_dataset(dataset, **reading) if data is None else data
    unit, terms = _unit(options, config, data), options.search or searched(recipe)
    kinds = space(config, terms)
    with studies.told(options.storage):
        storage, called = studies.open_storage(options.storage), options.study or f"{recipe}-{name}"
        old = studies.identity_of(storage, called)
        if old is not None and not options.search:
            kinds = space(config, [f"{path}={text}" for path, text in old["search"].items()])
        told, usual = counting(asdict(config)), flattened(asdict(resolve(recipe, name)))
        config = family(recipe)[0].for_study(config, kinds)
        rest = {path: value for path, value in counting(asdict(config)).items() if path not in kinds}
        identity = {
            "recipe": recipe, "dataset": name, "fingerprint": data.fingerprint, "objective": options.objective, "last": options.last,
            "unit": unit, "seeds": list(seeds), "search": {path: described(kind) for path, kind in kinds.items()}, "config": rest,
            "first": old["first"] if old is not None else _first(config, kinds),
            "told": {path: told[path] for path in rest if path.split(".")[0] in config.learns and told[path] != usual[path]},
        }  # fmt: skip
        how = {
            "sampler": studies.sampler(options.sampler, options.seed, identity["first"]),
            "pruner": _pruner(options, config, len(seeds)),
        }
        study = studies.open_study(storage, called, identity, **how)
        plan = Plan(
            called, recipe, dataset, name, asdict(config), tuple(seeds), options.objective, options.last, Path(runs), reading, prepare
        )
        del data
        Tuning(study, kinds, plan, options, watcher or Quiet(), say).run()
    return study


def _unit(options: Options, config: Any, data: Any) -> str:
    """What the objective's values are; raises where there can be none."""
    if not objective(options.objective).online:
        if options.last or options.pruner == "median":
            asked = "--last" if options.last else "--pruner median"
            raise ConfigError(f"{asked} looks at evaluations in the environment, which --objective {options.objective} does without")
        return options.objective
    try:
        make(config.env or env_for(data.spec)).close()
    except EnvError as error:
        raise RunError(f"--objective online plays episodes, and {error}") from None
    evaluations = config.steps // config.eval_every if config.eval_episodes else 0
    if options.last > evaluations:
        raise ConfigError(f"--last {options.last}: a run of {config.steps} steps has {evaluations} evaluations before the final one")
    return "return" if data.spec.ref_min is None or data.spec.ref_max is None else "normalised score"


def _pruner(options: Options, config: Any, seeds: int) -> Any:
    from optuna.pruners import MedianPruner, NopPruner

    if options.pruner == "none" or not objective(options.objective).online:
        return NopPruner()
    return MedianPruner(n_startup_trials=5, n_warmup_steps=seeds * config.steps // 4)


def _first(config: Any, kinds: dict[str, Any]) -> dict[str, Any]:
    """The searched fields as they are in the config, if all of them are among what is searched."""
    flat = flattened(asdict(config))
    inside = [
        flat[path] in kind.choices if hasattr(kind, "choices") else flat[path] is not None and kind.low <= flat[path] <= kind.high
        for path, kind in kinds.items()
    ]
    return {path: flat[path] for path in kinds} if all(inside) else {}


@dataclass
class Running:
    """A trial of this process's."""

    trial: Any
    process: Any
    begun: float
    late: bool = False


class Tuning:
    """A study being run: which trials are, and what happens to them."""

    def __init__(self, study: Any, kinds: dict[str, Any], plan: Plan, options: Options, watcher: Any, say: Callable[[str], None]):
        self.study, self.kinds, self.plan, self.options, self.watcher, self.say = study, kinds, plan, options, watcher, say
        self.running: dict[Any, Running] = {}
        self.signs: dict[int, tuple[Any, float]] = {}  # of others' trials: the last sign of life, and since when it has been the last
        self.beaten, self.beats, self.stopping = time.monotonic(), 0, False
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload(IMPORTED)

    def run(self) -> None:
        """Returns when every trial has its outcome; raises Interrupted after a signal."""
        self.target = studies.aim(self.study, self.options.trials, self.options.retries)
        self.watcher.begun(self.study, self.target, self.options.retries)
        try:
            with Interrupt() as self.interrupt:
                while self._more():
                    self._hear(0.2)
                    self._look_after()
        finally:
            for each in self.running.values():
                each.process.kill()
        if self.interrupt.requested:
            done = studies.done(self._trials(), self.options.retries)
            raise Interrupted(f"stopped: {done} of {self.target} trials are done; the same command again runs the others")

    def _trials(self) -> list[Any]:
        return patiently(self.study.get_trials, deepcopy=False)

    def _more(self) -> bool:
        """Starts what can be started; whether anything is left to wait for."""
        if self.interrupt.requested or len(self.running) == self.options.workers:
            return bool(self.running)
        trials = self._trials()
        for trial in studies.owed(trials, self.options.retries):
            studies.requeue(self.study, trial)
        while len(self.running) < self.options.workers:
            trials = self._trials()
            if len(studies.counted(trials)) >= self.target and not any(trial.state.name == "WAITING" for trial in trials):
                break
            self._start()
        self._take_over([trial for trial in trials if trial.state.name == "RUNNING"])
        trials = self._trials()
        return any(not trial.state.is_finished() for trial in trials) or bool(studies.owed(trials, self.options.retries))

    def _start(self) -> None:
        trial = patiently(self.study.ask, self.kinds)
        trials = self._trials()
        if studies.surplus(trials[trial.number], trials, self.target):
            return self._end(trial, "FAIL", kind="withdrawn", cause="another process had begun the last trial")
        ours, theirs = self.processes.Pipe()
        process = self.processes.Process(target=run_trial, args=(theirs, self.plan, trial.number, nested(trial.params)))
        process.start()
        theirs.close()
        self.running[ours] = Running(trial, process, time.monotonic())

    def _hear(self, seconds: float) -> None:
        from optuna.exceptions import UpdateFinishedTrialError

        for line in wait(list(self.running), seconds):
            each = self.running[line]
            try:
                try:
                    kind, value = line.recv()
                except (EOFError, OSError):
                    self._gone(line)
                else:
                    self._heard(line, kind, value)
            except UpdateFinishedTrialError:  # this process has slept, and another has given the trial up
                each.process.kill()
                self.running.pop(line, None)

    def _heard(self, line: Any, kind: str, value: Any) -> None:
        trial = self.running[line].trial
        if kind == "progress":
            self.watcher.progress(trial.number, *value)
        elif kind in ("runs", "seconds"):
            patiently(trial.set_user_attr, kind, value)
        elif kind in ("report", "final report"):
            step, worth = value
            patiently(trial.report, worth, step)
            if kind == "report":
                with suppress(OSError):
                    line.send(patiently(trial.should_prune))
        elif kind == "failed":
            self._close(line, "FAIL", kind=value[0], cause=value[1])
        elif kind == "interrupted":
            self._close(line, "FAIL", kind=kind, cause="a signal asked it to stop")
        elif kind == "pruned":
            self._close(line, "PRUNED")
        elif not math.isfinite(value):
            self._close(line, "FAIL", kind="not finite", cause=f"its value is {value}")
        else:
            self._close(line, "COMPLETE", value)

    def _gone(self, line: Any) -> None:
        """A process that ended without a last word."""
        each = self.running[line]
        each.process.join()
        code = each.process.exitcode
        if each.late:
            self._close(line, "FAIL", kind="timeout", cause=f"it took longer than {self.options.timeout:g} seconds")
        elif self.interrupt.requested:
            self._close(line, "FAIL", kind="interrupted", cause="a signal asked it to stop")
        elif code < 0:
            memory = ": was the memory full?" if code == -signal.SIGKILL else ""
            self._close(line, "FAIL", kind="killed", cause=f"its process was killed by {signal.Signals(-code).name}{memory}")
        else:
            self._close(line, "FAIL", kind="error", cause=f"its process ended with exit code {code}")

    def _close(self, line: Any, state: str, value: float | None = None, **attrs: str) -> None:
        """A trial of this process's has ended: in the database, and on this machine."""
        each = self.running.pop(line)
        line.close()
        each.process.join(10)
        each.process.kill()
        self._end(each.trial, state, value, **attrs)
        self.watcher.ended(self.study, each.trial.number)

    def _end(self, trial: Any, state: str, value: float | None = None, **attrs: Any) -> None:
        from optuna.trial import TrialState

        attrs["episodes"] = sum(episodes_played(Path(run)) for run in trial.user_attrs.get("runs", ()))
        for key, attr in attrs.items():
            patiently(trial.set_user_attr, key, attr[:1000] if isinstance(attr, str) else attr)
        patiently(self.study.tell, trial, value, state=TrialState[state])

    def _look_after(self) -> None:
        """Gives signs of life, stops what is late, and passes a signal on."""
        from optuna.exceptions import UpdateFinishedTrialError

        now = time.monotonic()
        for each in self.running.values():
            if self.options.timeout is not None and now - each.begun > self.options.timeout and not each.late:
                each.late = True
                each.process.kill()
            if self.interrupt.requested and not self.stopping:
                each.process.terminate()  # a second signal would kill it: sent once
        self.stopping = self.interrupt.requested
        if now - self.beaten > self.options.grace / 6:
            self.beaten, self.beats = now, self.beats + 1
            for each in self.running.values():
                with suppress(UpdateFinishedTrialError):
                    patiently(each.trial.set_user_attr, "beat", self.beats)

    def _take_over(self, trials: Sequence[Any]) -> None:
        """Ends others' trials, of those that are running, which have given no sign of life for long; they are owed, then."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import Trial

        now, mine = time.monotonic(), {each.trial.number for each in self.running.values()}
        for frozen in trials:
            beat, silence = frozen.user_attrs.get("beat"), f"no sign of life for {self.options.grace:g} seconds"
            if frozen.number in mine:
                continue
            if frozen.number not in self.signs:
                self.say(f"trial {frozen.number} was begun by another process; with {silence} it is taken over")
            if self.signs.setdefault(frozen.number, (beat, now))[0] != beat:
                self.signs[frozen.number] = beat, now
            elif now - self.signs[frozen.number][1] > self.options.grace:
                with suppress(UpdateFinishedTrialError):  # by another process, just now
                    self._end(Trial(self.study, frozen._trial_id), "FAIL", kind="lost", cause=silence)
