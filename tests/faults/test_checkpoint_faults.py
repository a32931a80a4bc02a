"""Kills, full disks, damage and malice, all of them real: after each the newest sound checkpoint loads, and nothing half-made does."""

import contextlib
import errno
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

from offrl.core.checkpoint import CheckpointError, Checkpoints, atomic_write, load_file, save_file
from offrl.core.tree import flatten

SAVER = """
import os, sys, torch
from offrl.core.checkpoint import Checkpoints
torch.set_num_threads(1)
for line in sys.stdin:  # one import, then a fresh process each time
    child = os.fork()
    if child == 0:
        checkpoints, step = Checkpoints(sys.argv[1]), int(line)
        while True:
            step += 1
            checkpoints.save(step, {"a": torch.full((200_000,), float(step)), "b": {"n": torch.tensor(step)}, "c": {}}, {"at": step})
            os.write(1, b"saved %d\\n" % step)
    os.write(1, b"child %d\\n" % child)
    os.waitpid(child, 0)
    os.write(1, b"dead 0\\n")
"""


UNNAMED = b'{"checkpoints": [{"file": null, "step": null, "bytes": 1, "sha256": ""}]}'


def example(step, size=10):
    return {"a": torch.full((size,), float(step)), "b": {"n": torch.tensor(step)}}


def complete(saved):
    return all((leaf == saved.step).all() for leaf in flatten(saved.tree).values())


def temporaries(folder):
    return [path for path in folder.iterdir() if path.suffix == ".tmp"]


@pytest.fixture
def run(tmp_path):
    """Checkpoints of steps 1 and 2, both sound."""
    checkpoints = Checkpoints(tmp_path / "run")
    for step in (1, 2):
        checkpoints.save(step, example(step), {})
    return checkpoints


@pytest.mark.parametrize("kills", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_kill_minus_nine_at_any_moment(tmp_path, kills):
    folder, moment, step = tmp_path / "run", random.Random(kills), 0
    with subprocess.Popen([sys.executable, "-c", SAVER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as saver:
        for count in range(kills):
            print(step, file=saver.stdin, flush=True)
            child, announced, waits_for = 0, step, "child" if count % 5 == 0 else "saved"
            for word, number in map(str.split, saver.stdout):
                if word == "dead":
                    break
                child, announced = (int(number), announced) if word == "child" else (child, int(number))
                if child and word == waits_for:
                    time.sleep(moment.uniform(0, 0.06))  # a save takes some 0.03 s
                    os.kill(child, signal.SIGKILL)
                    child = 0
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # not even the one before is needed
                saved = Checkpoints(folder).latest()
            if saved is None:
                assert announced == 0
            else:
                assert saved.step >= announced and complete(saved) and saved.tree["c"] == {} and saved.meta["at"] == saved.step
                step = saved.step
        saver.stdin.close()
    assert step >= 0.8 * kills
    Checkpoints(folder).save(step + 1, example(step + 1), {})
    assert not temporaries(folder)


@contextlib.contextmanager
def file_size_limit(size):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_disk_that_fills_up_while_writing(run):
    before = sorted((path.name, path.read_bytes()) for path in run.folder.iterdir())
    with file_size_limit(50_000), pytest.raises(CheckpointError) as error:
        run.save(3, example(3, size=100_000), {})
    assert str(error.value) == f"cannot write {run.folder / 'step-000000003.safetensors'}: File too large"
    assert sorted((path.name, path.read_bytes()) for path in run.folder.iterdir()) == before
    run.save(3, example(3), {})
    assert run.latest().step == 3


@pytest.mark.parametrize("failing", range(4))
def test_a_sync_that_fails(run, monkeypatch, failing):
    """Of the checkpoint's file, of its folder, of the manifest, of its folder."""
    calls, sync = [], os.fsync

    def fsync(file):
        calls.append(file)
        if len(calls) == failing + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CheckpointError, match="^cannot write .*: No space left on device$"):
        run.save(3, example(3), {})
    assert not temporaries(run.folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saved = run.latest()
    assert saved.step == (3 if failing == 3 else 2) and complete(saved)
    run.save(3, example(3), {})
    assert run.latest().step == 3


def test_a_file_that_cannot_be_replaced_stays_as_it_is(tmp_path, monkeypatch):
    atomic_write(tmp_path / "a", b"old")
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(errno.EIO, os.strerror(errno.EIO))))
    with pytest.raises(CheckpointError, match="Input/output error"):
        atomic_write(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old" and not temporaries(tmp_path)


def test_saving_again_at_a_step_and_being_killed_before_it_is_listed(tmp_path, monkeypatch):
    """The manifest then speaks of the file that was replaced."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, example(1), {"try": 1})
    listed = (tmp_path / "manifest.json").read_bytes()
    checkpoints.save(1, example(1), {"try": 2})
    (tmp_path / "manifest.json").write_bytes(listed)
    with pytest.warns(UserWarning, match="not the manifest's"):
        assert checkpoints.latest().meta["try"] == 2


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_checkpoint_is_passed_over(run, share):
    path = run.folder / "step-000000002.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.warns(UserWarning, match=rf"step-000000002.safetensors is damaged: {int(len(data) * share)} bytes where .* {len(data)}"):
        saved = run.latest()
    assert saved.step == 1 and complete(saved)
    with pytest.raises(CheckpointError, match="step-000000002.safetensors is (empty|damaged)"):
        load_file(path)


@pytest.mark.parametrize("where", ["length", "header", "payload"])
def test_a_flipped_bit_is_noticed(run, where):
    path = run.folder / "step-000000002.safetensors"
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    data[{"length": 1, "header": header // 2, "payload": header + 5}[where]] ^= 4
    path.write_bytes(data)
    with pytest.warns(UserWarning, match="step-000000002.safetensors is damaged: its sha256"):
        saved = run.latest()
    assert saved.step == 1 and complete(saved)
    with pytest.raises(CheckpointError, match="damaged"):
        load_file(path)


def test_no_single_flipped_bit_of_an_exported_file_goes_unnoticed(tmp_path):
    path = tmp_path / "policy"
    save_file(path, example(1) | {"flag": torch.tensor(True)}, {"algorithm": "bc"})
    data = path.read_bytes()
    for position in range(0, 8 * len(data), 5):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError):
            load_file(path)


@pytest.mark.parametrize("keep", [1, 2])
def test_no_single_flipped_bit_of_the_manifest_costs_the_run(tmp_path, keep):
    checkpoints = Checkpoints(tmp_path, keep)
    for step in (1, 2):
        checkpoints.save(step, example(step), {})
    path = tmp_path / "manifest.json"
    data = path.read_bytes()
    for position in range(0, 8 * len(data), 7):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        with warnings.catch_warnings(record=True):
            saved = checkpoints.latest()
        assert saved.step in (1, 2) and complete(saved)


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"3", b'{"checkpoints": [1]}', b"[" * 100_000, b"\x80\x04.", b'{"checkpoints": 1}', UNNAMED]
)
def test_a_damaged_manifest_is_said_and_the_files_speak_for_themselves(run, content):
    (run.folder / "manifest.json").write_bytes(content)
    with pytest.warns(UserWarning, match="manifest.json is damaged"):
        saved = run.latest()
    assert saved.step == 2 and complete(saved)
    with pytest.warns(UserWarning, match="manifest.json is damaged"):
        run.save(3, example(3), {})
    assert run.latest().step == 3


def test_a_manifest_leads_nowhere_outside_its_folder(run):
    shutil.copy(run.folder / "step-000000002.safetensors", run.folder.parent / "step-000000002.safetensors")
    manifest = json.loads((run.folder / "manifest.json").read_text())
    manifest["checkpoints"][-1]["file"] = "../step-000000002.safetensors"
    (run.folder / "manifest.json").write_text(json.dumps(manifest))
    (run.folder / "step-000000002.safetensors").unlink()
    with pytest.warns(UserWarning, match="manifest.json is damaged .*\\.\\./step"):
        assert run.latest().step == 1


def test_a_renamed_checkpoint_is_not_taken_for_another_step(run):
    os.replace(run.folder / "step-000000001.safetensors", run.folder / "step-000000009.safetensors")
    (run.folder / "manifest.json").unlink()
    (run.folder / "step-000000002.safetensors").unlink()
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match="step-000000009.safetensors holds step 1"):
        run.latest()


def test_no_sound_checkpoint_left_is_an_error_not_a_fresh_start(run):
    for path in run.folder.glob("step-*"):
        path.write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match="no sound checkpoint in .*step-000000002.*; .*step-000000001"):
        run.latest()
    for path in run.folder.glob("step-*"):
        path.unlink()
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match="No such file"):
        run.latest()


class Evil:
    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        return Path.touch, (Path(self.sentinel),)


@pytest.fixture
def sentinel(tmp_path):
    """A file that unpickling `Evil` makes, and that nothing here may make."""
    path = tmp_path / "sentinel"
    pickle.loads(pickle.dumps(Evil(path)))
    assert path.exists(), "the payload works"
    path.unlink()
    yield path
    assert not path.exists()


def archive(path, payload):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data", payload)


@pytest.mark.parametrize(
    "make",
    [
        *(lambda path, evil, protocol=protocol: path.write_bytes(pickle.dumps(evil, protocol)) for protocol in range(6)),
        lambda path, evil: torch.save({"state": evil}, path),
        lambda path, evil: torch.save({"state": evil}, path, _use_new_zipfile_serialization=False),
        lambda path, evil: archive(path, pickle.dumps(evil)),
    ],
    ids=[*(f"pickle {protocol}" for protocol in range(6)), "torch", "torch legacy", "zip"],
)
def test_a_malicious_file_is_refused_and_runs_nothing(run, sentinel, make):
    for name in ("policy.pt", "policy.safetensors"):
        make(run.folder / name, Evil(sentinel))
        with pytest.raises(CheckpointError, match=f"{name} (looks like a (pickle|zip archive)|is damaged, or no checkpoint)"):
            load_file(run.folder / name)
    path = run.folder / "step-000000002.safetensors"
    make(path, Evil(sentinel))
    with pytest.warns(UserWarning, match=path.name):
        assert run.latest().step == 1
    (run.folder / "manifest.json").unlink()
    with pytest.warns(UserWarning, match=path.name):
        assert run.latest().step == 1
    path.unlink()
    make(run.folder / "manifest.json", Evil(sentinel))
    with pytest.warns(UserWarning, match="manifest.json is damaged"):
        assert run.latest().step == 1


@pytest.mark.parametrize("content", [b"a", b"\xff" * 8, b"\xff" * 100, b"\x02" + bytes(7) + b"{}", b"\x89HDF\r\n\x1a\n" + bytes(99)])
def test_what_is_no_checkpoint_at_all_is_refused(tmp_path, content):
    (tmp_path / "policy").write_bytes(content)
    with pytest.raises(CheckpointError, match="policy is damaged, or no checkpoint of offrl"):
        load_file(tmp_path / "policy")


@pytest.fixture
def read_only():
    """A folder that may be read and not written, root included: a test run by root gives its rights away for as long as it lasts."""
    with tempfile.TemporaryDirectory() as outer:
        folder = Path(outer, "run")
        Checkpoints(folder).save(1, example(1), {})
        os.chmod(outer, 0o755)
        os.chmod(folder, 0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            if root:
                os.seteuid(0)
            os.chmod(folder, 0o755)


def test_a_read_only_folder(read_only):
    for save in (lambda: Checkpoints(read_only).save(2, example(2), {}), lambda: save_file(read_only / "policy", example(2), {})):
        with pytest.raises(CheckpointError, match="^cannot write .*: Permission denied$"):
            save()
    with pytest.raises(CheckpointError, match="cannot make the folder .*: Permission denied"):
        Checkpoints(read_only / "new").save(2, example(2), {})
    assert Checkpoints(read_only).latest().step == 1


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "run").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot make the folder .*run: File exists"):
        Checkpoints(tmp_path / "run").save(1, example(1), {})
    with pytest.raises(CheckpointError, match="cannot write .*policy: Not a directory"):
        save_file(tmp_path / "run" / "policy", example(1), {})
