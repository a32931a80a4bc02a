"""Configuration: frozen nested dataclasses, each hyperparameter written once with its default, range and meaning.

Layers of plain nested dicts (YAML, a study's best, dotted command-line flags) are merged onto the defaults; a key that
does not exist, a value of the wrong type or out of range is an error that names the nearest valid key.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import types
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """Valid values, ends included, which a study searches linearly."""

    low: float
    high: float = math.inf


@dataclass(frozen=True)
class Log(Range):
    """Valid values, which a study searches on a logarithmic scale."""


class ConfigError(ValueError):
    pass


def merge(config: T, layer: dict[str, Any], origin: str) -> T:
    """`config` with the values of the nested dict `layer`; `origin` names the layer in messages."""
    return _merge(config, layer, origin, "")


def _merge(config: Any, layer: dict[str, Any], origin: str, prefix: str) -> Any:
    if not isinstance(layer, dict):
        raise ConfigError(f"{origin}: {prefix.rstrip('.') or 'the file'} must be a mapping of keys, not {layer!r}")
    hints = get_type_hints(type(config), include_extras=True)
    names = [f.name for f in fields(config)]
    changes = {}
    for key, value in layer.items():
        if key not in names:
            raise ConfigError(f"{origin}: unknown key {prefix}{key}{nearest(str(key), names, prefix)}")
        current = getattr(config, key)
        if is_dataclass(current):
            changes[key] = _merge(current, value, origin, f"{prefix}{key}.")
        else:
            changes[key] = _checked(value, hints[key], f"{origin}: {prefix}{key}")
    return replace(config, **changes)


def nearest(key: str, names: Any, prefix: str = "") -> str:
    """A clause for an error message: the nearest valid name, or all of them."""
    close = difflib.get_close_matches(key, list(names), n=1, cutoff=0.5)
    return f"; did you mean {prefix}{close[0]}?" if close else f"; valid: {', '.join(prefix + n for n in sorted(names))}"


def _checked(value: Any, hint: Any, where: str) -> Any:
    ranges = [m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Range)]
    kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    value = _typed(value, kind, where)
    for bound in ranges:
        if value is not None and not bound.low <= value <= bound.high:
            raise ConfigError(f"{where} is {value:g}; it must lie between {bound.low:g} and {bound.high:g}")
    return value


def _typed(value: Any, kind: Any, where: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _typed(value, next(a for a in args if a is not type(None)), where)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where} is {value!r}{nearest(str(value), map(str, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} must be a list, not {value!r}")
        return tuple(_typed(v, args[0], where) for v in value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        hint = " (YAML reads 3e-4 as text: write 3.0e-4)" if kind is float and isinstance(value, str) and "e" in value.lower() else ""
        raise ConfigError(f"{where} must be {kind.__name__}, not {value!r}{hint}")
    return value


def validate(config: T, origin: str = "config") -> T:
    """The same config, its types and ranges checked (for values that did not come through `merge`)."""
    return merge(config, asdict(config), origin)  # type: ignore[call-overload]


def digest(value: Any, length: int = 8) -> str:
    """The hash that names a run folder: the first hex digits of sha256 over a plain value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]
