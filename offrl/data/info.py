"""The figures of a dataset."""

from __future__ import annotations

from typing import Any

import numpy as np

from offrl.core.space import Box
from offrl.data.dataset import Dataset
from offrl.envs.scores import normalize

QUANTILES = (0, 25, 50, 75, 100)


def info(dataset: Dataset) -> dict[str, Any]:
    """Plain figures, for JSON. Scores are there where the reference returns are known.

    returns: of all episodes, those that were cut among them. A dataset of several objectives has lists in the place of numbers.
    ends: of episodes, by kind; open: with neither flag.
    """
    spec, last, space = dataset.spec, dataset.starts[1:] - 1, dataset.spec.action
    terminated, truncated = dataset.terminated[last], dataset.truncated[last]
    returns, weighted = dataset.returns, transition_weighted_return(dataset)
    result: dict[str, Any] = {
        "dataset_id": spec.dataset_id,
        "env_id": spec.env_id,
        "rows": len(dataset),
        "episodes": dataset.episodes,
        "obs_size": spec.obs.size,
        "action": f"{space.size} numbers" if isinstance(space, Box) else f"one of {space.n}",
        "action_low": list(space.low) if isinstance(space, Box) and space.bounded else None,
        "action_high": list(space.high) if isinstance(space, Box) and space.bounded else None,
        "objectives": 1 if dataset.reward.ndim == 1 else dataset.reward.shape[1],
        "return_mean": returns.mean(axis=0).tolist(),
        "return_quantiles": {f"{q}%": np.percentile(returns, q, axis=0).tolist() for q in QUANTILES},
        "return_mean_by_transition": weighted,
        "length_mean": float(dataset.lengths.mean()),
        "length_range": [int(dataset.lengths.min()), int(dataset.lengths.max())],
        "length_quantiles": {f"{q}%": float(np.percentile(dataset.lengths, q)) for q in QUANTILES},
        "ends": {
            "terminated": int(terminated.sum()),
            "truncated": int((truncated & ~terminated).sum()),
            "open": int((~terminated & ~truncated).sum()),
        },
        "dtypes": {name: str(getattr(dataset, name).dtype) for name in ("obs", "action", "reward")},
        "bytes": dataset.nbytes,
        "mapped": dataset.mapped,
        "fingerprint": dataset.fingerprint,
    }
    if spec.ref_min is not None and spec.ref_max is not None and dataset.reward.ndim == 1:
        scores = normalize(returns, spec.ref_min, spec.ref_max)
        result["score_mean"] = float(scores.mean())
        result["score_quantiles"] = {f"{q}%": float(np.percentile(scores, q)) for q in QUANTILES}
        result["score_mean_by_transition"] = None if weighted is None else float(normalize(weighted, spec.ref_min, spec.ref_max))
    return result


def transition_weighted_return(dataset: Dataset) -> float | list[float] | None:
    """sum_e length_e return_e / sum_e length_e over the episodes that ended by either flag: the return behind a random transition.

    One number an objective where there are several; None where no episode is complete.
    """
    last = dataset.starts[1:] - 1
    complete = dataset.terminated[last] | dataset.truncated[last]
    if not complete.any():
        return None
    return np.average(dataset.returns[complete], axis=0, weights=dataset.lengths[complete]).tolist()
