"""The normaliser: part of the state, so that it travels with the policy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from offrl.core.space import Box
from offrl.core.types import Spec

OBS_EPS = 1e-3
BLOCK = 1 << 13  # rows


def identity(spec: Spec) -> dict[str, Tensor]:
    """Observations pass unchanged; actions are mapped from the space's bounds, where it has any, to [-1, 1]."""
    scale = {"obs_mean": torch.zeros(spec.obs.size), "obs_std": torch.ones(spec.obs.size)}
    if isinstance(spec.action, Box):
        low, high = np.array(spec.action.low), np.array(spec.action.high)
        scale |= _action_scale(low, high) if spec.action.bounded else _action_scale(-np.ones_like(low), np.ones_like(low))
    return scale


def fitted(dataset, standardize: bool = True) -> dict[str, Tensor]:
    """The normaliser of a dataset: observations to mean 0 and standard deviation about 1, actions to [-1, 1].

    The standard deviation has 1e-3 added, as published offline agents do; a feature that never changes keeps its scale.
    Actions without bounds are scaled by their range in the data, which the policy then cannot leave.
    """
    scale = identity(dataset.spec)
    if standardize:
        mean, std = _moments(dataset.obs)
        scale["obs_mean"] = torch.from_numpy(mean.astype(np.float32))
        scale["obs_std"] = torch.from_numpy(np.where(dataset.obs.min(0) == dataset.obs.max(0), 1.0, std + OBS_EPS).astype(np.float32))
    if isinstance(dataset.spec.action, Box) and not dataset.spec.action.bounded:
        scale |= _action_scale(dataset.action.min(0), dataset.action.max(0))
    return scale


def _moments(obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column in float64, a block of rows at a time: the rows may be more than memory holds."""
    blocks = [slice(row, row + BLOCK) for row in range(0, len(obs), BLOCK)]
    mean = sum(obs[rows].sum(0, dtype=np.float64) for rows in blocks) / len(obs)
    return mean, np.sqrt(sum(((obs[rows] - mean) ** 2).sum(0) for rows in blocks) / len(obs))


def moments(shape: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """Running moments of rows of this shape, before the first row."""
    return {"count": torch.zeros(()), "mean": torch.zeros(shape), "var": torch.ones(shape)}


def absorb(running: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """The moments of all rows so far and of `rows` (n, ...): mean and variance as if of one sample (Chan et al., 1979)."""
    count = running["count"] + len(rows)
    new, shift = len(rows) / count, rows.mean(0) - running["mean"]
    var = running["var"].lerp(rows.var(0, correction=0), new) + new * (1 - new) * shift.square()
    return {"count": count, "mean": running["mean"] + new * shift, "var": var}


def _action_scale(low: np.ndarray, high: np.ndarray) -> dict[str, Tensor]:
    half = (high - low) / 2
    half = np.where(half == 0, 1.0, half)
    return {"action_mid": torch.tensor((high + low) / 2, dtype=torch.float32), "action_half": torch.tensor(half, dtype=torch.float32)}
