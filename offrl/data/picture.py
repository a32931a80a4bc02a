"""One picture of a dataset: its returns, episodes, actions, the states it covers, its rewards and features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from offrl.core.checkpoint import printable
from offrl.core.space import Discrete
from offrl.data.dataset import Dataset
from offrl.envs.scores import normalize

BLUE, ORANGE, RED, GREEN, SKY, PINK = "#0072B2", "#E69F00", "#D55E00", "#009E73", "#56B4E9", "#CC79A7"  # Okabe and Ito's
GREY, COLORS = "#999999", (BLUE, ORANGE, GREEN, RED, SKY, PINK)
SAMPLE = 40_000  # rows that densities are drawn from
MARKS = 300  # episodes whose first and last states are marked
BINS = 40
ROWS = 24  # of actions or features that are drawn one by one with room for a label each


def draw(data: Dataset, path: Path, name: str | None = None) -> Path:
    """Draws the dataset into a PNG, for which `name` stands in the title. Memory holds a sample of its rows.

    Needs matplotlib: `pip install "offrl[plot]"`.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('plots need matplotlib: pip install "offrl[plot]"') from None

    figure = Figure(figsize=(14, 8.2), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    panels = figure.subplots(2, 3)
    rows = np.arange(len(data))
    if len(data) > SAMPLE:
        rows = np.sort(np.random.default_rng(0).choice(len(data), SAMPLE, replace=False))
    _returns(panels[0, 0], data)
    _lengths(panels[0, 1], data)
    _actions(panels[0, 2], data, rows)
    _coverage(panels[1, 0], data, rows)
    _rewards(panels[1, 1], data, rows)
    _features(panels[1, 2], data, rows)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    where = f" of {printable(data.spec.env_id)}" if data.spec.env_id else ""
    title = f"{printable(name or data.spec.dataset_id or 'dataset')}: {len(data):,} transitions in {data.episodes:,} episodes{where}"
    figure.suptitle(title, fontsize=14, parse_math=False)
    figure.savefig(path, dpi=120)
    return path


def _titled(axes: Any, title: str, **labels: Any) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set(**labels)


def _legend(axes: Any, **where: Any) -> None:
    axes.legend(fontsize=8, edgecolor="none", framealpha=0.8, **where)


def _share(value: float) -> str:
    """0 and 100 % are said of none and of all alone."""
    return f"{value:.2%}" if 0 < value < 0.01 or 0.99 < value < 1 else f"{value:.0%}"


def _bins(count: int) -> int:
    return int(np.clip(3 * count**0.5, 5, BINS))


def _returns(axes: Any, data: Dataset) -> None:
    returns, spec = data.returns.reshape(data.episodes, -1), data.spec
    several = returns.shape[1] > 1
    for i, values in enumerate(returns.T[: len(COLORS)]):
        counts, edges = np.histogram(values, _bins(data.episodes))
        rows = np.histogram(values, edges, weights=data.lengths)[0]
        axes.stairs(counts / counts.sum(), edges, fill=True, color=COLORS[i], alpha=0.5, label=f"objective {i}" if several else "episodes")
        axes.stairs(rows / rows.sum(), edges, color=COLORS[i] if several else "black", label=None if several else "transitions")
    _legend(axes)
    means = ", ".join(f"{mean:,.4g}" for mean in returns.mean(axis=0))
    if not several and spec.ref_min is not None and spec.ref_max is not None:
        low, high = spec.ref_min, spec.ref_max
        pair = (lambda x: normalize(x, low, high), lambda x: low + np.asarray(x) / 100 * (high - low))
        axes.secondary_xaxis("top", functions=pair)
        means += "; above: normalised score"
    _titled(axes, f"Returns (mean {means})", xlabel="return of an episode", ylabel="share")


def _lengths(axes: Any, data: Dataset) -> None:
    from matplotlib.ticker import MaxNLocator

    last = data.starts[1:] - 1
    true = data.terminated[last]
    cut = data.truncated[last] & ~true
    kinds = [("true ends", true, RED), ("cut by a limit", cut, BLUE), ("open", ~true & ~cut, GREY)]
    kinds = [(f"{name}: {mask.sum():,}", data.lengths[mask], color) for name, mask, color in kinds if mask.any()]
    low, high = int(data.lengths.min()), int(data.lengths.max())
    bins = np.linspace(low - 0.5, high + 0.5, min(_bins(data.episodes), high - low + 1) + 1) if high > low else [0.95 * low, 1.05 * low]
    labels, values, colors = zip(*kinds)
    axes.hist(values, bins, stacked=True, color=colors, label=labels)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    if high == low:
        axes.set_xlim(0, 2 * low)
    _legend(axes)
    steps = f"{low:,} to {high:,}" if high > low else f"all {low:,}"
    _titled(axes, f"Lengths ({steps} steps)", xlabel="steps in an episode", ylabel="episodes")


def _actions(axes: Any, data: Dataset, rows: np.ndarray) -> None:
    from matplotlib.ticker import MaxNLocator

    action, space = data.action[rows], data.spec.action
    if isinstance(space, Discrete):
        axes.bar(np.arange(space.n), np.bincount(action, minlength=space.n) / len(action), color=BLUE)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return _titled(axes, f"Actions ({space.n} choices)", xlabel="choice", ylabel="share of transitions")
    size, low, high = space.size, np.float32(space.low), np.float32(space.high)
    edges = np.histogram_bin_edges(action, 60)
    for i in range(size):
        base, height = size - 1 - i, np.histogram(action[:, i], edges)[0] ** 0.5
        axes.stairs(base + 0.9 * height / height.max(), edges, baseline=base, fill=True, color=BLUE, alpha=0.85, linewidth=0)
        if space.bounded:
            axes.plot([low[i], high[i]], [base + 0.3] * 2, "|", color="black", markersize=max(3, 150 / size), markeredgewidth=0.8)
    told = "no bounds are given"
    if space.bounded:
        shares = ((((action == low) | (action == high)), "at a bound"), (((action < low) | (action > high)), "outside"))
        told = ", ".join(f"{_share(where.any(axis=1).mean())} {what}" for where, what in shares if where.any())
    axes.xaxis.set_major_locator(MaxNLocator(5))
    _label_rows(axes, size)
    _titled(axes, f"Actions ({told})" if told else "Actions", xlabel="value (height: square root of the count)", ylabel="entry")


def _label_rows(axes: Any, size: int) -> None:
    """The first on top."""
    step = -(-size // ROWS)
    axes.set_yticks([size - 1 - i for i in range(0, size, step)], [str(i) for i in range(0, size, step)])
    axes.set_ylim(-0.6, size)


def _coverage(axes: Any, data: Dataset, rows: np.ndarray) -> None:
    """The plane in which standardised observations vary most."""
    from matplotlib.colors import LogNorm

    obs = data.obs[rows].astype(np.float64)
    mean, std = obs.mean(axis=0), obs.std(axis=0)
    varied = std > 0
    if varied.sum() < 2:
        axes.hist(obs[:, varied.argmax()], _bins(len(rows)), color=BLUE)
        return _titled(axes, "States", xlabel="the one feature that varies" if varied.any() else "no feature varies", ylabel="transitions")

    def standard(values: np.ndarray) -> np.ndarray:
        return (values[:, varied] - mean[varied]) / std[varied]

    variances, directions = np.linalg.eigh(np.cov(standard(obs).T))
    plane, shares = directions[:, [-1, -2]], variances[[-1, -2]] / variances.sum()
    axes.hexbin(*(standard(obs) @ plane).T, gridsize=60, norm=LogNorm(vmin=0.3), mincnt=1, cmap="Blues", linewidths=0)
    some = np.linspace(0, data.episodes - 1, min(MARKS, data.episodes)).astype(int)
    last = data.starts[1:][some] - 1
    true = data.terminated[last]
    marks = [(last[true], "x", RED, "true ends"), (last[~true], "+", "black", "cuts"), (data.starts[some], ".", ORANGE, "starts")]
    for at, marker, color, label in marks:
        if len(at):
            points = (standard(data.obs[at].astype(np.float64)) @ plane).T
            axes.scatter(*points, s=20, marker=marker, color=color, label=label, linewidths=0.8)
    _legend(axes, title="darker: more rows", title_fontsize=8)
    labels = [f"{which} component ({share:.0%})" for which, share in zip(("first", "second"), shares)]
    _titled(axes, f"States (a plane of {shares.sum():.0%} of their variance)", xlabel=labels[0], ylabel=labels[1])


def _rewards(axes: Any, data: Dataset, rows: np.ndarray) -> None:
    step = rows - data.starts[np.searchsorted(data.starts, rows, "right") - 1]
    reward = data.reward[rows].reshape(len(rows), -1)
    edges = np.unique(np.quantile(step, np.linspace(0, 1, 61)[:-1]).astype(int))
    part = np.searchsorted(edges, step, "right") - 1
    parts = [part == i for i in range(len(edges))]
    middle = [step[rows].mean() for rows in parts]
    marker = "." if len(parts) == 1 else None
    for i, values in enumerate(reward.T[: len(COLORS)]):
        low, high = np.transpose([np.quantile(values[rows], (0.1, 0.9)) for rows in parts])
        axes.fill_between(middle, low, high, color=COLORS[i], alpha=0.25, linewidth=0, label=None if i else "10 % to 90 %")
        label = "mean" if reward.shape[1] == 1 else f"mean of objective {i}"
        axes.plot(middle, [values[rows].mean() for rows in parts], marker=marker, color=COLORS[i], label=label)
    _legend(axes)
    _titled(axes, f"Rewards ({_share((reward == 0).mean())} zero)", xlabel="step in the episode", ylabel="reward")


def _features(axes: Any, data: Dataset, rows: np.ndarray) -> None:
    size, low, high = data.spec.obs.size, data.obs.min(axis=0), data.obs.max(axis=0)
    q1, q25, q50, q75, q99 = np.quantile(data.obs[rows], (0.01, 0.25, 0.5, 0.75, 0.99), axis=0)
    y, width = size - 1 - np.arange(size), min(6.0, 130 / size)
    axes.hlines(y, low, high, color=GREY, linewidth=min(1, width / 3), label="range")
    axes.hlines(y, q1, q99, color=SKY, linewidth=width / 2, label="98 %")
    axes.hlines(y, q25, q75, color=BLUE, linewidth=width, label="half")
    axes.plot(q50, y, "|", color="black", markersize=min(6, width), label="median")
    extent = np.maximum(np.abs(low), np.abs(high))
    if extent.max() > 1000 * (usual := float(np.median(extent))) > 0:
        axes.set_xscale("symlog", linthresh=10 ** np.ceil(np.log10(usual)))
        axes.xaxis.get_major_locator().set_params(numticks=7)
    _label_rows(axes, size)
    _legend(axes, ncols=4, loc="lower right", bbox_to_anchor=(1.02, 0.98), handlelength=1, columnspacing=1)
    _titled(axes, f"Features ({size})", xlabel="value", ylabel="feature")
