"""Trees of tensors: nested dicts whose branches are matched by key, never by the order of their leaves.

Plain recursion over dicts, so that it traces under `torch.compile(fullgraph=True)` and runs inside `torch.func` transformations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def flatten(tree: dict[str, Any], path: str = "") -> dict[str, Tensor]:
    """`{"a": {"b": x}}` as `{"a/b": x}`, in the tree's order; an empty dict leaves nothing behind.

    Raises ValueError for a key that is empty or holds "/", TypeError for a leaf that is not a tensor.
    """
    flat = {}
    for key, value in tree.items():
        if not isinstance(key, str) or not key or "/" in key:
            raise ValueError(f"key {key!r} under {path or '/'!r}: keys of a tree are non-empty strings without '/'")
        if isinstance(value, dict):
            flat.update(flatten(value, f"{path}{key}/"))
        elif isinstance(value, Tensor):
            flat[path + key] = value
        else:
            raise TypeError(f"{path}{key} is {type(value).__name__}, not a tensor")
    return flat


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`. Raises ValueError where a key is both a leaf and a branch."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *branches, leaf = path.split("/")
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
            if not isinstance(node, dict):
                raise ValueError(f"{path}: {branch!r} is both a leaf and a branch")
        if leaf in node:
            raise ValueError(f"{path} is both a leaf and a branch")
        node[leaf] = value
    return tree


def tree_map(fn: Callable[..., Any], *trees: Any, path: str = "") -> Any:
    """`fn(leaf, leaf of the second tree, ...)` at every leaf, in the order of the first tree.

    Raises ValueError that names the key where the trees differ in structure or where a leaf is None.
    """
    first = trees[0]
    if not isinstance(first, dict):
        if any(leaf is None or isinstance(leaf, dict) for leaf in trees):
            raise ValueError(f"{path or '/'}: a leaf is None, or a leaf in one tree and a branch in another")
        return fn(*trees)
    for other in trees[1:]:
        if not isinstance(other, dict):
            raise ValueError(f"{path or '/'}: a branch in one tree and a leaf in another")
        if first.keys() != other.keys():
            raise ValueError(f"{path}/{min(first.keys() ^ other.keys())}: a key of one tree that another lacks")
    return {key: tree_map(fn, *(tree[key] for tree in trees), path=f"{path}/{key}") for key in first}
