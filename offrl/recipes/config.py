"""What a run can be told: the config of each recipe, and its layers."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from types import ModuleType
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

import yaml

from offrl.core import registry
from offrl.core.config import ConfigError, Range, merge, nearest
from offrl.core.resources import resource

A, T = TypeVar("A"), TypeVar("T")
LAYERS = ("defaults", "datasets", "presets", "search")  # of a recipe's YAML


@dataclass(frozen=True)
class Config(Generic[A]):
    """All that a run can be told. What `learns` names decides what is learned and names the run's folder."""

    learns: ClassVar[tuple[str, ...]] = ("agent", "batch_size", "normalize", "reward", "sampling", "precision")

    agent: A
    batch_size: Annotated[int, Range(1)] = 256
    """Transitions in a batch."""
    normalize: bool = True
    """Standardise observations by the dataset's mean and standard deviation."""
    reward: Literal["raw", "antmaze_minus_one", "iql_locomotion", "standardise"] = "raw"
    """Transform of the rewards that are learned from, by name; evaluation knows nothing of it."""
    sampling: Literal["auto", "replay", "blocks"] = "auto"
    """Batches: rows at random with replacement, packed in memory; or without, shuffled in blocks where they are. auto: blocks for mapped
    data (--memory), else replay."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of hidden layers; everything else is float32."""
    steps: Annotated[int, Range(1)] = 1_000_000
    """Gradient steps."""
    log_every: Annotated[int, Range(1)] = 1_000
    """Gradient steps between rows of the log."""
    eval_every: Annotated[int, Range(1)] = 10_000
    """Gradient steps between evaluations."""
    eval_episodes: Annotated[int, Range(0)] = 10
    """Episodes of an evaluation during training; 0: none."""
    final_episodes: Annotated[int, Range(1)] = 20
    """Episodes of the evaluation at the end."""
    checkpoint_every: Annotated[int, Range(1)] = 10_000
    """Gradient steps between checkpoints."""
    skip_nonfinite: Annotated[int, Range(0)] = 0
    """Updates that may be left out because a loss or a gradient was not finite; 0: the first ends the run."""
    mode: Literal["auto", "eager", "compile", "cudagraph"] = "auto"
    """How updates run; auto picks by device and length."""
    device: str = "auto"
    """cpu, cuda, cuda:1; auto: a GPU if there is one."""
    env: str | None = None
    """Environment of the evaluation, where the dataset names none: a Gymnasium id, or file.py:factory."""
    tensorboard: bool = False
    """Also write TensorBoard files."""
    wandb: str | None = None
    """Also log to this Weights & Biases project."""


# recipe: what it is wired by, and the agent that learns; a recipe that is not named here is an agent's name, trained from the dataset alone
RECIPES = {"mbrl": ("offrl.recipes.mbrl", "sac"), "combo": ("offrl.recipes.mbrl", "combo")}


def family(recipe: str) -> tuple[ModuleType, str]:
    """The module that wires a recipe and the name of its agent."""
    module, agent = RECIPES.get(recipe, ("offrl.recipes.offline", recipe))
    return import_module(module), agent


def recipes() -> list[str]:
    """Those that learn from a dataset."""
    alone = (name for name in registry.agents() if not getattr(registry.agent_class(name), "on_policy", False))
    return sorted({*RECIPES, *alone})


def resolve(recipe: str, dataset_id: str, preset: str | None = None, overrides: dict[str, Any] | None = None) -> Config:
    """The config of a recipe on a dataset: defaults < the recipe's YAML < its block for the dataset < a preset < `overrides`.

    Raises ConfigError naming an unknown key's nearest valid one.
    """
    wiring, agent = family(recipe)
    return layered(wiring.Config(agent=registry.agent_class(agent).Config()), recipe, dataset_id, preset, overrides)


def layered(config: T, recipe: str, dataset_id: str, preset: str | None = None, overrides: dict[str, Any] | None = None) -> T:
    """The config with the layers above its defaults."""
    name, layers = _layers(recipe)
    config = merge(config, layers.get("defaults") or {}, f"{name}: defaults")
    for pattern, layer in (layers.get("datasets") or {}).items():
        if fnmatchcase(dataset_id, pattern):
            config = merge(config, layer, f"{name}: datasets: {pattern}")
    if preset is not None:
        presets = layers.get("presets") or {}
        if preset not in presets:
            raise ConfigError(f"{recipe} has no preset {preset!r}{nearest(preset, presets) if presets else ', nor any other'}")
        config = merge(config, presets[preset], f"{name}: presets: {preset}")
    return merge(config, overrides or {}, "overrides")


def searched(recipe: str) -> tuple[str, ...]:
    """What a study of the recipe searches unless told otherwise, in the terms of `offrl.recipes.search`."""
    return tuple(_layers(recipe)[1].get("search") or ())


def _layers(recipe: str) -> tuple[str, dict[str, Any]]:
    """The name and the content of the recipe's YAML; nothing for an agent of the user's own. Raises ConfigError for an unknown key."""
    try:
        path = resource("configs", f"{recipe}.yaml")
    except FileNotFoundError:
        return "", {}
    layers = yaml.safe_load(path.read_text()) or {}
    for key in layers:
        if key not in LAYERS:
            raise ConfigError(f"{path.name}: unknown key {key}{nearest(key, LAYERS)}")
    return path.name, layers
