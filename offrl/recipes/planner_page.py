"""How the figures of an ordering policy read: a page in Markdown, and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NAMES = {"foresight": "perfect foresight", "optimum": "the optimum", "lower bound": "a bound that no policy beats"}
NONE_APPLIES = "Base-stock rules: none applies, since a node has several suppliers."
FORESIGHT = "Perfect foresight knows all demand and has all arrive when it is sold. It is not to be had: it tells what not knowing costs."
PERIODS = 104  # that a picture shows at most
NAMED = 10  # lines of a picture that have a colour and a name


def written(found: Mapping[str, Any]) -> str:
    """The page for what `planner_report.report` found. Profit, where it is sought, is minus the cost."""
    period, sign, what, missed = found["period"], *_words(found)
    holding, underage, procurement = ({key: sign * x for key, x in found[part].items()} for part in ("holding", "underage", "procurement"))
    shares = f"holding {sum(holding.values()):.4f}, {missed} {sum(underage.values()):.4f}, buying {sum(procurement.values()):.4f}"
    error = "" if found["error"] is None else f" (standard error {found['error']:.4f})"
    compared = [[NAMES.get(each["policy"], each["policy"]), _n(sign * each["cost"]), _difference(each, found)] for each in found["others"]]
    stores = [
        [
            store,
            _percent(each["fill_rate"]),
            _percent(each["stock_outs"]),
            *map(_n, (found["stock"][store], holding[store], underage[store])),
        ]
        for store, each in found["stores"].items()
    ]
    warehouses = [[node, _n(stock), _n(holding[node])] for node, stock in found["stock"].items() if node not in found["stores"]]
    edges = [[*edge.split("->"), _n(x), _n(procurement[edge])] for edge, x in found["orders"].items()]
    parts = [
        f"# {found['name']}: how the ordering policy does",
        f"**{what.capitalize()} {sign * found['cost']:.4f}** for each {period} and store{error}: {shares}.",
        f"This is what it came to over {_span(found)}, which it was not trained on. In the tables, too, money is for each {period} and\n"
        f"store, so that it adds up to these figures.{' Each is the mean of all of them.' if found['scenarios'] > 1 else ''}",
        "## Beside other ways to order",
        *([NONE_APPLIES] if len(compared) == 1 else []),
        _table(["", what, "the policy"], compared),
        FORESIGHT,
        "## Stores",
        _table(["store", "demand met from stock", f"{period}s with unmet demand", "mean stock", "holding", missed], stores),
        *(["## Warehouses", _table(["warehouse", "mean stock", "holding"], warehouses)] if warehouses else []),
        f"Stock is what is left at the end of a {period}.",
        "## Orders",
        _table(["from", "to", f"mean of a {period}", "buying"], edges),
    ]
    return "\n\n".join(parts) + "\n"


def _words(found: Mapping[str, Any]) -> tuple[int, str, str]:
    return (-1, "profit", "revenue") if found["objective"] == "profit" else (1, "cost", "unmet demand")


def _span(found: Mapping[str, Any]) -> str:
    periods, count = f"{found['periods']:,} {found['period']}s", found["scenarios"]
    if found["dates"] is None:
        return f"{periods} of {count:,} traces of demand"
    return f"{periods}, {found['dates'][0]} to {found['dates'][1]}{f', of {count:,} items' if count > 1 else ''}"


def _difference(each: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    more, share = found["cost"] - each["cost"], "" if each["difference"] is None else f" ({abs(each['difference']):.1%})"
    verb, grows = ("earns", more < 0) if found["objective"] == "profit" else ("costs", more > 0)
    return f"{verb} {_n(abs(more))}{share} {'more' if grows else 'less'}"


def _n(x: float) -> str:
    return f"{x + 0.0:,.2f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """In Markdown, with columns that line up as they are."""
    widths = [max(3, *map(len, column)) for column in zip(head, *lines)]
    rule = ["-" * width for width in widths]
    return "\n".join(f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths))} |" for line in (head, rule, *lines))


def plot(
    folder: Path,
    found: Mapping[str, Any],
    stock: list[list[float]],
    orders: list[list[float]],
    curve: Mapping[int, float],
    dates: Any = None,
) -> dict[str, str]:
    """Draws one scenario's stock (nodes, periods) and orders (edges, periods), and dev costs by training step. Names and captions.

    Needs matplotlib: `pip install "offrl[plot]"`.
    """
    period, (sign, what, _), count = found["period"], _words(found), min(PERIODS, len(stock[0]))
    x, label = (range(1, count + 1), f"{period}s") if dates is None else (dates[:count], "")
    _draw(folder / "stock.png", x, dict(zip(found["stock"], stock)), xlabel=label, ylabel="on hand before demand")
    _draw(folder / "orders.png", x, dict(zip(found["orders"], orders)), xlabel=label, ylabel=f"ordered in a {period}")
    _draw(folder / "curve.png", list(curve), {what: [sign * cost for cost in curve.values()]}, xlabel="training steps", ylabel=what)
    which = " of the first item" if dates is not None and found["scenarios"] > 1 else ""
    return {
        "stock.png": f"Stock{which} in the test {period}s",
        "orders.png": f"Orders{which} in the test {period}s",
        "curve.png": f"{what.capitalize()} during training, on the {period}s by which the policy was chosen",
    }


def _draw(path: Path, x: Sequence[Any], lines: Mapping[str, Sequence[float]], **labels: str) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('plots need matplotlib: pip install "offrl[plot]"') from None
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    named = sorted(lines, key=lambda each: -sum(lines[each]))[:NAMED]
    for each, values in lines.items():
        axes.plot(x, values[: len(x)], **{"label": each} if each in named else {"color": "0.85", "zorder": 0})
    axes.set(**labels)
    if len(lines) > 1:
        axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=120)
