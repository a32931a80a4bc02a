"""Every registered agent keeps the contract: a new one is tested by being registered."""

from __future__ import annotations

import dataclasses

import pytest

from offrl import testing
from offrl.core import registry

SMALL = dict.fromkeys(("hidden", "actor_hidden", "critic_hidden", "vae_hidden"), (8, 8))


def small(name: str):
    """The agent's default config with narrow layers: what is tested does not depend on their width."""
    config = registry.agent_class(name).Config()
    fields = {field.name for field in dataclasses.fields(config)}
    return dataclasses.replace(config, **{k: v for k, v in SMALL.items() if k in fields})


def cases():
    return [
        pytest.param(example, id=f"{name}-{type(example.data.spec.action).__name__}")
        for name in registry.agents()
        for example in testing.examples(name, small(name))
    ]


@pytest.mark.parametrize("check", testing.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("example", cases())
def test_contract(example, check):
    check(example)


@pytest.mark.slow
@pytest.mark.parametrize("example", cases())
def test_inductor_is_eager(example):
    testing.compiling(example, backend="inductor")
