"""Networks, demand and a policy that asks for anything."""

from __future__ import annotations

import torch

from offrl.envs.inventory.network import Network
from offrl.envs.inventory.scenario import cast, scenario


def store(lead_time=4, holding=1.0, underage=9.0, unmet="backlog", **options):
    edge = {"from": "supplier", "to": "store", "lead_time": lead_time}
    return Network.of({"store": {"kind": "store", "holding": holding, "underage": underage}}, [edge], unmet, **options)


def crossed(unmet="lost", hub=False, capacity=None, **options):
    """Three tiers; the stores south and west lack the warehouse `first`, west has a supplier of its own."""
    nodes = {
        "south": {"kind": "store", "holding": 1.1, "underage": 7},
        "plant": {"holding": 0.2},
        "second": {"kind": "transshipment"} if hub else {"holding": 0.4},
        "first": {"holding": 0.3},
        "north": {"kind": "store", "holding": 0.9, "underage": 11},
        "west": {"kind": "store", "holding": 1.0, "underage": 9},
    }
    takes = {("plant", "first"): 2, ("first", "north"): 5, ("second", "north"): 1, ("second", "south"): 2, ("second", "west"): 1}
    takes |= {("supplier", "plant"): 3, ("plant", "second"): 1, ("supplier", "west"): 6}
    edges = [{"from": a, "to": b, "lead_time": n, "procurement": 0.1 * n if a == "supplier" else 0} for (a, b), n in takes.items()]
    if capacity is not None:
        edges[0]["capacity"] = edges[5]["capacity"] = capacity
    return Network.of(nodes, edges, unmet, **options)


def serial(unmet="backlog"):
    names = ["supplier", "top", "middle", "warehouse", "store"]
    nodes = {name: {"holding": h} for name, h in zip(names[1:], (0.1, 0.2, 0.5, 1.0))}
    nodes["store"] |= {"kind": "store", "underage": 9}
    return Network.of(nodes, [{"from": a, "to": b, "lead_time": n} for a, b, n in zip(names, names[1:], (2, 4, 3, 4))], unmet)


def demands(network, batch=16, periods=30, seed=0, mean=5.0, std=1.6, window=0, **options):
    """A scenario in float64 with Normal demand clipped at 0 and some stock to begin with."""
    draw = torch.Generator().manual_seed(seed)
    demand = (mean + std * torch.randn(batch, network.S, periods + window, generator=draw, dtype=torch.float64)).clamp_min(0)
    slots = max(network.longest, 3)
    initial = 2 * mean * torch.rand(batch, network.N, slots, generator=draw, dtype=torch.float64)
    given = scenario(network, demand[..., window:], initial=initial, past=demand[..., :window], **options)
    return cast(given, torch.float64)


def nonsense(network, seed=0, scale=20.0):
    """A policy that asks for numbers of any sign and size, the same ones at each call of the same period."""

    def policy(obs):
        draw = torch.Generator().manual_seed(1000 * seed + obs.t)
        asked = scale * torch.randn(len(obs.inventory), network.E, generator=draw, dtype=torch.float64)
        return torch.where(asked.abs() < scale / 5, 0.0, asked)

    return policy


def smooth(network, parameter):
    """A policy whose orders depend on all inventory, by numbers that are to be differentiated by."""

    def policy(obs):
        seen = obs.inventory.flatten(1)
        weights = torch.sin(torch.arange(network.E * seen.shape[1], dtype=torch.float64)).view(seen.shape[1], network.E)
        return torch.nn.functional.softplus(parameter[0] * 0.1 * torch.tanh(seen / 10) @ weights + parameter[1] * 5 + 3)

    return policy
