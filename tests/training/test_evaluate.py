"""Evaluation: the returns of plain Gymnasium loops, from fixed seeds, whatever the number of environments open at once."""

from __future__ import annotations

import warnings

import gymnasium as gym
import imageio
import numpy as np
import pytest
import torch

from offrl.envs.render import RenderError, choose_backend
from offrl.training import evaluate as module
from offrl.training.evaluate import NO_LIMIT, EvaluationError, evaluate, record


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """MuJoCo writes its log into the working directory where Gymnasium is used plainly."""
    monkeypatch.chdir(tmp_path)


class Counting(gym.Env):
    """An episode of 3 + seed % 5 steps whose n-th step, from 1, pays n (seed + 1) times its action."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, endless: bool = False):
        self.endless, self.closed = endless, 0

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.n, self.start = 0, seed
        return np.array([seed, 0], np.float64), {}

    def step(self, action):
        self.n += 1
        ended = not self.endless and self.n == 3 + self.start % 5
        return np.array([self.start, self.n], np.float64), self.n * (self.start + 1) * float(action[0]), ended, False, {}

    def close(self):
        self.closed += 1


def ones(obs: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(obs), 1)


def by_row(weights: torch.Tensor):
    """A linear policy whose rows are worked out one by one, so that they do not depend on the batch they come in."""
    return lambda obs: torch.stack([torch.tanh(row @ weights) for row in obs])


def plainly(act, env_id: str, seeds, limit: int) -> tuple[list[float], list[int]]:
    """Gymnasium as its users write it: every wrapper on, one environment, one episode after another."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env = gym.make(env_id, max_episode_steps=limit)
    returns, lengths = [], []
    for seed in seeds:
        (obs, _), total, steps, ended = env.reset(seed=int(seed)), 0.0, 0, False
        while not ended:
            obs, reward, terminated, truncated, _ = env.step(act(torch.from_numpy(np.float32(obs))[None])[0].numpy())
            total, steps, ended = total + float(reward), steps + 1, terminated or truncated
        returns.append(total)
        lengths.append(steps)
    env.close()
    return returns, lengths


@pytest.mark.parametrize(("env_id", "limit"), [("Hopper-v5", 1000), ("Hopper-v4", 1000), ("HalfCheetah-v5", 60), ("Walker2d-v5", 1000)])
def test_returns_equal_plain_gymnasium(env_id, limit, monkeypatch):
    monkeypatch.setattr(module, "SLOTS", 3)
    env = gym.make("Hopper-v5" if env_id == "Hopper-v4" else env_id)
    shape = env.observation_space.shape[0], env.action_space.shape[0]
    act = by_row(torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    result = evaluate(act, env_id, episodes=5, seed=11, time_limit=limit)
    returns, lengths = plainly(act, env_id, range(11, 16), limit)
    assert result.returns.tolist() == returns and result.lengths.tolist() == lengths
    assert result.seeds.tolist() == [11, 12, 13, 14, 15] and result.time_limit == limit


def test_discrete_actions():
    def act(obs):
        return (obs[:, 2] > 0).long()  # lean with the pole

    result = evaluate(act, "CartPole-v1", episodes=4)
    returns, lengths = plainly(act, "CartPole-v1", range(4), 500)
    assert result.returns.tolist() == returns and result.lengths.tolist() == lengths


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_known_returns_at_any_number_of_slots(slots, monkeypatch):
    monkeypatch.setattr(module, "SLOTS", slots)
    envs, batches, done = [], [], []

    def env():
        envs.append(Counting())
        return envs[-1]

    def act(obs):
        batches.append(obs)
        return torch.ones(len(obs), 1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = evaluate(act, env, episodes=7, seed=4, progress=lambda *pair: done.append(pair))
    lengths = [3 + seed % 5 for seed in range(4, 11)]
    assert result.lengths.tolist() == lengths
    assert result.returns.tolist() == [(seed + 1) * n * (n + 1) / 2 for seed, n in zip(range(4, 11), lengths)]
    assert len(envs) == min(slots, 7) and [env.closed for env in envs] == [1] * len(envs)
    assert {(batch.shape, batch.dtype) for batch in batches} == {((len(envs), 2), torch.float32)}
    assert len({batch.data_ptr() for batch in batches}) == len(batches), "what a policy keeps is not written over"
    assert done == [(i, 7) for i in range(1, 8)]


def test_fixed_seeds_repeat_and_fresh_ones_are_recorded():
    act = by_row(torch.zeros(3, 1))
    first, again = (evaluate(act, "Pendulum-v1", episodes=3, seed=5, time_limit=9) for _ in range(2))
    assert first.returns.tolist() == again.returns.tolist() and len(set(first.returns)) == 3
    fresh, other = (evaluate(act, "Pendulum-v1", episodes=3, seed=5, fresh=True, time_limit=9) for _ in range(2))
    assert len({5, 6, 7} | set(fresh.seeds) | set(other.seeds)) == 9
    for seed, value in zip(fresh.seeds, fresh.returns):
        assert evaluate(act, "Pendulum-v1", episodes=1, seed=int(seed), time_limit=9).returns.tolist() == [value]


def test_the_time_limit_is_the_environments_own_or_the_one_given():
    assert evaluate(by_row(torch.zeros(3, 1)), "Pendulum-v1", episodes=2).lengths.tolist() == [200, 200]
    assert evaluate(by_row(torch.zeros(3, 1)), "Pendulum-v1", episodes=2, time_limit=5).lengths.tolist() == [5, 5]
    assert evaluate(by_row(torch.zeros(3, 1)), "Pendulum-v1", episodes=1, time_limit=230).lengths.tolist() == [230]
    limited = evaluate(ones, lambda: gym.wrappers.TimeLimit(Counting(endless=True), 8), episodes=2)
    assert limited.lengths.tolist() == [8, 8] and limited.time_limit == 8
    doubled = evaluate(ones, lambda: gym.wrappers.TransformReward(Counting(), lambda reward: 2 * reward), episodes=1, time_limit=8)
    assert doubled.returns.tolist() == [2 * (1 + 2 + 3)], "a wrapper that changes numbers is kept"


def test_an_environment_without_a_limit_is_cut_and_said_so():
    with pytest.warns(UserWarning, match=f"no time limit: episodes are cut after {NO_LIMIT} steps") as warned:
        result = evaluate(ones, lambda: Counting(endless=True), episodes=1)
    assert result.lengths.tolist() == [NO_LIMIT] and result.time_limit == NO_LIMIT
    assert warned[0].filename == __file__


@pytest.mark.parametrize(
    ("act", "options", "message"),
    [
        (ones, {"obs_size": 105}, "the policy sees 105 numbers, the environment shows 2"),
        (lambda obs: torch.ones(len(obs), 3), {}, r"takes floats of shape \(2, 1\), the policy gave torch.float32 of shape \(2, 3\)"),
        (lambda obs: torch.ones(len(obs)), {}, r"of shape \(2, 1\).*of shape \(2,\)"),
        (lambda obs: torch.ones(len(obs), 1).long(), {}, "takes floats.*torch.int64"),
    ],
)
def test_a_policy_for_another_task_is_refused(act, options, message):
    with pytest.raises(EvaluationError, match=message):
        evaluate(act, Counting, episodes=2, time_limit=5, **options)


def test_probabilities_are_no_discrete_actions():
    with pytest.raises(EvaluationError, match=r"takes integers of shape \(2,\)"):
        evaluate(lambda obs: torch.ones(len(obs), 2), "CartPole-v1", episodes=2)


@pytest.mark.parametrize(("options", "message"), [({"episodes": 0}, "episodes must be"), ({"time_limit": 0}, "time_limit must be")])
def test_nothing_to_run_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(ones, Counting, **options)


def test_no_gradients_are_kept():
    weights = torch.zeros(3, 1, requires_grad=True)
    assert evaluate(by_row(weights), "Pendulum-v1", episodes=1, time_limit=3).lengths.tolist() == [3]


def test_a_film_is_an_mp4(tmp_path):
    with pytest.raises(ValueError, match="films are written as .mp4, not .gif"):
        record(ones, Counting, tmp_path / "film.gif")


def test_an_episode_on_film_or_the_packages_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "")
    monkeypatch.delenv("MUJOCO_GL")
    path, act = tmp_path / "films" / "hopper.mp4", by_row(torch.zeros(11, 3))
    try:
        choose_backend()
    except RenderError:
        with pytest.raises(RenderError, match="libegl1"):
            record(act, "Hopper-v5", path)
        assert list(path.parent.iterdir()) == []
        return
    result = record(act, "Hopper-v5", path, seed=3, time_limit=20)
    assert result.returns.tolist() == evaluate(act, "Hopper-v5", episodes=1, seed=3, time_limit=20).returns.tolist()
    assert [p.name for p in path.parent.iterdir()] == ["hopper.mp4"]
    film = imageio.mimread(path)
    assert len(film) == 1 + 20 // 4 and film[0].shape == (480, 480, 3), "125 steps a second, a picture every fourth"
    assert np.abs(film[0].astype(float) - film[-1]).mean() > 0.1, "the hopper falls"
