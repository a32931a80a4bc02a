"""Offline and model-based reinforcement learning for control."""

__version__ = "0.1.0"
