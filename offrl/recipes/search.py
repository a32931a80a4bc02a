"""What a study searches: fields of a config, each by its dotted path, within the range or among the values of its annotation or fewer.

A term is PATH (the whole annotated range, a Literal's values, or false and true), PATH=LOW:HIGH, PATH=LOW:HIGH:log or PATH=A,B,C.
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from offrl.core.config import ConfigError, Log, Range, merge, nearest
from offrl.core.tree import unflatten

BOOLEANS = {"false": False, "true": True}


def space(config: Any, terms: Sequence[str]) -> dict[str, Any]:
    """The Optuna distribution of each path that a term names; the config's `learns` are the top-level fields that may be searched at all.

    Raises ConfigError for a path that does not exist (naming the nearest), a range without an end, and values that are not valid.
    """
    known, learns = dict(_leaves(config)), config.learns
    found: dict[str, Any] = {}
    for term in terms:
        path, _, narrowed = term.partition("=")
        if path not in known:
            raise ConfigError(f"search: unknown field {path}{nearest(path, [name for name in known if name.split('.')[0] in learns])}")
        if path.split(".")[0] not in learns:
            raise ConfigError(f"search: {path} does not decide what is learned; these do: {', '.join(learns)}")
        if path in found:
            raise ConfigError(f"search: {path} is named twice")
        found[path] = _distribution(config, path, known[path], narrowed)
    return found


def described(distribution: Any) -> str:
    """What follows PATH= in the term that gives this distribution."""
    if hasattr(distribution, "choices"):
        return ",".join(str(choice).lower() if isinstance(choice, bool) else str(choice) for choice in distribution.choices)
    return f"{distribution.low!r}:{distribution.high!r}{':log' if distribution.log else ''}"


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"agent.alpha": 1} as {"agent": {"alpha": 1}}."""
    return unflatten({path.replace(".", "/"): value for path, value in flat.items()})


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"agent": {"alpha": 1}} as {"agent.alpha": 1}; tuples become the lists that they are in JSON."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= flattened(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return found


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, type annotation) of every field that is not itself a dataclass."""
    hints = get_type_hints(type(config), include_extras=True)
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", hints[field.name]


def _distribution(config: Any, path: str, hint: Any, narrowed: str) -> Any:
    from optuna import distributions

    bound = next((each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Range)), None)
    kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(each for each in get_args(kind) if each is not type(None))
    if ":" in narrowed or not narrowed and kind in (int, float):
        low, high, log = _interval(config, path, kind, bound, narrowed)
        return (distributions.IntDistribution if kind is int else distributions.FloatDistribution)(low, high, log=log)
    if get_origin(kind) is Literal:
        named = {str(value): value for value in get_args(kind)}
    elif kind is bool:
        named = BOOLEANS
    elif narrowed and kind in (int, float, str):
        named = {text: _number(path, kind, text) for text in narrowed.split(",")}
    else:
        raise ConfigError(f"search: {path} is neither a number nor a choice" + (f": name its values, {path}=A,B" if kind is str else ""))
    chosen = narrowed.split(",") if narrowed else list(named)
    for text in chosen:
        if text not in named:
            raise ConfigError(f"search: {path} cannot be {text}{nearest(text, named)}")
        merge(config, nested({path: named[text]}), "search")
    choices = [named[text] for text in chosen]
    if len(set(choices)) < max(2, len(choices)):
        raise ConfigError(f"search: {path}={narrowed} is no choice: name two values or more, each once")
    return distributions.CategoricalDistribution(choices)


def _interval(config: Any, path: str, kind: type, bound: Range | None, narrowed: str) -> tuple[Any, Any, bool]:
    """Its ends, and whether it is searched on a logarithmic scale."""
    log = isinstance(bound, Log)
    if narrowed:
        ends = narrowed.split(":")
        if ends[2:] == ["log"]:
            log, ends = True, ends[:2]
        if kind not in (int, float) or len(ends) != 2:
            raise ConfigError(f"search: {path}={narrowed}: write LOW:HIGH or LOW:HIGH:log of a number, or A,B of a choice")
        low, high = (_number(path, kind, text) for text in ends)
    else:
        low, high = (bound.low, bound.high) if bound else (-math.inf, math.inf)
    if not math.isfinite(low) or not math.isfinite(high):
        missing = "lower" if not math.isfinite(low) else "upper"
        example = f"{path}={low if math.isfinite(low) else 1:g}:{max(low, 1) * 100 if math.isfinite(low) else 100:g}"
        raise ConfigError(f"search: {path} has no {missing} bound: narrow it, as in {example}")
    if not low < high or (log and low <= 0):
        why = "must be above zero to be searched on a logarithmic scale" if log and low <= 0 else "must begin below its end"
        raise ConfigError(f"search: {path}={narrowed or f'{low:g}:{high:g}'} {why}")
    for end in (low, high):
        merge(config, nested({path: kind(end)}), "search")
    return kind(low), kind(high), log


def _number(path: str, kind: type, text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"search: {path} takes {kind.__name__}, not {text!r}") from None
