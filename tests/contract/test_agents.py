"""Every registered agent keeps the contract: a new one is tested by being registered."""

from __future__ import annotations

import dataclasses

import pytest

from offrl import testing
from offrl.core import registry

SMALL = dict.fromkeys(("hidden", "actor_hidden", "critic_hidden", "vae_hidden"), (8, 8)) | {"epochs": 1, "minibatches": 2}

VARIANTS = {  # other networks and branches than the defaults'
    "sac": {"members": 10},
    "ppo": {"target_kl": 1e-4, "value_clip": 0.1, "lr_steps": 30.0, "baseline": False, "entropy": 0.01},
}
QUICK = ("bc-Discrete", "td3bc-Box")  # to compile; the others take up to half a minute


def small(name: str, **change):
    """The agent's config with narrow layers and few steps: what is tested does not depend on their width and number."""
    config = registry.agent_class(name).Config(**change)
    fields = {field.name for field in dataclasses.fields(config)}
    return dataclasses.replace(config, **{k: v for k, v in SMALL.items() if k in fields})


def cases():
    named = [(name, example) for name in registry.agents() for example in testing.examples(name, small(name))]
    varied = [(f"{name}-varied", each) for name, change in VARIANTS.items() for each in testing.examples(name, small(name, **change), 20)]
    return [pytest.param(example, id=f"{name}-{type(example.data.spec.action).__name__}") for name, example in named + varied]


@pytest.mark.parametrize("check", [check for check in testing.CHECKS if check is not testing.compiling], ids=lambda check: check.__name__)
@pytest.mark.parametrize("example", cases())
def test_contract(example, check):
    check(example)


@pytest.mark.parametrize(
    "example", [pytest.param(*case.values, id=case.id, marks=() if case.id in QUICK else pytest.mark.slow) for case in cases()]
)
def test_compiled_is_eager(example):
    testing.compiling(example)


@pytest.mark.slow
@pytest.mark.parametrize("example", cases())
def test_inductor_is_eager(example):
    testing.compiling(example, backend="inductor")
