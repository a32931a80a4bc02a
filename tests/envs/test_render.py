"""Drawing without a screen: the backend that works is found, and its absence is explained."""

from __future__ import annotations

import os

import pytest

from offrl.envs import render
from offrl.envs.make import make
from offrl.envs.render import RenderError, choose_backend

PACKAGES = r"libegl1 libegl-mesa0 libgl1-mesa-dri, or libosmesa6"


@pytest.fixture(autouse=True)
def headless(monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("MUJOCO_GL", "")  # restored afterwards, whatever the test sets
    for name in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)


def test_a_hopper_is_drawn_or_the_packages_are_named():
    try:
        backend = choose_backend()
    except RenderError as error:
        assert PACKAGES in str(error)
        return
    assert os.environ["MUJOCO_GL"] == backend
    env = make("Hopper-v5", seed=0, render="rgb_array")
    picture = env.render()
    env.close()
    assert picture.shape == (480, 480, 3) and picture.std() > 10


@pytest.mark.parametrize(("broken", "chosen"), [((), "egl"), (("egl",), "osmesa")])
def test_egl_is_preferred_and_osmesa_is_next(broken, chosen, monkeypatch):
    monkeypatch.setattr(render, "_fails", lambda backend: "broken" if backend in broken else None)
    assert choose_backend() == chosen == os.environ["MUJOCO_GL"]


def test_where_nothing_works_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(render, "_PROBE", "raise OSError('no {0} here')")
    render._fails.cache_clear()
    try:
        with pytest.raises(RenderError, match=rf"egl: OSError: no egl here; osmesa: OSError: no osmesa here.*{PACKAGES}"):
            make("Hopper-v5", render="rgb_array")
        assert choose_backend(required=False) is None
    finally:
        render._fails.cache_clear()
    assert "MUJOCO_GL" not in os.environ
    make("Hopper-v5").close()  # what draws nothing needs nothing
    make("CartPole-v1", render="rgb_array").close()


@pytest.mark.parametrize("screen", ["DISPLAY", "WAYLAND_DISPLAY"])
def test_a_screen_or_a_users_choice_is_left_alone(screen, monkeypatch):
    monkeypatch.setattr(render, "_fails", lambda backend: pytest.fail("nothing needs probing"))
    with monkeypatch.context() as patch:
        patch.setenv("MUJOCO_GL", "osmesa")
        assert choose_backend() == "osmesa"
    monkeypatch.setenv(screen, ":0")
    assert choose_backend() is None and "MUJOCO_GL" not in os.environ
