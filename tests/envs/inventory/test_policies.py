"""Classical policies: gradients against finite differences, what they order by hand, and the oracle."""

from __future__ import annotations

import pytest
import torch
from networks import crossed, demands, serial, store
from torch.func import functional_call

from offrl.envs.inventory.forecast import QuantileForecaster, rolling_normal
from offrl.envs.inventory.network import Network
from offrl.envs.inventory.policies import BaseStock, EchelonStock, JustInTime, Newsvendor, rounded
from offrl.envs.inventory.rollout import evaluate, rollout
from offrl.envs.inventory.scenario import scenario
from offrl.envs.inventory.simulator import Simulator


def stores(lead_times=(2, 5, 3), unmet="lost", objective="cost"):
    nodes = {f"s{i}": {"kind": "store", "holding": 1.0, "underage": 4.0 + 5 * i} for i in range(len(lead_times))}
    edges = [{"from": "supplier", "to": f"s{i}", "lead_time": n} for i, n in enumerate(lead_times)]
    return Network.of(nodes, edges[::-1], unmet, objective)  # edges in another order than stores


def fork():
    nodes = {
        "w": {"holding": 0.3},
        "a": {"kind": "store", "holding": 1, "underage": 9},
        "b": {"kind": "store", "holding": 1, "underage": 4},
    }
    return Network.of(nodes, [{"from": a, "to": b, "lead_time": n} for a, b, n in (("supplier", "w", 2), ("w", "a", 1), ("w", "b", 4))])


def seen(kind, network, seed=0):
    torch.manual_seed(seed)
    forecaster = QuantileForecaster([2, 3, 5], window=6, calendar=0, hidden=(16,))
    return Newsvendor(network, forecaster if kind == "transformed" else rolling_normal, kind)


POLICIES = {
    "base stock": (serial, lambda net: BaseStock(net, [30.0, 28.0, 22.0, 27.0])),
    "base stock, lost": (fork, lambda net: BaseStock(net, [24.0, 12.0, 27.0])),
    "capped base stock": (lambda: store(unmet="lost"), lambda net: BaseStock(net, 24.0, 6.0)),
    "echelon stock": (serial, lambda net: EchelonStock(net, [75.0, 67.0, 46.0, 29.0])),
    "echelon stock of a tree": (fork, lambda net: EchelonStock(net, [52.0, 12.0, 27.0])),
    "fixed quantile": (stores, lambda net: seen("fixed", net)),
    "fixed quantile, profit": (lambda: stores(objective="profit"), lambda net: seen("fixed", net)),
    "transformed quantile": (lambda: stores(unmet="backlog"), lambda net: seen("transformed", net)),
}


@pytest.mark.parametrize("name", POLICIES)
def test_gradients_of_every_policy_are_the_finite_differences(name):
    make, policy = POLICIES[name]
    network = make()
    policy, simulator = policy(network).double(), Simulator(network)
    given = demands(network, batch=64, periods=network.longest + 12, window=6)
    parameters = {key: value.detach() for key, value in policy.named_parameters()}
    if name == "transformed quantile":
        parameters |= {key: value + 0.3 * torch.randn_like(value) for key, value in parameters.items() if key.startswith("transform.")}

    def total(changed):
        return rollout(simulator, lambda obs: functional_call(policy, changed, (obs,)), given, warm_up=network.longest).total.sum()

    leaves = {key: value.clone().requires_grad_() for key, value in parameters.items()}
    gradients = torch.autograd.grad(total(leaves), list(leaves.values()))
    draw = torch.Generator().manual_seed(1)
    for (key, value), gradient in zip(parameters.items(), gradients):
        for _ in range(2):
            way = torch.randn(value.shape, generator=draw, dtype=torch.float64)
            ahead, behind = (float(total(parameters | {key: value + sign * 1e-7 * way})) for sign in (1, -1))
            difference = (ahead - behind) / 2e-7
            assert float((gradient * way).sum()) == pytest.approx(difference, rel=1e-4, abs=1e-4), key
    assert any(gradient.abs().max() > 1 for gradient in gradients)


def test_what_is_ordered_by_hand():
    network = fork()
    inventory = torch.tensor([[[3.0, 1.0, 0.0, 0.0], [4.0, 0.0, 0.0, 0.0], [1.0, 2.0, 0.0, 2.0]]])
    obs = Simulator(network).observe(inventory, scenario(network, torch.zeros(1, 2, 3), initial=inventory), 0)
    torch.testing.assert_close(BaseStock(network, [10.0, 6.0, 2.0])(obs), torch.tensor([[6.0, 2.0, 0.0]]))
    torch.testing.assert_close(BaseStock(network, [10.0, 6.0, 2.0], [5.0, 9.0, 9.0])(obs), torch.tensor([[5.0, 2.0, 0.0]]))
    policy = EchelonStock(network, [20.0, 6.0, 7.0])
    torch.testing.assert_close(policy.levels, torch.tensor([20.0, 6.0, 7.0]))
    torch.testing.assert_close(policy(obs), torch.tensor([[20.0 - 13, 2.0, 2.0]]))
    assert rounded(lambda obs: torch.tensor([[0.4, 1.6]]))(obs).tolist() == [[0, 2]]


def test_levels_need_one_supplier():
    for make in (lambda net: BaseStock(net, 3.0), lambda net: EchelonStock(net, 3.0), lambda net: Newsvendor(net, rolling_normal)):
        with pytest.raises(ValueError, match="several suppliers|outside supplier"):
            make(crossed())
    with pytest.raises(ValueError, match="above those of the nodes"):
        EchelonStock(fork(), [20.0, 15.0, 15.0])


def test_a_newsvendor_orders_up_to_the_quantile_of_what_an_order_covers():
    """Constant demand has no spread, so any quantile is the sum of L + 1 periods; with spread, p / (p + h) of a Normal."""
    network = stores()
    simulator = Simulator(network)
    even = scenario(network, torch.full((1, 3, 20), 4.0), past=torch.full((1, 3, 6), 4.0))
    obs = simulator.observe(even.initial + 0.5, even, 0)
    order = dict(zip((b for _, b in network.edges), Newsvendor(network, rolling_normal)(obs)[0].tolist()))
    assert order == pytest.approx({"s0": 4 * 3 - 2.5, "s1": 4 * 6 - 2.5, "s2": 4 * 4 - 2.5})
    past = torch.tensor([2.0, 6.0] * 3).expand(1, 3, 6)
    wide = even._replace(past=past)
    order = dict(
        zip((b for _, b in network.edges), Newsvendor(network, rolling_normal)(simulator.observe(even.initial, wide, 0))[0].tolist())
    )
    for name, ratio, periods in (("s0", 0.8, 3), ("s1", 0.9, 6), ("s2", 14 / 15, 4)):
        z = float(torch.special.ndtri(torch.tensor(ratio)))
        assert order[name] == pytest.approx(4 * periods + 2 * z * periods**0.5, rel=1e-4)
    fixed = Newsvendor(network, rolling_normal, "fixed", 0.5)(simulator.observe(even.initial, wide, 0))
    torch.testing.assert_close(fixed.sort().values, torch.tensor([[12.0, 16.0, 24.0]]))
    plain, transformed = (
        Newsvendor(network, rolling_normal, level)(simulator.observe(even.initial, wide, 0)) for level in ("critical", "transformed")
    )
    torch.testing.assert_close(plain, transformed)


def test_a_forecaster_learns_quantiles():
    """Of demand that is 20 on even and 60 on odd periods, give or take a Normal of deviation 4, at two scales."""
    draw = torch.Generator().manual_seed(0)
    cycle = 40 + 20 * torch.tensor([-1.0, 1.0]).repeat(200)
    demand = (cycle + 4 * torch.randn(40, 400, generator=draw)) * torch.tensor([1.0, 30.0]).repeat(20)[:, None]
    torch.manual_seed(0)
    model = QuantileForecaster([1, 2], window=8, calendar=1, hidden=(32, 32))
    losses = model.fit(demand, torch.zeros(400, 1), steps=600, batch_size=256, lr=3e-3)
    assert losses[-50:].mean() < 0.3 * losses[:20].mean()
    network = Network.of(
        {"s": {"kind": "store", "holding": 1, "underage": 9}},
        [{"from": "supplier", "to": "s", "lead_time": [1 + i % 2 for i in range(40)]}],
    )
    given = scenario(network, demand[:, None, 300:], past=demand[:, None, 292:300], calendar=torch.zeros(1, 100, 1))
    simulator, below = Simulator(network), {0.1: [], 0.5: [], 0.9: []}
    for t in range(90):
        obs = simulator.observe(given.initial, given, t)
        for level, hits in below.items():
            with torch.no_grad():
                forecast = model(obs, torch.full((1, 1), level), network.values.lead_time)
            total = torch.stack([demand[i, 300 + t : 302 + t + i % 2].sum() for i in range(40)])
            hits.append((total[:, None] <= forecast).float().mean())
    for level, hits in below.items():
        assert float(torch.stack(hits).mean()) == pytest.approx(level, abs=0.06)
    with pytest.raises(ValueError, match="10 periods hold no window"):
        model.fit(demand[:, :10], torch.zeros(10, 1))


def test_between_quantiles_a_forecast_is_linear():
    network = store(2)
    model = QuantileForecaster([2], window=4, calendar=0)
    given = demands(network, batch=5, window=4)._replace(calendar=torch.zeros(1, 30, 0).double())
    model.double()
    obs = Simulator(network).observe(given.initial, given, 0)
    table = model.quantiles(obs.past, obs.calendar[:, None])[:, 0, 0]

    def at(level):
        return model(obs, torch.tensor([[level]], dtype=torch.float64), network.values.lead_time)[:, 0]

    torch.testing.assert_close(at(0.05), table[:, 0])
    torch.testing.assert_close(at(0.50), table[:, 9])
    torch.testing.assert_close(at(0.5125), 0.75 * table[:, 9] + 0.25 * table[:, 10])
    torch.testing.assert_close(at(0.95), table[:, 18])
    torch.testing.assert_close(at(0.99), table[:, 18])
    torch.testing.assert_close(at(0.01), table[:, 0])


@pytest.mark.parametrize("path", ["cheapest", "fastest"])
def test_the_oracle_meets_all_demand_without_stock(path):
    network = crossed()
    given = demands(network, periods=40)
    empty = given._replace(initial=torch.zeros_like(given.initial))
    made = rollout(Simulator(network), JustInTime(network, empty, path), empty, warm_up=12, trajectory=True)
    assert float(made.scored.underage.abs().max()) < 1e-6 and float(made.scored.holding.abs().max()) < 1e-6
    assert float(made.warm_up.underage.sum()) > 0
    used = made.trajectory.order.sum((0, 1)) > 0
    unused = {"plant->first", "first->north", "supplier->west"}  # as dear and slower; dearer and slower
    assert {f"{a}->{b}" for (a, b), there in zip(network.edges, used) if not there} == unused


def test_the_oracle_uses_up_what_a_store_begins_with():
    network = store([1, 2, 3, 4, 5, 6], unmet="lost")
    draw = torch.Generator().manual_seed(0)
    demand = 10 * torch.rand(6, 1, 40, generator=draw)
    given = scenario(network, demand, initial=20 * torch.rand(6, 1, 6, generator=draw))
    simulator = Simulator(network)
    assert evaluate(simulator, JustInTime(network, given), given, 30).cost == pytest.approx(0, abs=1e-5)
    backlog = store([1, 2, 3, 4, 5, 6])
    assert evaluate(Simulator(backlog), JustInTime(backlog, given), given, 30).cost == pytest.approx(0, abs=1e-4)


def test_the_oracle_takes_the_cheap_path_or_the_fast_one():
    nodes = {"far": {"holding": 1}, "near": {"holding": 1}, "s": {"kind": "store", "holding": 1, "underage": 9}}
    edges = [
        {"from": "supplier", "to": "far", "lead_time": 3, "procurement": 0.5},
        {"from": "supplier", "to": "near", "lead_time": 3, "procurement": 1.5},
    ]
    network = Network.of(
        nodes, [*edges, {"from": "far", "to": "s", "lead_time": 5}, {"from": "near", "to": "s", "lead_time": 1}], objective="profit"
    )
    given = scenario(network, torch.full((1, 1, 30), 4.0))
    for path, price in (("cheapest", 0.5), ("fastest", 1.5)):
        assert evaluate(Simulator(network), JustInTime(network, given, path), given, 10).cost == pytest.approx(-4 * (9 - price))
