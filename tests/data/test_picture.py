"""The picture of a dataset: what its panels say, for data of every shape."""

from __future__ import annotations

import builtins

import numpy as np
import pytest

from offrl.core.space import Box, Discrete
from offrl.data import picture
from offrl.data.dataset import Dataset
from offrl.data.load import load_dataset
from offrl.data.picture import draw
from offrl.data.save import save_npz

figure = pytest.importorskip("matplotlib.figure")


@pytest.fixture
def panels(tmp_path, monkeypatch):
    """Draws, and gives the panels: title -> axes."""
    drawn = []
    save = figure.Figure.savefig

    def keep(self, path, **options):
        drawn.append(self)
        return save(self, path, dpi=30)

    monkeypatch.setattr(figure.Figure, "savefig", keep)

    def panels(data, name=None):
        assert draw(data, tmp_path / "a.png", name).read_bytes().startswith(b"\x89PNG")
        found = {axes.get_title(loc="left"): axes for axes in drawn[-1].axes}
        return found | {"": drawn[-1].get_suptitle()}

    return panels


def dataset(n=400, size=3, action=2, **about):
    rng = np.random.default_rng(0)
    ends = np.arange(n) % 20 == 19
    flags = {"terminated": ends & (np.arange(n) < n / 4), "truncated": ends & (np.arange(n) >= n / 4)}
    rows = {"obs": rng.standard_normal((n, size)), "action": rng.uniform(-1, 1, (n, action)), "reward": np.arange(n) % 4 == 0}
    return Dataset.from_arrays(**rows | flags | about)


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_the_panels_say_what_is_there(panels):
    found = panels(dataset(action_space=Box.of(2, -0.5, 0.5), env_id="$Hopper_v4$", ref_min=0, ref_max=10), "mine")
    assert found.pop("") == "mine: 400 transitions in 20 episodes of $Hopper_v4$"
    titles = list(found)
    assert titles[:2] == ["Returns (mean 5; above: normalised score)", "Lengths (all 20 steps)"]
    assert titles[2].startswith("Actions (") and titles[2].endswith("% outside)")
    assert titles[3].startswith("States (a plane of ") and titles[4:] == ["Rewards (75% zero)", "Features (3)"]
    assert legend(found["Lengths (all 20 steps)"]) == ["true ends: 5", "cut by a limit: 15"]
    assert legend(found[titles[3]]) == ["true ends", "cuts", "starts"]
    low, high = found[titles[2]].lines[0].get_xdata()
    assert (low, high) == (-0.5, 0.5)  # the bounds are marked


def test_the_explained_variance_is_that_of_the_plane(panels):
    rng = np.random.default_rng(0)
    plane = rng.standard_normal((2000, 2)) @ rng.standard_normal((2, 5))
    titles = list(panels(dataset(2000, obs=plane * [1, 10, 100, 1, 1] + 7)))
    assert "States (a plane of 100% of their variance)" in titles


@pytest.mark.parametrize(
    ("about", "titles"),
    [
        ({"action": np.arange(400) % 3, "action_space": Discrete(4)}, ["Actions (4 choices)"]),
        ({"reward": np.ones((400, 2))}, ["Returns (mean 20, 20)", "Rewards (0% zero)"]),
        ({"obs": np.arange(400.0)[:, None]}, ["States", "Features (1)"]),
        ({"obs": np.ones((400, 2)), "reward": np.zeros(400)}, ["States", "Rewards (100% zero)"]),
        ({"size": 400, "action": 60}, ["Features (400)"]),
        ({"obs": np.exp(np.random.default_rng(0).normal(0, 5, (400, 6)))}, ["Features (6)"]),
        ({"action": np.zeros((400, 1))}, ["Actions (no bounds are given)"]),
        ({"terminated": np.zeros(400), "truncated": None}, ["Lengths (all 400 steps)"]),
        ({"n": 1}, ["Lengths (all 1 steps)"]),
    ],
)
def test_data_of_any_shape_is_drawn(panels, about, titles):
    sizes = {key: about[key] for key in ("n", "size") if key in about}
    if isinstance(about.get("action"), int):
        sizes["action"] = about["action"]
    rest = {key: value for key, value in about.items() if key not in sizes}
    found = panels(dataset(**sizes, **rest) if "action" not in rest else _with_action(rest))
    assert set(titles) <= set(found)


def _with_action(about):
    columns = {key: getattr(dataset(), key) for key in ("obs", "reward", "terminated", "truncated")}
    return Dataset.from_arrays(**columns | about)


def test_a_sample_of_mapped_rows_is_drawn(panels, tmp_path, monkeypatch):
    monkeypatch.setenv("OFFRL_CACHE", str(tmp_path / "cache"))
    data = load_dataset(save_npz(dataset(3000), tmp_path / "a.npz"), memory="map")
    assert data.mapped
    monkeypatch.setattr(picture, "SAMPLE", 200)
    found = panels(data)
    counts = next(axes for title, axes in found.items() if title.startswith("States")).collections[0].get_array()
    assert counts.sum() == 200


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **options):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"offrl\[plot\]"):
        draw(dataset(), tmp_path / "a.png")
