import hashlib
import os
import signal
import threading
import time

import pytest

from offrl.core.interrupt import EXIT_DIVERGED, EXIT_INTERRUPTED, Interrupt


def run(body):
    """`body(say)` in a child process, once it has said that it is ready: (process id, where it is heard)."""
    heard, said = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os._exit(body(lambda word: os.write(said, word)))
    os.close(said)
    assert os.read(heard, 10) == b"ready"
    return child, heard


def end(child):
    """(exit code or None, signal or None) of the child; fails where it does not end within ten seconds."""
    for _ in range(1000):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return (None, os.WTERMSIG(status)) if os.WIFSIGNALED(status) else (os.WEXITSTATUS(status), None)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the process did not end")


def loop(say):
    """A training loop that saves when it is asked to end."""
    with Interrupt() as interrupt:
        say(b"ready")
        while not interrupt.requested:
            time.sleep(0.001)
        say(b"saved")
    return EXIT_INTERRUPTED


def busy(say):
    """A loop that, asked to end, is caught in one long call that never returns to the interpreter."""
    with Interrupt() as interrupt:
        say(b"ready")
        while not interrupt.requested:
            time.sleep(0.001)
        say(b"seen")
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
    return 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_run_save_and_exit_with_its_code(number):
    child, heard = run(loop)
    os.kill(child, number)
    assert os.read(heard, 10) == b"saved"
    assert end(child) == (EXIT_INTERRUPTED, None)


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_it_at_once(second):
    child, heard = run(busy)
    os.kill(child, signal.SIGTERM)
    assert os.read(heard, 10) == b"seen"
    os.kill(child, second)
    assert end(child) == (None, second)


def test_handlers_come_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), Interrupt() as interrupt:
        assert signal.getsignal(signal.SIGTERM) != before[1]
        os.kill(os.getpid(), signal.SIGTERM)
        while not interrupt.requested:
            time.sleep(0.001)
        _ = 1 / 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            assert not interrupt.requested
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_it_does_nothing():
    seen = []

    def body():
        with Interrupt() as interrupt:
            seen.append((interrupt.requested, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [(False, signal.getsignal(signal.SIGTERM))]


def test_exit_codes_are_what_scripts_rely_on():
    assert (EXIT_INTERRUPTED, EXIT_DIVERGED) == (75, 76)
