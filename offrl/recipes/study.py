"""A study in its database: opened by whoever comes first, counted, continued, and asked for its best.

Everything that decides what is left to do is read from the database, so a process may die at any moment, or others may help. A trial
that was cut off is FAIL and goes on as another, WAITING, with the same values and so in the same run folder; the two count once.
"""

from __future__ import annotations

import contextlib
import copy
import random
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from offrl.core.config import ConfigError, digest, nearest
from offrl.recipes.search import flattened, nested
from offrl.recipes.trial import differences
from offrl.training.run import RunError

BUSY, PATIENCE = 60.0, 300.0  # seconds for which a locked database is waited for: by SQLite at once, and in all
BEING_MADE = ("already exists", "locked", "UNIQUE", "duplicate")  # what a database says whose tables another process is making
CUT_OFF = ("killed", "lost", "interrupted")  # kinds of failure after which a trial goes on
HISTORY = "retry_history"  # as Optuna's own retries call it: the numbers of the trials that one goes on from


def patiently(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The call's result; where the database is locked by another process it is called again."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import OperationalError

    end = time.monotonic() + PATIENCE
    while True:
        try:
            return call(*args, **options)
        except (StorageInternalError, OperationalError) as error:
            if "locked" not in _reason(error) or time.monotonic() > end:
                raise
            time.sleep(random.uniform(0, 0.5))


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error.args[0] if error.args else error).splitlines()[0]


@contextlib.contextmanager
def told(url: str) -> Iterator[None]:
    """Errors of the database as a RunError of one line."""
    try:
        import optuna
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError:
        raise ImportError('studies need Optuna: pip install "offrl[tune]"') from None
    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise RunError(f"{shown(url)}: {_reason(error)}") from None


def shown(url: str) -> str:
    """The URL without its password."""
    from sqlalchemy.engine import make_url

    return make_url(url).render_as_string(hide_password=True)


def open_storage(url: str, create: bool = True) -> Any:
    """The database of an SQLAlchemy URL, with Optuna's tables, which any number of processes may make at once.

    Raises RunError for what is no such URL, and without `create` where there is none.
    """
    from optuna.exceptions import StorageInternalError
    from optuna.storages import RDBStorage
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

    try:
        parts = make_url(url)
        parts.get_dialect()
    except (ArgumentError, NoSuchModuleError):
        raise RunError(f"{url} is no database: name an SQLite file, as in sqlite:///study.db, or another URL of SQLAlchemy's") from None
    options: dict[str, Any] = {}
    if parts.get_backend_name() == "sqlite":
        if parts.database in (None, "", ":memory:"):
            raise RunError(f"a study in {url} cannot be continued: name a file, as in sqlite:///study.db")
        if not create and not Path(parts.database).exists():
            raise RunError(f"there is no study in {url}")
        options = {"connect_args": {"timeout": BUSY}}
    end = time.monotonic() + BUSY
    while True:
        try:
            return RDBStorage(url.replace("{", "{{").replace("}", "}}"), engine_kwargs=options)
        except RuntimeError as error:  # made by another version of Optuna
            raise RunError(f"{shown(url)}: {_reason(error)}") from None
        except (SQLAlchemyError, StorageInternalError) as error:
            if time.monotonic() > end or not any(word in _reason(error) for word in BEING_MADE):
                raise
            time.sleep(random.uniform(0, 0.5))


def identity_of(storage: Any, name: str) -> dict[str, Any] | None:
    """What the study of that name was made for, or None where there is no such study, or one without trials that says nothing.

    Raises RunError for a study that others have made.
    """
    import optuna

    try:
        study = patiently(optuna.load_study, storage=storage, study_name=name)
    except KeyError:
        return None
    begun = bool(patiently(study.get_trials, deepcopy=False))  # looked at first: another process may be beginning it
    identity = patiently(lambda: study.user_attrs).get("offrl")
    if identity is None and begun:
        raise RunError(f"the study {name} was not made by `offrl tune`; --study names another")
    return identity


def open_study(storage: Any, name: str, identity: dict[str, Any], **how: Any) -> Any:
    """The study of that name, made if there is none.

    identity: what its trials share, plain. Raises RunError, with the difference, where those that it has share something else.
    how: Optuna's `sampler` and `pruner`.
    """
    import optuna

    old = identity_of(storage, name)
    study = patiently(optuna.create_study, storage=storage, study_name=name, direction="maximize", load_if_exists=True, **how)
    if old is None:
        patiently(study.set_user_attr, "offrl", identity)
    elif other := differences(flattened(old), flattened(identity), "in the study", "now"):
        raise RunError(f"the study {name} is another: {other}. The flags that began it continue it; --study NAME begins another")
    return study


class Learned:
    """A study to whose sampler a pruned trial is a complete one with its last value: Optuna's Gaussian process would not see it at all,
    and suggest the same again.
    """

    def __init__(self, study: Any):
        self.study = study

    def __getattr__(self, name: str) -> Any:
        return getattr(self.study, name)

    def _get_trials(self, deepcopy: bool = True, states: Any = None, use_cache: bool = False) -> list[Any]:
        from optuna.trial import TrialState

        found = []
        for trial in self.study._get_trials(deepcopy=False, use_cache=use_cache):
            if trial.state == TrialState.PRUNED and trial.values is not None:
                trial = copy.copy(trial)
                trial.state = TrialState.COMPLETE
            if states is None or trial.state in states:
                found.append(trial)
        return found


def sampler(kind: str, seed: int, first: Mapping[str, Any] | None = None) -> Any:
    """Optuna's sampler, which draws for each trial anew, from the seed and how many trials there were before it.

    So a study that was cut suggests what an uncut one would, and no two processes suggest the same. first: the first trial's values.
    """
    from optuna import samplers

    make = {
        "gp": partial(samplers.GPSampler, warn_independent_sampling=False), "tpe": samplers.TPESampler, "random": samplers.RandomSampler,
    }[kind]  # fmt: skip

    class Counted(samplers.BaseSampler):
        def before_trial(self, study: Any, trial: Any) -> None:
            before = sum(each.number < trial.number for each in counted(study.get_trials(deepcopy=False)))
            self.own, self.fixed = make(seed=int(digest([seed, before]), 16)), {} if before else first or {}
            self.own.before_trial(study, trial)

        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            return self.own.infer_relative_search_space(Learned(study), trial)

        def sample_relative(self, study: Any, trial: Any, search_space: dict[str, Any]) -> dict[str, Any]:
            return self.own.sample_relative(Learned(study), trial, search_space)

        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
            if param_name in self.fixed:
                return self.fixed[param_name]
            return self.own.sample_independent(study, trial, param_name, param_distribution)

    return Counted()


def superseded(trials: Sequence[Any]) -> set[int]:
    """Numbers of the trials that went on as others."""
    return {number for trial in trials for number in trial.system_attrs.get(HISTORY, ())}


def counted(trials: Sequence[Any]) -> list[Any]:
    """The trials of which each has, or will have, an outcome of its own."""
    gone = superseded(trials)
    return [trial for trial in trials if trial.number not in gone and trial.user_attrs.get("kind") != "withdrawn"]


def owed(trials: Sequence[Any], retries: int) -> list[Any]:
    """Trials that were cut off and are to go on: after an interruption always, else at most `retries` times."""
    kinds = {trial.number: trial.user_attrs.get("kind") for trial in trials}
    found = []
    for trial in counted(trials):
        lost = [kinds[number] for number in (*trial.system_attrs.get(HISTORY, ()), trial.number)]
        again = lost[-1] == "interrupted" or lost[-1] in CUT_OFF and len(lost) - lost.count("interrupted") <= retries
        if trial.state.name == "FAIL" and again:
            found.append(trial)
    return found


def done(trials: Sequence[Any], retries: int) -> int:
    """How many trials have their outcome."""
    return sum(trial.state.is_finished() for trial in counted(trials)) - len(owed(trials, retries))


def requeue(study: Any, trial: Any) -> None:
    """Has a trial that was cut off go on as another."""
    from optuna.trial import TrialState, create_trial

    history = [*trial.system_attrs.get(HISTORY, ()), trial.number]
    attrs = trial.system_attrs | {"failed_trial": history[0], HISTORY: history}
    state, params, kinds = TrialState.WAITING, trial.params, trial.distributions
    patiently(study.add_trial, create_trial(state=state, params=params, distributions=kinds, system_attrs=attrs))


def surplus(trial: Any, trials: Sequence[Any], target: int) -> bool:
    """Whether a trial just asked for is one too many, because another process asked at the same moment."""
    if history := trial.system_attrs.get(HISTORY):
        return any(other.number < trial.number and other.system_attrs.get(HISTORY) == history for other in trials)
    return [other.number for other in counted(trials)].index(trial.number) >= target


def aim(study: Any, asked: int, retries: int) -> int:
    """How many trials the study is to have: `asked` more than it was to have, unless the last call asked for as many and some are left."""
    trials, before = patiently(study.get_trials, deepcopy=False), patiently(lambda: study.user_attrs).get("trials")
    target = asked if before is None else before["target"]
    if before is not None and (before["asked"] != asked or done(trials, retries) >= target):
        target += asked
    patiently(study.set_user_attr, "trials", {"target": target, "asked": asked})
    return target


def best(study: Any) -> Any | None:
    """The complete trial of the highest value, or None."""
    complete = [trial for trial in patiently(study.get_trials, deepcopy=False) if trial.state.name == "COMPLETE"]
    return max(complete, key=lambda trial: trial.value, default=None)


def from_study(url: str, recipe: str, name: str | None = None) -> tuple[dict[str, Any], str]:
    """The overrides of a study's best trial, and where they are from, in words.

    They are the searched values, and what the study's command line said of learning. name: may be left out where there is one study.
    Raises RunError where there is no such study, or none of its trials is complete, and where it is another recipe's.
    """
    with told(url):
        import optuna

        storage = open_storage(url, create=False)
        names = sorted(optuna.get_all_study_names(storage))
        if not names:
            raise RunError(f"{shown(url)} holds no study")
        if name is None and len(names) > 1:
            raise RunError(f"{shown(url)} holds several studies, choose one with --study: {', '.join(names)}")
        name = name or names[0]
        if name not in names:
            raise RunError(f"{shown(url)} holds no study {name!r}{nearest(name, names)}")
        study = optuna.load_study(study_name=name, storage=storage)
        identity, top = study.user_attrs.get("offrl"), best(study)
    if identity is None:
        raise RunError(f"the study {name} was not made by `offrl tune`")
    if identity["recipe"] != recipe:
        raise ConfigError(f"the study {name} is of {identity['recipe']}, not of {recipe}")
    if top is None:
        raise RunError(f"no trial of the study {name} is complete")
    words = f"study {name}, trial {top.number} ({identity['unit']} {top.value:.4g} on {identity['dataset']})"
    return nested(identity["told"] | top.params), words


@dataclass(frozen=True)
class Summary:
    """What has come of a study."""

    states: dict[str, int]
    """How many trials are complete, pruned and failed, those that went on as others aside."""
    failures: dict[int, str]
    """Trial number -> why."""
    best: Any | None
    first: Any | None
    """The trial of the config as it was, if it is complete."""
    unit: str
    episodes: int
    """Online episodes that all trials played."""
    seconds: float
    """What the objective took, training aside."""


def summary(study: Any) -> Summary:
    trials, identity = patiently(study.get_trials, deepcopy=False), patiently(lambda: study.user_attrs)["offrl"]
    mine = counted(trials)
    played: dict[tuple[str, ...], int] = {}  # a run that several trials went on with was played once
    for trial in trials:
        runs = tuple(trial.user_attrs.get("runs", ()))
        played[runs] = max(played.get(runs, 0), trial.user_attrs.get("episodes", 0))
    failures = {t.number: f"{t.user_attrs.get('kind')}: {t.user_attrs.get('cause')}" for t in mine if t.state.name == "FAIL"}
    seconds = sum(trial.user_attrs.get("seconds", 0.0) for trial in trials)
    first = next((t for t in mine if t.state.name == "COMPLETE" and t.params == identity["first"]), None)
    states = Counter("failed" if trial.state.name == "FAIL" else trial.state.name.lower() for trial in mine)
    return Summary(dict(states), failures, best(study), first, identity["unit"], sum(played.values()), seconds)


def draw(study: Any, folder: Path) -> list[Path]:
    """Plots as PNGs: values in the order of trials, values over each searched field, and the fields' importance."""
    try:
        from matplotlib import pyplot
    except ImportError:
        raise ImportError('plots need matplotlib: pip install "offrl[plot]"') from None
    from optuna.visualization import matplotlib as plots

    identity = patiently(lambda: study.user_attrs)["offrl"]
    values = {trial.value for trial in patiently(study.get_trials, deepcopy=False) if trial.state.name == "COMPLETE"}
    kinds = {"history": plots.plot_optimization_history, "slices": plots.plot_slice} if values else {}
    if len(values) > 1 and len(identity["search"]) > 1:
        kinds["importance"] = plots.plot_param_importances
    folder.mkdir(parents=True, exist_ok=True)
    for name, plot in kinds.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # these plots are said to be experimental
            figure = np.ravel(plot(study, target_name=identity["unit"]))[0].figure
        figure.savefig(folder / f"{name}.png", dpi=120, bbox_inches="tight")
        pyplot.close(figure)
    return [folder / f"{name}.png" for name in kinds]
