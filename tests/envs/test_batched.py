"""Many environments as one, against the same environments one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from offrl.core.rng import generator
from offrl.core.space import Box, Discrete
from offrl.core.types import Spec
from offrl.envs.batched import Copies, Simulated
from offrl.envs.make import EnvError
from offrl.envs.probes import finite

gym = pytest.importorskip("gymnasium")


class Short(gym.Env):
    """Shows (its reset's seed, steps) in one array that it writes into; ends after three steps, by a limit where the action is positive."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1, 2), np.float32)

    def __init__(self):
        self.obs = np.zeros(2, np.float32)

    def reset(self, seed=None, options=None):
        self.obs[:] = seed, 0
        return self.obs, {}

    def step(self, action):
        assert action.shape == (1, 2)
        self.obs[1] += 1
        over = self.obs[1] == 3
        return self.obs, float(action.sum()), bool(over and action[0, 0] <= 0), bool(over and action[0, 0] > 0), {}


def test_copies_step_and_begin_anew():
    env = Copies(Short, 2, seed=5)
    assert env.spec == Spec(Box.of(2), Box.of(2, -1, 1)) and env.count == 2 and not env.resumes
    obs = env.reset()
    seeds = [[generator(5, f"episode/{i}", k).initial_seed() % 2**31 for k in range(3)] for i in range(2)]
    assert obs.dtype == torch.float32 and obs.tolist() == [[np.float32(own[0]), 0] for own in seeds]
    assert len({seed for own in seeds for seed in own}) == 6
    action = torch.tensor([[0.5, 0.25], [-0.5, 0.0]])
    for step in (1, 2, 3, 4):
        found = env.step(action)
        assert found.reward.tolist() == [0.75, -0.5] and found.reward.dtype == torch.float32
        ended, episode = step == 3, int(step > 3)
        assert found.terminated.tolist() == [False, ended] and found.truncated.tolist() == [ended, False]
        shown = [np.float32(own[episode]) for own in seeds]
        assert found.next_obs.tolist() == [[each, step - 3 * episode] for each in shown]  # the last one before the new episode
        if ended:
            assert found.obs.tolist() == [[np.float32(own[1]), 0] for own in seeds]
        else:
            assert torch.equal(found.obs, found.next_obs)
    env.load_state_dict(Copies(Short, 2, seed=5).state_dict())
    assert torch.equal(env.reset(), obs)
    env.close()


def test_copies_are_the_environments_one_by_one():
    env, alone = Copies("CartPole-v1", 3, seed=1), [gym.make("CartPole-v1") for _ in range(3)]
    assert isinstance(env.spec.action, Discrete) and env.spec.env_id == "CartPole-v1"
    obs, begun = env.reset(), [0, 0, 0]

    def begin(i):
        begun[i] += 1
        return alone[i].reset(seed=generator(1, f"episode/{i}", begun[i] - 1).initial_seed() % 2**31)[0]

    expected = [begin(i) for i in range(3)]
    actions, ended = np.random.default_rng(0).integers(2, size=(60, 3)), 0
    for row in actions:
        np.testing.assert_array_equal(obs, np.float32(expected))
        found = env.step(torch.from_numpy(row))
        for i, action in enumerate(row):
            after, reward, terminated, truncated, _ = alone[i].step(int(action))
            np.testing.assert_array_equal(found.next_obs[i], np.float32(after))
            assert (found.reward[i], found.terminated[i], found.truncated[i]) == (reward, terminated, truncated)
            ended += terminated
            expected[i] = begin(i) if terminated or truncated else after
        obs = found.obs
    assert ended > 3


def test_what_cannot_be_driven_is_refused():
    class Words(Short):
        action_space = gym.spaces.MultiBinary(3)

    with pytest.raises(EnvError, match="actions"):
        Copies(Words, 2)


def walk(count=3, horizon=4, seed=0):
    """x + action; the task ends at 3. Episodes begin in [0, 1)."""

    def advance(state, action, source):
        x = state["x"] + action[:, 0]
        return {"x": x, "tag": state["tag"]}, x, x >= 3

    def begin(count, source):
        return {"x": torch.rand(count, generator=source), "tag": torch.zeros(count, 2, 2)}

    return Simulated(Spec(Box.of(1), Box.of(1)), count, begin, lambda state: state["x"][:, None], advance, horizon, seed)


def test_simulated_episodes_end_and_begin_each_for_itself():
    env = walk()
    obs = env.reset()
    action = torch.tensor([[0.0], [1.0], [2.0]])
    lengths, age = [], torch.zeros(3)
    for _ in range(12):
        found = env.step(action)
        age += 1
        torch.testing.assert_close(found.next_obs, obs + action)
        assert torch.equal(found.terminated, found.next_obs[:, 0] >= 3) and torch.equal(found.truncated, age == 4)
        over = found.terminated | found.truncated
        assert torch.equal(found.obs[~over], found.next_obs[~over]) and (found.obs[over] < 1).all()
        lengths += [(i, int(age[i])) for i in range(3) if over[i]]
        age, obs = age * ~over, found.obs
    assert {(0, 4), (2, 2)} < set(lengths) <= {(0, 4), (1, 3), (2, 2)}


def test_simulations_are_seeded_and_go_on_where_they_stopped():
    one, two, other = walk(), walk(), walk(seed=1)
    assert torch.equal(one.reset(), two.reset()) and not torch.equal(one.reset(), other.reset())
    two.reset()
    action = torch.tensor([[0.0], [1.0], [2.0]])
    for _ in range(3):
        one.step(action)
    three = walk()
    three.load_state_dict(one.state_dict())
    for _ in range(9):
        for a, b in zip(one.step(action), three.step(action)):
            assert torch.equal(a, b)


def test_a_simulation_without_a_horizon_is_not_cut():
    env = walk(horizon=None)
    env.reset()
    assert not any(env.step(torch.zeros(3, 1)).truncated.any() for _ in range(20))


def test_a_finite_task_moves_by_its_probabilities():
    moves = np.array([[[0.25, 0.75, 0], [0, 0, 1]], [[1, 0, 0], [1, 0, 0]], [[0, 0, 1], [0, 0, 1]]])
    env = finite(moves, np.array([[1.0, 2], [3, 4], [0, 0]]), np.array([0.5, 0.5, 0]), ends=[2], count=20_000, horizon=9)
    obs = env.reset()
    assert obs[:, 1].mean() == pytest.approx(0.5, abs=0.02)
    found = env.step(torch.zeros(20_000, dtype=torch.int64))
    at = obs[:, 0] == 1
    assert found.next_obs[at, 1].mean() == pytest.approx(0.75, abs=0.02) and (found.next_obs[~at, 0] == 1).all()
    assert set(found.reward[at].tolist()) == {1.0} and set(found.reward[~at].tolist()) == {3.0} and not found.terminated.any()
    at = found.obs[:, 0] == 1
    last = env.step(torch.ones(20_000, dtype=torch.int64))
    assert torch.equal(last.terminated, at) and (last.next_obs[at, 2] == 1).all() and not last.obs[:, 2].any()
