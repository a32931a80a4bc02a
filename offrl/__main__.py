"""The command line: offrl train, tune, eval, export, bench, data and hdpo."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch

from offrl import __version__
from offrl.cli.console import err, out
from offrl.core.checkpoint import CheckpointError
from offrl.core.config import ConfigError, nearest
from offrl.core.interrupt import EXIT_DIVERGED, EXIT_INTERRUPTED
from offrl.core.lock import LockError
from offrl.core.log import LogError
from offrl.data.dataset import DataError
from offrl.envs.inventory.faults import NetworkError
from offrl.envs.make import EnvError
from offrl.envs.render import RenderError
from offrl.recipes.config import recipes
from offrl.training.evaluate import EvaluationError
from offrl.training.hooks import Diverged, Interrupted
from offrl.training.run import RunError

REFUSALS = (
    ConfigError, DataError, RunError, CheckpointError, LockError, LogError, EnvError, NetworkError, RenderError, EvaluationError,
    KeyError, TypeError, ImportError, OSError,
)  # fmt: skip
COMMANDS = {
    "train": "offrl.cli.train:train",
    "tune": "offrl.cli.tune:tune",
    "eval": "offrl.cli.policy:evaluate",
    "export": "offrl.cli.policy:export",
    "bench": "offrl.cli.bench:main",
    "data": "offrl.cli.data:main",
    "hdpo": "offrl.cli.hdpo:main",
}
USAGE = """offrl COMMAND

  train RECIPE DATASET   train a policy and evaluate it; RECIPE is one of {recipes}
  tune RECIPE DATASET    search hyperparameters; `train --from-study` takes what is found
  eval RUN               evaluate a trained policy
  export RUN             write a trained policy as ONNX
  bench calibration DATASET   how well penalties tell where a dynamics model errs
  data build ID          build a dataset by rolling out policies
  data list [PATTERN]    the datasets that can be built, fetched or loaded by id
  data fetch ID          download a dataset, or the file of a URL
  data info DATASET      what is in a dataset
  data check DATASET     what is wrong with a dataset
  data convert DATASET OUT    write it in another format; likewise data merge, split, subset
  train hdpo NETWORK     train an ordering policy for a supply network: a setting's name or a YAML file
  hdpo check FILE        what is wrong with a network's file
  hdpo solve SETTING     what is known of a setting's least cost
  hdpo order RUN         today's orders from today's stock
  hdpo report RUN        costs, service and stock on the test scenarios, beside other ways to order

DATASET is an id or a path (HDF5, NPZ, CSV, Parquet, a Minari folder). `offrl COMMAND --help` lists the flags of a command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. 0: done; 1: refused; 2: a wrong call; 75: stopped by a signal, and saved; 76: the training diverged."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    torch.set_num_threads(1)  # two threads collapse when another process holds a core
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.reconfigure(errors="backslashreplace")  # paths may be other than UTF-8
    try:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _warn
                return _run(arguments)
        finally:
            out.file.flush()
    except Interrupted as error:
        err.print(str(error))
        return EXIT_INTERRUPTED
    except Diverged as error:
        err.print(str(error))
        return EXIT_DIVERGED
    except BrokenPipeError:  # the reader has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except REFUSALS as error:
        err.print(f"offrl: {error.args[0] if isinstance(error, KeyError) and error.args else error}", style="red")
        return 1


def _warn(message: Warning, category: type[Warning], *_: Any) -> None:
    """A warning as a user reads it: without its place in the code."""
    err.print(f"warning: {message}", style="yellow")


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        out.print(USAGE.format(recipes=", ".join(recipes())))
        return 0 if arguments else 2
    if arguments[0] == "--version":
        out.print(__version__)
        return 0
    if arguments[0] not in COMMANDS:
        raise ConfigError(f"no command {arguments[0]!r}{nearest(arguments[0], COMMANDS)}")
    module, _, function = COMMANDS[arguments[0]].partition(":")
    return getattr(import_module(module), function)(arguments[1:]) or 0


if __name__ == "__main__":
    sys.exit(main())
