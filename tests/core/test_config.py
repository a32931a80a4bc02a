"""Layers of configuration, and what is said of a value that is wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offrl.core import registry
from offrl.core.config import ConfigError, Log, Range, digest, merge, nearest, validate


@dataclass(frozen=True)
class Inner:
    gamma: Annotated[float, Range(0, 1)] = 0.99
    rate: Annotated[float, Log(1e-5, 1e-2)] = 3e-4
    hidden: tuple[int, ...] = (256, 256)
    kind: Literal["q1", "min", "mean"] = "q1"
    norm: bool = False


@dataclass(frozen=True)
class Outer:
    agent: Inner = field(default_factory=Inner)
    steps: Annotated[int, Range(1)] = 1000
    env: str | None = None
    limit: Annotated[float | None, Range(0, 5)] = None


def test_layers_override_key_by_key():
    base = Outer()
    first = merge(base, {"agent": {"gamma": 0.9, "hidden": [8, 4]}, "steps": 5}, "defaults")
    second = merge(first, {"agent": {"gamma": 0.5}, "env": "Pendulum-v1"}, "command line")
    assert second == Outer(Inner(gamma=0.5, hidden=(8, 4)), steps=5, env="Pendulum-v1")
    assert base == Outer() and merge(base, {}, "nothing") == base
    assert merge(second, {"env": None}, "back").env is None


@pytest.mark.parametrize("layer, words", [
    ({"stepz": 1}, r"unknown key stepz; did you mean steps\?"),
    ({"agent": {"gama": 0.5}}, r"unknown key agent\.gama; did you mean agent\.gamma\?"),
    ({"agent": {"zzzzz": 0.5}}, r"unknown key agent\.zzzzz; valid: agent\.gamma, agent\.hidden, agent\.kind, agent\.norm, agent\.rate"),
    ({3: 1}, "unknown key 3"),
    ({"agent": 3}, "agent must be a mapping of keys, not 3"),
    ([1], r"the file must be a mapping of keys, not \[1\]"),
    ({"agent": {"gamma": 1.5}}, "agent.gamma is 1.5; it must lie between 0 and 1"),
    ({"agent": {"gamma": -0.1}}, "between 0 and 1"),
    ({"agent": {"gamma": math.nan}}, "agent.gamma is nan"),
    ({"agent": {"rate": 0.1}}, "between 1e-05 and 0.01"),
    ({"steps": 0}, "steps is 0; it must lie between 1 and inf"),
    ({"steps": 1.0}, "steps must be int, not 1.0"),
    ({"steps": True}, "steps must be int, not True"),
    ({"steps": "7"}, "steps must be int, not '7'"),
    ({"steps": None}, "steps must be int, not None"),
    ({"agent": {"gamma": True}}, "agent.gamma must be float, not True"),
    ({"agent": {"gamma": "0.5"}}, "agent.gamma must be float, not '0.5'"),
    ({"agent": {"norm": 1}}, "agent.norm must be bool, not 1"),
    ({"agent": {"norm": "yes"}}, "agent.norm must be bool"),
    ({"agent": {"hidden": 8}}, "agent.hidden must be a list, not 8"),
    ({"agent": {"hidden": "88"}}, "agent.hidden must be a list"),
    ({"agent": {"hidden": [8, 4.5]}}, "agent.hidden must be int, not 4.5"),
    ({"agent": {"kind": "mim"}}, r"agent.kind is 'mim'; did you mean min\?"),
    ({"agent": {"kind": ["q1"]}}, r"agent.kind is \['q1'\]"),
    ({"env": 3}, "env must be str, not 3"),
    ({"limit": 6.0}, "limit is 6; it must lie between 0 and 5"),
])  # fmt: skip
def test_what_is_wrong_is_named(layer, words):
    with pytest.raises(ConfigError, match=f"^a2pr.yaml: .*{words}"):
        merge(Outer(), layer, "a2pr.yaml")


def test_values_are_taken_in_their_own_type():
    got = merge(Outer(), {"agent": {"gamma": 1, "hidden": [], "kind": "mean", "norm": True}, "limit": 5}, "x")
    assert got.agent == Inner(gamma=1.0, hidden=(), kind="mean", norm=True)
    assert type(got.agent.gamma) is float and type(got.limit) is float
    assert merge(got, {"limit": None}, "x").limit is None


@given(st.floats(0, 1))
def test_the_ends_of_a_range_are_in_it(value):
    assert merge(Inner(), {"gamma": value}, "x").gamma == value


def test_validate_checks_what_was_built_by_hand():
    assert validate(Outer(Inner(gamma=0.0))) == Outer(Inner(gamma=0.0))
    with pytest.raises(ConfigError, match="config: agent.gamma is 2"):
        validate(Outer(Inner(gamma=2.0)))
    with pytest.raises(ConfigError, match="config: steps must be int"):
        validate(Outer(steps=0.5))


def test_nearest():
    assert nearest("gama", ["alpha", "gamma"]) == "; did you mean gamma?"
    assert nearest("x", ["b", "a"], "agent.") == "; valid: agent.a, agent.b"


def test_digest():
    """Fixed for ever: it names folders of runs. The order of keys does not count, every value does."""
    value = {"agent": {"gamma": 0.99, "hidden": (256, 256)}, "seed": 0}
    assert digest(value) == "f462f1d3"  # of sha256sum, too
    assert digest({"seed": 0, "agent": {"hidden": [256, 256], "gamma": 0.99}}) == digest(value)
    changed = [{"agent": {"gamma": 0.98, "hidden": (256, 256)}, "seed": 0}, {"agent": {"gamma": 0.99, "hidden": (256,)}, "seed": 0}, {}]
    assert len({digest(v) for v in [value, *changed]}) == 4
    assert len(digest(value, 12)) == 12 and digest(value, 12).startswith(digest(value))


@pytest.mark.parametrize("name", registry.agents())
def test_the_agents_own_defaults_lie_in_their_ranges(name):
    kind = registry.agent_class(name)
    assert validate(kind.Config()) == kind.Config()
    hints = get_type_hints(kind.Config, include_extras=True)
    assert not [key for key, hint in hints.items() if hint in (float, int)], "every number has a range"
