"""What is in a dataset, and everything that is wrong with one at once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from offrl.core.space import Box, Discrete
from offrl.data.columns import Columns, bad_rows, unflagged
from offrl.data.dataset import DataError, Dataset
from offrl.data.load import prepare
from offrl.envs.scores import normalize


@dataclass(frozen=True)
class Finding:
    """Something to know before training. `count` rows (or columns, episodes) show it, the first at `first_row`.

    severity: "error" keeps `load_dataset` from reading the data as it is, "warning" may spoil training, "note" is good to know.
    """

    severity: str
    field: str
    count: int
    first_row: int | None
    what: str
    advice: str


def check(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    action_space: Any = None,
    env_id: str | None = None,
    columns: Any = None,
    limit_bytes: int | None = None,
) -> list[Finding]:
    """Everything conspicuous in what `load_dataset` would read under the same arguments, errors first; empty: nothing was found."""
    try:
        columns = prepare(source, action_space, env_id, columns, limit_bytes)
    except DataError as error:
        return [Finding("error", "file", 1, None, str(error), "nothing else was looked at; mend this first")]
    looks = (_numbers, _flags, _episodes, _observations, _actions, _rewards, _successors, _duplicates)
    found = [finding for look in looks for finding in look(columns)]
    return sorted(found, key=lambda finding: ("error", "warning", "note").index(finding.severity))


def info(dataset: Dataset) -> dict[str, Any]:
    """Plain figures of a dataset, for JSON. Scores are there where the reference returns are known.

    returns: of all episodes, those that were cut among them. A dataset of several objectives has lists in the place of numbers.
    """
    spec, last = dataset.spec, dataset.starts[1:] - 1
    terminated, truncated = dataset.terminated[last], dataset.truncated[last]
    returns, weighted = dataset.returns, transition_weighted_return(dataset)
    result: dict[str, Any] = {
        "dataset_id": spec.dataset_id,
        "env_id": spec.env_id,
        "rows": len(dataset),
        "episodes": dataset.episodes,
        "obs_size": spec.obs.size,
        "action": f"{spec.action.size} numbers" if isinstance(spec.action, Box) else f"one of {spec.action.n}",
        "return_mean": returns.mean(axis=0).tolist(),
        "return_quantiles": {f"{q}%": np.percentile(returns, q, axis=0).tolist() for q in (0, 25, 50, 75, 100)},
        "return_mean_by_transition": weighted,
        "length_mean": float(dataset.lengths.mean()),
        "length_range": [int(dataset.lengths.min()), int(dataset.lengths.max())],
        "ends": {
            "terminated": int(terminated.sum()),
            "truncated": int((truncated & ~terminated).sum()),
            "open": int((~terminated & ~truncated).sum()),
        },
        "bytes": dataset.nbytes,
        "fingerprint": dataset.fingerprint,
    }
    if spec.ref_min is not None and spec.ref_max is not None and dataset.reward.ndim == 1:
        result["score_mean"] = float(normalize(returns, spec.ref_min, spec.ref_max).mean())
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


def _rows(severity: str, field: str, rows: np.ndarray, what: str, advice: str) -> Iterator[Finding]:
    """A finding if some `rows` (N,) are True."""
    if rows.any():
        yield Finding(severity, field, int(rows.sum()), int(rows.argmax()), what, advice)


def _ends(columns: Columns) -> np.ndarray:
    """(N,) bool: the last row of each episode."""
    ends = columns.flag("terminals") | columns.flag("timeouts")
    ends = ends if columns.ends is None else ends | columns.ends
    ends[-1] = True
    return ends


def _numbers(columns: Columns) -> Iterator[Finding]:
    for field, rows in bad_rows(columns).items():
        yield from _rows(
            "error", field, rows, "NaN or infinity", "find out where it comes from, or leave these rows out with on_bad='drop'"
        )


def _flags(columns: Columns) -> Iterator[Finding]:
    for field, column in (("terminals", columns.terminals), ("timeouts", columns.timeouts)):
        if column is not None:
            odd = ~np.isin(np.nan_to_num(column), (0, 1)).reshape(len(columns))
            yield from _rows("error", field, odd, "flags other than 0 and 1", "a flag says whether the episode ended at this row")
    both = columns.flag("terminals") & columns.flag("timeouts")
    yield from _rows("note", "timeouts", both, "both flags on one row", "taken as a true end, except that d4rl semantics drop the row")


def _episodes(columns: Columns) -> Iterator[Finding]:
    n = len(columns)
    flagged = columns.flag("terminals") | columns.flag("timeouts")
    if columns.ends is not None:
        yield from _rows(
            "warning", "timeouts", unflagged(columns), "episodes end without a flag", "taken as cut off; set the flag that applies"
        )
    elif not flagged.any():
        what = "no end is ever set: all rows are one episode"
        yield Finding("warning", "terminals", n, None, what, "set terminals where the task ended and timeouts where it was cut")
    elif columns.timeouts is None:
        what = "no timeouts: only true ends part the episodes"
        yield Finding("warning", "timeouts", n, None, what, "add timeouts where an episode was cut, or give the d4rl semantics an env_id")
    elif not flagged[-1]:
        unused = ": its last row has no successor and is not used" if columns.next_observations is None else ""
        what = f"the last episode is open{unused}"
        yield Finding("note", "timeouts", 1, n - 1, what, "set timeouts on the last row if the recording stopped there")
    ends = _ends(columns)
    single = ends & np.append(True, ends[:-1])
    yield from _rows(
        "warning", "terminals", single & (n > 1), "episodes of one step", "rare in real tasks: are the flags shifted by a row?"
    )


def _observations(columns: Columns) -> Iterator[Finding]:
    constant = np.flatnonzero((columns.observations == columns.observations[0]).all(axis=0))
    if len(constant) and len(columns) > 1:
        listed = ", ".join(map(str, constant[:10])) + (", ..." if len(constant) > 10 else "")
        yield Finding(
            "note",
            "observations",
            len(constant),
            None,
            f"features that never change: {listed}",
            "they say nothing; normalising leaves them be",
        )


def _actions(columns: Columns) -> Iterator[Finding]:
    actions, space = columns.actions, columns.action_space
    whole = actions.dtype.kind != "f"
    if whole and space is None:
        what = f"{actions.dtype} actions, and no action space"
        yield Finding("error", "actions", len(actions), 0, what, "say what they are: action_space='discrete:N' or 'continuous'")
    actions = actions.reshape(len(actions), -1)
    if not whole and len(actions) > 1 and (actions == np.round(actions)).all():
        what, advice = "every action is a whole number", "read as amounts; if they are names of choices, give action_space='discrete:N'"
        yield Finding("warning", "actions", len(actions), 0, what, advice)
    if whole or isinstance(space, Discrete):
        return
    known = space is not None and space.size == actions.shape[1] and space.bounded
    low, high = (np.asarray(space.low), np.asarray(space.high)) if known else (-1.0, 1.0)
    outside = (actions < np.float32(low)) | (actions > np.float32(high))
    name = "the action space" if known else "[-1, 1]"
    advice = "a bounded policy cannot reproduce them" if known else "give action_space='box:LOW,HIGH' if they are bounded"
    yield from _rows("warning" if known else "note", "actions", outside.any(axis=1), f"actions outside {name}", advice)
    at = (actions == np.float32(low)) | (actions == np.float32(high))
    yield from _rows(
        "note", "actions", at.any(axis=1), f"actions at the bound of {name}", "atanh is infinite there; likelihoods are of clipped actions"
    )


def _rewards(columns: Columns) -> Iterator[Finding]:
    yield from _rows(
        "warning", "rewards", np.full(len(columns), not columns.rewards.any()), "every reward is zero", "nothing can be learned from it"
    )


def _successors(columns: Columns) -> Iterator[Finding]:
    if columns.next_observations is not None:
        differ = (columns.next_observations[:-1] != columns.observations[1:]).any(axis=1) & ~_ends(columns)[:-1]
        what = "stored next observations that are not the row below, inside an episode"
        advice = "an unmarked end, or rows left out? Kept as stored"
        yield from _rows("warning", "next_observations", differ, what, advice)


def _duplicates(columns: Columns) -> Iterator[Finding]:
    """Rows that repeat an earlier one's observation, action and reward, told apart by a 64-bit hash."""
    n, rng = len(columns), np.random.default_rng(0)
    digest = np.zeros(n, np.uint64)
    for column in (columns.observations, columns.actions, columns.rewards):
        bits = np.ascontiguousarray(column.reshape(n, -1), np.float32).view(np.uint32)
        for weight, entry in zip(rng.integers(1, 2**64, bits.shape[1], np.uint64) | np.uint64(1), bits.T):
            digest += entry * weight
    repeated = np.ones(n, bool)
    repeated[np.unique(digest, return_index=True)[1]] = False
    yield from _rows("note", "observations", repeated, "rows that repeat an earlier one", "fine if wanted; splits by row would leak")
