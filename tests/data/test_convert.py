"""Every format gives back what it was given: rows, flags, borders, unknown successors, spaces, ids and scores."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import offrl.data.save as save
from offrl.__main__ import main
from offrl.core.space import Box, Discrete
from offrl.core.types import Spec
from offrl.data.dataset import DataError, Dataset
from offrl.data.load import load_dataset
from offrl.data.save import lost_in_minari, save_csv, save_d4rl, save_minari, save_npz, save_parquet
from offrl.envs import scores

SAVE = {".npz": save_npz, ".hdf5": save_d4rl, ".csv": save_csv, ".csv.gz": save_csv, ".parquet": save_parquet}

HOPPER = (None, "hopper-medium-v2", *scores.reference("hopper-medium-v2"))


@pytest.fixture(autouse=True)
def folders(tmp_path_factory, monkeypatch):
    for name in ("OFFRL_CACHE", "MINARI_DATASETS_PATH", "D4RL_DATASET_DIR"):
        monkeypatch.setenv(name, str(tmp_path_factory.mktemp("folder")))


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


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.filterwarnings("ignore:.*end without a flag")
@pytest.mark.parametrize("suffix", SAVE)
@given(data=datasets())
def test_what_is_saved_is_loaded(suffix, data, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / f"a{suffix}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save, "BLOCK", 64)  # a row or two at once
        assert SAVE[suffix](data, path) == path
    loaded = load_dataset(path)
    assert loaded.fingerprint == data.fingerprint
    assert loaded.spec == data.spec


def rich(known=True, stored=True, flags="tu-b") -> Dataset:
    """Open ends in the middle, bounds on one side, two objectives, numbers that need every digit."""
    rng, lengths = np.random.default_rng(3), np.array([3, 1, 2, 2])
    n, starts = 8, np.concatenate([[0], np.cumsum(lengths)])
    last = starts[1:] - 1
    obs, after, next_obs = some_floats(rng, n, 2), some_floats(rng, 4, 2), some_floats(rng, n, 2)
    after = after if known else obs[last]
    next_obs[last] = after
    ends = {name: np.zeros(n, bool) for name in ("terminated", "truncated")}
    for kind, row in zip(flags, last):
        ends["terminated"][row], ends["truncated"][row] = kind in "tb", kind in "ub"
    space = Box((-np.inf, 0.1), (1e30, np.inf))
    spec = Spec(Box((-1.0, -np.inf), (0.1, 3.0)), space, "Plant-v0", None, -0.1, 1e9)
    known = np.full(4, known)
    return Dataset(
        obs, some_floats(rng, n, 2), some_floats(rng, n, 2), **ends, starts=starts, last_obs=after, last_known=known, spec=spec,
        next_obs=next_obs if stored else None,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*end without a flag")
@pytest.mark.parametrize(("here", "there"), list(itertools.combinations([*SAVE, "minari"], 2)))
def test_there_and_back_again(here, there, tmp_path, capsys):
    data = rich(stored="minari" not in (here, there))
    if here == "minari":
        save_minari(data, start := "me/start-v0", env_spec_json=None, metadata={"author": "me", "seed": 3})
        data = replace(data, spec=replace(data.spec, dataset_id=start))
    else:
        start = SAVE[here](data, tmp_path / f"start{here}")
    middle = "me/middle-v0" if there == "minari" else tmp_path / f"middle{there}"
    back = "me/back-v0" if here == "minari" else tmp_path / f"back{here}"
    for source, target in ((start, middle), (middle, back)):
        assert main(["data", "convert", str(source), str(target)]) == 0
        loaded, renamed = load_dataset(target), isinstance(target, str)
        data = replace(data, spec=replace(data.spec, dataset_id=target)) if renamed else data  # Minari's id is the dataset's name
        assert (loaded.fingerprint, loaded.spec) == (data.fingerprint, data.spec)
        assert f": 8 rows, 4 episodes, fingerprint {data.fingerprint}\n" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*end without a flag")
def test_what_minari_cannot_hold_is_named(tmp_path, capsys):
    data = rich(known=False)
    path = save_npz(data, tmp_path / "a.npz")
    lost = [
        "the last row of 2 episodes, whose next observation is not known",
        "that the observation after 2 terminated episodes is not known (their last one stands for it)",
        "next observations that are not the row below",
    ]
    assert lost_in_minari(data) == lost
    assert main(["data", "convert", str(path), "me/plant-v0"]) == 1
    assert f"Minari cannot hold {'; '.join(lost)}. Other formats can; --lossy leaves it out" in capsys.readouterr().err
    assert main(["data", "convert", str(path), "me/plant-v0", "--lossy"]) == 0
    said, loaded = capsys.readouterr(), load_dataset("me/plant-v0")
    assert f"warning: me/plant-v0 is without {'; '.join(lost)}" in said.err
    assert loaded.lengths.tolist() == [3, 1, 2] and loaded.fingerprint in said.out, "what is said is what is there"


def test_minari_reads_what_is_converted(tmp_path):
    minari = pytest.importorskip("minari")
    rng = np.random.default_rng(0)
    ends = np.arange(20) % 5 == 4
    data = Dataset.from_arrays(
        *(rng.standard_normal((20, k)) for k in (3, 1)), np.ones(20), ends, next_obs=rng.standard_normal((20, 3)), env_id="Pendulum-v1"
    )
    data = replace(data, next_obs=None)
    save_npz(data, tmp_path / "a.npz")
    assert main(["data", "convert", str(tmp_path / "a.npz"), "me/pendulum-v0"]) == 0
    read = minari.load_dataset("me/pendulum-v0")
    assert read.env_spec.id == "Pendulum-v1" and (read.total_episodes, read.total_steps) == (4, 20)
    np.testing.assert_array_equal(read[1].observations, [*data.obs[5:10], data.last_obs[1]])


def test_words_of_a_minari_dataset_go_with_it_or_are_named(tmp_path, capsys):
    save_minari(rich(stored=False, flags="tutu"), "me/a-v0", env_spec_json=None, metadata={"author": "me", "offrl_build": {"seed": 3}})
    assert main(["data", "convert", "me/a-v0", "me/b-v0"]) == 0
    out = capsys.readouterr().out
    assert "its dataset_id was me/a-v0" in out and "not in it" not in out
    about = json.loads((save.minari_root() / "me/b-v0/data/metadata.json").read_text())
    assert about["author"] == ["me"] and about["offrl_build"] == {"seed": 3} and about["dataset_id"] == "me/b-v0"
    assert main(["data", "convert", "me/a-v0", str(tmp_path / "a.npz")]) == 0
    assert "not in it: author, offrl_build in the source's metadata.json" in capsys.readouterr().out


def test_d4rls_reading_is_not_done_twice(tmp_path, monkeypatch):
    rng, n = np.random.default_rng(0), 12
    with h5py.File(tmp_path / "hopper_medium-v2.hdf5", "w") as file:
        for name, size in (("observations", 3), ("actions", 2)):
            file[name] = rng.uniform(-1, 1, (n, size)).astype(np.float32)
        file["rewards"], file["terminals"], file["timeouts"] = np.ones(n), np.arange(n) == 3, np.arange(n) % 6 == 5
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    data = load_dataset("hopper-medium-v2")
    assert len(data) == 10 and data.spec.dataset_id == "hopper-medium-v2" and data.spec.ref_max == HOPPER[3]
    for suffix in SAVE:
        path = tmp_path / f"{suffix[-2:]}{suffix}"
        assert main(["data", "convert", "hopper-medium-v2", str(path)]) == 0
        loaded = load_dataset(path)
        assert loaded.fingerprint == data.fingerprint and loaded.spec == data.spec


def test_choices_are_numbered_aloud(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("o,a,r,t\n1,off,0,0\n2,on,1,1\n")
    flags = "--obs o --action a --actions on off --reward r --terminated t --env Plant-v0"
    assert main(["data", "convert", str(tmp_path / "a.csv"), str(tmp_path / "a.npz"), *flags.split()]) == 0
    assert capsys.readouterr().out.startswith("actions: 0 is on, 1 is off\n")
    data = load_dataset(tmp_path / "a.npz")
    assert data.action.tolist() == [1, 0] and data.spec.action == Discrete(2) and data.spec.env_id == "Plant-v0"


def test_other_readers_see_every_cut(tmp_path):
    """They know flags and the row below alone, and must not bootstrap across an end that no flag marks."""
    data = rich(stored=False)
    with h5py.File(save_d4rl(data, tmp_path / "a.hdf5")) as file:
        assert file["timeouts"][:].tolist() == [0, 0, 0, 1, 0, 1, 0, 1] and file["terminals"][:].tolist() == [0, 0, 1, 0, 0, 0, 0, 1]
        np.testing.assert_array_equal(file["next_observations"], data.full_next_obs())
    with np.load(save_npz(data, tmp_path / "a.npz")) as file:
        assert file["truncated"].tolist() == [0, 0, 0, 1, 0, 1, 0, 1]
    some = replace(data, last_known=np.array([True, False, True, True]))
    with h5py.File(save_d4rl(some, tmp_path / "b.hdf5")) as file:
        assert "next_observations" not in file, "one of them would be made up"


def test_plain_data_makes_plain_files(tmp_path):
    data = Dataset.from_arrays([[1.0], [2.0]], [[0.5], [0.25]], [0.1, 3.0], [False, True], next_obs=[[2.0], [4.0]])
    plain = ["obs", "action", "reward", "terminated", "truncated", "next_obs"]
    assert sorted(np.load(save_npz(data, tmp_path / "a.npz"))) == sorted([*plain, "offrl_spec"])
    text = save_csv(data, tmp_path / "a.csv").read_text().replace('"', "")
    assert text == "episode,obs_0,action_0,reward,terminated,truncated,last_obs_0\n0,1,0.5,0.1,false,false,\n0,2,0.25,3,true,false,4\n"


@pytest.mark.parametrize("saver", [save_csv, save_parquet], ids=["csv", "parquet"])
def test_tables_replace_only_when_asked_and_whole(saver, tmp_path, monkeypatch):
    first, second = rich(stored=False, flags="tutu"), rich(stored=False, flags="utut")
    path = tmp_path / "sub" / f"a.{saver.__name__.removeprefix('save_')}"
    there = sorted(p.name for p in saver(first, path).parent.iterdir())
    with pytest.raises(FileExistsError, match="overwrite=True"):
        saver(second, path)
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        saver(second, path, overwrite=True)
    monkeypatch.undo()
    assert load_dataset(path).fingerprint == first.fingerprint and sorted(p.name for p in path.parent.iterdir()) == there
    saver(second, path, overwrite=True)
    assert load_dataset(path).fingerprint == second.fingerprint
    with pytest.raises(DataError, match="call it .csv or .csv.gz"):
        save_csv(first, tmp_path / "a.txt")
