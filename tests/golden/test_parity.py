"""The agents against their naive second writings: the same weights, rows and noise give the same networks and optimisers."""

from __future__ import annotations

import dataclasses

import a2pr_naive
import iql_naive
import pytest
import td3bc_naive
import torch
from by_hand import D, N, noise, rows
from plain_nets import linears, q

from offrl.agents.a2pr import A2PR
from offrl.agents.iql import IQL
from offrl.agents.td3bc import TD3BC
from offrl.core.space import Box
from offrl.core.tree import flatten, tree_map
from offrl.core.types import Spec

SPEC = Spec(Box.of(N), Box.of(D, -1, 1))
FAST = {"actor_lr": 1e-3, "critic_lr": 2e-3, "tau": 0.1, "gamma": 0.9}  # large enough for six steps to tell


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def mlp(tree: dict, prefix: str = "mlp.") -> dict:
    """The naive layers "0", "1", ... under our names: the last is the head."""
    names = [f"hidden.{i}" for i in range(len(tree) - 1)] + ["head"]
    return {f"{prefix}{name}.{kind}": tree[str(i)][kind] for i, name in enumerate(names) for kind in ("weight", "bias")}


def vae(tree: dict) -> dict:
    """Naive layers in the order encoder, mean, log_std, decoder; our encoder's head is mean and log_std in one."""
    half = (len(tree) - 3) // 2  # hidden layers of each
    encoder = {str(i): tree[str(i)] for i in range(half)}
    encoder[str(half)] = {kind: torch.cat([tree[str(half)][kind], tree[str(half + 1)][kind]]) for kind in ("weight", "bias")}
    decoder = {str(i): tree[str(half + 2 + i)] for i in range(half + 1)}
    return mlp(encoder, "encoder.") | mlp(decoder, "decoder.")


def group(name: str, tree: dict) -> dict:
    if name == "critic":
        return {key: value for j, member in tree.items() for key, value in mlp(member, f"members.{j}.").items()}
    if name == "vae":
        return vae(tree)
    rest = dict(tree)
    extra = {"log_std": rest.pop("log_std")} if "log_std" in rest else {}
    return extra | mlp(rest)


def ours(groups: dict) -> dict:
    """The naive writing's weights as our tree."""
    return {name: group(name, tree) for name, tree in groups.items()}


def transplanted(agent, trainer) -> dict:
    """Our state with the naive trainer's weights in it: every name and shape must fit."""
    state = tree_map(torch.Tensor.double, agent.init(0))
    grafts = {"params": ours(trainer.parameters()), "target": ours(trainer.targets())}
    return state | {part: tree_map(_same_shape, state[part], tree) for part, tree in grafts.items()}


def _same_shape(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    assert old.shape == new.shape
    return new


@torch.no_grad()
def spread_(trainer) -> None:
    """Make the critics steep and centre V on the first: fresh networks are flat, so that all rows would be treated alike."""
    for net in [*trainer.critics, *trainer.target_critics]:
        for layer in linears(net):
            layer.weight *= 2
    probe = rows(256)
    linears(trainer.value)[-1].bias += (q(trainer.critics[0], probe.obs, probe.action) - trainer.value(probe.obs)).mean()


def distance(state: dict, trainer) -> float:
    got = flatten({"params": state["params"], "target": state["target"]})
    want = flatten({"params": ours(trainer.parameters()), "target": ours(trainer.targets())})
    assert got.keys() == want.keys()
    return max((got[k] - want[k]).abs().max().item() for k in got)


def run(agent, trainer, step, updates: int, batch: int = 24):
    """Both through the same gradient steps; the largest difference of any weight or loss, and what the naive steps and our updates say."""
    state, worst, outs = transplanted(agent, trainer), 0.0, []
    start = flatten(state["params"])
    assert distance(state, trainer) == 0
    for _ in range(updates):
        batches = [rows(batch) for _ in range(agent.period)]
        draws = [noise(batch) for _ in range(agent.period)]
        for rows_, draw in zip(batches, draws):
            outs.append(step(trainer, rows_, draw))
        renamed = [d | {"proposal": d["target"]} for d in draws]
        asked = [{k: d[k] for k in kinds} for d, kinds in zip(renamed, agent.noise(batch))]  # what the agent says it consumes
        state, metrics = agent.update(state, batches, asked)
        losses = [metrics[f"{name}/loss"] - outs[-1][f"{name}_loss"] for name in state["params"] if f"{name}/loss" in metrics]
        worst = max(worst, distance(state, trainer), *(loss.abs().item() for loss in losses))
        outs[-1] |= metrics
    moved = [k for k, leaf in flatten(state["params"]).items() if not torch.equal(leaf, start[k])]
    assert set(moved) == set(start), f"took no part: {set(start) - set(moved)}"
    return worst, outs


@pytest.mark.parametrize("detach", [False, True], ids=["official", "detached"])
def test_a2pr(detach):
    """Over eight gradient steps in which the policy is pulled to proposals and to the data, and not at all."""
    shared = FAST | {"alpha": 2.0, "mask": 0.7, "vae_weight": 1.5, "value_lr": 2e-3, "vae_lr": 5e-3}
    shared |= {"actor_hidden": (8, 8), "critic_hidden": (9, 9, 9), "vae_hidden": (7, 7), "detach_target": detach}
    trainer = a2pr_naive.Trainer(N, D, a2pr_naive.Config(**shared))
    spread_(trainer)
    worst, outs = run(A2PR(A2PR.Config(**shared), SPEC), trainer, a2pr_naive.step, updates=4)
    assert worst < 1e-12
    for out in outs[1::2]:  # where the actor steps
        assert out["weight"].unique().tolist() == [0.0, 0.7] and 0 < out["actor/proposed"] < 1


def test_a2pr_parity_tells_the_two_modes_apart():
    shared = FAST | {"actor_hidden": (8, 8), "critic_hidden": (9, 9), "vae_hidden": (7, 7)}
    trainer = a2pr_naive.Trainer(N, D, a2pr_naive.Config(**shared, detach_target=True))
    spread_(trainer)
    config = A2PR.Config(**shared, mask=trainer.config.mask, detach_target=False)
    assert run(A2PR(config, SPEC), trainer, a2pr_naive.step, updates=4)[0] > 1e-6


def test_td3bc():
    shared = FAST | {"alpha": 2.0, "policy_noise": 0.4, "noise_clip": 0.5}
    trainer = td3bc_naive.Trainer(N, D, td3bc_naive.Config(**shared, actor_hidden=(8, 8), critic_hidden=(8, 8)))
    worst, _ = run(TD3BC(TD3BC.Config(**shared, hidden=(8, 8)), SPEC), trainer, td3bc_naive.step, updates=4)
    assert worst < 1e-12


def test_iql():
    """Over eight steps of a rate that falls to 0 in twelve; some advantage weights are clipped and some are not."""
    shared = FAST | {"value_lr": 2e-3, "expectile": 0.8, "beta": 5.0, "hidden": (8, 8)}
    naive = iql_naive.Config(**shared, max_steps=12, max_weight=1.5)
    trainer = iql_naive.Trainer(N, D, naive)
    spread_(trainer)
    agent = IQL(IQL.Config(**shared, actor_lr_steps=12, weight_max=1.5), SPEC)
    assert run(agent, trainer, iql_naive.step, updates=8)[0] < 1e-12
    batch = rows(64)
    advantage = torch.min(*[q(net, batch.obs, batch.action) for net in trainer.target_critics]) - trainer.value(batch.obs)
    clipped = (5 * advantage).exp() > 1.5
    assert clipped.any() and not clipped.all()


def test_the_naive_defaults_are_the_agents():
    """One set of published settings, written twice. Only A2PR's mask differs: 0.5 as released, 1 as reproduced."""
    for config, naive, renamed in [
        (A2PR.Config(), a2pr_naive.Config(), {}),
        (TD3BC.Config(), td3bc_naive.Config(), {"actor_hidden": "hidden", "critic_hidden": "hidden"}),
        (IQL.Config(), iql_naive.Config(), {"max_steps": "actor_lr_steps", "max_weight": "weight_max"}),
    ]:
        for name, value in dataclasses.asdict(naive).items():
            if name not in ("policy_freq", "log_std_min", "log_std_max", "mask"):
                assert getattr(config, renamed.get(name, name)) == value, name
