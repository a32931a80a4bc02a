"""Drawing MuJoCo without a screen: which OpenGL backend works is found out in a child process, before this one is bound to it."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache

_PROBE = "import mujoco.{0} as gl; context = gl.GLContext(16, 16); context.make_current(); context.free()"
_ADVICE = "To draw without a screen install (Debian) libegl1 libegl-mesa0 libgl1-mesa-dri, or libosmesa6, and leave MUJOCO_GL unset"


class RenderError(RuntimeError):
    """A picture that could not be drawn; the message says why and what to install."""

    def __init__(self, cause: str) -> None:
        super().__init__(f"{cause}. {_ADVICE}")


def choose_backend(required: bool = True) -> str | None:
    """The OpenGL backend for MuJoCo, set as MUJOCO_GL where nobody set it and there is no screen: egl, else osmesa.

    Gymnasium reads MUJOCO_GL at the first frame, so this may come after the first import of mujoco. None where a screen is there to
    draw on. Raises RenderError where nothing works, if it is `required`.
    """
    screen = not sys.platform.startswith("linux") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if screen or os.environ.get("MUJOCO_GL"):
        return os.environ.get("MUJOCO_GL")
    reasons = []
    for backend in ("egl", "osmesa"):
        reason = _fails(backend)
        if reason is None:
            os.environ["MUJOCO_GL"] = backend
            return backend
        reasons.append(f"{backend}: {reason}")
    if required:
        raise RenderError(f"there is no screen, and MuJoCo cannot draw without one here ({'; '.join(reasons)})")
    return None


@cache
def _fails(backend: str) -> str | None:
    """Why a fresh process cannot open a context of this backend, None where it can."""
    environment = os.environ | {"MUJOCO_GL": backend}
    environment.pop("PYOPENGL_PLATFORM", None)
    done = subprocess.run([sys.executable, "-c", _PROBE.format(backend)], env=environment, capture_output=True, text=True, timeout=120)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
