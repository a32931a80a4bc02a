"""Every format gives back what it was given: rows, flags, borders, unknown successors, spaces, ids and scores."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offrl.core.space import Box, Discrete
from offrl.core.types import Spec
from offrl.data.dataset import Dataset
from offrl.data.load import load_dataset
from offrl.data.save import save_csv, save_d4rl, save_npz, save_parquet
from offrl.envs import scores

SAVE = {".npz": save_npz, ".hdf5": save_d4rl, ".csv": save_csv, ".csv.gz": save_csv, ".parquet": save_parquet}

HOPPER = (None, "hopper-medium-v2", *scores.reference("hopper-medium-v2"))


@pytest.fixture(autouse=True)
def folders(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("OFFRL_CACHE", str(tmp_path_factory.mktemp("cache")))


def some_floats(rng, *shape) -> np.ndarray:
    """Finite float32 of all sizes, denormal and negative zeros among them."""
    bits = rng.integers(0, 2**32, shape, np.uint32)
    values = bits.view(np.float32)
    return np.where(np.isfinite(values), values, np.float32(-0.0))


@st.composite
def datasets(draw) -> Dataset:
    lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    each = {"min_size": len(lengths), "max_size": len(lengths)}
    flags = draw(st.text("tub-", **each))
    known = np.array(draw(st.one_of(st.just([True] * len(lengths)), st.just([False] * len(lengths)), st.lists(st.booleans(), **each))))
    size, objectives = draw(st.integers(1, 3)), draw(st.sampled_from([0, 2]))
    space = draw(st.sampled_from([Box.of(2), Box((-0.1, -1.0), (2.0, 1e30)), Box((0.0, -np.inf), (1.0, np.inf)), Discrete(3)]))
    rng, n = np.random.default_rng(draw(st.integers(0, 99))), sum(lengths)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    last = starts[1:] - 1
    terminated, truncated = np.zeros(n, bool), np.zeros(n, bool)
    terminated[last], truncated[last] = [f in "tb" for f in flags], [f in "ub" for f in flags]
    obs, after = some_floats(rng, n, size), some_floats(rng, len(lengths), size)
    after[~known] = obs[last][~known]
    next_obs = None
    if draw(st.booleans()) and max(lengths) > 1:  # some row is not the one below
        next_obs = some_floats(rng, n, size)
        next_obs[last] = after
    action = rng.integers(0, space.n, n) if isinstance(space, Discrete) else some_floats(rng, n, 2)
    reward = some_floats(rng, n, objectives) if objectives else some_floats(rng, n)
    told = draw(st.sampled_from([(None, None, None, None), ("Plant-v0", None, 0.1, None), ("Plant-v0", "me/plant-v3", -0.1, 1e9), HOPPER]))
    spec = Spec(draw(st.sampled_from([Box.of(size), Box.of(size, -1, 0.1)])), space, *told)
    return Dataset(obs, action, reward, terminated, truncated, starts, after, known, spec, next_obs)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.filterwarnings("ignore:.*end without a flag")
@pytest.mark.parametrize("suffix", SAVE)
@given(data=datasets())
def test_what_is_saved_is_loaded(suffix, data, tmp_path_factory):
    path = SAVE[suffix](data, tmp_path_factory.mktemp("saved") / f"a{suffix}")
    loaded = load_dataset(path)
    assert loaded.fingerprint == data.fingerprint
    assert loaded.spec == data.spec
