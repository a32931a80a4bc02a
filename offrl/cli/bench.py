"""offrl bench COMMAND: measurements of models and data, as tables, plots and JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from offrl.cli.console import Imports, bars, dispatch, import_files, out, reporter
from offrl.core.checkpoint import atomic_write
from offrl.core.config import ConfigError, validate
from offrl.data.load import load_dataset
from offrl.recipes import calibration
from offrl.recipes.calibration import CONTROLS, Correlations, calibrate
from offrl.recipes.common import name_of
from offrl.recipes.config import resolve
from offrl.stats import Estimate
from offrl.training.run import write_json

MEASURES = {"spearman": "Spearman", "pearson": "Pearson"}


@dataclass(frozen=True, kw_only=True)
class Calibration:
    config: Annotated[calibration.Config, tyro.conf.arg(name="")] = field(default_factory=calibration.Config)
    policy: Path | None = None
    """A run whose policy is rolled out; by default, the data's behaviour is cloned."""
    env: str | None = None
    """Environment, where the dataset names none: a Gymnasium id of Hopper, Walker2d, HalfCheetah or Swimmer, -v4 or -v5."""
    runs: Path = Path("runs")
    """Folder of all runs, whose ensembles are used again."""
    out: Path | None = None
    """Folder of what is written; by default RUNS/calibration/DATASET."""
    semantics: Literal["strict", "d4rl", "ogbench"] | None = None
    """How a file is read: every row as stored, as D4RL itself does, as OGBench means it; by default what the dataset's id stands for."""
    imports: Imports = ()
    """Your own Python files to run first."""


def calibrate_penalties(arguments: Sequence[str]) -> None:
    dataset, flags = (arguments[0], arguments[1:]) if arguments and not arguments[0].startswith("-") else ("DATASET", arguments)
    if dataset == "DATASET" and not {"-h", "--help"} & set(arguments):
        raise ConfigError("usage: offrl bench calibration DATASET [flags]")
    default = Calibration(config=calibration.Config(model=resolve("mbrl", name_of(dataset)).model))
    about = {"prog": f"offrl bench calibration {dataset}", "description": "Correlate penalties with a dynamics model's true error."}
    args = validate(tyro.cli(Calibration, default=default, args=list(flags), **about), "offrl bench calibration")
    import_files(args.imports)
    with bars() as progress:
        data = load_dataset(dataset, progress=partial(reporter(progress, "reading"), dataset), semantics=args.semantics)
        how = {"policy": args.policy, "env": args.env, "models": args.runs / "models", "say": out.print}
        found = calibrate(data, args.config, **how, stage=reporter(progress, ""))
    found = {"dataset": name_of(dataset), **found, "config": asdict(args.config)}
    folder = args.out or args.runs / "calibration" / re.sub(r"[^\w.-]+", "-", name_of(dataset))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "calibration.json", plain(found))
    text = markdown(found)
    atomic_write(folder / "calibration.md", text.encode())
    out.print(text)
    try:
        out.print(f"plot: {plot(found, folder / 'calibration.png')}")
    except ImportError as error:
        out.print(f"no plot: {error}")
    out.print(f"results: {folder}")


def plain(value: Any) -> Any:
    """A value as JSON has it: tuples by their names, keys as text, null for what is not a number."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown(found: dict[str, Any]) -> str:
    """The result of `calibrate` to be read: the simulator's floor, the rollouts, and a table for each error."""
    floor, lost = found["floor"], found["left out"]
    lines = [f"# Calibration of penalties: {found['dataset']}", "", f"Simulator {found['env']}, policy: {found['policy']}.", ""]
    lines += [f"The simulator on {floor['rows']:,} of the data's own transitions, the floor of what can be measured:", ""]
    lines += [*_row("error", "median", "95 %", "max"), *_row("---", "---:", "---:", "---:")]
    for name, unit in (("normalised", "std of changes"), ("raw", "rms"), ("reward", "absolute")):
        lines += _row(f"{name} ({unit})", *(f"{floor[name][key]:.2g}" for key in ("median", "q95", "max")))
    lines += ["", f"Other endings than the data's: {floor['other endings']}. Left out: {_counts(floor['left out'])}.", ""]
    lines += ["The model on imagined steps, by their place in a rollout; states that no motion leads to are taken as they are:", ""]
    lines += [*_row("step", "rollouts", "median error (std of changes)", "raw"), *_row("---:", "---:", "---:", "---:")]
    for each in found["rows"]:
        lines += _row(each["step"], each["rollouts"], *(f"{each['median error'][units]:.3g}" for units in calibration.UNITS))
    lines += ["", f"Left out: {_counts(lost)}.", ""]
    for units, by_error in found["correlations"].items():
        for of, by_penalty in by_error.items():
            lines += [f"## Error of the {of}{' prediction' * (of == 'mean')}, {units}", "", *_table(by_penalty), ""]
    lines += [
        "Intervals: 95 %, of a bootstrap over rollouts. Pooled correlations mix in how error and penalty move along a rollout: what the",
        "step alone gives is in `shuffled within steps`. `shuffled` must hold 0, which one interval in twenty misses; `oracle` must be 1.",
    ]
    return "\n".join(lines) + "\n"


def _row(*cells: Any) -> list[str]:
    return [f"| {' | '.join(map(str, cells))} |"]


def _counts(lost: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in lost.items())


def _table(by_penalty: dict[str, Correlations]) -> list[str]:
    columns = [(measure, part) for measure in MEASURES for part in ("within", "pooled")]
    heads = [f"{MEASURES[measure]}, {'within steps' if part == 'within' else part}" for measure, part in columns]
    lines = [*_row("penalty", *heads), *_row("---", *["---:"] * len(columns))]
    for name, found in by_penalty.items():
        lines += _row(name, *(_shown(getattr(getattr(found, part), measure)) for measure, part in columns))
    return lines


def _shown(estimate: Estimate) -> str:
    return "none" if math.isnan(estimate.value) else f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"


def plot(found: dict[str, Any], path: Path) -> Path:
    """Correlations with the normalised error of the mean, as a PNG: overall, and by the step. Needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('plots need matplotlib: pip install "offrl[plot]"') from None

    by_penalty = found["correlations"]["normalised"]["mean"]
    figure = Figure(figsize=(12, 8), layout="constrained")
    for (measure, label), (overall, along) in zip(MEASURES.items(), figure.subplots(2, 2, width_ratios=(3, 4))):
        for i, (name, each) in enumerate(by_penalty.items()):
            style = {"color": f"C{i % 10}" if name not in CONTROLS else "black", "label": name}
            for part, shift, marker in (("within", -0.15, "o"), ("pooled", 0.15, "x")):
                estimate = getattr(getattr(each, part), measure)
                overall.plot([estimate.low, estimate.high], [i + shift] * 2, color=style["color"])
                overall.plot(estimate.value, i + shift, marker, color=style["color"])
            if name in CONTROLS:
                style |= {"linestyle": (":", "--", "-.")[CONTROLS.index(name)]}
            along.plot(list(each.steps), [getattr(pair, measure).value for pair in each.steps.values()], **style)
        overall.set_yticks(range(len(by_penalty)), by_penalty)
        overall.invert_yaxis()
        overall.set(xlabel=f"{label} (o: within steps, x: pooled)", xlim=(-1.05, 1.05))
        overall.axvline(0, color="black", linewidth=0.5)
        along.set(xlabel="step of the rollout", ylabel=f"{label} within the step", ylim=(-1.05, 1.05))
    along.legend(fontsize="small", ncols=3)
    figure.suptitle(f"Penalties and the normalised error of the mean prediction: {found['dataset']}", parse_math=False)
    figure.savefig(path, dpi=120)
    return path


COMMANDS: dict[str, Callable[[Sequence[str]], int | None]] = {"calibration": calibrate_penalties}


main = partial(dispatch, "bench", COMMANDS)
