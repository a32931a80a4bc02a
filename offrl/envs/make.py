"""Environments by name: Gymnasium's, or a user's own factory, checked to be ones that a policy on flat vectors can drive."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from offrl.core import space as spaces
from offrl.core.types import Spec
from offrl.envs.render import choose_backend
from offrl.envs.scores import ROBOTS, d4rl

# Robots of Minari's `mujoco` namespace, whose datasets were collected in the -v5 environments.
_MINARI = ROBOTS | {
    "humanoid": "Humanoid",
    "humanoidstandup": "HumanoidStandup",
    "inverteddoublependulum": "InvertedDoublePendulum",
    "invertedpendulum": "InvertedPendulum",
    "pusher": "Pusher",
    "reacher": "Reacher",
    "swimmer": "Swimmer",
}
_ADROIT = {"pen": "AdroitHandPen-v1", "door": "AdroitHandDoor-v1", "hammer": "AdroitHandHammer-v1", "relocate": "AdroitHandRelocate-v1"}
_CANNOT = {  # D4RL family -> what stands between its id and an environment
    "ant": "D4RL's ant shows 111 numbers, Gymnasium's Ant-v4 shows 27 and Ant-v5 105",
    "antmaze": "its nearest relative, AntMaze_*-v4 of gymnasium-robotics, shows a dictionary to be rearranged into D4RL's 29 numbers",
    "kitchen": "its nearest relative, FrankaKitchen-v1 of gymnasium-robotics, shows a dictionary with 59 numbers where D4RL has 60",
    "maze2d": "its nearest relative, PointMaze_*-v3 of gymnasium-robotics, shows a dictionary",
    "minigrid": "it runs in gym-minigrid as D4RL packages it",
    "bullet": "it runs in PyBullet through D4RL itself",
    "carla": "it runs in the CARLA simulator",
    "flow": "it runs in the Flow and SUMO traffic simulators",
}


class EnvError(ValueError):
    """An environment that cannot be made or driven; the message says which, why and what would help."""


def make(env_id: str, seed: int | None = None, render: str | None = None, register: str | None = None) -> Any:
    """A Gymnasium environment with a Box observation and a Box or Discrete action.

    `env_id` is a Gymnasium id, or a user's own factory as `package.module:factory` or `folder/file.py:factory`, called without
    arguments (with `render_mode` where `render` is given). `register` names a module or a .py file to import first, which
    registers the id. `seed` seeds the first reset and the action space. `render` is Gymnasium's render mode.

    Raises EnvError, or ImportError where gymnasium or the simulator is not installed.
    """
    gym = _gymnasium()
    if register is not None:
        user_module(register)
    options = {} if render is None else {"render_mode": render}
    source, _, name = env_id.rpartition(":")
    factory = bool(source) and name.isidentifier()  # a registered id may carry a module too, but ends in a version
    if render == "rgb_array" and (factory or _mujoco_of(env_id)):
        choose_backend(required=not factory)
    env = check(env_id, _from_factory(source, name, options) if factory else _from_registry(gym, env_id, options))
    if seed is not None:
        env.reset(seed=seed)
        env.action_space.seed(seed)
    return env


def env_for(source: Spec | str) -> str:
    """The id of the environment in which policies trained on a dataset are evaluated: of its Spec, or of a dataset id.

    D4RL's locomotion ids give the -v4 environment, the closest to D4RL's -v2 that still runs; Minari's `mujoco/...` and `offrl/...`
    give -v5; otherwise the dataset's own `env_id`. Raises EnvError saying what is missing.
    """
    names = (source,) if isinstance(source, str) else (source.dataset_id, source.env_id)
    for name in names:
        if name is not None and (known := _known(name)):
            return known
    if isinstance(source, Spec) and source.env_id is not None:
        return source.env_id
    near = difflib.get_close_matches(names[0] or "", d4rl(), n=3)
    hint = f" (near: {', '.join(near)})" if near else ""
    dataset = f"the dataset {names[0]!r}" if names[0] else "this dataset"
    raise EnvError(f"{dataset} names no environment; give one, as in Hopper-v5 or my_file.py:factory{hint}")


def _known(name: str) -> str | None:
    if match := re.fullmatch(r"mujoco/(\w+)/.+|offrl/(\w+)-.+", name):
        robot = _MINARI.get(match[1] or match[2])
        return robot and f"{robot}-v5"
    if name not in d4rl():
        return None
    family = name.split("-")[0]
    if family in _ADROIT:
        env_id = _ADROIT[family]
        raise EnvError(
            f"offrl makes no environment for D4RL's {name} by itself: its task lives on as {env_id} of gymnasium-robotics. Install that "
            f"package and name {env_id} with `register` gymnasium_robotics; its rewards have changed between releases, so note the version"
        )
    if family in _CANNOT:
        raise EnvError(
            f"offrl makes no environment for D4RL's {name}: {_CANNOT[family]}. Training from the data needs none; to evaluate, give "
            "your own as my_file.py:factory"
        )
    return f"{ROBOTS[family]}-v4"


def check(name: str, env: Any) -> Any:
    """`env`, if it is a Gymnasium environment with spaces that offrl drives; otherwise it is closed and EnvError says why."""
    missing = [part for part in ("reset", "step", "close", "observation_space", "action_space") if not hasattr(env, part)]
    if missing:
        raise EnvError(f"{name} gave a {type(env).__name__}, which is no Gymnasium environment: it has no {', '.join(missing)}")
    try:
        if type(env.observation_space).__name__ != "Box":
            raise EnvError(f"{name}: observations must be one Box, not {env.observation_space}; wrap the environment to show one vector")
        spaces.from_gym(env.action_space)
    except (EnvError, TypeError) as error:
        env.close()
        raise error if isinstance(error, EnvError) else EnvError(f"{name}: actions: {error}") from error
    return env


def _gymnasium() -> Any:
    try:
        import gymnasium
    except ImportError as error:
        raise ImportError('environments need gymnasium: pip install "offrl[envs]"') from error
    return gymnasium


def _from_registry(gym: Any, env_id: str, options: dict[str, Any]) -> Any:
    try:
        with _quiet(env_id):
            return gym.make(env_id, disable_env_checker=True, **options)
    except (gym.error.DependencyNotInstalled, ModuleNotFoundError) as error:
        raise ImportError(f'{env_id}: {error}; for MuJoCo, pip install "offrl[envs]"') from error
    except (gym.error.Error, ImportError) as error:  # Gymnasium raises a plain ImportError for ids that it has retired
        raise EnvError(f"{env_id}: {error}") from error


def _from_factory(source: str, name: str, options: dict[str, Any]) -> Any:
    module = user_module(source)
    factory = getattr(module, name, None)
    if not callable(factory):
        near = difflib.get_close_matches(name, [n for n, value in vars(module).items() if callable(value)], n=3)
        raise EnvError(f"{source} has no callable {name!r}" + (f"; near: {', '.join(near)}" if near else ""))
    with _quiet():
        return factory(**options)


def user_module(source: str) -> ModuleType:
    """A user's module by its dotted name or the path of its .py file, imported once; its folder stays importable, after all others.

    Raises EnvError where it, or what it imports, is not there.
    """
    file = Path(source).resolve() if source.endswith(".py") else None
    name = f"offrl_user:{file}" if file else source
    if name in sys.modules:
        return sys.modules[name]
    if file and not file.is_file():
        raise EnvError(f"{source}: there is no such file")
    folder = str(file.parent if file else Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        if file is None:
            return importlib.import_module(name)
        spec = importlib.util.spec_from_file_location(name, file)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except BaseException as error:
        sys.modules.pop(name, None)
        if not isinstance(error, ModuleNotFoundError):
            raise
        raise EnvError(f"{source}: {error}") from error


@contextlib.contextmanager
def _quiet(env_id: str | None = None) -> Iterator[None]:
    """Without what is known and can't be acted on: that a benchmark's environment is old, and an attribute in Gymnasium's own models."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*The environment .* is out of date", category=DeprecationWarning)
        mujoco = sys.modules.get("mujoco") or _mujoco_of(env_id)
        if mujoco is None or not hasattr(mujoco, "set_mju_user_warning"):
            yield
            return
        before = mujoco.get_mju_user_warning()
        mujoco.set_mju_user_warning(lambda text: None if "settotalmass" in text else warnings.warn(f"MuJoCo: {text}", stacklevel=2))
        try:
            yield
        finally:
            mujoco.set_mju_user_warning(before)


def _mujoco_of(env_id: str | None) -> ModuleType | None:
    spec = _gymnasium().registry.get(env_id)
    if spec is None or "mujoco" not in str(spec.entry_point):
        return None
    with contextlib.suppress(ImportError):  # gymnasium says so itself in a moment
        import mujoco

        return mujoco
    return None
