"""Offline learning (bc, td3bc, iql, a2pr and agents of one's own): every batch is replayed from the dataset."""

from __future__ import annotations

from typing import Any

from offrl.nn.normalize import fitted
from offrl.training.sources import Replay


def normalizer(data: Any, config: Any) -> Any:
    return fitted(data, config.normalize)


def source(agent: Any, data: Any, config: Any, seeds: Any, device: str) -> Replay:
    gamma = getattr(config.agent, "gamma", None)
    return Replay(data, config.batch_size, seeds, period=agent.period, needs=agent.needs, gamma=gamma, device=device)
