"""The simulator as a batched environment: rewards are the simulator's costs, and an agent that knows these alone learns from it."""

from __future__ import annotations

import torch

from offrl.agents.ppo import PPO, Config
from offrl.envs.inventory.batched import simulated
from offrl.envs.inventory.demand import Horizon
from offrl.envs.inventory.policies import BaseStock
from offrl.envs.inventory.rollout import rollout
from offrl.envs.inventory.scenario import rows
from offrl.envs.inventory.settings import ManyWarehouses, OneStoreBacklog
from offrl.envs.inventory.simulator import Simulator
from offrl.training.fit import fit
from offrl.training.onpolicy import OnPolicy


def test_an_episodes_rewards_are_minus_the_simulated_cost():
    problem = ManyWarehouses(train=Horizon(6, 0, 40)).problem()
    env, simulator = simulated(problem, 5), Simulator(problem.network)
    orders = torch.linspace(1, 5, problem.network.E).expand(5, -1)
    obs = env.reset()
    given = rows(problem.scenario("train"), env.state["row"])
    torch.testing.assert_close(obs, simulator.observe(given.initial, given, 0).flat())
    total = torch.zeros(5)
    for t in range(6):
        stepped = env.step(orders)
        total += stepped.reward
        assert not stepped.terminated.any() and stepped.truncated.all() == (t == 5) == stepped.truncated.any()
    expected = rollout(simulator, lambda obs: orders, given)
    torch.testing.assert_close(total, -expected.total / problem.network.S)
    inventory = stepped.next_obs[:, : expected.inventory[0].numel()]
    torch.testing.assert_close(inventory, expected.inventory.flatten(1))
    assert min(env.spec.action.high) > 4.0


def test_ppo_learns_to_order():
    """Most of the way from a fresh policy's cost to a sensible level's, in forty rollouts."""
    problem = OneStoreBacklog(lead_time=1, underage=4.0, train=Horizon(20, 0, 512)).problem()
    env = simulated(problem, 64)
    agent = PPO(Config(epochs=4, minibatches=4, actor_lr=3e-3, critic_lr=3e-3), env.spec)
    fresh = agent.init(0)
    learned = fit(agent, fresh, OnPolicy(env, 20), agent.period * 40)
    simulator, test = Simulator(problem.network), problem.scenario("train")

    def cost(policy):
        return float(rollout(simulator, policy, test).total.mean().detach()) / 20

    before, after = (cost(lambda obs, state=state: agent.act(state, obs.flat())) for state in (fresh, learned))
    level = cost(BaseStock(problem.network, 11.9))
    assert after < level + 0.35 * (before - level), (before, after, level)
