"""Files that ship beside the code: `configs/` and `datasets/`, inside the package in a wheel, next to it in a checkout."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def resource(*parts: str) -> Path:
    """The path of a shipped file or folder, as in `resource("configs", "iql.yaml")`. Raises FileNotFoundError naming it."""
    package = Path(str(files("offrl")))
    root = package if (package / parts[0]).exists() else package.parent
    path = root.joinpath(*parts)
    if not path.exists():
        raise FileNotFoundError(f"offrl ships no {'/'.join(parts)}: {path} is missing")
    return path
