"""Named transforms of rewards: applied to what an agent is trained on, never to what it is evaluated by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from offrl.data.dataset import DataError, Dataset


def _iql_locomotion(data: Dataset) -> tuple[float, float]:
    spread = float(np.ptp(data.returns))
    if spread == 0:
        raise DataError("the reward transform iql_locomotion divides by the spread of the returns, and all episodes return the same")
    return 1000 / spread, 0.0


def _standardise(data: Dataset) -> tuple[float, float]:
    mean, std = float(data.reward.mean(dtype=np.float64)), float(data.reward.std(dtype=np.float64))
    if std == 0:
        raise DataError("the reward transform standardise divides by the rewards' standard deviation, and all rewards are the same")
    return 1 / std, -mean / std


REWARDS: dict[str, Callable[[Dataset], tuple[float, float]]] = {
    "raw": lambda data: (1.0, 0.0),
    "antmaze_minus_one": lambda data: (1.0, -1.0),  # IQL on AntMaze (Kostrikov et al. 2022): 0 at the goal, -1 a step before it
    "iql_locomotion": _iql_locomotion,  # IQL on locomotion: 1000 / (best - worst return of an episode)
    "standardise": _standardise,
}


def scale_and_shift(name: str, data: Dataset) -> tuple[float, float]:
    """(a, b) of the transform a r + b of that name on these data, of one reward. Raises DataError where it is not defined."""
    return REWARDS[name](data)


def with_reward(data: Dataset, scale: float, shift: float) -> Dataset:
    """The dataset with the rewards a r + b, in memory."""
    return data if (scale, shift) == (1.0, 0.0) else replace(data, reward=(data.reward * np.float32(scale) + np.float32(shift)))
