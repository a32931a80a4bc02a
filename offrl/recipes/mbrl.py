"""Offline model-based RL: an ensemble is fitted to the data, and an agent learns from the data and from what the ensemble imagines.

With SAC and a penalty it is MOPO (Yu et al., 2020, arXiv 2005.13239), with a halt MOReL (Kidambi et al., 2020, arXiv 2005.05951), with
the conservative agent COMBO (Yu et al., 2021, arXiv 2102.08363); Lu et al., 2022 (arXiv 2110.04135) compares the choices.
"""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from offrl.core.checkpoint import CheckpointError, load_file, save_file
from offrl.core.config import Log, Range, digest
from offrl.core.lock import InUse, RunLock
from offrl.core.machine import cores
from offrl.data.dataset import Dataset
from offrl.envs.terminations import Terminated, never, termination_for
from offrl.models import dynamics
from offrl.models.dynamics import CHUNK, Dynamics, Fitted, Step
from offrl.models.imagine import Imagine
from offrl.models.penalty import Kind, penalty
from offrl.recipes import config as base
from offrl.recipes.offline import replay
from offrl.training.accelerate import best_mode
from offrl.training.run import RunError
from offrl.training.sources import Mix

A = TypeVar("A")
STACKS = False


@dataclass(frozen=True)
class Model(dynamics.Config):
    trained: Annotated[int | None, Range(1, 50)] = None
    """Members to train, of which the first `members` are used: one training then serves many choices of `members`."""
    seed: Annotated[int | None, Range(0)] = None
    """Seed of the ensemble; none: each run's own. Runs that share a seed share the ensemble."""


@dataclass(frozen=True)
class Imagination:
    horizon: Annotated[int, Log(1, 50)] = 5
    """Steps of a rollout."""
    starts: Annotated[int, Range(1)] = 10_000
    """Rollouts in a generation, each from a row of the data."""
    every: Annotated[int, Range(1)] = 1_000
    """Gradient steps from one generation to the next."""
    keep: Annotated[int, Range(1)] = 5
    """Generations that are learned from."""
    real: Annotated[float, Range(0, 1)] = 0.5
    """Share of each batch that is the data's own rows."""


@dataclass(frozen=True)
class Penalisation:
    kind: Kind = "ensemble_std"
    """What the penalty is."""
    weight: Annotated[float, Range(0, 1000)] = 1.0
    """Weight of the penalty in the reward."""
    units: Literal["normalised", "raw"] = "normalised"
    """Of the penalty: standard deviations of what is predicted, and of rewards of the weighted penalty; or the data's own."""
    target: Annotated[float | None, Range(0, 1000)] = None
    """Mean of the weighted penalty that the weight is to be adapted to, from `weight` on; none: the weight stays."""
    halt: Annotated[float | None, Range(0, 1000)] = None
    """A rollout ends where the penalty is more than so many times the greatest on the data (MOReL); none: it does not."""
    halt_offset: Annotated[float, Range(-10_000, 0)] = -50.0
    """The reward there, below the data's least."""


@dataclass(frozen=True)
class Config(base.Config[A]):
    learns: ClassVar[tuple[str, ...]] = (*base.Config.learns, "model", "imagine", "penalty", "termination")

    model: Model = field(default_factory=Model)
    imagine: Imagination = field(default_factory=Imagination)
    penalty: Penalisation = field(default_factory=Penalisation)
    termination: Literal["auto", "never"] = "auto"
    """When imagined episodes end. auto: by the rule of the data's environment; never: only at their horizon."""


def source(
    agent: Any,
    data: Dataset,
    config: Config,
    seeds: int,
    device: str,
    sampling: str,
    *,
    models: Path,
    say: Callable[[str], None],
    stage: Callable[[str, int, int], None],
) -> Mix:
    """Batches of real and imagined rows; the ensemble is fitted, or read from the folder `models` where it was fitted before."""
    rule = terminated(data, config)
    model = ensemble(data, config, seeds, device, models, say, stage)
    imagine, c = config.imagine, config.penalty
    penalize = penalizer(model, c)
    options: dict[str, Any] = {"weight": c.weight, "target": c.target}
    if c.halt is not None:
        limit = c.halt * greatest(model, data, penalize, device)
        options |= {"halt": limit, "halt_reward": float(data.reward.min()) + c.halt_offset}
        say(f"imagined rollouts halt where {c.kind} is above {limit:.3g}")
    real = int(config.batch_size * imagine.real)
    options |= {name: value for name, value in asdict(imagine).items() if name != "real"}
    options |= {"terminated": rule, "penalize": penalize, "period": agent.period, "device": device}
    imagined = Imagine(model, data, config.batch_size - real, seeds, **options)
    if real in (0, config.batch_size):
        raise RunError(f"imagine.real {imagine.real} of {config.batch_size} rows leaves {real} rows of the data: some must be, and not all")
    return Mix(replay(agent, data, config, seeds, device, sampling, real), imagined, mark=True)


def penalizer(model: Dynamics, c: Penalisation) -> Callable[[Step], Tensor]:
    """What a step of the model is penalised by, before the weight: (B,)."""
    scale = model.target_std if c.units == "normalised" else None
    unit = float(model.target_std[-1]) if c.units == "normalised" else 1.0
    return lambda step: unit * penalty(c.kind, step.mean, step.std, step.sample, model.spec.obs.size, scale)


def for_study(config: Config, kinds: Mapping[str, Any]) -> Config:
    """The config with which all trials of a study share one ensemble, trained at the largest size that `kinds` searches."""
    sizes, c = kinds.get("model.members"), config.model
    largest = c.members if sizes is None else max(getattr(sizes, "choices", None) or [sizes.high])
    return replace(config, model=replace(c, trained=max(c.trained or 0, largest), seed=c.seed or 0))


def terminated(data: Dataset, config: Config) -> Terminated:
    """The rule by which imagined episodes end. Raises RunError where episodes do end and no rule is known."""
    if config.termination == "never":
        return never
    task = config.env or data.spec.env_id
    rule = termination_for(task)
    if rule is None and data.terminated.any():
        raise RunError(
            f"the data has {int(data.terminated.sum())} terminations, and no rule is known by which imagined episodes of "
            f"{task or 'an environment without a name'} end: register one (offrl.register_termination) in a file that --import names, "
            "or let them never end with --termination never"
        )
    return rule or never


def ensemble(
    data: Dataset,
    config: Config,
    seed: int,
    device: str,
    folder: Path,
    say: Callable[[str], None] = lambda text: None,
    stage: Callable[[str, int, int], None] = lambda what, done, of: None,
) -> Dynamics:
    """The fitted ensemble of `config.model`, kept in `folder` under what decides it. Processes that need the same one wait for one."""
    c = config.model
    if c.trained is not None and c.trained < c.members:
        raise RunError(f"model.members is {c.members} and model.trained only {c.trained}")
    path, model = model_file(data, config, seed, folder), Dynamics(_whole(c))
    while not path.exists():
        try:
            with RunLock(path.parent):
                if not path.exists():
                    _fit(model, data, _seed(config, seed), device, config, path, say, stage)
        except InUse:
            stage("dynamics model, in another process", 0, 1)
            time.sleep(1)
    state, meta = load_file(path)
    if "fitted" not in meta:
        raise CheckpointError(f"{path} is no dynamics model")
    model.load_state_dict({key: tensor.to(device) for key, tensor in state.items()}, data.spec)
    return model if model.config.members == c.members else model.subset(c.members)


def model_file(data: Dataset, config: Config, seed: int, folder: Path) -> Path:
    """Where in `folder` the ensemble of `config.model` is kept."""
    decides = {"config": asdict(_whole(config.model)), "data": data.fingerprint, "seed": _seed(config, seed), "precision": config.precision}
    return folder / digest(decides) / "model.safetensors"


def _seed(config: Config, seed: int) -> int:
    return seed if config.model.seed is None else config.model.seed


def _whole(c: Model) -> dynamics.Config:
    """The ensemble as it is trained, of which the first `members` are used."""
    fields = {name: value for name, value in asdict(c).items() if name not in ("members", "trained", "seed")}
    return dynamics.Config(**fields, members=c.trained or c.members)


def _fit(model: Dynamics, data: Dataset, seed: int, device: str, config: Config, path: Path, say: Any, stage: Any) -> None:
    steps = model.config.max_epochs * len(data) // model.config.batch_size
    mode = best_mode(device, steps)[0] if config.mode == "auto" else config.mode
    begin, threads = time.monotonic(), cores() if multiprocessing.parent_process() is None else 1  # else others train beside this process

    def progress(epoch: int, of: int, error: float) -> None:
        stage("dynamics model, epochs", epoch, of)

    modes = {"mode": "eager" if mode == "eager" else "compile", "precision": config.precision}
    fitted = model.fit(data, seed, device=device, **modes, threads=threads, progress=progress)
    stage("dynamics model, epochs", model.config.max_epochs, model.config.max_epochs)
    for line in described(fitted):
        say(line)
    meta = {"fitted": {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in fitted._asdict().items()}}
    save_file(path, model.state_dict(), meta | {"seconds": time.monotonic() - begin, "config": asdict(model.config), "seed": seed})


def described(fitted: Fitted) -> list[str]:
    """What a user is told of an ensemble: the error of each prediction on the rows held out, beside what little would do."""
    lines = [f"dynamics model: {fitted.epochs} epochs; squared error on {fitted.rows:,} rows held out, as a share of the variance:"]
    lines.append(f"{'':>12} {'ensemble':>9} {'linear':>9} {'no change':>9}")
    names = [f"obs {i}" for i in range(fitted.error.shape[1] - 1)] + ["reward"]
    for i, name in enumerate(names):
        lines.append(f"{name:>12} {fitted.error[:, i].mean():9.4f} {fitted.linear[i]:9.4f} {fitted.unchanged[i]:9.4f}")
    return lines


def greatest(model: Dynamics, data: Dataset, penalize: Callable[[Step], Tensor], device: str) -> float:
    """The greatest penalty on the data's own rows."""
    found = -math.inf
    for row in range(0, len(data), CHUNK):
        obs, action = (torch.from_numpy(column[row : row + CHUNK]).to(device) for column in (data.obs, data.action))
        mean, std = model.predict(obs, action)
        sample = mean.mean(0)
        found = max(found, float(penalize(Step(sample, sample, mean, std, sample)).max()))
    return found
