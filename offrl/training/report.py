"""What a finished run looks like: lines to read and a curve to look at."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offrl.core.checkpoint import printable
from offrl.core.log import read
from offrl.envs.scores import normalize
from offrl.training.run import read_about, read_json


def lines(folder: Path, behaviors: Mapping[str, float] | None = None) -> list[str]:
    """The result of one seed beside its data: the data's own mean return and the behaviour policies', in the result's units.

    behaviors: policy name -> mean return.
    """
    about, found = read_about(folder), read_json(folder / "result.json")
    spec, scored = about["spec"], "score" in found

    def shown(value: float) -> float:
        return float(normalize([value], spec["ref_min"], spec["ref_max"])[0]) if scored else value

    what, estimate = ("normalised score", found["score"]) if scored else ("return", found["return"])
    interval = "" if estimate["interval"] is None else " (95 % interval {:.1f} to {:.1f})".format(*estimate["interval"])
    text = [f"{what} {estimate['mean']:.1f}{interval} over {found['episodes']} episodes of {found['env']} after {found['step']:,} steps"]
    mean = about["data"]["return_mean"]
    if mean is not None:
        text.append(f"  the data's own mean, weighted by transitions: {shown(mean):.1f}")
    if behaviors:
        best = max(behaviors, key=behaviors.__getitem__)
        text += [f"  behaviour {name}: {shown(value):.1f}{' (the best)' if name == best else ''}" for name, value in behaviors.items()]
        if estimate["mean"] < shown(behaviors[best]):
            text.append(f"  the {what} is below that of the best behaviour, {best}")
    elif mean is not None and estimate["mean"] < shown(mean):
        text.append(f"  the {what} is below the data's own mean")
    return text


def plot(folders: list[Path], path: Path) -> Path:
    """The learning curves of a run's seeds with the data's mean, as a PNG. Needs matplotlib: `pip install "offrl[plot]"`."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('plots need matplotlib: pip install "offrl[plot]"') from None

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    about = read_about(folders[0])
    spec = about["spec"]
    rows = {folder: [row for row in read(folder) if "eval/return_mean" in row] for folder in folders}
    scored = spec["ref_min"] is not None
    key, label = ("eval/normalized_score_mean", "normalised score") if scored else ("eval/return_mean", "return")
    for folder, points in rows.items():
        axes.plot([p["step"] for p in points], [p[key] for p in points], marker=".", label=f"seed {folder.name}")
    if (mean := about["data"]["return_mean"]) is not None:
        level = float(normalize([mean], spec["ref_min"], spec["ref_max"])[0]) if scored else mean
        axes.axhline(level, color="grey", linestyle="--", label="the data's mean")
    axes.set(xlabel="gradient steps", ylabel=label)
    axes.set_title(f"{about['recipe']} on {printable(about['data']['name'])}", parse_math=False)
    axes.legend()
    figure.savefig(path, dpi=120)
    return path


def summary(folder: Path) -> dict[str, Any]:
    """run.json and result.json of one seed as one dict, with its learning curve."""
    curve = [row for row in read(folder) if "eval/return_mean" in row]
    return {"folder": str(folder), "about": read_about(folder), "result": read_json(folder / "result.json"), "curve": curve}
