"""Hindsight differentiable policy optimisation (Alvo et al., arXiv 2306.11246): descend the simulated cost of known demand itself.

Demand does not depend on what is ordered, so the cost of a recorded or sampled trace is a function of the policy's weights, and its
gradient goes through the whole horizon: no value function, no noise in the actions, no discount (section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from offrl.core.config import Log, Range
from offrl.core.graph import compiled
from offrl.core.types import Metrics, State
from offrl.envs.inventory.network import Network
from offrl.envs.inventory.neural import GNN, GraphPolicy, MLPPolicy, in_units
from offrl.envs.inventory.policies import classical
from offrl.envs.inventory.scenario import Observation, Scenario
from offrl.envs.inventory.simulator import Simulator
from offrl.nn.descend import adam, adam_init, clip_norm, cosine


@dataclass(frozen=True)
class Config:
    policy: Literal["mlp", "data_driven", "gnn", "base_stock", "capped_base_stock", "echelon_stock"] = "mlp"
    """mlp: a perceptron of all inventories; data_driven: of all that is observed; gnn: a graph network, for networks of any shape; the
    others learn levels that are ordered up to, where every node has one supplier."""
    hidden: tuple[int, ...] = (32, 32)
    """Widths of the hidden layers of a perceptron."""
    width: Annotated[int, Range(1, 1024)] = 32
    """Width of all layers of a graph network."""
    rounds: Annotated[int, Range(1, 10)] = 1
    """Rounds of messages of a graph network."""
    lr: Annotated[float, Log(1e-5, 1.0)] = 3e-3
    """Learning rate of Adam."""
    lr_steps: Annotated[float | None, Range(1)] = None
    """Steps over which the rate falls to 0 along a cosine; none: it stays."""
    clip: Annotated[float | None, Range(0, 1000)] = None
    """Largest norm of the gradient; none: as it is."""
    segment: Annotated[int | None, Range(1)] = None
    """Periods between states that are kept for the gradient, which simulates those in between once more: memory for time. None: all."""


class Shape(NamedTuple):
    """Of an observation: what a policy's layers depend on, beside the network."""

    slots: int
    window: int
    calendar: int

    @classmethod
    def of(cls, scenario: Scenario) -> Shape:
        return cls(scenario.initial.shape[-1], scenario.past.shape[-1], scenario.calendar.shape[-1])


class HDPO:
    """Deviation from the paper: none in the objective. From the released code: 1. gradients are clipped only if told so, for any policy;
    2. one period is a compiled graph and the horizon a loop of it.

    A batch is a Scenario. backend: torch.compile's, for one period as a graph; none: eager.
    """

    Config = Config
    needs = ()
    period = 1

    def __init__(self, config: Config, network: Network, shape: Shape, backend: str | None = None):
        self.config, self.network, self.shape, self.simulator = config, network, shape, Simulator(network)
        self.policy = self.networks()
        self.step = self._step if backend is None else compiled(self._step, backend)

    def networks(self) -> nn.Module:
        c, shape = self.config, self.shape
        if c.policy == "gnn":
            return GraphPolicy(self.network, GNN(shape.slots, shape.window, shape.calendar, c.width, c.rounds))
        if c.policy in ("mlp", "data_driven"):
            return MLPPolicy(self.network, *shape, c.hidden, everything=c.policy == "data_driven")
        return classical(c.policy, self.network)

    def init(self, seed: int) -> State:
        """A fresh state on the CPU in float32. The global generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            params = {name: p.detach() for name, p in self.networks().named_parameters()}
        return {"params": {"policy": params}, "adam": {"policy": adam_init(params)}}

    def noise(self, batch_size: int) -> list[dict[str, Any]]:
        return [{}]

    def _step(self, params: dict[str, Tensor], inventory: Tensor, seen: Observation, demand: Tensor) -> tuple[Tensor, Tensor]:
        """One period: the next inventory (B, N, M) and the cost (B,)."""
        order = functional_call(self.policy, params, (seen._replace(inventory=inventory),))
        shipped = self.simulator.ship(inventory, order, seen.values)
        following, cost = self.simulator.advance(inventory, shipped, demand, seen.values)
        return following, cost.total

    def cost(self, params: dict[str, Tensor], scenario: Scenario) -> Tensor:
        """(B,) cost for each period and store, of all periods, differentiable."""
        (scenario, unit, price), periods = in_units(scenario), scenario.demand.shape[-1]

        def simulate(inventory: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
            total = inventory.new_zeros(len(inventory))
            for t in range(first, last):
                seen = self.simulator.observe(inventory, scenario, t)._replace(t=0)  # a number would be a constant of the graph
                inventory, cost = self.step(params, inventory, seen, scenario.demand[..., t])
                total = total + cost
            return inventory, total

        if (segment := self.config.segment) is None:
            _, total = simulate(self.simulator.reset(scenario), 0, periods)
        else:
            inventory, total = self.simulator.reset(scenario), 0.0
            for t in range(0, periods, segment):
                inventory, cost = checkpoint(simulate, inventory, t, min(t + segment, periods), use_reentrant=False)
                total = total + cost
        return total * (unit * price).squeeze(1) / (periods * self.network.S)

    def update(self, state: State, batches: list[Scenario], noise: list[dict[str, Tensor]]) -> tuple[State, Metrics]:
        (scenario,), moments = batches, state["adam"]["policy"]
        params = {name: p.detach().requires_grad_() for name, p in state["params"]["policy"].items()}
        with torch.enable_grad():
            loss = self.cost(params, scenario).mean()
        grads = dict(zip(params, torch.autograd.grad(loss, list(params.values()))))
        norm = torch.stack([grad.square().sum() for grad in grads.values()]).sum().sqrt()
        if self.config.clip is not None:
            grads = clip_norm(grads, self.config.clip)
        lr = self.config.lr if self.config.lr_steps is None else cosine(moments["count"], self.config.lr, self.config.lr_steps)
        params, moments = adam(state["params"]["policy"], grads, moments, lr)
        metrics = {"policy/cost": loss.detach(), "policy/gradient_norm": norm}
        return {"params": {"policy": params}, "adam": {"policy": moments}}, metrics

    def act(self, state: State, obs: Observation) -> Tensor:
        """Desired orders (B, E)."""
        obs, unit, _ = in_units(obs)
        return functional_call(self.policy, state["params"]["policy"], (obs,)) * unit
