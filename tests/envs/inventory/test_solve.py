"""Exact references against published and independently computed optima, and against the simulator."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from offrl.envs.inventory import solve
from offrl.envs.inventory.demand import Horizon
from offrl.envs.inventory.policies import BaseStock, EchelonStock
from offrl.envs.inventory.rollout import evaluate
from offrl.envs.inventory.settings import OneStoreBacklog, OneStoreLost, Serial, Transshipment
from offrl.envs.inventory.simulator import Simulator

PRICES = (4, 9, 19, 39)
NORMAL = {
    1: (11.9044, 3.1674, 12.8998, 3.9711, 13.7219, 4.6674, 14.4349, 5.2898),
    4: (28.0111, 5.0081, 29.5850, 6.2788, 30.8848, 7.3798, 32.0122, 8.3640),
    7: (43.8087, 6.3348, 45.7996, 7.9421, 47.4438, 9.3348, 48.8698, 10.5797),
    10: (59.4661, 7.4282, 61.8007, 9.3130, 63.7286, 10.9460, 65.4007, 12.4058),
    15: (85.3864, 8.9588, 88.2019, 11.2319, 90.5271, 13.2014, 92.5438, 14.9619),
    20: (111.1709, 10.2636, 114.3965, 12.8678, 117.0603, 15.1241, 119.3707, 17.1411),
}
POISSON = {
    1: (13, 4.61236, 14, 5.86937, 15, 7.06957, 17, 8.10787),
    2: (18, 5.58805, 20, 7.12300, 22, 8.52445, 23, 9.73914),
    3: (24, 6.43800, 26, 8.18643, 28, 9.76551, 29, 11.15769),
    4: (29, 7.16984, 32, 9.15105, 33, 10.87298, 35, 12.40105),
    7: (45, 9.03428, 48, 11.44804, 51, 13.58744, 53, 15.50299),
    10: (61, 10.56124, 65, 13.38117, 67, 15.85632, 70, 18.05747),
}
LOST = {
    1: (4.04071, 5.43822, 6.67574, 7.83595),
    2: (4.39530, 6.09364, 7.66442, 9.10638),
    3: (4.59872, 6.53137, 8.36251, 10.03848),
    4: (4.72853, 6.83594, 8.88718, 10.79441),
}
SERIAL = {
    1: (6.8986, 8.3669, 9.6080, 10.7009),
    2: (7.5984, 9.2610, 10.6703, 11.9130),
    3: (8.2059, 10.0367, 11.5919, 12.9648),
    4: (8.7525, 10.7339, 12.4201, 13.9100),
}
BY_LENGTH = {3: 9.8688, 4: 10.7339, 5: 10.9865, 6: 11.7072, 7: 12.2890}
BOUNDS = {  # stores: lead time and price (2, 4), (2, 9), (6, 4), (6, 9), (4, 9)
    3: (5.7537, 7.2136, 7.7172, 9.6753, 8.5337),
    5: (5.2964, 6.6402, 7.1695, 8.9886, 7.9021),
    10: (5.5359, 6.9405, 7.5462, 9.4609, 8.2970),
    20: (5.8103, 7.2846, 7.9522, 9.9699, 8.7311),
    30: (5.5700, 6.9832, 7.6336, 9.5705, 8.3773),
    50: (5.3937, 6.7622, 7.4002, 9.2779, 8.1181),
}
grid = [(lead_time, i) for lead_time in (1, 2, 3, 4) for i in range(4)]


@pytest.mark.parametrize("lead_time", NORMAL)
def test_newsvendor_with_normal_demand(lead_time):
    found = [solve.newsvendor_normal(5, 1.6, lead_time, 1, p) for p in PRICES]
    assert [x for each in found for x in (each.levels[0], each.cost)] == pytest.approx(NORMAL[lead_time], abs=6e-5)


@pytest.mark.parametrize("lead_time", POISSON)
def test_newsvendor_with_poisson_demand(lead_time):
    """At a lead time of 4 and a price of 9, levels 31 and 32 cost 9.15173 and 9.15105."""
    found = [solve.newsvendor_poisson(5, lead_time, 1, p) for p in PRICES]
    assert [x for each in found for x in (each.levels[0], each.cost)] == pytest.approx(POISSON[lead_time], abs=6e-6)


@pytest.mark.parametrize(("lead_time", "i"), grid)
def test_lost_sales(lead_time, i):
    cost = solve.lost_sales(5, lead_time, 1, PRICES[i])
    assert cost == pytest.approx(LOST[lead_time][i], abs=1e-5)
    assert cost <= solve.newsvendor_poisson(5, lead_time, 1, PRICES[i]).cost


@pytest.mark.parametrize(("lead_time", "i"), grid)
def test_clark_scarf(lead_time, i):
    assert solve.clark_scarf(*Serial(lead_time=lead_time).stages(), PRICES[i], 5, 2).cost == pytest.approx(SERIAL[lead_time][i], abs=1e-4)


@pytest.mark.parametrize("nodes", BY_LENGTH)
def test_clark_scarf_by_length(nodes):
    assert solve.clark_scarf(*Serial(nodes=nodes).stages(), 9, 5, 2).cost == pytest.approx(BY_LENGTH[nodes], abs=1e-4)


@pytest.mark.parametrize(
    ("lead_times", "holding", "p", "cost", "levels"),
    [
        ((1, 1), (0.5, 1), 9, 5.8681, (19.78, 14.66)),
        ((2, 2), (0.5, 1), 9, 7.4656, (31.28, 20.70)),
        ((2, 4, 3, 4), (0.1, 0.2, 0.5, 1), 9, 10.7339, (83.19, 72.83, 49.01, 32.35)),
        ((2, 4, 3, 1), (0.1, 0.2, 0.5, 1), 4, 6.8986, (64.43, 54.29, 30.69, 13.63)),
    ],
)
def test_echelon_levels(lead_times, holding, p, cost, levels):
    found = solve.clark_scarf(lead_times, holding, p, 5, 2)
    assert found.cost == pytest.approx(cost, abs=1e-4) and found.levels == pytest.approx(levels, abs=0.03)


def test_a_serial_system_of_one_stage_is_a_newsvendor():
    assert solve.clark_scarf((4,), (1.0,), 9, 20, 1.6).cost == pytest.approx(solve.newsvendor_normal(20, 1.6, 4, 1, 9).cost, rel=1e-4)


@pytest.mark.parametrize("stores", BOUNDS)
def test_the_lower_bound_with_the_published_stores(stores):
    demand = Transshipment(stores=stores).demand()
    std = demand.std.double().numpy()
    covariance = np.outer(std, std) * demand.correlation.numpy()
    found = [solve.transshipment_bound(covariance, lead_time, 3, 1, p) for lead_time, p in ((2, 4), (2, 9), (6, 4), (6, 9), (4, 9))]
    assert found == pytest.approx(BOUNDS[stores], abs=6e-5)
    if stores == 5:
        found = [solve.transshipment_bound(np.diag(std**2), lead_time, 3, 1, p) for lead_time in (2, 6) for p in (4, 9)]
        assert found == pytest.approx((4.5912, 5.7561, 6.6655, 8.3567), abs=6e-5)


def simulated(setting, policy, size=1024):
    problem = setting.problem()
    return evaluate(Simulator(problem.network), policy(problem.network), problem.batches("test", size), setting.test.warm_up)


def levels(found):
    return lambda network: BaseStock(network, torch.tensor(found.levels))


SHORT = Horizon(240, 40, 4096)


def _newsvendors(leads):
    return [
        pytest.param(lead_time, p, marks=() if (lead_time, p) in leads else pytest.mark.slow)
        for lead_time in (1, 2, 3, 4, 7, 10, 15, 20)
        for p in PRICES
    ]


@pytest.mark.parametrize(("lead_time", "p"), [case for case in _newsvendors({(1, 4), (4, 9)}) if case.values[0] in NORMAL])
def test_the_simulated_cost_of_the_normal_newsvendor_is_its_closed_form(lead_time, p):
    optimum = solve.newsvendor_normal(5, 1.6, lead_time, 1, p)
    found = simulated(OneStoreBacklog(lead_time=lead_time, underage=p, test=SHORT), levels(optimum))
    assert found.cost == pytest.approx(optimum.cost, rel=3e-3, abs=4 * found.error)


@pytest.mark.parametrize(
    ("lead_time", "p", "level", "cap", "cost"),
    [
        (1, 9, 13, None, 5.54747),
        (2, 4, 17, 5, 4.40577),
        (3, 9, 23, None, 6.86403),
        (3, 39, 28, 7, 10.08526),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (1, 4, 12, None, 4.16280),
                (1, 4, 12, 6, 4.06545),
                (1, 39, 16, 9, 7.84252),
                (2, 9, 19, None, 6.31626),
                (2, 19, 21, 7, 7.72089),
                (3, 4, 20, None, 4.97500),
                (3, 19, 26, 6, 8.40108),
            )
        ),
    ],
)
def test_the_simulated_cost_of_base_stock_under_lost_sales(lead_time, p, level, cap, cost):
    setting = OneStoreLost(lead_time=lead_time, underage=p, test=SHORT)
    found = simulated(setting, lambda network: BaseStock(network, float(level), cap))
    assert found.cost == pytest.approx(cost, rel=3e-3)
    assert found.cost > solve.lost_sales(5, lead_time, 1, p)


@pytest.mark.parametrize(
    ("nodes", "lead_time", "p"),
    [(4, 1, 4), (3, 4, 9)]
    + [pytest.param(4, lead_time, p, marks=pytest.mark.slow) for lead_time in (1, 2, 3, 4) for p in PRICES]
    + [pytest.param(nodes, 4, 9, marks=pytest.mark.slow) for nodes in (2, 5, 6, 7)],
)
def test_the_simulated_cost_of_echelon_levels_is_clark_and_scarfs(nodes, lead_time, p):
    setting = Serial(nodes=nodes, lead_time=lead_time, underage=p, test=Horizon(400, 100, 4096))
    optimum = solve.clark_scarf(*setting.stages(), p, 5, 2)
    assert simulated(setting, lambda network: EchelonStock(network, optimum.levels)).cost == pytest.approx(optimum.cost, rel=5e-3)


@pytest.mark.parametrize("stores", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_no_simulated_policy_beats_the_lower_bound_and_a_good_one_comes_near(stores):
    """Orders up to the whole system's level, shares that level the stores' positions."""
    setting = Transshipment(stores=stores, test=Horizon(200, 60, 2048))
    demand = setting.demand()
    std = demand.std.double().numpy()
    bound = solve.transshipment_bound(np.outer(std, std) * demand.correlation.numpy(), 2, 3, 1, 4)
    mean, z = demand.mean.double(), 0.8416
    spread = float(np.sqrt(3 * std.sum() ** 2 + 3 * std @ demand.correlation.numpy() @ std))
    system = float(6 * mean.sum()) + z * spread

    def policy(obs):
        place = obs.inventory[:, 1:].sum(-1)
        order = (system - obs.inventory.sum((1, 2)))[:, None].relu()
        target = 3 * demand.mean + demand.std * (obs.inventory[:, :1, 0] + place.sum(1, keepdim=True) - 3 * mean.sum()) / float(std.sum())
        return torch.cat([order, (target - place).relu()], 1).float()

    found = simulated(setting, lambda network: policy)
    assert bound - 3 * found.error <= found.cost <= 1.02 * bound
