"""Offline and model-based reinforcement learning for control."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "Dataset": "offrl.data.dataset",
    "load_dataset": "offrl.data.load",
    "from_sb3": "offrl.data.formats.sb3",
    "fetch": "offrl.data.fetch",
    "Dynamics": "offrl.models.dynamics",
    "Imagine": "offrl.models.imagine",
    "OnPolicy": "offrl.training.onpolicy",
    "train": "offrl.recipes.common",
    "load": "offrl.training.policy",
    "evaluate": "offrl.training.evaluate",
    "register": "offrl.core.registry",
    "register_termination": "offrl.envs.terminations",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'offrl' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
