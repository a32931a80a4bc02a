"""Drawing MuJoCo without a screen: which OpenGL backend works is found out in a child process, before this one is bound to it."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache

_PROBE = "import mujoco.{0} as gl; context = gl.GLContext(16, 16); context.make_current(); context.free()"
_PACKAGES = "install libegl1 libegl-mesa0 libgl1-mesa-dri (for egl) or libosmesa6 (for osmesa), which are Debian's names for them"


class RenderError(RuntimeError):
    """Nothing can draw here; the message names what to install."""


def choose_backend() -> str:
    """The OpenGL backend that MuJoCo draws with, set as MUJOCO_GL where nobody set it and there is no screen: egl, else osmesa.

    Gymnasium reads MUJOCO_GL at the first frame, so it may come after the first import of mujoco. Raises RenderError.
    """
    if chosen := os.environ.get("MUJOCO_GL"):
        return chosen
    if not sys.platform.startswith("linux") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        return "glfw"
    reasons = []
    for backend in ("egl", "osmesa"):
        reason = _fails(backend)
        if reason is None:
            os.environ["MUJOCO_GL"] = backend
            return backend
        reasons.append(f"{backend}: {reason}")
    raise RenderError(f"there is no screen, and MuJoCo cannot draw without one here ({'; '.join(reasons)}). Please {_PACKAGES}")


@cache
def _fails(backend: str) -> str | None:
    """Why a fresh process cannot open a context of this backend, None where it can."""
    environment = os.environ | {"MUJOCO_GL": backend}
    environment.pop("PYOPENGL_PLATFORM", None)
    done = subprocess.run([sys.executable, "-c", _PROBE.format(backend)], env=environment, capture_output=True, text=True, timeout=120)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
