"""What a study may maximise: a number for a finished run.

An objective of one's own joins `OBJECTIVES` in a file that `offrl tune --import` reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from offrl.core.config import ConfigError, nearest
from offrl.core.log import read
from offrl.core.rng import draw
from offrl.data.dataset import Dataset
from offrl.recipes import mbrl
from offrl.training import fqe, ope
from offrl.training.policy import load
from offrl.training.run import read_json

GAMMA = 0.99  # of the values that need no environment: the same for all trials, whatever they discount by
FITTED = fqe.Config(gamma=GAMMA, resamples=0, steps=50_000, layer_norm=True)  # without, policies that leave the data make it diverge
MODEL = mbrl.Model()  # that policies of recipes without one are valued in
HORIZON = 500  # steps of a rollout that a policy is valued by

EVALUATION = ("eval/normalized_score_mean", "eval/return_mean")  # of a row of the log: the first that it has


@dataclass(frozen=True)
class Objective:
    """value(run folder, data, config) is to be as large as possible; `online` says that it looks at episodes in the environment."""

    value: Callable[[Path, Any, Any], float]
    online: bool = False


def online(folder: Path, data: Any, config: Any, last: int = 0) -> float:
    """The mean normalised score, or return where no reference scores are known, of the final evaluation.

    last: of the last so many evaluations during training instead.
    """
    if last:
        values = [evaluation(row) for row in read(folder) if EVALUATION[-1] in row]
        return sum(values[-last:]) / last
    found = read_json(folder / "result.json")
    return found["score" if "score" in found else "return"]["mean"]


def fitted(folder: Path, data: Dataset, config: Any) -> float:
    """The mean discounted return from the data's initial states by fitted Q evaluation on the data."""
    return ope.fqe(load(folder).act, data, FITTED).value.value


def in_model(folder: Path, data: Dataset, config: Any) -> float:
    """The mean discounted return, less the penalty, of rollouts from the data's initial states in an ensemble fitted to the data.

    A state beyond the least and greatest observations of the data is put back onto them: a model that is followed further gives any
    number. The penalty is the default one for all trials, whatever they were trained with. A recipe with an ensemble is valued in that of
    its study at its full size, another in `MODEL`.
    """
    c = config if isinstance(config, mbrl.Config) else mbrl.Config(agent=config.agent, env=config.env, model=MODEL)
    c = mbrl.for_study(c, {})
    c = replace(c, model=replace(c.model, members=c.model.trained), penalty=mbrl.Penalisation())
    rule, model = mbrl.terminated(data, c), mbrl.ensemble(data, c, 0, "cpu", folder.parents[3] / "models")
    penalize = mbrl.penalizer(model, c.penalty)
    least, greatest = (torch.from_numpy(bound) for bound in (data.obs[:].min(0), data.obs[:].max(0)))

    def step(obs: torch.Tensor, action: torch.Tensor, source: torch.Generator) -> tuple[torch.Tensor, ...]:
        found = model.step(obs, action, {name: draw(kind, 1, source)[0] for name, kind in model.noise(len(obs)).items()})
        next_obs = found.next_obs.clamp(least, greatest)
        return next_obs, found.reward - c.penalty.weight * penalize(found), rule(obs, action, found.next_obs)

    starts = torch.from_numpy(data.obs[data.starts[:-1]])
    return ope.model_value(step, load(folder).act, starts, HORIZON, GAMMA).value


OBJECTIVES: dict[str, Objective] = {"online": Objective(online, online=True), "fqe": Objective(fitted), "model": Objective(in_model)}


def objective(name: str) -> Objective:
    """Raises ConfigError naming the nearest."""
    if name not in OBJECTIVES:
        raise ConfigError(f"objective: there is no {name!r}{nearest(name, OBJECTIVES)}")
    return OBJECTIVES[name]


def evaluation(row: dict[str, Any]) -> float:
    """The score, or return, of a row of the log that is an evaluation's."""
    return float(next(row[key] for key in EVALUATION if key in row))


def episodes_played(folder: Path) -> int:
    """Online episodes of a run, finished or not: of each evaluation in its log, and of the final one."""
    if not (folder / "config.yaml").exists():
        return 0
    each = yaml.safe_load((folder / "config.yaml").read_text())["eval_episodes"]
    final = read_json(folder / "result.json")["episodes"] if (folder / "result.json").exists() else 0
    return each * sum(EVALUATION[-1] in row for row in read(folder)) + final
