"""A trained policy on its own: no dataset, no environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from offrl.core.checkpoint import Checkpoints, check_meta, restore
from offrl.core.config import merge
from offrl.core.registry import agent_class
from offrl.core.space import Discrete
from offrl.core.types import Spec, State
from offrl.training.run import RunError, find_runs, read_about


class Policy:
    """An agent with what it has learned. The normaliser is inside: observations and actions are the environment's."""

    def __init__(self, agent: Any, state: State, step: int = 0):
        self.agent, self.spec, self.step = agent, agent.spec, step
        self.state = {key: tree for key, tree in state.items() if key != "adam"}

    def act(self, obs: torch.Tensor) -> torch.Tensor:
        """obs (..., obs) float32 -> the deterministic action (..., action), or (...,) int64 where discrete."""
        with torch.no_grad():
            return self.agent.act(self.state, obs)

    def predict(self, obs: Any, state: Any = None, episode_start: Any = None, deterministic: bool = True) -> tuple[np.ndarray, Any]:
        """(action, state), as Stable-Baselines3's policies answer; obs (obs,) or (n, obs), `state` passed through.

        With `deterministic=False` a stochastic policy samples within the bounds, from torch's global generator; others act the same.
        """
        given = np.asarray(obs, np.float32)
        size = self.spec.obs.size
        if given.shape[-1:] != (size,) or given.ndim > 2:
            raise ValueError(f"observations must have shape ({size},) or (n, {size}), not {given.shape}")
        obs = torch.from_numpy(given)
        noise = None
        if not deterministic:
            draw = torch.rand if isinstance(self.spec.action, Discrete) else torch.randn
            noise = draw(*given.shape[:-1], self.spec.action.size)
        with torch.no_grad():
            action = self.agent.act(self.state, obs, noise)
        sampled = noise is not None and not isinstance(self.spec.action, Discrete)
        return (self.spec.action.clip(action) if sampled else action).numpy(), state


def load(path: str | Path) -> Policy:
    """The policy of a run: the folder of one seed, or one above it that holds a single seed.

    Nothing is executed and the dataset is not needed. Raises RunError or CheckpointError saying what is wrong.
    """
    folders = find_runs(Path(path))
    if len(folders) > 1:
        raise RunError(f"{path} holds {len(folders)} runs; name one of them, for example {folders[0]}")
    about, saved = read_about(folders[0]), Checkpoints(folders[0] / "checkpoints").latest()
    if "obs" not in about["spec"]:
        raise RunError(f"{folders[0]} is a run of {about['recipe']}, which has commands of its own: offrl {about['recipe']}")
    if saved is None:
        raise RunError(f"{folders[0]} holds no checkpoint yet")
    check_meta(saved.meta, {"algorithm": about["algorithm"], "spec": about["spec"]})
    agent = build_agent(about["algorithm"], about["agent"], Spec.from_json(about["spec"]))
    learned = {key: tree for key, tree in saved.tree.items() if key != "source"}
    return Policy(agent, restore(learned, agent.init(0)), saved.step)


def build_agent(algorithm: str, config: dict[str, Any], spec: Spec) -> Any:
    """The registered agent with a config given as a plain dict."""
    kind = agent_class(algorithm)
    return kind(merge(kind.Config(), config, f"the config of {algorithm}"), spec)
