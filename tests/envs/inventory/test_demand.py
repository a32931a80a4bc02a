"""Scenarios: their distributions, their independence of how many are asked for, and splits by time that never look ahead."""

from __future__ import annotations

from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import torch
from networks import store

from offrl.core.config import ConfigError, merge, validate
from offrl.envs.inventory.demand import EmpiricalDemand, History, Horizon, NormalDemand, Observed, PoissonDemand
from offrl.envs.inventory.settings import REAL, SETTINGS, WEEKS, ManyWarehouses, OneStoreLost, RealOneStore, RealWarehouses, Transshipment


def draw(demand, count=2000, periods=50, seed=0):
    return demand.sample(count, periods, torch.Generator().manual_seed(seed))


def test_normal_demand_has_its_moments():
    mean, std = torch.tensor([3.0, 6.0, 5.0]), torch.tensor([1.5, 1.6, 2.0])
    correlation = torch.tensor([[1.0, 0.5, -0.3], [0.5, 1.0, 0.2], [-0.3, 0.2, 1.0]])
    for given in (correlation, 0.5, 0.0):
        sample = draw(NormalDemand(mean, std, given, clipped=False))
        pooled = sample.movedim(1, 0).flatten(1)
        expected = torch.as_tensor(given).expand(3, 3).clone().fill_diagonal_(1.0)
        torch.testing.assert_close(pooled.mean(1), mean, rtol=0, atol=0.03)
        torch.testing.assert_close(pooled.std(1), std, rtol=0, atol=0.03)
        torch.testing.assert_close(torch.corrcoef(pooled), expected, rtol=0, atol=0.015)
        assert (sample < 0).any() and abs(float(torch.corrcoef(sample[:, 0].T)[0, 1])) < 0.08  # a period knows nothing of the one before
    clipped = draw(NormalDemand(mean, std, correlation))
    assert torch.equal(clipped, draw(NormalDemand(mean, std, correlation, clipped=False)).clamp_min(0))
    with pytest.raises(ValueError, match="not positive definite"):
        NormalDemand(mean, std, -0.9)


def test_poisson_and_empirical_demand():
    sample = draw(PoissonDemand(torch.tensor([5.0, 2.0])))
    assert torch.equal(sample, sample.round()) and sample.shape == (2000, 2, 50)
    torch.testing.assert_close(sample.mean((0, 2)), torch.tensor([5.0, 2.0]), rtol=0.01, atol=0)
    torch.testing.assert_close(sample.var((0, 2)), torch.tensor([5.0, 2.0]), rtol=0.02, atol=0)
    seen = torch.tensor([[[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]])
    drawn = draw(EmpiricalDemand(seen))
    assert torch.equal(drawn[:, 1], 10 * drawn[:, 0]) and set(drawn[:, 0].unique().tolist()) == {1, 2, 3}
    torch.testing.assert_close(drawn.mean((0, 2)), torch.tensor([2.0, 20.0]), rtol=0.01, atol=0)


def test_fits_recover_what_was_sampled():
    truth = NormalDemand(torch.tensor([9.0, 6.0]), torch.tensor([1.5, 1.0]), 0.6)
    found = NormalDemand.fit(draw(truth))
    torch.testing.assert_close(found.mean, truth.mean, rtol=0.01, atol=0)
    torch.testing.assert_close(found.std, truth.std, rtol=0.01, atol=0)
    assert float(found.correlation[0, 1]) == pytest.approx(0.6, abs=0.01)
    torch.testing.assert_close(PoissonDemand.fit(draw(PoissonDemand(torch.tensor([4.0])))).mean, torch.tensor([4.0]), rtol=0.01, atol=0)


@pytest.mark.parametrize("name", SETTINGS)
def test_scenarios_do_not_depend_on_their_company(name):
    setting = SETTINGS[name](train=Horizon(6, 2, 200), dev=Horizon(7, 3, 150), test=Horizon(9, 3, 130))
    problem = setting.problem()
    whole = problem.scenario("train")
    part = problem.scenario("train", 60, 20)
    assert whole.demand.shape == (200, problem.network.S, 6) and whole.initial.shape[1] == problem.network.N
    assert torch.equal(part.demand, whole.demand[60:80]) and torch.equal(part.initial, whole.initial[60:80])
    batches = list(problem.batches("train", 96))
    assert [len(batch.demand) for batch in batches] == [96, 96, 8]
    assert torch.equal(torch.cat([batch.demand for batch in batches]), whole.demand)
    fewer = SETTINGS[name](train=Horizon(6, 2, 70), dev=setting.dev, test=setting.test).problem()
    assert torch.equal(fewer.scenario("train").demand, whole.demand[:70])
    assert torch.equal(fewer.scenario("dev").demand, problem.scenario("dev").demand)
    other = SETTINGS[name](train=setting.train, seed=1).problem().scenario("train")
    assert not torch.equal(other.demand, whole.demand) and torch.equal(other.mean, whole.mean)
    assert not torch.equal(problem.scenario("dev").demand[:100, :, :6], whole.demand[:100])
    first = whole.initial[:, problem.network.W :]
    assert (whole.initial[:, : problem.network.W] == 0).all() and (first >= 0).all() and (first <= whole.mean[..., None]).all()
    assert float((first / whole.mean[..., None]).mean()) == pytest.approx(0.5, abs=0.06)


def test_the_many_warehouses_overlap():
    network = ManyWarehouses().network()
    suppliers = {name: {a for a, b in network.edges if b == name} for name in network.stores}
    assert (network.W, network.S, network.E) == (2, 10, 17)
    assert [name for name, by in suppliers.items() if "warehouse0" not in by] == ["store0", "store1", "store5", "store9"]
    for warehouses, stores in ((3, 20), (4, 30), (5, 40), (6, 50)):
        network = ManyWarehouses(warehouses=warehouses, stores=stores).network()
        assert (warehouses, stores, warehouses) == (network.W, network.S, network.K) and network.longest == 6
        assert warehouses * (stores + 1) > network.E


def test_a_transshipment_point_is_one():
    network = Transshipment(stores=4).network()
    assert network.kinds == ("transshipment", *["store"] * 4) and network.unmet == "backlog"
    assert (Transshipment(stores=4, test=Horizon(50, 0, 64)).problem().scenario("test").demand < 0).any()  # as published, not clipped


@pytest.mark.parametrize("setting", [*SETTINGS.values(), *REAL.values()])
def test_settings_are_configs(setting):
    config = setting()
    assert is_dataclass(config) and validate(config) == config
    if any(each.name == "lead_time" for each in fields(config)):
        assert merge(config, {"lead_time": 2, "underage": 19.0}, "test").network().values.underage.max() == 19
        with pytest.raises(ConfigError, match="must lie between 1 and 50"):
            merge(config, {"lead_time": 0}, "test")
        with pytest.raises(ConfigError, match="did you mean lead_time"):
            merge(config, {"leadtime": 2}, "test")
    if setting in SETTINGS.values():
        assert merge(config, {"test": {"scenarios": 64}}, "test").problem().horizon("test") == Horizon(
            config.test.periods, config.test.warm_up, 64
        )


def history(items=3, stores=2, periods=171):
    values = torch.arange(float(items * stores * periods)).view(items, stores, periods)
    days = np.datetime64("2013-01-01") + 7 * np.arange(periods)
    return History(values, tuple(f"store{i}" for i in range(stores)), days)


def test_splits_by_time_do_not_look_ahead():
    past = history()
    problem = RealOneStore().problem(past, WEEKS)
    assert problem.network.values.lead_time.shape == (6, 1) and set(problem.network.values.lead_time.flatten().tolist()) <= {4, 5, 6}
    assert {split: (problem.horizon(split).periods, problem.horizon(split).warm_up) for split in WEEKS} == {
        "train": (95, 16),
        "dev": (37, 16),
        "test": (37, 16),
    }
    series = past.demand.flatten(0, 1)
    for split, (first, stop) in WEEKS.items():
        given = problem.scenario(split)
        assert torch.equal(given.past[:, 0], series[:, first : first + 16]) and torch.equal(
            given.demand[:, 0], series[:, first + 16 : stop]
        )
        torch.testing.assert_close(given.mean, series[:, :111].mean(1, keepdim=True))
        assert torch.equal(given.calendar, past.calendar[:, first + 16 : stop])
    few = problem.scenario("dev", 2, 3)
    assert torch.equal(few.demand[:, 0], series[2:5, 104:141]) and torch.equal(few.values.lead_time, problem.network.values.lead_time[2:5])
    assert sum(len(batch.demand) for batch in problem.batches("dev", 4)) == 6


def test_fractions_split_a_history_of_ones_own():
    network, past = store(2, unmet="lost"), history(items=4, stores=1, periods=100)
    problem = Observed.split(network, past, (0.6, 0.2), window=8, warm_up=4)
    assert problem.spans == {"train": (0, 60), "dev": (48, 80), "test": (68, 100)}
    scored = {split: problem.scenario(split).demand[0, 0, 4:].tolist() for split in problem.spans}
    assert scored["dev"] == list(range(60, 80)) and scored["test"] == list(range(80, 100)) and scored["train"][-1] == 59
    with pytest.raises(ValueError, match="100 periods are too few"):
        Observed.split(network, past, (0.1, 0.2), window=8, warm_up=4)


def test_the_calendar_is_the_nearest_christmas():
    past = history(periods=120)
    for t, day in enumerate(past.dates):
        year = day.astype(object).year
        since = [(day - np.datetime64(f"{year + k}-12-25")).astype(int) for k in (-1, 0, 1)]
        assert float(past.calendar[0, t, 0]) == pytest.approx(min(since, key=abs) / 365)
    assert History(past.demand, past.stores).calendar.shape == (1, 120, 0)


def test_the_real_network_has_the_published_edges():
    products = history(items=5, stores=21)
    problem = RealWarehouses().problem(products)
    network = problem.network
    assert (network.W, network.S, network.E, network.K) == (3, 21, 58, 3) and network.longest == 6
    assert [sum(a == f"warehouse{w}" for a, _ in network.edges) for w in range(3)] == [19, 16, 20]
    values = dict(zip(network.edges, network.values.lead_time[0].tolist()))
    assert [values[f"warehouse{w}", "store4"] for w in range(3)] == [6, 1, 4] and ("warehouse0", "store3") not in values
    assert RealWarehouses("product").problem(products).network.values.underage.shape == (5, 21)
    assert 6.3 <= network.values.underage.min() < network.values.underage.max() <= 11.7
    with pytest.raises(ValueError, match="21 stores, the history 2"):
        RealWarehouses().problem(history())


def test_sampled_scenarios_of_differing_networks_are_refused():
    problem = OneStoreLost(train=Horizon(5, 0, 3)).problem()
    differing = store([1, 2, 3], unmet="lost")
    with pytest.raises(ValueError, match="share one set"):
        type(problem)(differing, problem.demand, problem.horizons)
