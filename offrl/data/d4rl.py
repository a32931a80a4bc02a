"""D4RL's own reading of its files, the one published scores were trained on (`qlearning_dataset`, Fu et al. 2020), without its loop.

The next observation of a row is always the row below it, whatever the file stores; the file's last row has none and is left out; so is
every row that a time limit ended. A row that terminated keeps the row below as its next observation, which nothing bootstraps through.
"""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np

from offrl.data.columns import Columns
from offrl.data.dataset import DataError

LIMITS = {  # the episode length of a D4RL environment whose files may lack `timeouts`
    r"(hopper|halfcheetah|walker2d|ant)-.*": 1000,
    r"antmaze-umaze-.*": 700,
    r"antmaze-(medium|large)-.*": 1000,
    r"pen-.*": 100,
    r"(door|hammer|relocate)-.*": 200,
    r"kitchen-.*": 280,
    r"maze2d-open-.*": 150,
    r"maze2d-(eval-)?umaze-.*v1": 300,
    r"maze2d-(eval-)?medium-.*v1": 600,
    r"maze2d-(eval-)?large-.*v1": 800,
}


def max_steps(name: str | None) -> int | None:
    """The time limit of a D4RL dataset id or an environment id; None where it is not known."""
    return next((limit for pattern, limit in LIMITS.items() if re.fullmatch(pattern, (name or "").lower())), None)


def with_time_limits(columns: Columns) -> Columns:
    """The same with D4RL's time limits where the file has no timeouts. Raises DataError where `qlearning` would have no rows or rule.

    The flags must be in memory.
    """
    if columns.ends is not None:
        raise DataError(
            f"{columns.name}: semantics 'd4rl' belongs to D4RL's flat files; this source stores whole episodes, read it as 'strict'"
        )
    for field in ("terminals", "timeouts"):
        column = getattr(columns, field)
        if column is not None and not np.isin(np.nan_to_num(column), (0, 1)).all():
            raise DataError(f"{columns.name}: {field} must be one 0 or 1 a row, not values up to {np.nanmax(column):g}")
    if columns.timeouts is None:
        limit = max_steps(columns.dataset_id) or max_steps(columns.env_id)
        if limit is None:
            raise DataError(
                f"{columns.name}: it has no timeouts, and the episode length that D4RL's rule puts in their place is known for the "
                "locomotion, maze, Adroit and kitchen tasks only; read it with semantics='strict'"
            )
        columns = replace(columns, timeouts=time_limits(columns.flag("terminals"), limit))
    if columns.flag("timeouts")[:-1].all():
        raise DataError(f"{columns.name}: D4RL's rule leaves no row: each of the {len(columns)} is a timeout or the last of the file")
    return columns


def qlearning(columns: Columns) -> Columns:
    """D4RL's rows, bit for bit, of a flat file with timeouts, in memory; (N, 1) flags are flat afterwards.

    `timeouts` of the result marks the last row kept of an episode that a time limit ended.
    """
    terminals, final = columns.flag("terminals"), columns.flag("timeouts")
    keep = ~final
    keep[-1] = False
    rows = {field: column[keep] for field, column in columns.fields()}
    rows |= {"terminals": terminals[keep], "timeouts": (np.append(final[1:], False) & ~terminals)[keep]}
    rows |= {"next_observations": columns.observations[1:][keep[:-1]]}
    return replace(columns, name=f"{columns.name} as D4RL reads it", **rows)


def time_limits(terminals: np.ndarray, limit: int) -> np.ndarray:
    """(N,) bool: the rows that D4RL's step counter takes for the last of `limit`.

    The counter starts an episode at 0, except after a terminal row, where it starts at 1: such an episode is cut one row early.
    A terminal row that is itself the last of `limit` counts as a time limit.
    """
    ends = np.flatnonzero(terminals)
    first = np.concatenate([[0], ends + 1])
    length = np.diff(np.append(first, len(terminals)))
    offset = np.ones(len(first), np.int64)
    offset[0] = 0
    for i in range(1, len(first)):  # only whether the episode before ended exactly at the limit matters
        offset[i] = (length[i - 1] + offset[i - 1]) % limit != 0
    step = np.arange(len(terminals)) - np.repeat(first - offset, length)
    return step % limit == limit - 1
