"""D4RL's files as its own scripts wrote them, version by version: read by id as D4RL's loop reads them, and by path row by row."""

from __future__ import annotations

import h5py
import numpy as np
import pytest

from offrl.data.d4rl import max_steps
from offrl.data.dataset import DataError
from offrl.data.load import load_dataset
from offrl.envs import scores


def episodes(lengths, obs, act, ends, seed=0) -> dict[str, np.ndarray]:
    """Rows of episodes; `ends` says of each whether it terminated (t), was cut (u) or is open (-)."""
    rng, n = np.random.default_rng(seed), sum(lengths)
    last = np.cumsum(lengths) - 1
    data = {
        "observations": rng.standard_normal((n, obs)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (n, act)).astype(np.float32),
        "rewards": rng.standard_normal(n).astype(np.float32),
        "terminals": np.zeros(n, bool),
        "timeouts": np.zeros(n, bool),
    }
    data["terminals"][last], data["timeouts"][last] = [e == "t" for e in ends], [e == "u" for e in ends]
    return data


def infos(n, **widths):
    return {f"infos/{key}": np.ones((n, width), np.float32) for key, width in widths.items()}


def locomotion_v0():
    """No timeouts, no next observations, and what `medium-replay` of that version had: flags of one column."""
    data = episodes((1000, 400, 1000, 1000, 700), 11, 3, "-tt--")
    del data["timeouts"]
    return data | {key: data[key][:, None] for key in ("rewards", "terminals")}


def locomotion_v1():
    data = episodes((1000, 400, 600), 17, 6, "utu")
    following = np.roll(data["observations"], -1, 0) + np.repeat([0, 0.5], (1999, 1))[:, None].astype(np.float32)
    said = {"metadata/algorithm": np.bytes_("SAC"), "metadata/iteration": np.int32(1600), "infos/action_log_probs": np.ones(2000)}
    said |= {f"metadata/policy/{layer}/weight": np.ones((256, 17), np.float32) for layer in ("fc0", "fc1", "last_fc")}
    said |= {"metadata/policy/nonlinearity": np.bytes_("relu")}
    return data | {"next_observations": following} | said | infos(2000, qpos=9, qvel=9)


def replay_v2():
    """Float flags; a time limit and the end of training in the middle of an episode, at odd rows."""
    data = episodes((1000, 33, 1000, 7), 11, 3, "utu-")
    data["timeouts"][[1500, 1501]] = True
    return data | {key: data[key].astype(np.float32) for key in ("terminals", "timeouts")} | infos(2040, qpos=6, qvel=6)


def antmaze_v2():
    """A counter that is looked at before it is raised: episodes of limit + 1 rows."""
    return episodes((1001, 1001, 300), 29, 8, "uut") | infos(2302, goal=2, qpos=15, qvel=14)


def adroit_v0():
    return episodes((200, 300, 250), 39, 28, "uuu") | infos(750, door_body_pos=3, qpos=30, qvel=30)


def kitchen_v0():
    """A demonstration's end is terminal; the number of each row's demonstration is a column of its own, called infos."""
    data = episodes((250, 180, 300), 60, 9, "ttt")
    del data["timeouts"]
    return data | {"terminals": data["terminals"].astype(np.float32), "infos": np.repeat([0, 1, 2], (250, 180, 300))}


def maze2d_v1():
    """One trajectory; timeouts say where another goal was drawn."""
    data = episodes((1200,), 4, 2, "-") | infos(1200, goal=2, qpos=2, qvel=2)
    data["timeouts"][[91, 144, 230, 700]] = True
    return data


def relabelled_maze2d_v1():
    data = maze2d_v1()
    del data["timeouts"]
    return data


def carla_v0():
    """Rows in parts beside the whole, for those who cannot load the whole."""
    data = episodes((600, 400), 48, 2, "uu")
    return data | {f"virtual/{part}/{key}": data[key][part * 500 :][:500] for part in (0, 1) for key in data}


LAYOUTS = {
    "hopper-medium-replay-v0": locomotion_v0,
    "walker2d-medium-v1": locomotion_v1,
    "hopper-medium-replay-v2": replay_v2,
    "antmaze-medium-play-v2": antmaze_v2,
    "door-human-v0": adroit_v0,
    "kitchen-mixed-v0": kitchen_v0,
    "maze2d-umaze-v1": maze2d_v1,
    "maze2d-large-v1": relabelled_maze2d_v1,
    "carla-lane-v0": carla_v0,
}


def write(path, data):
    with h5py.File(path, "w") as file:
        for key, value in data.items():
            file.create_dataset(key, data=value, compression="gzip" if np.ndim(value) else None)
    return path


def by_its_loop(data, limit):
    """What D4RL's `qlearning_dataset` keeps: the rows' numbers and which of them end the task."""
    rows, ended, step = [], [], 0
    for row in range(len(data["rewards"]) - 1):
        done = bool(data["terminals"][row])
        if data["timeouts"][row] if "timeouts" in data else step == limit - 1:
            step = 0
            continue
        rows.append(row)
        ended.append(done)
        step = 1 if done else step + 1
    return np.array(rows), np.array(ended)


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_id_reads_as_d4rls_own_loop(tmp_path, monkeypatch, name):
    data = LAYOUTS[name]()
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    monkeypatch.setenv("OFFRL_CACHE", str(tmp_path / "cache"))
    write(tmp_path / scores.d4rl()[name]["url_path"].rpartition("/")[2], data)
    dataset = load_dataset(name)
    rows, ended = by_its_loop(data, max_steps(name))
    batch = dataset.transitions()
    np.testing.assert_array_equal(batch.obs, data["observations"][rows])
    np.testing.assert_array_equal(batch.next_obs, data["observations"][rows + 1])
    np.testing.assert_array_equal(batch.action, data["actions"][rows])
    np.testing.assert_array_equal(batch.reward, data["rewards"].reshape(-1)[rows])
    np.testing.assert_array_equal(batch.mask, 1.0 - ended)
    assert dataset.spec.dataset_id == name


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_path_reads_row_by_row(tmp_path, name):
    data = LAYOUTS[name]()
    dataset = load_dataset(write(tmp_path / "a.hdf5", data))
    np.testing.assert_array_equal(dataset.obs, data["observations"])
    np.testing.assert_array_equal(dataset.terminated, data["terminals"].reshape(-1).astype(bool))
    np.testing.assert_array_equal(dataset.truncated, data["timeouts"] if "timeouts" in data else np.zeros(len(dataset), bool))
    if "next_observations" in data:
        np.testing.assert_array_equal(dataset.full_next_obs(), data["next_observations"])


def test_time_limits_are_those_of_d4rls_registry():
    known = {"pen-human-v0": 100, "relocate-cloned-v1": 200, "kitchen-complete-v0": 280, "maze2d-open-dense-v0": 150}
    known |= {"maze2d-eval-umaze-dense-v1": 300, "maze2d-medium-v1": 600, "maze2d-large-dense-v1": 800, "antmaze-umaze-diverse-v2": 700}
    assert {name: max_steps(name) for name in known} == known and set(known) <= set(scores.d4rl())
    unknown = {name.split("-")[0] for name in scores.d4rl() if max_steps(name) is None}
    assert unknown == {"bullet", "carla", "flow", "minigrid"}


def test_without_timeouts_and_limit_the_id_says_so(tmp_path, monkeypatch):
    data = carla_v0()
    del data["timeouts"]
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    write(tmp_path / scores.d4rl()["carla-lane-v0"]["url_path"].rpartition("/")[2], data)
    with pytest.raises(DataError, match="no timeouts.*semantics='strict'"):
        load_dataset("carla-lane-v0")
    assert len(load_dataset("carla-lane-v0", semantics="strict")) == 1000


def test_parts_alone_are_no_dataset(tmp_path):
    parts = {key: value for key, value in carla_v0().items() if key.startswith("virtual/")}
    with pytest.raises(DataError, match="no 'observations' or 'obs'"):
        load_dataset(write(tmp_path / "a.hdf5", parts))


def test_strings_and_stray_scalars_do_no_harm(tmp_path):
    data = locomotion_v1()
    path = write(tmp_path / "a.hdf5", data)
    with h5py.File(path, "a") as file:
        file["metadata/author"] = "text"
        file["metadata/tags"] = np.array(["a", "b"], h5py.string_dtype())
        file["version"] = 2.0
        file["notes"] = np.bytes_("one\0two")
        file["infos/empty"] = h5py.Empty("f")
    plain = load_dataset({key: data[key] for key in ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")})
    assert load_dataset(path).fingerprint == plain.fingerprint


def test_an_axis_too_many_is_named(tmp_path):
    data = adroit_v0()
    with pytest.raises(DataError, match=r"observations must have shape \(N, size\).* not \(750, 1, 39\)"):
        load_dataset(write(tmp_path / "a.hdf5", data | {"observations": data["observations"][:, None]}))
