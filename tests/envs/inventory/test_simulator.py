"""The simulator against answers that need no simulator: closed forms, conservation of mass, arrival times, finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import crossed, demands, nonsense, serial, smooth, store
from torch.distributions import Normal

from offrl.envs.inventory.network import Network
from offrl.envs.inventory.rollout import evaluate, rollout
from offrl.envs.inventory.scenario import cast, each, rows, scenario
from offrl.envs.inventory.simulator import Simulator


def up_to(level):
    """Order up to a level, of one store."""
    return lambda obs: (level - obs.inventory[:, 0].sum(-1, keepdim=True)).clamp_min(0)


def newsvendor_cost(level, lead_time, mean=5.0, std=1.6, h=1.0, p=9.0):
    """Of backlogged Normal demand: h E[x+] + p E[x-] of x = level - demand of L + 1 periods."""
    m, s = (lead_time + 1) * mean, std * math.sqrt(lead_time + 1)
    z, unit = torch.tensor((level - m) / s, dtype=torch.float64), Normal(torch.zeros((), dtype=torch.float64), 1.0)
    loss = unit.log_prob(z).exp() - z * (1 - unit.cdf(z))
    return float(h * (level - m) + (p + h) * s * loss), float(h - (p + h) * (1 - unit.cdf(z)))


@pytest.mark.parametrize(
    ("lead_time", "level", "cost", "slope"),
    [
        (1, 10.8998, 6.13231, -2.45441),
        (1, 12.8998, 3.97107, 0.0),
        (1, 14.8998, 5.02175, 0.84822),
        (4, 27.585, 7.50460, -1.34985),
        (4, 29.585, 6.27882, 0.0),
        (4, 31.585, 7.04586, 0.67157),
    ],
)
def test_cost_and_slope_of_a_base_stock_level_are_the_closed_form(lead_time, level, cost, slope):
    assert newsvendor_cost(level, lead_time) == pytest.approx((cost, slope), abs=2e-4)
    draw = torch.Generator().manual_seed(0)
    demand = 5 + 1.6 * torch.randn(4096, 1, 200, generator=draw)
    network, parameter = store(lead_time), torch.tensor(level, requires_grad=True)
    found = rollout(Simulator(network), up_to(parameter), scenario(network, demand), warm_up=20).scored.total.mean() / 180
    (gradient,) = torch.autograd.grad(found, parameter)
    assert float(found.detach()) == pytest.approx(cost, rel=4e-3)
    assert float(gradient) == pytest.approx(slope, abs=0.03)


@pytest.mark.parametrize("lead_time", [1, 3, 6])
def test_constant_demand(lead_time):
    for off, cost in ((2.0, 2.0), (0.0, 0.0), (-1.5, 9 * 1.5)):
        network = store(lead_time)
        found = evaluate(Simulator(network), up_to(5.0 * (lead_time + 1) + off), scenario(network, torch.full((1, 1, 40), 5.0)), 20)
        assert found.cost == pytest.approx(cost, abs=1e-5)
    network = store(lead_time, unmet="lost")
    level = 5.0 * (lead_time + 1) - 2
    even = torch.full((1, 1, lead_time), level / (lead_time + 1))
    even[..., 0] *= 2
    cycle = scenario(network, torch.full((1, 1, 30 * (lead_time + 1)), 5.0), initial=even)
    found = evaluate(Simulator(network), up_to(level), cycle, 10 * (lead_time + 1))
    assert found.cost == pytest.approx(9 * 2 / (lead_time + 1), abs=1e-4)


def test_a_unit_that_is_ordered_at_t_serves_the_demand_of_t_plus_its_lead_time():
    """Lead times 1 to 6 in one batch, one store; a unit is ordered in period 2 and demand of one is there in one period."""
    network, taken = store(list(range(1, 7)), unmet="lost"), torch.arange(1, 7)
    for offset, sold in ((-1, 0.0), (0, 1.0)):
        demand = torch.zeros(6, 1, 12)
        demand[torch.arange(6), 0, 2 + taken + offset] = 1
        made = rollout(Simulator(network), lambda obs: torch.full((6, 1), float(obs.t == 2)), scenario(network, demand), trajectory=True)
        assert made.trajectory.sales.sum((1, 2)).tolist() == [sold] * 6


def test_lead_times_hold_for_each_edge():
    network = crossed()
    initial = torch.zeros(1, network.N, 6)
    initial[:, : network.W, 0] = 100
    given = scenario(network, torch.zeros(1, 3, 9), initial=initial)
    made = rollout(Simulator(network), lambda obs: torch.full((1, network.E), float(obs.t == 0)), given, trajectory=True)
    stock = made.trajectory.inventory[0, :, :, 0]
    for node, name in enumerate(network.nodes):
        arrivals = sorted(int(n) for (_, b), n in zip(network.edges, network.values.lead_time[0]) if b == name)
        begin = float(stock[1, node]) if 1 not in arrivals else float(stock[1, node]) - arrivals.count(1)
        expected = [begin + sum(n <= t for n in arrivals) for t in range(1, 9)]
        assert stock[1:, node].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("hub", [False, True])
@pytest.mark.parametrize("unmet", ["lost", "backlog"])
def test_mass_is_conserved_whatever_is_asked_for(unmet, hub):
    network = crossed(unmet, hub)
    given = demands(network)
    made = rollout(Simulator(network), nonsense(network), given, trajectory=True)
    path = torch.cat([made.trajectory.inventory, made.inventory[:, None]], 1)
    for node, name in enumerate(network.nodes):
        into = made.trajectory.order[..., [b == name for _, b in network.edges]].sum(-1)
        out = made.trajectory.order[..., [a == name for a, _ in network.edges]].sum(-1)
        if node >= network.W:
            out = made.trajectory.sales[..., node - network.W]
        torch.testing.assert_close(path[:, 1:, node].sum(-1) - path[:, :-1, node].sum(-1), into - out, rtol=0, atol=1e-10)
    assert made.trajectory.order.sum() > 0


@pytest.mark.parametrize("hub", [False, True])
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([1e-14, 1.0, 20.0, 1e6]))
@settings(max_examples=20, deadline=None)
def test_no_policy_ships_what_is_not_there(hub, seed, scale):
    network = crossed(hub=hub, capacity=4.0)
    made = rollout(Simulator(network), nonsense(network, seed, scale), demands(network, 4, 12, seed), trajectory=True).trajectory
    assert (made.order >= 0).all() and (made.inventory >= 0).all()
    limited = network.values.capacity[0].isfinite()
    assert limited.sum() == 2 and (made.order[..., limited] <= 4).all()
    for node, name in enumerate(network.nodes[: network.W]):
        out = made.order[..., [a == name for a, _ in network.edges]].sum(-1)
        on_hand = made.inventory[:, :, node, 0]
        assert (out <= on_hand + 1e-9).all()
        if network.kinds[node] == "transshipment":
            torch.testing.assert_close(out, on_hand)


def test_feasible_orders_pass_untouched_with_a_gradient_of_one():
    network = crossed()
    given = demands(network)
    share = torch.rand(len(given.demand), network.E, dtype=torch.float64, requires_grad=True)
    asked = share * 0.3  # at most three edges leave a node
    stock = given.initial.clone()
    stock[:, :, 0] = 1.0
    shipped = Simulator(network).ship(stock, asked, given.values)
    assert torch.equal(shipped, asked)
    (gradient,) = torch.autograd.grad(shipped.sum(), share)
    torch.testing.assert_close(gradient, torch.full_like(share, 0.3))


@pytest.mark.parametrize("hub", [False, True])
def test_gradients_are_finite_where_nothing_is_asked_for_or_nothing_is_there(hub):
    network = crossed(hub=hub)
    values = demands(network, 3).values
    for there in (0.0, 1.0):
        for asked in (0.0, 1e-30, 1.0):
            stock = torch.full((3, network.N, 6), there, requires_grad=True)
            order = torch.full((3, network.E), asked, requires_grad=True)
            gradients = torch.autograd.grad(Simulator(network).ship(stock, order, values).square().sum(), (stock, order), allow_unused=True)
            assert all(gradient.isfinite().all() for gradient in gradients)


def test_scarce_stock_goes_out_in_proportion():
    network = crossed()
    stock = torch.zeros(1, network.N, 6)
    stock[0, network.nodes.index("second"), 0] = 6
    asked = torch.tensor([[{"north": 1.0, "south": 2.0, "west": 9.0}[b] if a == "second" else 0.0 for a, b in network.edges]])
    shipped = Simulator(network).ship(stock, asked, network.values)
    torch.testing.assert_close(shipped, asked / 2)


@pytest.mark.parametrize("make", [crossed, lambda: crossed("backlog", hub=True), serial, lambda: crossed(objective="profit", capacity=6.0)])
def test_gradients_through_all_periods_are_the_finite_differences(make):
    network = make()
    simulator, given = Simulator(network), demands(network, periods=network.longest + 8)

    def total(parameter):
        return rollout(simulator, smooth(network, parameter), given).total.sum()

    at = torch.tensor([0.7, 0.2], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(total(at), at)
    for i in range(2):
        by = 1e-6 * torch.eye(2, dtype=torch.float64)[i]
        difference = float(total(at.detach() + by) - total(at.detach() - by)) / 2e-6
        assert abs(difference) > 1 and float(gradient[i]) == pytest.approx(difference, rel=1e-6)


@pytest.mark.parametrize("unmet", ["lost", "backlog"])
def test_units_scale(unmet):
    network = crossed(unmet)
    given = demands(network)
    simulator, policy = Simulator(network), nonsense(network)
    once = rollout(simulator, policy, given).total
    thrice = rollout(simulator, lambda obs: 3 * policy(obs), given._replace(demand=3 * given.demand, initial=3 * given.initial)).total
    torch.testing.assert_close(thrice, 3 * once)


def test_costs_by_hand():
    """Two periods of one warehouse and one store: 10 and 4 on hand, 6 asked for and shipped, demand 5, then 6.5."""
    nodes = {"w": {"holding": 0.5}, "s": {"kind": "store", "holding": 1, "underage": 9}}
    edges = [{"from": "supplier", "to": "w", "lead_time": 2, "procurement": 2.0}, {"from": "w", "to": "s", "lead_time": 1}]
    initial = torch.tensor([[[10.0, 0.0], [4.0, 1.0]]])
    for unmet, objective, underage, holding in (
        ("lost", "cost", [9 * 1, 0], [0, 0.5]),
        ("backlog", "cost", [9 * 1, 9 * 0.5], [0, 0]),
        ("lost", "profit", [-9 * 4, -9 * 6.5], [0, 0.5]),
    ):
        network = Network.of(nodes, edges, unmet, objective)
        given = scenario(network, torch.tensor([[[5.0, 6.5]]]), initial=initial)
        made = rollout(Simulator(network), lambda obs: torch.tensor([[3.0, 6.0]]), given, trajectory=True)
        cost = made.trajectory.cost
        assert cost.underage[0, :, 0].tolist() == underage
        assert cost.holding[0].tolist() == [[0.5 * 4, holding[0]], [0.5 * 0, holding[1]]]  # the second order of 6 finds 4
        assert cost.procurement[0].tolist() == [[6, 0], [6, 0]]
        assert made.inventory[0, 0].tolist() == [3, 3]
        assert made.inventory[0, 1].tolist() == [4 + (-0.5 if unmet == "backlog" else 0.5), 0]
        assert float(made.total) == pytest.approx(sum(underage) + sum(holding) + 2 + 12)


def test_each_scenario_has_its_own_numbers_and_is_as_if_alone():
    def own(i):
        nodes = {"w": {"holding": [0.1, 0.3, 0.5][i]}, "s": {"kind": "store", "holding": [1, 2, 3][i], "underage": [9, 4, 19][i]}}
        into = {"from": "supplier", "to": "w", "lead_time": [3, 1, 2][i]}
        return nodes, [into, {"from": "w", "to": "s", "lead_time": [1, 4, 2][i], "capacity": [9, 5, 6][i]}]

    network = Network.of(*own(slice(None)))
    given = demands(network, batch=3, window=2)
    simulator, parameter = Simulator(network), torch.tensor([0.3, 0.1], dtype=torch.float64)
    together = rollout(simulator, smooth(network, parameter), given).total
    for i in range(3):
        alone = rollout(simulator, smooth(network, parameter), rows(given, slice(i, i + 1))).total
        torch.testing.assert_close(alone, together[i : i + 1])
        other = Network.of(*own(i))
        shared = rows(given, slice(i, i + 1))._replace(values=cast(scenario(other, given.demand[:1].float()), torch.float64).values)
        torch.testing.assert_close(rollout(Simulator(other), smooth(network, parameter), shared).total, alone, rtol=1e-6, atol=0)
    assert together.unique().numel() == 3


def test_a_period_is_one_graph():
    network = crossed(hub=True, capacity=3.0)
    simulator, given = Simulator(network), demands(network, periods=5, window=3)
    compiled = torch.compile(simulator.advance, backend="aot_eager", fullgraph=True)
    ship = torch.compile(simulator.ship, backend="aot_eager", fullgraph=True)
    inventory = other = given.initial.clone().requires_grad_()
    start = inventory
    for t in range(5):
        order = smooth(network, torch.tensor([1.0, 1.0], dtype=torch.float64))(simulator.observe(inventory, given, t))
        inventory, cost = simulator.step(inventory, order, given, t)
        other, fast = compiled(other, ship(other, order, given.values), given.demand[..., t], given.values)
        torch.testing.assert_close(fast.total, cost.total)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), start, retain_graph=True)[0] for x in (inventory, other)))


def test_a_policy_sees_the_past_and_not_the_future():
    network = crossed()
    given = demands(network, periods=8, window=4)._replace(calendar=torch.arange(16.0).view(1, 8, 2))
    simulator, whole = Simulator(network), torch.cat([given.past, given.demand], -1)
    for t in range(8):
        obs = simulator.observe(given.initial, given, t)
        assert torch.equal(obs.past, whole[..., t : t + 4]) and obs.calendar.tolist() == [[2.0 * t, 2.0 * t + 1]]
    assert obs.node_features().shape == (16, 6, given.initial.shape[-1] + 4 + 4 + 2)
    assert obs.edge_features().shape == (1, 8, 2)
    assert obs.flat().shape == (16, 6 * given.initial.shape[-1] + 3 * 4 + 2 + 8 + 6 + 3 + 8 + 3 + 3)
    nodes = obs.node_features()
    slots = given.initial.shape[-1]
    assert torch.equal(nodes[:, :, slots], given.values.holding.expand(16, -1))
    assert (nodes[:, : network.W, slots + 1 : -2] == 0).all()
    assert torch.equal(nodes[:, network.W :, slots + 4 : -2], obs.past)


def test_evaluation_adds_up_and_takes_batches():
    network = crossed()
    given, simulator, policy = demands(network, batch=12), Simulator(network), smooth(network, torch.tensor([0.5, 0.1]).double())
    whole = evaluate(simulator, policy, given, warm_up=10)
    parts = evaluate(simulator, policy, (rows(given, slice(i, i + 5)) for i in range(0, 12, 5)), warm_up=10)
    assert parts.cost == pytest.approx(whole.cost) and parts.error == pytest.approx(whole.error)
    assert sum(sum(part.values()) for part in (whole.holding, whole.underage, whole.procurement)) == pytest.approx(whole.cost)
    made = rollout(simulator, policy, given, trajectory=True).trajectory.cost
    late = sum(part[:, 10:].sum() for part in made)
    assert whole.cost == pytest.approx(float(late) / (12 * 20 * 3))
    assert whole.error == pytest.approx(float(whole.scenarios.std()) / math.sqrt(12)) and not whole.scenarios.requires_grad
    with pytest.raises(ValueError, match="30 periods leave none"):
        evaluate(simulator, policy, given, warm_up=30)


def test_a_scenario_of_the_wrong_shape_is_refused():
    network = crossed()
    demand = torch.zeros(4, 3, 10)
    for wrong in (
        {"demand": torch.zeros(4, 2, 10)},
        {"initial": torch.zeros(4, 5, 6)},
        {"mean": torch.zeros(3, 3)},
        {"past": torch.zeros(1, 3, 2)},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} has shape"):
            scenario(network, **({"demand": demand} | wrong))
    with pytest.raises(ValueError, match="lead times up to 6 need as many"):
        scenario(network, demand, initial=torch.zeros(4, network.N, 5))
    assert all(len(x) in (1, 4) for x in each(lambda x: x, scenario(network, demand)).values)
