"""`offrl(...)`: the command line in a process of its own, to be killed, starved and cut off.

Processes are forked from one that has imported everything, since importing takes seconds and a fork takes none.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from offrl.__main__ import main

MOTHER = """
import gc, json, os, resource, signal, sys, traceback
from offrl.__main__ import main

here, data = sys.argv[1:]
# everything that a training imports late is imported once, here
once = "--steps 1 --agent.hidden 2 --env Pendulum-v1 --final-episodes 1"
assert main(["train", "bc", data, "--runs", here, *once.split()]) == 0
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
sys.stdout.flush()
gc.freeze()
os.write(1, b"ready\\n")
for line in sys.stdin:
    job = json.loads(line)
    if os.fork():
        continue
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if child:
        os.write(1, b"%d\\n" % child)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with open(job["folder"] + "/code.new", "w") as file:
            file.write(str(code))
        os.rename(job["folder"] + "/code.new", job["folder"] + "/code")
        os._exit(0)
    os.setsid()
    os.chdir(job["cwd"])
    for name, value in job["env"].items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    for number, name in enumerate(("/dev/null", job["folder"] + "/out", job["folder"] + "/err")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
    if job["limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], resource.RLIM_INFINITY))
    if job["stdout"] == "unread":
        read, write = os.pipe()
        os.dup2(write, 1)
        os.close(read)
    elif job["stdout"] == "closed":
        os.close(1)
        sys.stdout = None  # as Python begins where it is closed
    if job["user"]:
        os.setuid(job["user"])
    try:
        code = main(job["args"])
    except SystemExit as exit:
        code = exit.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if sys.stdout:
        sys.stdout.flush()
    os._exit(code or 0)  # tearing down what was forked would take longer than most of what is run
"""


@pytest.fixture(autouse=True, scope="session")
def kept_apart(tmp_path_factory):
    """What is kept of datasets that are slow to read lies in a folder of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OFFRL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


class Ended(NamedTuple):
    code: int  # negative: the signal that killed it
    out: str
    err: str


class Process:
    def __init__(self, pid: int, folder: Path):
        self.pid, self.folder = pid, folder

    def kill(self, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    @property
    def alive(self) -> bool:
        return not (self.folder / "code").exists()

    def until(self, condition, timeout: float = 60) -> None:
        """Waits for a condition; fails if the process ends first."""
        end = time.monotonic() + timeout
        while not condition():
            assert self.alive and time.monotonic() < end, self.ended() if not self.alive else "it takes too long"
            time.sleep(0.002)

    def ended(self, timeout: float = 60) -> Ended:
        """Waits for its end."""
        end = time.monotonic() + timeout
        while self.alive:
            assert time.monotonic() < end, f"the process does not end: {(self.folder / 'err').read_text()}"
            time.sleep(0.005)
        out, err = ((self.folder / name).read_text(errors="surrogateescape") for name in ("out", "err"))
        return Ended(int((self.folder / "code").read_text()), out, err)


class Launcher:
    """`start` gives a running Process, a call waits for its end."""

    def __init__(self, folder: Path, data: Path):
        self.folder, self.data, self.processes = folder, data, []

    def start(self, *args, cwd=None, env=None, limit=None, stdout=None, user=None) -> Process:
        """env: variables to set, or to unset with None; limit: bytes that a file may have; stdout: "unread", a pipe whose reader has
        gone, or "closed"; user: the user id to take."""
        if not self.processes:
            command = [sys.executable, "-c", MOTHER, str(self.folder / "runs"), str(self.data)]
            self.mother = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            for line in self.mother.stdout:
                if line == "ready\n":
                    break
        folder = self.folder / str(len(self.processes))
        folder.mkdir()
        for name in ("out", "err"):  # the process may be killed before it opens them
            (folder / name).touch()
        job = {"args": [os.fspath(arg) for arg in map(_text, args)], "folder": str(folder), "cwd": os.fspath(cwd or self.folder)}
        print(json.dumps(job | {"env": env or {}, "limit": limit, "stdout": stdout, "user": user}), file=self.mother.stdin, flush=True)
        self.processes.append(Process(int(self.mother.stdout.readline()), folder))
        return self.processes[-1]

    def __call__(self, *args, **options) -> Ended:
        return self.start(*args, **options).ended()

    def close(self) -> None:
        for process in self.processes:
            if process.alive:
                process.kill()
        if self.processes:
            self.mother.kill()
            self.mother.communicate()


def _text(arg) -> str:
    return os.fspath(arg) if isinstance(arg, os.PathLike) else str(arg)


def _write(path: Path, rows: int = 400, seed: int = 0, **changed) -> Path:
    """Random transitions of Pendulum's shape as an NPZ archive, eight episodes of it."""
    rng = np.random.default_rng(seed)
    obs = rng.standard_normal((rows, 3)).astype(np.float32)
    columns = {"obs": obs, "action": rng.uniform(-2, 2, (rows, 1)).astype(np.float32), "reward": rng.standard_normal(rows)}
    columns |= {"terminated": np.zeros(rows, bool), "truncated": np.arange(rows) % 50 == 49, "next_obs": obs + np.float32(0.1)}
    np.savez(path, **columns | changed)
    return path


@pytest.fixture(scope="session")
def write_data():
    return _write


@pytest.fixture
def run(capfd):
    """`main` in this process: (exit code, what it said, what it complained about)."""

    def call(*args):
        try:
            code = main([str(arg) for arg in args])
        except SystemExit as exit:
            code = exit.code
        return code, *capfd.readouterr()

    return call


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return _write(tmp_path_factory.mktemp("data") / "data.npz")


@pytest.fixture(scope="session")
def offrl(tmp_path_factory, data):
    launcher = Launcher(tmp_path_factory.mktemp("processes"), data)
    yield launcher
    launcher.close()
