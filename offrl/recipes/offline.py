"""Offline learning (bc, td3bc, iql, a2pr and agents of one's own): every batch is replayed from the dataset."""

from __future__ import annotations

from typing import Any

from offrl.data.transforms import with_reward
from offrl.nn.normalize import fitted
from offrl.training.blocks import BlockReplay
from offrl.training.sources import Replay

SAMPLING = {"replay": Replay, "blocks": BlockReplay}


def normalizer(data: Any, config: Any) -> Any:
    return fitted(data, config.normalize)


def source(agent: Any, data: Any, config: Any, seeds: Any, device: str, sampling: str, reward: tuple[float, float]) -> Any:
    """The batches; `reward` (a, b) makes their rewards a r + b."""
    options = {"period": agent.period, "needs": agent.needs, "gamma": getattr(config.agent, "gamma", None), "device": device}
    return SAMPLING[sampling](with_reward(data, *reward), config.batch_size, seeds, **options)
