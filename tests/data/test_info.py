"""The figures of a dataset, and the commands that show them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from offrl.__main__ import main
from offrl.core.space import Box
from offrl.data.dataset import Dataset
from offrl.data.info import info, transition_weighted_return
from offrl.data.load import load_dataset
from offrl.data.save import save_npz
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


@pytest.fixture
def command(capsys, monkeypatch):
    """`offrl data ...` in this process: (exit code, what it printed)."""
    monkeypatch.setenv("COLUMNS", "80")

    def call(*arguments):
        code = main(["data", *map(str, arguments)])
        return code, capsys.readouterr().out

    return call


def test_the_info_command_shows_the_figures(command, tmp_path):
    path = save_npz(load_dataset(arrays(), env_id="Hopper-v5"), tmp_path / "a.npz")
    code, out = command("info", path)
    assert code == 0 and "12 in 2 episodes" in out and "1 terminated, 1 cut by a limit, 0 open" in out
    assert "2 numbers in [-1, 1], float32" in out and str(path) in out and "in memory" in out and "score" in out
    assert max(map(len, out.splitlines()[1:])) <= 80 and not any(line != line.rstrip() for line in out.splitlines())
    about = json.loads(command("info", path, "--json")[1])
    assert about["file"] == str(path) and about["format"] == "NPZ" and about["file_bytes"] == path.stat().st_size
    assert {key: about[key] for key in info(load_dataset(path))} == info(load_dataset(path))


def test_the_info_command_shows_several_objectives(command, tmp_path):
    path = save_npz(load_dataset(arrays(rewards=np.arange(24.0).reshape(12, 2))), tmp_path / "a.npz")
    lines = [line.split() for line in command("info", path)[1].splitlines()]
    assert [line[2:] for line in lines if line[:1] == ["return"]] == [
        ["42.0", "54.0", "66.0", "78.0", "90.0", "66.0", "62.0"],
        ["49.0", "60.5", "72.0", "83.5", "95.0", "72.0", "68.2"],
    ]


def test_the_info_command_draws(command, tmp_path):
    path = save_npz(load_dataset(arrays()), tmp_path / "a.npz")
    assert command("info", path, "--plot", tmp_path / "a.png")[0] == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_the_check_command_says_what_and_what_to_do(command, tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, **arrays(actions=np.zeros(12, int), rewards=np.full(12, np.nan)))
    code, out = command("check", path)
    assert code == 1 and "error: actions: int64 from 0 to 0, and no action space is given (all 12 rows)\n" in out
    assert "\n    -> give the action space" in out and out.endswith("2 errors, 1 warning, 1 note\n")
    assert max(map(len, out.splitlines()[:-1])) <= 80 and "\x1b" not in out
    code, out = command("check", path, "--action-space", "discrete:1")
    assert code == 1 and "no action space" not in out
    code, out = command("check", path, "--json")
    about = json.loads(out)
    assert code == 1 and (about["errors"], about["warnings"], about["notes"]) == (2, 1, 1)
    assert about["findings"][0] | {"means": "", "advice": ""} == {
        "name": "not-finite", "severity": "error", "field": "rewards", "count": 12, "first_row": 0, "what": "NaN or infinity",
        "means": "", "advice": "", "unit": "rows", "of": 12,
    }  # fmt: skip
