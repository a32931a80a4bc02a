"""Reference scores: D4RL's pairs, the ids that map to them, and ids that have none."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offrl.core.resources import resource
from offrl.envs.scores import UnknownScore, d4rl, normalize, reference

PAIRS = {  # d4rl/infos.py
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "ant": (-325.6, 3879.7),
    "antmaze": (0.0, 1.0),
    "pen": (96.262799, 3076.8331017826877),
    "hammer": (-274.856578, 12794.134825156867),
    "relocate": (-6.425911, 4233.877797728884),
    "door": (-56.512833, 2880.5693087298737),
    "kitchen": (0.0, 4.0),
}


def test_every_known_id_scores_0_and_100_at_its_own_ends():
    scored = [name for name, entry in d4rl().items() if entry["ref_min"] is not None]
    assert (len(d4rl()), len(scored)) == (155, 147)
    for name in scored:
        low, high = reference(name)
        assert (low, high) == (d4rl()[name]["ref_min"], d4rl()[name]["ref_max"])
        assert normalize([low, high], low, high).tolist() == [0.0, 100.0], name


def test_the_eight_ids_without_a_score_say_so():
    unscored = [name for name, entry in d4rl().items() if entry["ref_min"] is None]
    assert len(unscored) == 8
    for name in unscored:
        with pytest.raises(UnknownScore, match=f"{name}.*without a reference score"):
            reference(name)


def test_families_have_the_published_pairs_in_every_version():
    for name in d4rl():
        family = name.split("-")[0]
        if family in PAIRS and name != "ant-random-expert-v0":
            assert reference(name) == PAIRS[family], name


@pytest.mark.parametrize(
    ("name", "robot"),
    [
        ("Hopper-v4", "hopper"),
        ("HalfCheetah-v5", "halfcheetah"),
        ("Walker2d-v3", "walker2d"),
        ("Ant-v5", "ant"),
        ("offrl/hopper-medium-v0", "hopper"),
        ("offrl/walker2d-medium-replay-v0", "walker2d"),
        ("offrl/halfcheetah-medium-expert-v1", "halfcheetah"),
    ],
)
def test_environments_and_our_datasets_take_their_robots_pair(name, robot):
    assert reference(name) == PAIRS[robot]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("hopper-medium-v3", "hopper-medium-v2"),
        ("Hopper-medium-v2", "hopper-medium-v2"),
        ("Hoper-v5", "Hopper-v5"),
        ("offrl/humanoid-medium-v0", "nearest"),
        ("CartPole-v1", "known are"),
        ("", "known are"),
    ],
)
def test_an_unknown_id_is_an_error_that_names_its_neighbours(name, near):
    with pytest.raises(UnknownScore, match=near) as error:
        reference(name)
    assert repr(name) in str(error.value)


@given(st.lists(st.floats(-1e4, 1e4), min_size=2, max_size=20), st.floats(-1e3, 1e3), st.floats(1, 1e4))
def test_scores_are_affine_in_each_return(returns, low, span):
    scores = normalize(returns, low, low + span)
    assert scores.dtype == np.float64
    np.testing.assert_allclose(scores.mean(), normalize(np.mean(returns), low, low + span), atol=1e-6)
    np.testing.assert_allclose(scores.std(), 100 * np.std(returns) / span, atol=1e-6)


@pytest.mark.parametrize("pair", [(1.0, 1.0), (2.0, 1.0), (float("nan"), 1.0)])
def test_ends_out_of_order_are_refused(pair):
    with pytest.raises(ValueError, match="ref_max must be above ref_min"):
        normalize([1.0], *pair)


def test_the_table_says_where_it_comes_from():
    about = json.loads(resource("datasets", "reference_scores.json").read_text())["_about"]
    assert about["source"].startswith("Farama-Foundation/D4RL") and len(about["commit"]) == 40


def test_a_missing_resource_is_named():
    with pytest.raises(FileNotFoundError, match="offrl ships no datasets/nothing.json"):
        resource("datasets", "nothing.json")
