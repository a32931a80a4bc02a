"""A supply network in motion, as a differentiable function of the orders (Alvo et al., arXiv 2306.11246, section 2).

State: inventory (B, N, M) of every node, slot 0 on hand and slot k arriving k periods from now. One period, in this order:

1. All nodes see all inventory, before demand, and order along their incoming edges.
2. A warehouse that is asked for more than it has ships in proportion to what each edge asks for; a transshipment node ships all it has.
3. Stores meet demand from what is on hand. What is missing is lost, or goes on as a negative stock.
4. Holding and underage costs are booked on what is then left, procurement on what was ordered; what is in transit costs nothing.
5. The pipeline moves by one slot. An order of period t with lead time L serves the demand of period t + L: a level that is ordered up to
   covers L + 1 demands.

Everything has a static shape and no tensor's value is branched on: a period compiles whole.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from offrl.envs.inventory.network import Network, Values
from offrl.envs.inventory.scenario import Cost, Observation, Scenario

NOTHING = 1e-12  # a transshipment node whose edges ask for less, all together, ships in equal parts


class Simulator:
    """The periods of a network, as pure functions of tensors; it holds the topology and nothing that changes."""

    def __init__(self, network: Network, device: str | torch.device = "cpu"):
        self.network, self.device, self.capacitated = network, torch.device(device), network.capacitated
        source, target = torch.tensor(network.ends, device=device).T
        self.target, self.source = target, source[network.K :]
        self.leaves = F.one_hot(self.source, network.W).float() if network.W else None  # (inner edges, W)
        self.hubs = torch.tensor([kind == "transshipment" for kind in network.kinds[: network.W]], device=device)

    def reset(self, scenario: Scenario) -> Tensor:
        """The first inventory (B, N, M)."""
        return scenario.initial

    def observe(self, inventory: Tensor, scenario: Scenario, t: int) -> Observation:
        """What is seen at the start of period t, and after the last period (t = T), which has that one's calendar."""
        window = scenario.past.shape[-1]
        demand = scenario.demand[..., max(t - window, 0) : t] if window else scenario.past
        past = torch.cat([scenario.past[..., t:], demand], -1) if t < window else demand
        return Observation(
            inventory, scenario.values, scenario.mean, scenario.std, past, scenario.calendar[:, min(t, scenario.calendar.shape[1] - 1)], t
        )

    def ship(self, inventory: Tensor, order: Tensor, values: Values) -> Tensor:
        """What leaves on each edge (B, E) when `order` (B, E) is asked for: never less than 0, more than a capacity or than there is.

        Orders that are feasible come back as they are, with a gradient of one.
        """
        net, order = self.network, order.clamp_min(0)
        if self.capacitated:
            order = torch.minimum(order, values.capacity.to(order.dtype))
        if net.W == 0:
            return order
        outside, inner, leaves = order[:, : net.K], order[:, net.K :], self.leaves.to(order.dtype)
        there, asked = inventory[:, : net.W, 0], inner @ leaves
        short = asked > there
        if "transshipment" in net.kinds:
            idle = self.hubs & (asked < NOTHING)
            inner = torch.where(idle[:, self.source], 1.0, inner)
            asked = torch.where(idle, leaves.sum(0), asked)
            short = short | self.hubs
        scale = torch.where(short, there / torch.where(short, asked, 1.0), 1.0)
        return torch.cat([outside, inner * scale[:, self.source]], 1)

    def advance(self, inventory: Tensor, shipped: Tensor, demand: Tensor, values: Values) -> tuple[Tensor, Cost]:
        """One period, from what was shipped (B, E) and the period's demand (B, S) to the next inventory (B, N, M) and the cost."""
        net, on_hand = self.network, inventory[..., 0]
        leaving = demand if net.W == 0 else torch.cat([shipped[:, net.K :] @ self.leaves.to(shipped.dtype), demand], 1)
        after = on_hand - leaving
        left = after.relu()  # of a warehouse, `after` is below 0 by rounding alone
        if net.objective == "profit":
            underage = -values.underage * (on_hand - left)[:, net.W :]
        else:
            underage = values.underage * (left - after)[:, net.W :]
        cost = Cost(values.holding * left, underage, values.procurement * shipped)
        if net.unmet == "backlog":
            left = after if net.W == 0 else torch.cat([left[:, : net.W], after[:, net.W :]], 1)
        slots = inventory.shape[-1]
        moved = F.pad(inventory[..., 1:], (0, 1)) + F.pad(left[..., None], (0, slots - 1))
        place = (self.target * slots + values.lead_time - 1).expand(shipped.shape)
        return moved.flatten(1).scatter_add(1, place, shipped).view_as(inventory), cost

    def sales(self, inventory: Tensor, demand: Tensor) -> Tensor:
        """(B, S): the demand of a period less what is lost of it."""
        return demand if self.network.unmet == "backlog" else torch.minimum(demand, inventory[:, self.network.W :, 0])

    def step(self, inventory: Tensor, order: Tensor, scenario: Scenario, t: int) -> tuple[Tensor, Cost]:
        """Period t under the desired orders (B, E): the next inventory and the cost. Orders must be finite."""
        shipped = self.ship(inventory, order, scenario.values)
        return self.advance(inventory, shipped, scenario.demand[..., t], scenario.values)
