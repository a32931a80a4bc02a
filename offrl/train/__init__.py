"""The loop, run folders, evaluation. Called, the package is `offrl.train(...)`: see `offrl.recipes.common.train`."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """Python puts a package into its parent's namespace, where a function of the same name would be lost."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return import_module("offrl.recipes.common").train(*args, **options)


sys.modules[__name__].__class__ = _Callable
