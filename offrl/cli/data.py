"""offrl data: build, info, check; list and fetch are in cli/catalog.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import tyro
from rich.table import Table

from offrl.cli.catalog import fetch_dataset, list_datasets
from offrl.cli.console import bars, dispatch, out, reporter
from offrl.cli.inspect import check, info
from offrl.cli.reshape import convert, merge_datasets, split, subset
from offrl.core.config import ConfigError
from offrl.data.build import build, describe
from offrl.data.dataset import DataError


@dataclass(frozen=True)
class Build:
    dataset: Annotated[str, tyro.conf.Positional]
    """An id of `offrl data list`, or a new one of your own with --policy and --env."""
    rows: int | None = None
    """Transitions; the recipe's number unless told otherwise."""
    seed: int = 0
    """The same seed gives the same data, whatever the number of workers."""
    workers: int | None = None
    """Processes; one a core unless told otherwise."""
    policy: tuple[str, ...] = ()
    """Policies of your own: random, FILE.py:function, module:function, a .safetensors, .onnx or Stable-Baselines3 .zip file; each may
    be followed by =SHARE and =SHARE,EPSILON."""
    env: str | None = None
    """Environment of your own policies: a Gymnasium id, or file.py:factory."""
    overwrite: bool = False
    """Build anew where the dataset is there already."""


def build_dataset(arguments: Sequence[str]) -> None:
    args = tyro.cli(Build, args=list(arguments), prog="offrl data build", description="Build a dataset by rolling out policies.")
    policies = [_ingredient(text) for text in args.policy] or None
    with bars() as progress:
        bar = partial(reporter(progress, "rows of"), args.dataset)
        options = {"rows": args.rows, "seed": args.seed, "workers": args.workers, "policies": policies, "env_id": args.env}
        try:
            folder = build(args.dataset, progress=bar, overwrite=args.overwrite, **options)
        except FileExistsError as error:
            if not _same(args):
                raise DataError(f"{error} (--overwrite builds it anew)") from None
            out.print(f"{args.dataset} is there already, with these rows and this seed")
            return
    out.print(f"built {folder}")
    _behaviors(describe(args.dataset))


def _same(args: Build) -> bool:
    there = describe(args.dataset)
    return not args.policy and there.get("seed") == args.seed and args.rows in (None, there["rows"])


def _ingredient(text: str) -> tuple[Any, ...]:
    policy, _, weights = text.partition("=")
    try:
        return (policy, *(float(w) for w in weights.split(",") if w))
    except ValueError:
        raise ConfigError(f"--policy {text!r}: write POLICY, POLICY=SHARE or POLICY=SHARE,EPSILON") from None


def _behaviors(about: dict[str, Any]) -> None:
    table = Table("behaviour", "share", "random actions", "mean return", "score", box=None)
    for each in about["behaviors"]:
        figures = ("" if each.get(k) is None else f"{each[k]:.1f}" for k in ("return_mean", "score_mean"))
        table.add_row(each["policy"], f"{each['share']:.0%}", f"{each['epsilon']:.0%}", *figures)
    out.print(table)
    if about.get("score_mean_by_transition") is not None:
        out.print(f"the data's own mean score, weighted by transitions: {about['score_mean_by_transition']:.1f}")


COMMANDS: dict[str, Callable[[Sequence[str]], int | None]] = {
    "build": build_dataset,
    "list": list_datasets,
    "fetch": fetch_dataset,
    "info": info,
    "check": check,
    "convert": convert,
    "merge": merge_datasets,
    "split": split,
    "subset": subset,
}


main = partial(dispatch, "data", COMMANDS)
