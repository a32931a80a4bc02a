"""Seeds in processes of one thread each: on a CPU, where matrix products already run at the hardware's rate."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Empty
from typing import Any

from offrl.core.interrupt import EXIT_DIVERGED, EXIT_INTERRUPTED, Interrupt
from offrl.recipes.common import Config, train
from offrl.train.hooks import Diverged, Interrupted


def train_in_processes(
    recipe: str,
    dataset: str,
    config: Config,
    seeds: Sequence[int],
    workers: int,
    *,
    prepare: Callable[[], None] | None = None,
    progress: Callable[[int, int, int], None] = lambda seed, done, steps: None,
    say: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> list[Path]:
    """`recipes.common.train`, each seed in a process of its own, at most `workers` at once.

    `prepare` runs first in every process (it registers agents, say); `progress(seed, done, steps)`. When one fails the
    others finish first; then its exception is raised here, or Interrupted if a signal stopped them.
    """
    context = multiprocessing.get_context("spawn")
    reports = context.Queue()
    waiting, running, folders, failures = list(seeds), {}, {}, {}
    with Interrupt() as interrupt:
        while running or (waiting and not interrupt.requested):
            while waiting and len(running) < workers and not interrupt.requested:
                seed = waiting.pop(0)
                running[seed] = context.Process(target=_child, args=(reports, recipe, dataset, config, seed, prepare, options))
                running[seed].start()
            _drain(reports, folders, failures, progress, say)
            if interrupt.requested:
                for process in running.values():
                    process.terminate()  # a second signal in the child would kill it: sent once
                for process in running.values():
                    process.join()
            running = {seed: process for seed, process in running.items() if process.is_alive() or _ended(seed, process, failures)}
        _drain(reports, folders, failures, progress, say)
    if interrupt.requested:
        raise Interrupted(f"stopped and saved {len(seeds) - len(folders)} unfinished seeds; the same command again continues")
    if failures:
        seed, failure = min(failures.items())
        raise failure if isinstance(failure, BaseException) else RuntimeError(f"seed {seed}: {failure}")
    return [folders[seed] for seed in seeds]


def _child(reports, recipe, dataset, config, seed, prepare, options) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        if prepare is not None:
            prepare()
        (folder,) = train(
            recipe, dataset, config, seeds=[seed], say=lambda text: reports.put(("say", seed, text)),
            progress=lambda done, steps: reports.put(("progress", seed, (done, steps))), **options,
        )  # fmt: skip
        reports.put(("done", seed, folder))
    except Interrupted:
        raise SystemExit(EXIT_INTERRUPTED) from None
    except Diverged as error:
        reports.put(("failed", seed, error))
        raise SystemExit(EXIT_DIVERGED) from None
    except Exception as error:
        reports.put(("failed", seed, RuntimeError(f"seed {seed}: {type(error).__name__}: {error}")))
        raise SystemExit(1) from None


def _drain(reports, folders, failures, progress, say) -> None:
    while True:
        try:
            kind, seed, value = reports.get(timeout=0.2)
        except Empty:
            return
        if kind == "progress":
            progress(seed, *value)
        elif kind == "say":
            say(value)
        elif kind == "done":
            folders[seed] = value
        else:
            failures[seed] = value


def _ended(seed: int, process: Any, failures: dict[int, Any]) -> bool:
    """Notes how a process ended; always False, so that it leaves the list of the running ones."""
    process.join()
    if process.exitcode not in (0, EXIT_INTERRUPTED):
        failures.setdefault(seed, f"its process ended with exit code {process.exitcode}")
    return False
