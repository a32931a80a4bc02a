import json
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from offrl.core.lock import LockError, RunLock


def hold(folder):
    """A child process that holds the lock until it is killed: (process id, where it reports)."""
    heard, said = os.pipe()
    child = os.fork()
    if child == 0:
        with RunLock(folder):
            os.write(said, b"held")
            signal.pause()
        os._exit(0)
    os.close(said)
    assert os.read(heard, 10) == b"held"
    os.close(heard)
    return child


def kill(child):
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_second_process_is_refused_and_told_by_whom(tmp_path):
    child = hold(tmp_path)
    try:
        with pytest.raises(LockError) as error, RunLock(tmp_path):
            pass
    finally:
        kill(child)
    for word in (f"process {child}", repr(socket.gethostname()), str(tmp_path)):
        assert word in str(error.value)


def test_the_lock_of_a_killed_process_is_taken_over_even_if_its_id_lives_on(tmp_path):
    kill(hold(tmp_path))
    (tmp_path / ".lock").write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
    with RunLock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_bytes())["pid"] == os.getpid()


def test_a_separate_program_is_refused(tmp_path):
    program = "import sys; from offrl.core.lock import RunLock\nwith RunLock(sys.argv[1]): print('in')"
    with RunLock(tmp_path):
        result = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode and f"in use by process {os.getpid()} on" in result.stderr and "in\n" not in result.stdout


def test_a_child_that_outlives_the_holder_does_not_keep_the_lock(tmp_path):
    heard, said = os.pipe()
    holder = os.fork()
    if holder == 0:
        with RunLock(tmp_path):
            grandchild = os.fork()
            if grandchild == 0:
                signal.pause()
            os.write(said, b"%d" % grandchild)
            signal.pause()
    grandchild = int(os.read(heard, 20))
    try:
        kill(holder)
        with RunLock(tmp_path):
            os.kill(grandchild, 0)  # it is alive
    finally:
        os.kill(grandchild, signal.SIGKILL)


def test_the_lock_ends_with_the_context_and_can_be_had_again(tmp_path):
    lock, refused = RunLock(tmp_path / "new" / "folder"), []

    def another_thread():
        with pytest.raises(LockError), RunLock(tmp_path / "new" / "folder"):
            pass
        refused.append(True)

    for times in (1, 2):
        with lock:
            thread = threading.Thread(target=another_thread)
            thread.start()
            thread.join()
            assert len(refused) == times
    with pytest.raises(ZeroDivisionError), lock:
        _ = 1 / 0
    with lock:
        pass
    assert (tmp_path / "new" / "folder" / ".lock").read_bytes() == b"", "nobody is named who has left"


@pytest.mark.parametrize("content", [b"", b"\x80\x04torn", b"[1]", b'{"pid": "x"}'])
def test_the_refusal_does_not_depend_on_what_the_file_says(tmp_path, content):
    with RunLock(tmp_path):
        (tmp_path / ".lock").write_bytes(content)
        with pytest.raises(LockError, match="in use by another process"), RunLock(tmp_path):
            pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(LockError, match="cannot lock the run folder .*file/run: Not a directory"), RunLock(tmp_path / "file" / "run"):
        pass
