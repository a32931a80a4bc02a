"""The figures of a dataset, and the commands that show them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from offrl.core.space import Box
from offrl.data.dataset import Dataset
from offrl.data.info import info, transition_weighted_return
from offrl.data.load import load_dataset
from offrl.envs.scores import reference


def arrays(n=12, **change) -> dict[str, np.ndarray]:
    """Two episodes."""
    rng = np.random.default_rng(0)
    floats = {"observations": rng.standard_normal((n, 3)), "actions": rng.uniform(-0.9, 0.9, (n, 2)), "rewards": rng.standard_normal(n)}
    flags = {"terminals": np.arange(n) == n // 2, "timeouts": np.arange(n) == n - 1}
    return {k: v.astype(np.float32) for k, v in floats.items()} | flags | change


def test_info_counts_by_hand():
    rewards = [1, 2, 3, 10, 20, 5]
    data = Dataset.from_arrays(
        np.zeros((6, 4)),
        np.zeros((6, 2)),
        rewards,
        [0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 0],
        action_space=Box.of(2, -1, 1),
        ref_min=0,
        ref_max=60,
    )
    about = info(data)
    assert json.loads(json.dumps(about)) == about
    assert (about["rows"], about["episodes"], about["obs_size"], about["action"]) == (6, 3, 4, "2 numbers")
    assert about["ends"] == {"terminated": 1, "truncated": 1, "open": 1}
    assert about["return_mean"] == pytest.approx(41 / 3)
    assert about["return_quantiles"] == {"0%": 5, "25%": 5.5, "50%": 6, "75%": 18, "100%": 30}
    assert about["return_mean_by_transition"] == pytest.approx((3 * 6 + 2 * 30) / 5)  # the open episode does not count
    assert (about["length_mean"], about["length_range"]) == (2, [1, 3])
    assert about["score_mean"] == pytest.approx(41 / 3 / 60 * 100)
    assert about["score_mean_by_transition"] == pytest.approx(26)
    assert about["fingerprint"] == data.fingerprint
    assert transition_weighted_return(data) == pytest.approx(15.6)


def test_scores_need_references_and_complete_episodes():
    data = load_dataset(arrays(), env_id="Hopper-v5")
    low, high = reference("Hopper-v5")
    assert info(data)["score_mean"] == pytest.approx(np.mean(100 * (data.returns - low) / (high - low)))
    assert "score_mean" not in info(load_dataset(arrays()))
    open_ = load_dataset(arrays(terminals=np.zeros(12), timeouts=np.zeros(12)), env_id="Hopper-v5")
    assert transition_weighted_return(open_) is None and info(open_)["score_mean_by_transition"] is None
    two = load_dataset(arrays(rewards=np.ones((12, 2))), env_id="Hopper-v5")
    assert transition_weighted_return(two) == pytest.approx([(7 * 7 + 5 * 5) / 12] * 2) and "score_mean" not in info(two)
