"""offrl train hdpo NETWORK, and offrl hdpo check, solve, order, report: inventory control."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import tyro

from offrl.cli.console import bars, dispatch, out, reporter
from offrl.cli.train import parse_seeds, values_of
from offrl.core.config import ConfigError, Range, nearest, validate
from offrl.envs.inventory import files
from offrl.envs.inventory.settings import SETTINGS
from offrl.envs.inventory.state import read_state, write_rows
from offrl.recipes import hdpo, planner, planner_report
from offrl.training.run import read_json

C = TypeVar("C")
SHOWN = 40  # orders that are printed


@dataclass(frozen=True, kw_only=True)
class Train(Generic[C]):
    config: Annotated[C, tyro.conf.arg(name="")]
    preset: str | None = None
    """A named set of hyperparameters."""
    seeds: str = "0"
    """Seeds, as in 0-4 or 0,3,7, one after the other."""
    runs: Path = Path("runs")
    """Folder of all runs."""
    fresh: bool = False
    """Start anew where there is a run already."""


def train(arguments: Sequence[str]) -> None:
    name, flags = _named(arguments, f"offrl train hdpo NETWORK [flags]; NETWORK is a YAML file or one of {', '.join(SETTINGS)}")
    config = hdpo.resolve(name, next(iter(values_of(flags, "--preset")), None))
    about = {"prog": f"offrl train hdpo {name}", "description": "Train an ordering policy through its simulated cost."}
    args = validate(
        tyro.cli(Train[type(config)[type(config.network)]], default=Train(config=config), args=flags, **about), "offrl train hdpo"
    )
    seeds = parse_seeds(args.seeds)
    with bars() as progress:
        for seed in seeds:
            bar = partial(reporter(progress, "hdpo seed"), seed)
            (folder,) = hdpo.train(name, args.config, seeds=[seed], runs=args.runs, fresh=args.fresh, progress=bar, say=out.print)
            for line in described(read_json(folder / "result.json")):
                out.print(line)
            out.print(f"run: {folder}")


def described(result: dict[str, Any]) -> list[str]:
    """The cost that a run came to, beside what is known of the least one, and where it arises."""
    error = "" if result["error"] is None else f" (standard error {result['error']:.4f})"
    lines = [f"cost {result['cost']:.4f} for each period and store{error}, of the weights of step {result['best_step']}"]
    if least := result.get("reference"):
        lines.append(f"  {least['kind']}: {least['cost']:.4f}, {100 * (result['cost'] / least['cost'] - 1):+.2f} %")
    shares = [f"{part} {sum(result[part].values()):.4f}" for part in ("holding", "underage", "procurement") if any(result[part].values())]
    return [*lines, f"  of this: {', '.join(shares)}"]


def check(arguments: Sequence[str]) -> int:
    """All that is wrong with the file of a network; 1 where something is."""
    path, _ = _named(arguments, "offrl hdpo check NETWORK.yaml")
    findings = files.check(path)
    for finding in findings:
        out.print(f"{finding.name}: {finding.field}: {finding.what}; {finding.advice}")
    if not findings:
        network, history = files.load(path)
        of = "" if history is None else f", {history.demand.shape[-1]} periods of demand"
        out.print(f"{path}: {network.W} warehouses, {network.S} stores, {network.E} edges{of}: nothing is wrong")
    return bool(findings)


def solve(arguments: Sequence[str]) -> None:
    """What is known of the least cost in a setting."""
    name, flags = _named(arguments, f"offrl hdpo solve SETTING [flags]; SETTING is one of {', '.join(SETTINGS)}")
    if name not in SETTINGS:
        raise ConfigError(f"no setting {name!r}{nearest(name, SETTINGS)}")
    setting = validate(tyro.cli(SETTINGS[name], args=flags, prog=f"offrl hdpo solve {name}"), "offrl hdpo solve")
    least = hdpo.reference(setting)
    out.print(f"{name}: nothing is known of the least cost" if least is None else f"{least[0]}: {least[1]:.4f} for each period and store")


def _named(arguments: Sequence[str], usage: str) -> tuple[str, list[str]]:
    if not arguments or (arguments[0].startswith("-") and not {"-h", "--help"} & set(arguments)):
        raise ConfigError(f"usage: {usage}")
    return ("one-store-lost", list(arguments)) if arguments[0].startswith("-") else (arguments[0], list(arguments[1:]))


@dataclass(frozen=True)
class Order:
    run: Annotated[Path, tyro.conf.Positional]
    """The folder of a run of one seed."""
    state: Path
    """Today's stock, CSV or Parquet: columns node, arrives_in (0: on hand) and quantity, and item where there are several."""
    demand: Path | None = None
    """Past demand, a table like the network's own; that one, unless told otherwise."""
    out: Path | None = None
    """Also write the orders to this CSV file."""


def order(arguments: Sequence[str]) -> None:
    """What to order today."""
    args = tyro.cli(Order, args=list(arguments), prog="offrl hdpo order", description="Orders for today from today's stock.")
    policy = planner.load(args.run)
    inventory = read_state(args.state, policy.network, policy.agent.shape.slots, policy.items)
    past = policy.past(args.demand) if policy.sees_past else None
    rows = policy.rows(policy.orders(inventory, past))
    period = policy.period or "period"
    if past is not None:
        out.print(f"orders for the {period} of {past.date}, after {policy.agent.shape.window} {period}s of demand")
    shown = [row for row in rows if row[3]]
    for item, source, target, quantity, periods in shown[:SHOWN]:
        of = f"{item}: " if item else ""
        out.print(f"  {of}{source} -> {target}: {quantity:,}, arrives in {periods} {period}{'s' * (periods > 1)}")
    if len(shown) > SHOWN:
        out.print(f"  and {len(shown) - SHOWN} more{'' if args.out else '; --out FILE.csv writes all'}")
    if not shown:
        out.print("  nothing is to be ordered")
    if args.out:
        write_rows(args.out, planner.COLUMNS, rows, policy.items)
        out.print(f"orders: {args.out}")


@dataclass(frozen=True)
class Report:
    run: Annotated[Path, tyro.conf.Positional]
    """The folder of a run of one seed."""
    steps: Annotated[int, Range(1)] = 200
    """Gradient steps by which the levels of base-stock policies are learned, to compare with."""


def report(arguments: Sequence[str]) -> None:
    """Costs, service and stock on the test scenarios."""
    args = tyro.cli(Report, args=list(arguments), prog="offrl hdpo report", description="How a trained policy does on the test scenarios.")
    validate(args, "offrl hdpo report")
    with bars() as progress:
        path, text = planner_report.report(args.run, args.steps, reporter(progress, "learning"))
    out.print(text)
    out.print(f"report: {path}")


COMMANDS: dict[str, Callable[[Sequence[str]], int | None]] = {"check": check, "solve": solve, "order": order, "report": report}
main = partial(dispatch, "hdpo", COMMANDS)
