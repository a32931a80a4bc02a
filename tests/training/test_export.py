"""The exported graph acts as the policy does, with nothing but the one file."""

from __future__ import annotations

import dataclasses
import os
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from offrl.core import registry
from offrl.core.space import Box
from offrl.core.tree import tree_map
from offrl.data.dataset import Dataset
from offrl.nn.normalize import fitted
from offrl.testing import toy
from offrl.training.export import ExportError, export_onnx
from offrl.training.policy import Policy

SMALL = dict.fromkeys(("hidden", "actor_hidden", "critic_hidden", "vae_hidden"), (8, 8))


def policy(name: str, data: Dataset) -> Policy:
    """Of an agent that has learned nothing but its data's scale, and has strong opinions."""
    kind = registry.agent_class(name)
    fields = {field.name for field in dataclasses.fields(kind.Config)}
    agent = kind(kind.Config(**{k: v for k, v in SMALL.items() if k in fields}), data.spec)
    state = agent.init(2)
    loud = tree_map(lambda leaf: 3 * leaf, state["params"])
    return Policy(agent, state | {"params": loud, "normalizer": fitted(data)})


def act(path, obs):
    return onnxruntime.InferenceSession(path).run(None, {"obs": obs})[0]


@pytest.mark.parametrize("name", ["bc", "td3bc", "iql", "a2pr", "discrete"])
def test_the_graph_is_the_policy_normaliser_and_all(name, tmp_path):
    data = toy(discrete=name == "discrete")
    original = policy("bc" if name == "discrete" else name, data)
    path, difference = export_onnx(original, tmp_path / "policy.onnx")
    assert difference <= 1e-5 and [path] == list(tmp_path.iterdir()), "no second file for the weights"
    onnx.checker.check_model(onnx.load(path))
    # elsewhere, from another working directory
    moved = tmp_path / "elsewhere" / "a b"
    moved.mkdir(parents=True)
    shutil.move(path, moved / "p.onnx")
    before = os.getcwd()
    os.chdir(moved)
    try:
        for batch in (1, 7, 100):
            obs = data.obs[:batch]  # in the data's own units, far from standard normal
            expected = original.predict(obs)[0]
            action = act("p.onnx", obs)
            assert action.shape == expected.shape and action.dtype == expected.dtype
            np.testing.assert_allclose(action, expected, atol=1e-5)
    finally:
        os.chdir(before)
    assert len(np.unique(act(moved / "p.onnx", data.obs))) > 1, "a graph that says the same of everything agrees with anything"
    if name != "discrete":
        unscaled = original.state["normalizer"] | {"obs_mean": torch.zeros(5), "obs_std": torch.ones(5)}
        other = Policy(original.agent, original.state | {"normalizer": unscaled})
        assert np.abs(other.predict(data.obs)[0] - act(moved / "p.onnx", data.obs)).max() > 0.01


def test_the_interface_has_names_and_a_free_batch(tmp_path):
    path, _ = export_onnx(policy("td3bc", toy()), tmp_path / "policy.onnx")
    session = onnxruntime.InferenceSession(path)
    (given,), (back,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.type, given.shape[1]) == ("obs", "tensor(float)", 5) and isinstance(given.shape[0], str)
    assert (back.name, back.type, back.shape[1]) == ("action", "tensor(float)", 3)


def test_bounds_of_their_own_for_each_action(tmp_path):
    rng = np.random.default_rng(0)
    space = Box((-1.0, 0.0), (1.0, 10.0))
    action = np.stack([rng.uniform(-1, 1, 50), rng.uniform(0, 10, 50)], 1)
    data = Dataset.from_arrays(
        rng.standard_normal((50, 4)), action, np.zeros(50), np.zeros(50), None, rng.standard_normal((50, 4)), action_space=space
    )
    path, _ = export_onnx(policy("td3bc", data), tmp_path / "policy.onnx")
    action = act(path, 100 * data.obs)
    assert (np.abs(action[:, 0]) <= 1).all() and ((action[:, 1] >= 0) & (action[:, 1] <= 10)).all() and action[:, 1].max() > 5


def test_a_graph_that_differs_is_not_written(tmp_path):
    with pytest.raises(ExportError, match="differs from the original by .*: nothing was written"):
        export_onnx(policy("td3bc", toy()), tmp_path / "policy.onnx", tolerance=-1.0)
    assert list(tmp_path.iterdir()) == []


def test_exporting_leaves_the_policy_and_the_generator_alone(tmp_path):
    original = policy("iql", toy())
    before, generator = original.predict(toy().obs)[0], torch.get_rng_state()
    export_onnx(original, tmp_path / "policy.onnx")
    assert (original.predict(toy().obs)[0] == before).all() and torch.equal(generator, torch.get_rng_state())
