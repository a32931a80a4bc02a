"""The Gymnasium environment: the interface's own checks, the simulator's numbers, and an agent of another library."""

from __future__ import annotations

import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from offrl.envs.inventory.demand import History, Horizon, Observed
from offrl.envs.inventory.gym import make
from offrl.envs.inventory.network import Network
from offrl.envs.inventory.rollout import rollout
from offrl.envs.inventory.settings import SETTINGS
from offrl.envs.inventory.simulator import Simulator

SHORT = Horizon(12, 4, 20)


def observed():
    demand = 10 * torch.rand(5, 1, 60, generator=torch.Generator().manual_seed(0))
    nodes = {"s": {"kind": "store", "holding": 1, "underage": [4, 5, 6, 7, 8]}}
    network = Network.of(nodes, [{"from": "supplier", "to": "s", "lead_time": [1, 2, 3, 1, 2]}], "lost", "profit")
    return Observed.split(network, History(demand, ("s",), np.datetime64("2024-01-01") + 7 * np.arange(60)), window=4, warm_up=2)


@pytest.mark.parametrize("name", [*SETTINGS, "observed"])
def test_the_interface_is_gymnasiums(name):
    env = make(observed()) if name == "observed" else make(name, train=SHORT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*normalized.*|.*Box observation space.*|.*render.*|.*spec.*")
        check_env(env, skip_render_check=True)


@pytest.mark.parametrize("name", ["many-warehouses", "observed"])
def test_an_episode_is_a_rollout(name):
    problem = observed() if name == "observed" else SETTINGS[name](train=SHORT).problem()
    env, given, simulator = make(problem), problem.scenario("train", 3, 1), Simulator(problem.network)
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(problem.horizon("train").periods)]
    made = rollout(simulator, lambda obs: torch.from_numpy(actions[obs.t])[None], given, trajectory=True)
    seen, _ = env.reset(options={"scenario": 3})
    rewards = []
    for t, action in enumerate(actions):
        assert torch.equal(torch.from_numpy(seen), simulator.observe(made.trajectory.inventory[:, t], given, t).flat()[0])
        seen, reward, terminated, truncated, info = env.step(action)
        assert not terminated and truncated == (t == len(actions) - 1) and info["scored"] == (t >= problem.horizon("train").warm_up)
        assert np.array_equal(info["shipped"], made.trajectory.order[0, t].numpy())
        rewards.append(reward)
    assert -sum(rewards) == pytest.approx(float(made.total), rel=1e-5)


def test_a_seed_draws_the_scenario():
    env = make("serial", train=SHORT)
    first, other, again = (env.reset(seed=seed)[0] for seed in (1, 2, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_orders_reach_some_multiple_of_the_demand_that_they_serve():
    env = make("one-warehouse", train=SHORT, stores=3, most=2.0)
    mean = env.problem.mean[0]
    assert env.action_space.high.tolist() == pytest.approx([float(2 * mean.sum()), *(2 * mean).tolist()])


def test_it_can_be_registered_and_names_its_neighbours():
    gymnasium.register("offrl/Inventory-v0", "offrl.envs.inventory.gym:make", kwargs={"setting": "one-store-lost", "train": SHORT})
    try:
        env = gymnasium.make("offrl/Inventory-v0", lead_time=2)
        assert env.unwrapped.simulator.network.longest == 2 and env.reset(seed=0)[0].dtype == np.float32
    finally:
        del gymnasium.registry["offrl/Inventory-v0"]
    with pytest.raises(KeyError, match="did you mean one-store-lost"):
        make("one-store-loss")


def test_stable_baselines_learns_in_it():
    from stable_baselines3 import PPO

    model = PPO("MlpPolicy", make("one-store-lost", train=SHORT, lead_time=1), n_steps=64, batch_size=32, n_epochs=1, seed=0, device="cpu")
    model.learn(128)
    action, _ = model.predict(model.get_env().reset())
    assert action.shape == (1, 1) and (action >= 0).all()
