"""What Gymnasium knows of an environment that a dataset names. A name in a file makes nothing run but Gymnasium's own code."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from offrl.core.space import Space, from_gym
from offrl.envs.make import make


@dataclass(frozen=True)
class Facts:
    """limit: the steps after which episodes are cut; obs: how many numbers an observation has. None: not known.

    problem: why the environment cannot be made here.
    """

    limit: int | None = None
    obs: int | None = None
    action: Space | None = None
    problem: str | None = None


def facts(env_id: str | None) -> Facts:
    """Nothing is known where gymnasium is not installed, or where the id names a module or a file to import."""
    if env_id is None or ":" in env_id:
        return Facts()
    try:
        import gymnasium
    except Exception:  # an installation can be broken in more ways than being absent, and nothing here depends on it
        return Facts()
    spec = gymnasium.registry.get(env_id)
    if spec is None:
        near = difflib.get_close_matches(env_id, gymnasium.registry, 2)
        return Facts(problem=f"Gymnasium has no {env_id} here{f' (nearest: {near[0]})' if near else ''}")
    if not str(spec.entry_point).startswith("gymnasium"):  # code of a third party
        return Facts(spec.max_episode_steps)
    try:
        env = make(env_id)
    except Exception as error:  # whatever a simulator raises
        return Facts(spec.max_episode_steps, problem=f"{env_id} cannot be made here: {str(error).partition(chr(10))[0][:160]}")
    env.close()
    return Facts(spec.max_episode_steps, env.observation_space.shape[-1], from_gym(env.action_space))
