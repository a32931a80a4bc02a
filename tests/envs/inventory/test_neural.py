"""Neural ordering policies: gradients, symmetries, units, and networks of different shapes under one set of weights."""

from __future__ import annotations

import pytest
import torch

from offrl.agents.hdpo import HDPO, Config, Shape
from offrl.envs.inventory.network import Network
from offrl.envs.inventory.neural import GNN, GraphPolicy, flow, side_by_side
from offrl.envs.inventory.scenario import cast, rows, scenario
from offrl.envs.inventory.simulator import Simulator

POLICIES = ["mlp", "data_driven", "gnn"]


def network(unmet="lost", stores=("a", "b", "c"), lead_times=(2, 1, 3), hub=False, costs=((1.0, 9.0), (0.8, 7.0), (1.2, 8.0))):
    """Two warehouses; the first store lacks the first warehouse."""
    first = {"kind": "transshipment"} if hub else {"holding": 0.3}
    nodes = {"w0": first, "w1": {"holding": 0.4}}
    nodes |= {name: {"kind": "store", "holding": h, "underage": p} for name, (h, p) in zip(stores, costs)}
    edges = [{"from": "supplier", "to": "w0", "lead_time": 2, "procurement": 0.5}, {"from": "supplier", "to": "w1", "lead_time": 1}]
    for i, (name, n) in enumerate(zip(stores, lead_times)):
        edges += [{"from": w, "to": name, "lead_time": n} for w in (["w1"] if i == 0 else ["w0", "w1"])]
    return Network.of(nodes, edges, unmet)


def scenarios(net, count=4, periods=9, window=0, calendar=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    made = scenario(
        net,
        torch.rand(count, net.S, periods, generator=draw) * 8,
        initial=torch.rand(count, net.N, net.longest, generator=draw) * 6,
        mean=torch.full((1, net.S), 4.0),
        std=torch.full((1, net.S), 2.0),
        past=torch.rand(count, net.S, window, generator=draw) * 8,
        calendar=torch.rand(1, periods, calendar, generator=draw),
    )
    return cast(made, dtype)


def agent_of(kind, net, given, **more):
    agent = HDPO(Config(policy=kind, hidden=(6, 6), width=6, rounds=2, **more), net, Shape.of(given))
    params = {name: p.double() for name, p in agent.init(0)["params"]["policy"].items()}
    return agent, params


def orders(agent, params, given, t=0):
    return agent.act({"params": {"policy": params}}, agent.simulator.observe(given.initial, given, t))


@pytest.mark.parametrize("unmet", ["lost", "backlog"])
@pytest.mark.parametrize("kind", POLICIES)
def test_the_gradient_is_the_slope_of_the_simulated_cost(kind, unmet):
    """Finite differences along random directions, through more than twice the longest lead time."""
    net = network(unmet, hub=unmet == "backlog")
    given = scenarios(net, window=3, calendar=1)
    agent, params = agent_of(kind, net, given)
    params = {name: p.requires_grad_() for name, p in params.items()}
    grads = torch.autograd.grad(agent.cost(params, given).mean(), list(params.values()))
    draw = torch.Generator().manual_seed(1)
    for _ in range(3):
        along = [torch.randn(p.shape, generator=draw, dtype=p.dtype) for p in params.values()]
        step = 1e-6
        ends = [agent.cost({k: p.detach() + s * step * d for (k, p), d in zip(params.items(), along)}, given).mean() for s in (1, -1)]
        slope = sum((g * d).sum() for g, d in zip(grads, along))
        assert float((ends[0] - ends[1]) / (2 * step)) == pytest.approx(float(slope), rel=1e-5, abs=1e-7)
        assert abs(float(slope)) > 1e-4


@pytest.mark.parametrize("kind", POLICIES)
def test_what_is_ordered_can_be_shipped_and_scenarios_do_not_meet(kind):
    net = network()
    given = scenarios(net)
    agent, params = agent_of(kind, net, given)
    order = orders(agent, params, given)
    assert (order >= 0).all() and order.shape == (4, net.E)
    torch.testing.assert_close(orders(agent, params, rows(given, slice(1, 2))), order[1:2])
    if kind == "gnn":
        torch.testing.assert_close(agent.simulator.ship(given.initial, order, given.values), order)


@pytest.mark.parametrize("kind", POLICIES)
def test_other_units_change_nothing_but_the_units(kind):
    net = network()
    given = scenarios(net, window=2)
    agent, params = agent_of(kind, net, given)
    larger = given._replace(**{name: 7 * getattr(given, name) for name in ("demand", "initial", "mean", "std", "past")})
    torch.testing.assert_close(orders(agent, params, larger), 7 * orders(agent, params, given))
    prices = {name: 3 * getattr(given.values, name) for name in ("holding", "underage", "procurement")}
    dearer = given._replace(values=given.values._replace(**prices))
    torch.testing.assert_close(orders(agent, params, dearer), orders(agent, params, given))
    torch.testing.assert_close(agent.cost(params, dearer), 3 * agent.cost(params, given))


@pytest.mark.parametrize("kind", ["data_driven", "gnn"])
def test_who_sees_past_demand_does_not_see_its_mean_in_training(kind):
    """Over the training periods this mean would tell what is to come in them."""
    net = network()
    given = scenarios(net, window=3)
    agent, params = agent_of(kind, net, given)
    other = given._replace(mean=3 * given.mean, std=2 * given.std)
    torch.testing.assert_close(orders(agent, params, other), orders(agent, params, given))
    other = given._replace(past=given.past.flip(-1))
    assert (orders(agent, params, other) - orders(agent, params, given)).abs().max() > 1e-9


def test_a_graph_policy_does_not_care_in_what_order_stores_are():
    net, turned = network(), [2, 0, 1]
    costs = ((1.0, 9.0), (0.8, 7.0), (1.2, 8.0))
    names, leads = ("a", "b", "c"), (2, 1, 3)
    # the same network with its stores turned: the store that lacks a warehouse comes last
    nodes = {"w0": {"holding": 0.3}, "w1": {"holding": 0.4}}
    nodes |= {names[i]: {"kind": "store", "holding": costs[i][0], "underage": costs[i][1]} for i in turned}
    edges = [{"from": "supplier", "to": "w0", "lead_time": 2, "procurement": 0.5}, {"from": "supplier", "to": "w1", "lead_time": 1}]
    edges += [{"from": w, "to": names[i], "lead_time": leads[i]} for i in turned for w in (["w1"] if i == 0 else ["w0", "w1"])]
    other, given = Network.of(nodes, edges, "lost"), scenarios(net)
    place = [net.nodes.index(name) for name in other.nodes]
    moved = scenarios(other)._replace(initial=given.initial[:, place])
    agent, params = agent_of("gnn", net, given)
    twin, _ = agent_of("gnn", other, moved)
    there = [net.edges.index(edge) for edge in other.edges]
    torch.testing.assert_close(orders(twin, params, moved), orders(agent, params, given)[:, there])


def test_a_graph_policy_sees_each_scenarios_own_lead_times():
    net = network()
    given = scenarios(net)
    agent, params = agent_of("gnn", net, given)
    times = given.values.lead_time.expand(4, -1).clone()
    times[2, -1] = 1
    mixed = given._replace(values=given.values._replace(lead_time=times))
    order, before = orders(agent, params, mixed), orders(agent, params, given)
    torch.testing.assert_close(order[[0, 1, 3]], before[[0, 1, 3]])
    assert (order[2] - before[2]).abs().max() > 1e-6


def test_networks_of_different_shapes_are_one_ragged_batch():
    one = Network.of({"s": {"kind": "store", "holding": 1.0, "underage": 9.0}}, [{"from": "supplier", "to": "s", "lead_time": 2}])
    gnn, parts, alone = GNN(3, width=8, rounds=2).double(), [], []
    for net in (network(), one, network(lead_times=(1, 1, 2), hub=True)):
        policy, given = GraphPolicy(net, gnn), scenarios(net)
        nodes, edges = gnn.features(Simulator(net).observe(given.initial, given, 0))
        parts.append((nodes, edges, policy.wiring))
        alone.append(gnn.orders(nodes, edges, policy.wiring))
    *joined, shapes = side_by_side(parts)
    together = gnn.orders(*joined).split([a * b for a, b in shapes])
    for part, shape, expected in zip(together, shapes, alone, strict=True):
        torch.testing.assert_close(part.view(shape), expected)


def test_a_network_with_longer_lead_times_than_the_weights_know_is_refused():
    net = network()
    with pytest.raises(ValueError, match="the policy knows 2 inventory slots; the network has 3"):
        given = scenarios(net)
        GraphPolicy(net, GNN(2).double())(Simulator(net).observe(given.initial, given, 0))


def test_flow_is_shared_among_suppliers_and_adds_up_upstream():
    net = network()
    found = dict(zip(net.edges, flow(net)))
    assert found[("w1", "a")] == 1 and found[("w0", "b")] == found[("w1", "b")] == 0.5
    assert found[("supplier", "w0")] == 1.0 and found[("supplier", "w1")] == 2.0


def test_a_fresh_perceptron_orders_about_what_is_asked_for():
    net = network()
    given = scenarios(net, dtype=torch.float32)
    agent = HDPO(Config(hidden=(8,)), net, Shape.of(given))
    order = agent.act(agent.init(0), Simulator(net).observe(given.initial, given, 0)).mean(0)
    torch.testing.assert_close(order, 4.0 * torch.tensor(flow(net)), rtol=0.5, atol=0.1)
