"""Several datasets as one, episodes chosen out of one, and the commands that do it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offrl.__main__ import main
from offrl.core.space import Box, Discrete
from offrl.data.dataset import DataError, Dataset
from offrl.data.load import load_dataset
from offrl.data.reshape import choose, merge
from offrl.data.save import save_npz


def made(lengths, seed=0, *, stored=False, known=True, open_end=False, objectives=0, size=2, **about) -> Dataset:
    """Episodes that end by either flag, their rewards all the number of the episode."""
    rng, n = np.random.default_rng(seed), sum(lengths)
    ends = np.isin(np.arange(n), np.cumsum(lengths) - 1)
    ends[-1] &= not open_end
    terminated = ends & (rng.random(n) < 0.5)
    obs, after = rng.standard_normal((2, n, size)).astype(np.float32)
    if not stored:
        after[:-1][~ends[:-1]] = obs[1:][~ends[:-1]]
    reward = np.repeat(np.arange(len(lengths)), lengths).astype(np.float32)
    reward = np.stack([reward] * objectives, 1) if objectives else reward
    action = rng.uniform(-1, 1, (n, 1))
    return Dataset.from_arrays(obs, action, reward, terminated, ends & ~terminated, after if known else None, **about)


flags = {name: st.booleans() for name in ("stored", "known", "open_end")}
parts = st.builds(made, st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 99), **flags)


@settings(max_examples=60, deadline=None)
@given(st.lists(parts, min_size=1, max_size=4))
def test_what_is_merged_comes_apart_again(datasets):
    whole, first = merge(datasets), 0
    assert whole.episodes == sum(each.episodes for each in datasets) and len(whole) == sum(map(len, datasets))
    for each in datasets:
        part = whole.subset(slice(first, first + each.episodes))
        first += each.episodes
        assert part.fingerprint == each.fingerprint and part.spec == each.spec
    got, want = whole.transitions(), [each.transitions() for each in datasets]
    for field in ("obs", "action", "reward", "next_obs", "mask"):
        np.testing.assert_array_equal(getattr(got, field), np.concatenate([getattr(each, field) for each in want]))


def test_a_merge_names_all_that_clashes():
    base = made([2], env_id="Plant-v0", ref_min=0.0, ref_max=1.0)
    others = {
        "observations are 2 wide in a and 3 in b": made([2], size=3, env_id="Plant-v0", ref_min=0.0, ref_max=1.0),
        "env_id is 'Plant-v0' in a and None in b; ref_min is 0.0 in a and None in b; ref_max is 1.0": made([2]),
        "action is Box.* in a and Box.* in b": made([2], env_id="Plant-v0", ref_min=0.0, ref_max=1.0, action_space=Box.of(1, -1, 1)),
        "one reward in a and 2 objectives in b": made([2], objectives=2, env_id="Plant-v0", ref_min=0.0, ref_max=1.0),
        "action is Box.* in a and Discrete.n=2. in b": replace(base, spec=replace(base.spec, action=Discrete(2))),
    }
    for message, other in others.items():
        with pytest.raises(DataError, match=f"not of one kind: {message}.*can be given when it is read"):
            merge([base, other], ["a", "b"])
    with pytest.raises(DataError, match="at least one"):
        merge([])


def test_a_merge_keeps_what_is_said_of_all():
    one, two = (replace(d, spec=replace(d.spec, dataset_id=name)) for d, name in ((made([2]), "a/x-v0"), (made([3]), "a/y-v0")))
    assert merge([one, two]).spec.dataset_id is None and merge([one, one]).spec.dataset_id == "a/x-v0"
    two = replace(two, spec=replace(two.spec, obs=Box((-1.0, -5.0), (9.0, 1.0))))
    assert merge([replace(one, spec=replace(one.spec, obs=Box.of(2, -2, 2))), two]).spec.obs == Box((-2.0, -5.0), (9.0, 2.0))
    assert merge([one, two]).spec.obs == Box.of(2)


@pytest.mark.parametrize(
    ("conditions", "chosen"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"first": 2}, [0, 1]),
        ({"last": 2}, [4, 5]),
        ({"first": 4, "last": 4}, [2, 3]),
        ({"first": 99}, [0, 1, 2, 3, 4, 5]),
        ({"episodes": [4, 0, 4]}, [0, 4]),
        ({"min_length": 3}, [0, 2, 5]),
        ({"top": 0.3}, [4, 5]),
        ({"top": 1 / 6}, [5]),
        ({"top": 1.0}, [0, 1, 2, 3, 4, 5]),
        ({"top": 0.5}, [2, 4, 5]),  # of two that are equal the first
        ({"top": 0.1, "first": 4}, [2]),
        ({"top": 0.34, "min_length": 3}, [2, 5]),
        ({"episodes": [1, 2, 3], "last": 4, "min_length": 2, "top": 0.5}, [2]),
    ],
)
def test_episodes_meet_every_condition(conditions, chosen):
    data = made([3, 1, 3, 2, 2, 3])
    assert data.returns.tolist() == [0, 1, 6, 6, 8, 15]
    assert choose(data, **conditions).tolist() == chosen


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({"episodes": [0, 2]}, "there is no episode 2; there are episodes 0 to 1"),
        ({"episodes": [-1]}, "there is no episode -1"),
        ({"episodes": []}, "no episode meets"),
        ({"min_length": 4}, "no episode meets"),
        ({"first": 1, "last": 1}, "no episode meets"),
        ({"first": 0}, "whole numbers from 1"),
        ({"top": 0.0}, "a share above 0"),
        ({"top": 1.5}, "a share above 0"),
    ],
)
def test_conditions_that_cannot_be_met(conditions, message):
    with pytest.raises(DataError, match=message):
        choose(made([3, 1]), **conditions)


def test_the_best_of_several_objectives_is_not_guessed():
    with pytest.raises(DataError, match="best is not said by 2 objectives"):
        choose(made([3, 1], objectives=2), top=0.5)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """`offrl data ...` in the folder of the test: (exit code, what it said, what it complained about)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OFFRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))

    def call(*words):
        code = main(["data", *map(str, words)])
        return code, *capsys.readouterr()

    return call


def test_merge_and_split_on_the_command_line(run):
    one, two = made([3, 1], 1), made([2, 2, 4], 2)
    save_npz(one, "one.npz"), save_npz(two, "two.npz")
    code, out, _ = run("merge", "one.npz", "two.npz", "both.parquet")
    both = load_dataset("both.parquet")
    assert code == 0 and out == f"both.parquet: 12 rows, 5 episodes, fingerprint {both.fingerprint}\n"
    assert both.fingerprint == merge([one, two]).fingerprint
    assert run("split", "both.parquet", "part.csv.gz", "--fractions", 0.6, 0.4, "--names", "train", "test")[0] == 0
    train, test = (load_dataset(f"part-{name}.csv.gz") for name in ("train", "test"))
    assert [train.fingerprint, test.fingerprint] == [each.fingerprint for each in both.split([0.6, 0.4])]
    assert run("split", "both.parquet", "me/part-v0", "--fractions", 0.2, 0.2, "--seed", 1)[0] == 0
    assert load_dataset("me/part-1-v0").fingerprint == both.split([0.2, 0.2], seed=1)[1].fingerprint


def test_subset_on_the_command_line(run):
    data = made([3, 1, 3, 2])
    save_npz(data, "a.npz")
    assert run("subset", "a.npz", "b.hdf5", "--episodes", "0,2-3", "--min-length", 3)[0] == 0
    assert load_dataset("b.hdf5").fingerprint == data.subset([0, 2]).fingerprint
    assert run("subset", "a.npz", "b.hdf5", "--top", 0.5, "--last", 3, "--overwrite")[0] == 0
    assert load_dataset("b.hdf5").fingerprint == data.subset([2, 3]).fingerprint


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("subset a.npz b.hdf5 --episodes 3-", "--episodes '3-': write 0-99 or 0,3,7-9"),
        ("subset a.npz b.hdf5 --episodes 9", "there is no episode 9"),
        ("subset a.npz b.hdf", "'b.hdf' is no format: end it in .hdf5, .h5, .npz, .csv, .csv.gz, .parquet, or write a Minari id"),
        ("subset a.npz a.npz", "a.npz is there already; --overwrite replaces it"),
        ("merge a.npz b.npz", "usage: offrl data merge SOURCE SOURCE ... OUT"),
        ("merge a.npz wide.npz b.npz", "observations are 2 wide in a.npz and 3 in wide.npz"),
        ("split a.npz b.npz --fractions 0.5 0.6", "sum to at most 1"),
        ("split a.npz b.npz --fractions 0.5 0.01", "2 episodes are too few"),
        ("split a.npz b.npz --fractions 0.5 0.5 --names x x", "give each of the 2 parts a name of its own"),
        ("split a.npz b.npz --fractions 0.5 0.5 --names x", "give each of the 2 parts a name of its own"),
        ("split a.npz taken.npz --fractions 0.5 0.5", "taken-1.npz is there already"),
        ("convert b.npz c.npz", "b.npz: no such file"),
        ("convert a.npz c.npz --obs x", "columns are given, and this is neither a CSV"),
        ("convert a.npz c.npz --columns x.yaml --next-obs y", "--columns x.yaml says what --next-obs says; give one of them"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(run, command, message, tmp_path):
    save_npz(made([3, 1]), "a.npz"), save_npz(made([1], size=3), "wide.npz"), save_npz(made([1]), "taken-1.npz")
    before = sorted(tmp_path.iterdir())
    code, _, err = run(*command.split())
    assert code == 1 and message in err
    assert sorted(tmp_path.iterdir()) == before
