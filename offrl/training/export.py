"""A policy as one ONNX file, observations and actions in the environment's units."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from offrl.core.checkpoint import atomic_write
from offrl.core.tree import flatten, unflatten
from offrl.training.policy import Policy

BATCHES = (1, 7)  # sizes at which the file is compared with the policy


class ExportError(RuntimeError):
    """The exported graph does not act as the policy does."""


class _Graph(nn.Module):
    """The deterministic policy as a module, its state as buffers."""

    def __init__(self, policy: Policy):
        super().__init__()
        self.agent, self.names = policy.agent, {}
        wanted = {"params": {"actor": policy.state["params"]["actor"]}, "normalizer": policy.state["normalizer"]}
        for i, (key, leaf) in enumerate(flatten(wanted).items()):
            self.register_buffer(f"leaf{i}", leaf)
            self.names[key] = f"leaf{i}"

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return self.agent.act(unflatten({key: getattr(self, name) for key, name in self.names.items()}), obs)


def export_onnx(policy: Policy, path: Path, tolerance: float = 1e-4) -> tuple[Path, float]:
    """Write `obs (batch, obs) float32 -> action` and return the path and the largest difference found to the policy.

    The normaliser is inside the graph, and everything is in the one file. Raises ExportError where the two differ by more than
    `tolerance`, ImportError where onnx is not installed.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError:
        raise ImportError('ONNX needs three more packages: pip install "offrl[onnx]"') from None
    example = torch.zeros(2, policy.spec.obs.size)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            _Graph(policy).eval(), (example,), input_names=["obs"], output_names=["action"],
            dynamic_shapes=({0: torch.export.Dim("batch")},), dynamo=True, external_data=False, verbose=False,
        )  # fmt: skip
    model = program.model_proto.SerializeToString()
    session, rng = onnxruntime.InferenceSession(model), np.random.default_rng(0)
    scale = policy.state["normalizer"]
    difference = 0.0
    for batch in BATCHES:
        normal = rng.standard_normal((batch, policy.spec.obs.size)).astype(np.float32)
        obs = normal * scale["obs_std"].numpy() + scale["obs_mean"].numpy()
        (action,) = session.run(None, {"obs": obs})
        difference = max(difference, float(np.abs(action - policy.predict(obs)[0]).max()))
    if difference > tolerance:
        raise ExportError(f"the exported policy differs from the original by {difference:.1e}: nothing was written")
    atomic_write(path, model)
    return path, difference
