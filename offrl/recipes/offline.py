"""Offline learning (bc, td3bc, iql, a2pr and agents of one's own): every batch is replayed from the dataset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from offrl.data.dataset import Dataset
from offrl.recipes.config import Config as Config
from offrl.training.blocks import BlockReplay
from offrl.training.sources import Replay

STACKS = True  # several seeds can train as one
SAMPLING = {"replay": Replay, "blocks": BlockReplay}


def for_study(config: Config, kinds: Mapping[str, Any]) -> Config:
    """The config as it is: trials of a study share nothing but the data."""
    return config


def source(agent: Any, data: Dataset, config: Config, seeds: Any, device: str, sampling: str, **session: Any) -> Any:
    return replay(agent, data, config, seeds, device, sampling, config.batch_size)


def replay(agent: Any, data: Dataset, config: Config, seeds: Any, device: str, sampling: str, batch_size: int) -> Any:
    """Batches of the data's own rows."""
    options = {"period": agent.period, "needs": agent.needs, "gamma": getattr(config.agent, "gamma", None), "device": device}
    return SAMPLING[sampling](data, batch_size, seeds, **options)
