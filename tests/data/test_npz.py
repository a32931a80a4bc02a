"""NPZ archives, plain arrays, and the files that `save_npz` and `save_d4rl` write."""

from __future__ import annotations

from dataclasses import replace

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offrl.core.space import Box, Discrete
from offrl.data.dataset import DataError, Dataset
from offrl.data.load import load_dataset
from offrl.data.save import save_d4rl, save_npz

OURS = {
    "observations": "obs", "actions": "action", "rewards": "reward", "terminals": "terminated", "timeouts": "truncated",
    "next_observations": "next_obs",
}  # fmt: skip


def arrays(n=6, seed=0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    base = {
        key: rng.standard_normal(shape).astype(np.float32)
        for key, shape in (("observations", (n, 3)), ("actions", (n, 2)), ("rewards", (n,)))
    }
    flags = {"terminals": np.arange(n) == 2, "timeouts": np.arange(n) == n - 1}
    return base | flags | {"next_observations": rng.standard_normal((n, 3)).astype(np.float32)}


def test_both_vocabularies_and_both_compressions_read_alike(tmp_path):
    data = arrays()
    np.savez(tmp_path / "a.npz", **data, version=np.array("1.0"), extra=np.arange(3))
    np.savez_compressed(tmp_path / "b.npz", **{OURS[k]: v for k, v in data.items()})
    prints = [
        load_dataset(source).fingerprint
        for source in (tmp_path / "a.npz", str(tmp_path / "b.npz"), data, {OURS[k]: v for k, v in data.items()})
    ]
    assert len(set(prints)) == 1
    assert prints[0] == Dataset.from_arrays(*data.values()).fingerprint
    with pytest.raises(DataError, match="both 'rewards' and 'reward'"):
        load_dataset(data | {"reward": data["rewards"]})


def test_missing_keys_are_named_with_what_is_there(tmp_path):
    data = arrays()
    data["rewrad"] = data.pop("rewards")
    del data["terminals"]
    np.savez(tmp_path / "a.npz", **data)
    with pytest.raises(DataError) as error:
        load_dataset(tmp_path / "a.npz")
    text = str(error.value)
    assert "a.npz: no 'rewards' or 'reward' (nearest: 'rewrad'), no 'terminals'" in text
    assert "its keys are actions, next_observations, observations, rewrad, timeouts" in text
    with pytest.raises(DataError, match="its keys are none"):
        load_dataset({})


def test_wrong_lengths_and_kinds_are_all_named(tmp_path):
    data = arrays() | {"rewards": np.zeros(5), "actions": np.array(["a"] * 6), "timeouts": np.float32(0)}
    np.savez(tmp_path / "a.npz", **data)
    with pytest.raises(DataError, match="actions must be numbers, not <U1; rewards has 5 rows, observations have 6; timeouts has no rows"):
        load_dataset(tmp_path / "a.npz")
    with pytest.raises(DataError, match="no rows"):
        load_dataset({k: v[:0] for k, v in arrays().items()})
    with pytest.raises(DataError, match="must be numbers, not object"):
        load_dataset(arrays() | {"actions": np.array([None] * 6)})


def test_files_that_are_neither(tmp_path):
    (tmp_path / "empty.npz").touch()
    (tmp_path / "text.npz").write_text("observations,actions\n")
    (tmp_path / "folder").mkdir()
    for name, message in (("empty.npz", "is empty"), ("text.npz", "neither an HDF5"), ("folder", "no data/metadata.json")):
        with pytest.raises(DataError, match=message):
            load_dataset(tmp_path / name)
    with pytest.raises(DataError, match="no such file; the nearest: empty.npz"):
        load_dataset(tmp_path / "empyt.npz")


def test_paths_with_spaces_and_other_letters(tmp_path):
    path = tmp_path / "meine Daten äöü" / "läufe 1.npz"
    path.parent.mkdir()
    np.savez(path, **arrays())
    assert len(load_dataset(path)) == len(load_dataset(str(path))) == 6


def made(lengths, flags, known, stored, space, objectives) -> Dataset:
    rng, n = np.random.default_rng(1), sum(lengths)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    last = starts[1:] - 1
    terminated, truncated = np.zeros(n, bool), np.zeros(n, bool)
    terminated[last], truncated[last] = [f == "t" for f in flags], [f == "u" for f in flags]
    action = rng.integers(0, space.n, n) if isinstance(space, Discrete) else rng.uniform(-1, 1, (n, space.size)).astype(np.float32)
    reward = rng.standard_normal((n, objectives) if objectives else n).astype(np.float32)
    obs, after = (rng.standard_normal((k, 2)).astype(np.float32) for k in (n, len(lengths)))
    base = Dataset.from_arrays(obs, action, reward, terminated, action_space=space, env_id="Mine-v0")
    data = replace(base, terminated=terminated, truncated=truncated, starts=starts, last_obs=after, last_known=np.array(known))
    if stored:
        following = rng.standard_normal((n, 2)).astype(np.float32)
        data = replace(data, next_obs=following, last_obs=following[last], last_known=np.ones(len(lengths), bool))
    return data


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("save", [save_npz, save_d4rl])
@pytest.mark.filterwarnings("ignore:.*end without a flag")
@given(data=st.data())
def test_what_is_saved_trains_alike(save, data, tmp_path_factory):
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    each = {"min_size": len(lengths), "max_size": len(lengths)}
    flags, known = data.draw(st.text("tu-", **each)), data.draw(st.lists(st.booleans(), **each))
    space = data.draw(st.sampled_from([Box.of(2, -1, 1), Discrete(3)]))
    original = made(lengths, flags, known, data.draw(st.booleans()), space, data.draw(st.sampled_from([0, 2])))
    want = original.transitions()
    path = save(original, tmp_path_factory.mktemp("saved") / "data.bin")
    loaded = load_dataset(path, action_space=space)
    got = loaded.transitions()
    for field in ("obs", "action", "reward", "mask"):
        np.testing.assert_array_equal(getattr(got, field), getattr(want, field))
    bootstraps = want.mask.bool()
    np.testing.assert_array_equal(got.next_obs[bootstraps], want.next_obs[bootstraps])
    assert loaded.spec.env_id == "Mine-v0" and loaded.lengths.tolist() == original.lengths.tolist()


def test_the_saved_file_says_what_it_is(tmp_path):
    data = made([2, 3], "tu", [True, True], False, Box((-2.0, -1.0), (2.0, 3.0)), 0)
    with h5py.File(save_d4rl(data, tmp_path / "a.hdf5")) as file:
        assert sorted(file) == sorted(OURS) and file.attrs["env_id"] == "Mine-v0"
        assert file["terminals"].dtype == bool and file["observations"].fletcher32
    loaded = load_dataset(tmp_path / "a.hdf5")
    assert loaded.fingerprint == data.fingerprint and loaded.spec == data.spec


@pytest.mark.parametrize("save", [save_npz, save_d4rl])
def test_saving_replaces_only_when_asked_and_whole(save, tmp_path, monkeypatch):
    first, second = (made([2, k], "tu", [True, True], False, Box.of(2), 0) for k in (3, 4))
    path = save(first, tmp_path / "sub" / "a.bin")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save(second, path)
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        save(second, path, overwrite=True)
    monkeypatch.undo()
    assert load_dataset(path).fingerprint == first.fingerprint and [p.name for p in path.parent.iterdir()] == ["a.bin"]
    save(second, path, overwrite=True)
    assert load_dataset(path).fingerprint == second.fingerprint
    (path.parent / "plain").touch()
    assert path.stat().st_mode == (path.parent / "plain").stat().st_mode
