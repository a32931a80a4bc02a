"""offrl eval RUN and offrl export RUN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from offrl.cli.console import Imports, bars, import_files, out, reporter
from offrl.core.config import Range, validate
from offrl.recipes import common
from offrl.training.evaluate import record
from offrl.training.export import export_onnx
from offrl.training.hooks import evaluate_state
from offrl.training.policy import load
from offrl.training.run import RunError, find_runs, read_about, write_json


@dataclass(frozen=True)
class Eval:
    run: Annotated[Path, tyro.conf.Positional]
    """A run folder, of one seed or of several."""
    episodes: Annotated[int, Range(1)] = 100
    """Episodes a seed."""
    env: str | None = None
    """Environment, where the run's data named none: a Gymnasium id, or file.py:factory."""
    fresh: bool = False
    """Draw new seeds for the episodes; otherwise they are the same each time."""
    seed: int = common.FINAL_SEED
    """First of the episodes' fixed seeds."""
    time_limit: Annotated[int | None, Range(1)] = None
    """Steps after which an episode is cut, instead of the environment's own limit."""
    video: Path | None = None
    """Also record one episode to this MP4 file."""
    imports: Imports = ()
    """Your own Python files to run first: they register agents and environments."""


def evaluate(arguments: Sequence[str]) -> None:
    args = tyro.cli(Eval, args=list(arguments), prog="offrl eval", description="Evaluate a trained policy.")
    validate(args, "offrl eval")
    import_files(args.imports)
    for folder in find_runs(args.run):
        policy, env = load(folder), args.env or read_about(folder)["env"]
        if env is None:
            raise RunError(f"{folder}: its data names no environment; give one with --env, a Gymnasium id or file.py:factory")
        with bars() as progress:
            bar = partial(reporter(progress, "episodes of seed"), folder.name)
            options = {"seed": args.seed, "fresh": args.fresh, "time_limit": args.time_limit, "progress": bar}
            played = evaluate_state(policy.agent, policy.state, env, args.episodes, **options)
        found = common.result(played, policy.spec, env, policy.step)
        write_json(folder / "eval.json", found)
        what = found.get("score") or found["return"]
        label = "normalised score" if "score" in found else "return (no reference scores are known for a normalised one)"
        between = " (95 % interval {:.1f} to {:.1f})".format(*what["interval"]) if what["interval"] else ""
        out.print(f"{folder}: {label} {what['mean']:.1f}{between}, IQM {what['iqm']:.1f}, {args.episodes} episodes of {env}")
        if args.video is not None:
            record(policy.act, env, args.video, seed=args.seed)
            out.print(f"video: {args.video}")


@dataclass(frozen=True)
class Export:
    run: Annotated[Path, tyro.conf.Positional]
    """The run folder of one seed."""
    onnx: Path | None = None
    """File to write; policy.onnx in the run's folder unless told otherwise."""
    imports: Imports = ()
    """Your own Python files to run first."""


def export(arguments: Sequence[str]) -> None:
    # `--onnx` alone asks for the default place
    arguments = [a for i, a in enumerate(arguments) if a != "--onnx" or arguments[i + 1 : i + 2] and not arguments[i + 1].startswith("-")]
    args = tyro.cli(Export, args=arguments, prog="offrl export", description="Write a trained policy as ONNX.")
    import_files(args.imports)
    path, error = export_onnx(load(args.run), args.onnx or find_runs(args.run)[0] / "policy.onnx")
    out.print(f"{path}: same actions as the policy to {error:.1e}")
