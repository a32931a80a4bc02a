"""Names of agents, as "module:Class" strings: nothing is imported before it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from offrl.core.config import nearest

_AGENTS: dict[str, str | type] = {
    "bc": "offrl.agents.bc:BC",
    "td3bc": "offrl.agents.td3bc:TD3BC",
    "iql": "offrl.agents.iql:IQL",
    "a2pr": "offrl.agents.a2pr:A2PR",
    "sac": "offrl.agents.sac:SAC",
    "combo": "offrl.agents.combo:COMBO",
    "ppo": "offrl.agents.ppo:PPO",
}


def register(name: str, agent: str | type) -> None:
    """Make an agent known as `name` to `offrl train`, `offrl.load` and the contract tests.

    `agent` is a class (a subclass of offrl.agents.base.Agent, or one with the same members) or a "module:Class" string.
    Raises ValueError if the name belongs to another agent.
    """
    if _AGENTS.get(name, agent) != agent:
        raise ValueError(f"an agent called {name!r} is registered already: {_AGENTS[name]}")
    _AGENTS[name] = agent


def agents() -> list[str]:
    return sorted(_AGENTS)


def agent_class(name: str) -> Any:
    """The class registered as `name`. Raises KeyError naming the nearest one."""
    if name not in _AGENTS:
        raise KeyError(f"no agent {name!r}{nearest(name, _AGENTS)}; one of your own is known once its file has been read: --import FILE")
    entry = _AGENTS[name]
    if isinstance(entry, str):
        module, _, attribute = entry.partition(":")
        return getattr(import_module(module), attribute)
    return entry
