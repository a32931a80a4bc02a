"""Environments by name: quiet where nothing can be done, clear where something can."""

from __future__ import annotations

import subprocess
import sys
import warnings

import gymnasium as gym
import mujoco
import numpy as np
import pytest

from offrl.core.space import Box
from offrl.core.types import Spec
from offrl.envs.make import EnvError, env_for, make
from offrl.envs.scores import d4rl

USER = """
from __future__ import annotations
from dataclasses import dataclass
import gymnasium as gym
import numpy as np

@dataclass
class Options:
    size: int = 3

class Plant(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (Options().size,))
    action_space = gym.spaces.Box(-2, 2, (1,))
    closed = 0
    def __init__(self, render_mode=None):
        self.render_mode = render_mode
    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(3, np.float32), {}
    def step(self, action):
        return np.zeros(3, np.float32), 0.0, False, False, {}
    def close(self):
        Plant.closed += 1

class Dictionary(Plant):
    observation_space = gym.spaces.Dict(a=Plant.observation_space)

class Switches(Plant):
    action_space = gym.spaces.MultiDiscrete([2, 2])

def nothing():
    return 3

number = 4
gym.register("UserPlant-v0", entry_point=Plant, max_episode_steps=7)
"""


@pytest.fixture
def user(tmp_path, monkeypatch):
    """The folder of a user's file, as the working directory; their module is forgotten afterwards."""
    (tmp_path / "plant.py").write_text(USER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]
    gym.registry.pop("UserPlant-v0", None)


@pytest.mark.parametrize("env_id", ["Hopper-v4", "HalfCheetah-v4", "HalfCheetah-v5", "CartPole-v1"])
def test_making_is_silent_and_leaves_no_log(env_id, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    before = mujoco.get_mju_user_warning()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = make(env_id)
    assert env.reset(seed=0)[0].shape == env.observation_space.shape
    env.close()
    assert capfd.readouterr() == ("", "") and list(tmp_path.iterdir()) == []
    assert mujoco.get_mju_user_warning() is before


def test_other_warnings_of_mujoco_still_arrive(user):
    (user / "odd.py").write_text(
        "import mujoco, plant\ndef env():\n    mujoco.get_mju_user_warning()('unstable')\n    return plant.Plant()"
    )
    with pytest.warns(UserWarning, match="MuJoCo: unstable"):
        make("odd.py:env").close()


def test_a_seed_fixes_the_first_reset_and_the_sampled_actions():
    first, again, other = (make("Hopper-v5", seed=seed) for seed in (3, 3, 4))
    samples = [np.concatenate([env.action_space.sample() for _ in range(3)]) for env in (first, again, other)]
    assert np.array_equal(samples[0], samples[1]) and not np.array_equal(samples[0], samples[2])
    resets = [env.reset()[0] for env in (first, again, other)]
    assert np.array_equal(resets[0], resets[1]) and not np.array_equal(resets[0], resets[2])


@pytest.mark.parametrize("env_id", ["plant:Plant", "plant.py:Plant", "{folder}/plant.py:Plant"])
def test_a_users_factory_by_module_or_file(env_id, user):
    env_id = env_id.format(folder=user)
    env = make(env_id, render="rgb_array")
    assert env.observation_space.shape == (3,) and env.render_mode == "rgb_array"
    assert type(make(env_id)) is type(env), "the file is run once"


def test_register_imports_the_file_that_registers_the_id(user):
    with pytest.raises(EnvError, match="UserPlant"):
        make("UserPlant-v0")
    assert make("UserPlant-v0", register="plant.py").spec.max_episode_steps == 7


def test_spaces_that_are_not_driven_are_refused_and_closed(user):
    for name, message in [("Dictionary", "observations must be one Box, not Dict"), ("Switches", "actions.*MultiDiscrete")]:
        with pytest.raises(EnvError, match=message):
            make(f"plant:{name}")
    assert sys.modules["plant"].Plant.closed == 2


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("plant:Plnt", "plant has no callable 'Plnt'; near: Plant"),
        ("plant:number", "no callable 'number'"),
        ("plant:nothing", "gave a int, which is no Gymnasium environment"),
        ("plnt:Plant", "No module named 'plnt'"),
        ("plnt.py:Plant", "plnt.py: there is no such file"),
        ("Hoper-v5", "Did you mean: `Hopper`"),
        ("Hopper-v9", "v5"),
        ("Hopper-v3", "gymnasium-robotics"),
    ],
)
def test_wrong_names_are_explained(env_id, message, user):
    with pytest.raises(EnvError, match=message):
        make(env_id)


def test_a_users_own_error_is_not_hidden(user):
    (user / "broken.py").write_text("raise RuntimeError('calibration missing')")
    for _ in range(2):  # and a half-imported module is not taken for a whole one
        with pytest.raises(RuntimeError, match="calibration missing"):
            make("broken.py:env")


def test_without_gymnasium_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ImportError, match=r'pip install "offrl\[envs\]"'):
        make("Hopper-v5")


@pytest.mark.parametrize(
    ("name", "env_id"),
    [
        ("hopper-medium-v2", "Hopper-v4"),
        ("halfcheetah-medium-replay-v0", "HalfCheetah-v4"),
        ("walker2d-expert-v1", "Walker2d-v4"),
        ("mujoco/hopper/medium-v0", "Hopper-v5"),
        ("mujoco/humanoidstandup/expert-v0", "HumanoidStandup-v5"),
        ("offrl/walker2d-medium-v0", "Walker2d-v5"),
    ],
)
def test_datasets_name_their_environment(name, env_id):
    assert env_for(name) == env_id
    assert env_for(_spec(dataset_id=name, env_id="Other-v0")) == env_id


def test_every_id_of_d4rl_has_an_environment_or_a_reason():
    for name in d4rl():
        robot = name.split("-")[0]
        if robot in ("hopper", "halfcheetah", "walker2d"):
            assert env_for(name).lower() == f"{robot}-v4"
        else:
            with pytest.raises(EnvError, match=f"D4RL's {name}"):
                env_for(name)


def test_a_file_keeps_its_own_environment():
    assert env_for(_spec(env_id="Pendulum-v1")) == "Pendulum-v1"
    assert env_for(_spec(env_id="hopper-medium-v2")) == "Hopper-v4"
    for spec, message in [(_spec(), "this dataset names no environment"), (_spec(dataset_id="hopper-medium-v7"), "near: hopper-medium-v")]:
        with pytest.raises(EnvError, match=message):
            env_for(spec)


def test_importing_loads_no_simulator():
    heavy = ("gymnasium", "mujoco", "imageio", "scipy")
    code = f"import sys, offrl.training.evaluate, offrl.stats; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def _spec(**fields) -> Spec:
    return Spec(Box.of(3), Box.of(1), **fields)
