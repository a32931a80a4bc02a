"""Environments and policies that fail: evaluation stops, names the place and closes what it opened."""

from __future__ import annotations

import sys

import gymnasium as gym
import numpy as np
import pytest
import torch

from offrl.envs.render import RenderError
from offrl.training.evaluate import EvaluationError, evaluate, record


class Faulty(gym.Env):
    """Ten steps an episode, of which the third of the episode with seed 8 returns or raises `fault`."""

    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Box(-1, 1, (1,))
    metadata = {"render_fps": 30}
    render_mode = "rgb_array"
    opened: list[Faulty] = []

    def __init__(self, at_step=None, at_reset=None):
        self.at_step, self.at_reset, self.closed = at_step, at_reset, False
        Faulty.opened.append(self)

    def reset(self, seed=None, options=None):
        self.seed, self.n = seed, 0
        return self._or_fault(self.at_reset if seed == 8 else None, (np.zeros(2), {}))

    def step(self, action):
        self.n += 1
        return self._or_fault(self.at_step if (self.seed, self.n) == (8, 3) else None, (np.zeros(2), 1.0, False, self.n == 10, {}))

    def close(self):
        self.closed = True

    @staticmethod
    def _or_fault(fault, result):
        if isinstance(fault, Exception):
            raise fault
        return result if fault is None else fault


@pytest.fixture(autouse=True)
def all_closed():
    Faulty.opened.clear()
    yield
    assert Faulty.opened and all(env.closed for env in Faulty.opened)


def zeros(obs: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(obs), 1)


STEP = (np.zeros(2), 1.0, False, False, {})


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ({"at_step": RuntimeError("the arm hit the wall")}, "step 2: the environment raised RuntimeError: the arm hit the wall"),
        ({"at_reset": OSError("port closed")}, "step 0: the environment raised OSError: port closed"),
        ({"at_step": (STEP[0], float("nan"), *STEP[2:])}, "step 2: the reward is nan"),
        ({"at_step": (STEP[0], -float("inf"), *STEP[2:])}, "step 2: the reward is -inf"),
        ({"at_step": (STEP[0], np.ones(2), *STEP[2:])}, r"step 2: the reward is a ndarray of shape \(2,\), not a number"),
        ({"at_step": (STEP[0], None, *STEP[2:])}, "step 2: the reward is a NoneType"),
        ({"at_step": (np.array([0, np.nan]), *STEP[1:])}, "step 3: the observation is not finite"),
        ({"at_step": (np.zeros(3), *STEP[1:])}, r"step 3: the observation has shape \(3,\), its space has 2 numbers"),
        ({"at_step": STEP[:4]}, "step must return 5 values as in Gymnasium"),
        ({"at_reset": np.zeros(2)}, "reset must return 2 values as in Gymnasium"),
    ],
)
def test_a_failing_environment_stops_the_evaluation(fault, cause):
    with pytest.raises(EvaluationError, match=rf"episode 3 \(seed 8\), step .*{cause}|episode 3 \(seed 8\), {cause}") as error:
        evaluate(zeros, lambda: Faulty(**fault), episodes=5, seed=5, time_limit=50)
    raised = next((value for value in fault.values() if isinstance(value, Exception)), None)
    assert error.value.__cause__ is raised


def test_a_failing_policy_stops_the_evaluation():
    calls = []

    def act(obs):
        calls.append(obs)
        return torch.where(torch.arange(len(obs))[:, None] == 1, float("nan") if len(calls) == 4 else 0.0, torch.zeros(len(obs), 1))

    with pytest.raises(EvaluationError, match=r"episode 1 \(seed 6\), step 3: the policy's action is \[nan\]"):
        evaluate(act, Faulty, episodes=5, seed=5, time_limit=50)


def test_the_policys_own_error_is_its_own():
    with pytest.raises(ZeroDivisionError):
        evaluate(lambda obs: 1 / 0, Faulty, episodes=2, time_limit=50)


def test_the_second_environment_that_cannot_be_opened_leaves_none_open():
    def env():
        if Faulty.opened:
            raise OSError("no second licence")
        return Faulty()

    with pytest.raises(OSError, match="no second licence"):
        evaluate(zeros, env, episodes=2)


def test_an_episode_that_never_ends_is_cut():
    class Endless(Faulty):
        def step(self, action):
            return np.zeros(2), 1.0, False, False, {}

    assert evaluate(zeros, Endless, episodes=2, time_limit=77).returns.tolist() == [77, 77]
    with pytest.warns(UserWarning, match="no time limit"):
        assert evaluate(zeros, Endless, episodes=1).lengths.tolist() == [10_000]


@pytest.mark.parametrize("mode", ["rgb_array", None])
def test_a_film_that_fails_leaves_nothing_behind(mode, tmp_path):
    class Blind(Faulty):
        render_mode = mode

        def render(self):
            if self.n == 4:
                raise RuntimeError("lens cap on")
            return np.zeros((64, 64, 3), np.uint8)

    with pytest.raises(RenderError, match="lens cap on.*libegl1" if mode else "render_mode None, films need 'rgb_array'"):
        record(zeros, Blind, tmp_path / "film.mp4", time_limit=50)
    assert list(tmp_path.iterdir()) == []


def test_a_film_without_the_encoder_names_the_extra(tmp_path, monkeypatch):
    Faulty().close()
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ImportError, match=r'pip install "offrl\[video\]"'):
        record(zeros, Faulty, tmp_path / "film.mp4")
