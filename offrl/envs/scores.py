"""Normalised scores: 0 is what a random policy earns, 100 what an expert earns, each return by itself.

The reference returns are D4RL's (Fu et al. 2020, d4rl/infos.py), the same for the v0, v1 and v2 datasets of a task. They belong to
the task's own reward, so the robots' Gymnasium environments and the datasets built on them are scored with the same pair.
"""

from __future__ import annotations

import difflib
import json
import re
from functools import cache
from typing import Any

import numpy as np

from offrl.core.resources import resource

ROBOTS = {"halfcheetah": "HalfCheetah", "hopper": "Hopper", "walker2d": "Walker2d", "ant": "Ant"}
_ENV = re.compile(rf"({'|'.join(ROBOTS.values())})-v\d+")
_OURS = re.compile(rf"offrl/({'|'.join(ROBOTS)})-[a-z-]+-v\d+")


class UnknownScore(LookupError):
    """No reference returns are known for this id; the message names the nearest ids that have some."""


@cache
def d4rl() -> dict[str, dict[str, Any]]:
    """D4RL's datasets: id -> {ref_min, ref_max, url_path}, the first two None where D4RL itself gives no score."""
    return json.loads(resource("datasets", "reference_scores.json").read_text(encoding="utf-8"))["datasets"]


def reference(name: str) -> tuple[float, float]:
    """(ref_min, ref_max), the returns that score 0 and 100, of a dataset id or an environment id.

    D4RL ids are matched exactly; `Hopper-v5` and `offrl/hopper-medium-v0` take the pair of their robot. Raises UnknownScore.
    """
    table = d4rl()
    robot = _ENV.fullmatch(name) or _OURS.fullmatch(name)
    entry = table[f"{robot[1].lower()}-medium-v2"] if robot else table.get(name)
    if entry is None:
        known = [*table, *(f"{env}-v{version}" for env in ROBOTS.values() for version in (4, 5))]
        near = difflib.get_close_matches(name, [k for k in known if table.get(k, {}).get("ref_min", 0) is not None], n=3)
        hint = f"nearest: {', '.join(near)}" if near else "known are D4RL's dataset ids and the robots' environments, as in Hopper-v5"
        raise UnknownScore(f"no reference score is known for {name!r}; {hint}")
    if entry["ref_min"] is None or entry["ref_max"] is None:
        raise UnknownScore(f"D4RL lists {name!r} without a reference score, so its returns cannot be normalised")
    return float(entry["ref_min"]), float(entry["ref_max"])


def normalize(returns: Any, ref_min: float, ref_max: float) -> np.ndarray:
    """100 (R - ref_min) / (ref_max - ref_min) of every return, in float64, in the shape of `returns`.

    For returns, never for a spread: take the standard deviation of scores from the scores.
    """
    if not ref_max > ref_min:
        raise ValueError(f"ref_max must be above ref_min, not {ref_max} and {ref_min}")
    return (np.asarray(returns, np.float64) - ref_min) / (ref_max - ref_min) * 100
