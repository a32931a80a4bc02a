"""Which networks each loss reaches, and that a step moves the one it names and nothing else.

The losses and what they are called with are those of a real update: a spy on `descend` notes them. So a new agent needs
one entry of the table.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from stubs import draws, rollout, rows, start

from offrl.core import registry
from offrl.core.space import Box
from offrl.core.tree import flatten
from offrl.core.types import Spec

SMALL = dict.fromkeys(("hidden", "actor_hidden", "critic_hidden", "vae_hidden"), (8, 8)) | dict.fromkeys(("epochs", "minibatches"), 1)

TD3BC = {"critic_loss": {"critic"}, "actor_loss": {"actor", "critic"}}
IQL = {"value_loss": {"value"}, "critic_loss": {"critic"}, "actor_loss": {"actor"}}
SAC = {"critic_loss": {"critic"}, "actor_loss": {"actor", "critic"}, "temperature_loss": {"temperature"}}
A2PR = {"critic_loss": {"critic"}, "value_loss": {"value"}, "vae_loss": {"vae"}, "actor_loss": {"actor", "critic", "vae"}}

# (agent, change of its config): {loss: groups that its gradient reaches}, of which `descend` steps one
REACHES = {
    ("bc", ()): {"actor_loss": {"actor"}},
    ("td3bc", ()): TD3BC,
    ("iql", ()): IQL,
    ("a2pr", ()): A2PR,
    ("a2pr", ("detach_target", True)): A2PR | {"actor_loss": {"actor", "critic"}},
    ("a2pr", ("vae_action", "prior")): A2PR,
    ("a2pr", ("advantage", "min")): A2PR,
    ("sac", ()): SAC,
    ("sac", ("members", 10)): SAC,
    ("sac", ("alpha", 0.2)): {name: groups for name, groups in SAC.items() if name != "temperature_loss"},
    ("combo", ()): SAC,
    ("ppo", ()): {"critic_loss": {"critic"}, "actor_loss": {"actor"}},
}


def spied(name: str, change: tuple):
    """(the agent, [(group, loss, state before, its arguments, state after), ...]) of one update."""
    kind = registry.agent_class(name)
    fields = {f.name for f in dataclasses.fields(kind.Config)}
    config = kind.Config(**{k: v for k, v in SMALL.items() if k in fields} | dict([change] if change else []))
    agent = kind(config, Spec(Box.of(3), Box.of(2, -1, 1)))
    calls, descend = [], agent.descend

    def spy(state, group, loss, *args):
        after, metrics = descend(state, group, loss, *args)
        calls.append((group, loss, state, args, after))
        return after, metrics

    agent.descend = spy
    batches = [rollout(4, 4)] if agent.on_policy else [rows(16, seed=i) for i in range(agent.period)]
    state = start(agent)
    if "value" in state["params"]:  # in the middle of the values of the data's actions, so that some advantages are positive
        q = agent.bind(state, "critic")(batches[-1].obs, batches[-1].action)[0]
        head = state["params"]["value"]["mlp.head.bias"]
        state["params"]["value"]["mlp.head.bias"] = head + (q - agent.bind(state, "value")(batches[-1].obs)).mean()
    agent.update(state, batches, draws(agent, 16))
    return agent, calls


def reached(loss, state, args) -> set[str]:
    """The groups of `params`, and "target", "adam", "normalizer", for which some gradient is not zero."""

    def of(tree):
        return loss(tree, *args)[0]

    grads = flatten(torch.func.grad(of)(state))
    names = {path.split("/")[1] if path.startswith("params/") else path.split("/")[0] for path, grad in grads.items() if grad.any()}
    return names


@pytest.mark.parametrize("name, change", REACHES, ids=lambda x: x if isinstance(x, str) else "=".join(map(str, x)) or "default")
def test_reach_of_every_loss(name, change):
    """Targets and advantages come in as numbers: no loss reaches a target network, or the network that made its target."""
    agent, calls = spied(name, change)
    table = {}
    for group, loss, state, args, _ in calls:
        table.setdefault(loss.__name__, set()).update(reached(loss, state, args))
        assert group in table[loss.__name__], f"{loss.__name__} does not reach {group}, which it descends"
        assert not any(leaf.requires_grad for leaf in tensors(args))
    assert table == REACHES[name, change]


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from tensors(entry)


@pytest.mark.parametrize("name", registry.agents())
def test_a_step_changes_the_named_group_alone(name):
    assert (name, ()) in REACHES, f"add the losses of {name!r} to REACHES"
    agent, calls = spied(name, ())
    assert [group for group, *_ in calls].count("actor") == 1
    assert {group for group, *_ in calls} == set(agent.modules)
    for group, _, before, _, after in calls:
        old, new = flatten(before), flatten(after)
        assert old.keys() == new.keys()
        changed = {tuple(path.split("/")[:2]) for path in old if not torch.equal(old[path], new[path])}
        assert changed == {("params", group), ("adam", group)}
