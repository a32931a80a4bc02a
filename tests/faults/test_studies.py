"""Studies whose processes are killed, race, hang and fail: every trial keeps its one outcome, and the study goes on."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import threading
import time
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.distributions import FloatDistribution

from offrl.core.interrupt import EXIT_INTERRUPTED
from offrl.recipes import study as studies
from offrl.training.run import RunError

URL, KINDS = "sqlite:///study.db", {"x": FloatDistribution(0, 1)}
# the n-th trial of all that come so far meets the n-th word of fates.txt, those that are left over the last one
FATES = """
import os
import signal
import time
from pathlib import Path

from offrl.recipes.objectives import OBJECTIVES, Objective


def call():
    for n in range(1000):
        try:
            with open(f"call-{n}.new", "x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:
            continue
        os.link(f"call-{n}.new", f"call-{n}")  # whoever finds it finds all of it
        return n


def planted(folder, data, config):
    words = Path("fates.txt").read_text().split()
    word = words[min(call(), len(words) - 1)]
    if word == "raise":
        raise ValueError("a fault of its own")
    if word == "memory":
        bytearray(1 << 60)
    if word == "exit":
        os._exit(3)
    if word == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "wait":
        time.sleep(600)
    return config.agent.actor_lr if word == "fine" else float(word)


OBJECTIVES["planted"] = Objective(planted)
"""
CALL = ("--storage", URL, "--agent.hidden", 2, "--mode", "eager", "--search", "agent.actor_lr", "--sampler", "random")
PLANTED = (*CALL, "--steps", 1, "--import", "fates.py", "--objective", "planted")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to be in; `place(words)` writes the fates."""
    monkeypatch.chdir(tmp_path)

    def write(words):
        (tmp_path / "fates.py").write_text(FATES)
        (tmp_path / "fates.txt").write_text(words)
        return tmp_path

    return write


def trials(name="bc-data"):
    return optuna.load_study(study_name=name, storage=URL).trials


def states(found):
    return [trial.state.name for trial in found]


def calls():
    return len(list(Path().glob("call-*[0-9]")))


def pid_of(number, timeout=60):
    """The process of the trial that met the n-th fate."""
    end = time.monotonic() + timeout
    while not Path(f"call-{number}").exists():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.01)
    return int(Path(f"call-{number}").read_text())


def test_whatever_a_trial_ends_with_is_recorded_and_the_study_goes_on(run, data, place):
    place("fine nan inf -inf raise exit memory killed fine")
    code, out, err = run("tune", "bc", data, *PLANTED, "--trials", 9, "--retries", 0)
    assert code == 0, err
    found = trials()
    assert states(found) == ["COMPLETE", *["FAIL"] * 7, "COMPLETE"] and calls() == 9
    causes = {trial.number: (trial.user_attrs["kind"], trial.user_attrs["cause"]) for trial in found if trial.state.name == "FAIL"}
    assert causes == {
        1: ("not finite", "its value is nan"), 2: ("not finite", "its value is inf"), 3: ("not finite", "its value is -inf"),
        4: ("error", "ValueError: a fault of its own"), 5: ("error", "its process ended with exit code 3"), 6: ("error", "MemoryError"),
        7: ("killed", "its process was killed by SIGKILL: was the memory full?"),
    }  # fmt: skip
    assert "9 trials, 2 complete, 7 failed" in out and "  trial 4 failed: error: ValueError: a fault of its own" in out
    assert [found[number].value for number in (0, 8)] == [found[number].params["agent.actor_lr"] for number in (0, 8)]
    assert "online episodes played, none of which the selection used: 0" in out


def test_a_trial_that_takes_too_long_has_failed(run, data, place):
    place("wait")
    code, out, err = run("tune", "bc", data, *PLANTED, "--trials", 1, "--timeout", 1)
    assert code == 1 and "no trial of the study bc-data is complete" in err
    assert [(each.state.name, each.user_attrs["kind"]) for each in trials()] == [("FAIL", "timeout")]
    assert trials()[0].user_attrs["cause"] == "it took longer than 1 seconds"


def test_a_trial_that_diverges_has_failed(run, write_data, place):
    data = write_data(place("") / "data.npz", reward=np.full(400, 1e30))
    call = ("tune", "td3bc", data, *CALL[:-4], "--steps", 20, "--log-every", 2, "--env", "Pendulum-v1", "--trials", 1)
    code, _, err = run(*call)
    (trial,) = trials("td3bc-data")
    assert code == 1 and trial.state.name == "FAIL" and trial.user_attrs["kind"] == "diverged", err
    assert " is inf at step 2; no checkpoint had been saved" in trial.user_attrs["cause"].replace("nan", "inf")


def test_a_killed_process_costs_a_try_of_its_trial_and_nothing_else(run, data, place):
    place("wait wait wait fine")

    def kill():
        for number in range(3):
            os.kill(pid_of(number), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    code, out, err = run("tune", "bc", data, *PLANTED, "--trials", 3, "--retries", 2)
    killer.join()
    assert code == 0, err
    found = trials()
    assert states(found) == ["FAIL"] * 3 + ["COMPLETE"] * 2 and calls() == 5
    assert found[0].params == found[1].params == found[2].params and found[2].system_attrs["retry_history"] == [0, 1]
    assert [trial.number for trial in studies.counted(found)] == [2, 3, 4] and "3 trials, 2 complete, 1 failed" in out


def test_after_a_kill_of_the_study_the_same_command_runs_what_is_left(offrl, run, data, write_data, place):
    folder = place("fine fine wait wait fine")
    call = ("tune", "bc", data, *PLANTED)
    process = offrl.start(*call, "--trials", 6, "--workers", 2, cwd=folder)
    cut = [pid_of(2), pid_of(3)]
    process.kill()
    assert process.ended().code == -signal.SIGKILL
    for pid in cut:  # nobody trains on for a study that is no more
        process_ends(pid)
    before = trials()
    assert sorted(states(before)) == ["COMPLETE"] * 2 + ["RUNNING"] * 2
    code, out, err = run(*call, "--trials", 6, "--grace", 1)
    assert code == 0 and "6 trials, 6 complete" in out, err
    found = trials()
    assert calls() == 2 + 2 + 4, "two done, two cut, and exactly what was left"
    assert len(studies.counted(found)) == 6
    for trial in before:
        if trial.state.name == "RUNNING":
            assert found[trial.number].state.name == "FAIL" and found[trial.number].user_attrs["kind"] == "lost"
            (other,) = (each for each in found if each.system_attrs.get("retry_history") == [trial.number])
            assert other.params == trial.params and other.state.name == "COMPLETE"
        else:
            assert found[trial.number] == trial
    code, out, err = run(*call, "--trials", 2)
    assert code == 0 and "8 trials, 8 complete" in out and calls() == 10, err
    # and what is not the same command is told so
    other = write_data(folder / "data.npz", seed=1)
    for changed, message in {
        ("--search", "agent.actor_lr=1e-4:1e-3"): "search.agent.actor_lr is 1e-05:0.01:log in the study, 0.0001:0.001:log now",
        ("--steps", 2): "config.steps is 1 in the study, 2 now",
        ("--agent.hidden", 3): "config.agent.hidden is [2] in the study, [3] now",
        ("--seeds", "0-1"): "seeds is [0] in the study, [0, 1] now",
        ("--objective", "online", "--env", "Pendulum-v1"): "objective is planted in the study, online now",
        (): "fingerprint is ",
    }.items():
        flags = dict(zip(PLANTED[::2], PLANTED[1::2])) | dict(zip(changed[::2], changed[1::2]))
        code, _, err = run("tune", "bc", data if changed else other, *(each for flag in flags.items() for each in flag))
        assert code == 1 and message in err and len(err.strip().splitlines()) == 1 and "--study NAME begins another" in err, err
    code, _, err = run("tune", "a2pr", data, "--storage", URL, *PLANTED[-6:], "--study", "bc-data")
    assert code == 1 and "recipe is bc in the study, a2pr now" in err
    assert trials()[: len(found)] == found and calls() == 10


def process_ends(pid, timeout=30):
    end = time.monotonic() + timeout
    while Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < end, "orphans train on"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM", "Ctrl-C in a terminal"])
def test_a_signal_saves_and_the_same_command_goes_on_from_there(offrl, run, data, place, how):
    folder = place("")
    call = ("tune", "bc", data, *CALL, "--env", "Pendulum-v1", "--eval-episodes", 0, "--final-episodes", 1)
    call += ("--log-every", 5, "--steps", 700)
    process = offrl.start(*call, "--trials", 2, cwd=folder)
    process.until(lambda: any(path.read_bytes().count(b"\n") > 20 for path in folder.glob("runs/*/*/*/*/log.jsonl")))
    os.killpg(process.pid, signal.SIGINT) if how != "SIGTERM" else process.kill(signal.SIGTERM)
    ended = process.ended()
    assert ended.code == EXIT_INTERRUPTED, ended.err
    assert ended.err.strip().splitlines()[-1] == "stopped: 0 of 2 trials are done; the same command again runs the others"
    (cut,) = trials()
    assert cut.state.name == "FAIL" and cut.user_attrs["kind"] == "interrupted"
    log = next(folder.glob("runs/*/*/*/*/log.jsonl"))
    kept = log.read_bytes()
    code, out, err = run(*call, "--trials", 2)
    assert code == 0 and "2 trials, 2 complete" in out, err
    assert log.read_bytes().startswith(kept) and kept, "times and all: it did not start anew"
    shutil.rmtree(folder / "runs")
    code, out, err = run(*call, "--trials", 2, "--study", "whole")
    assert code == 0, err
    one, other = ([(each.params, each.value) for each in studies.counted(trials(name))] for name in ("bc-data", "whole"))
    assert sorted(map(repr, one)) == sorted(map(repr, other))


def together(count, work):
    """Runs work(number) in so many processes, which begin at the same moment; their exit codes."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(count)

    def begin(number):
        barrier.wait()
        work(number)
        os._exit(0)

    processes = [context.Process(target=begin, args=(number,)) for number in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def a_study(name="race"):
    return studies.open_study(studies.open_storage(URL), name, {"search": {}}, sampler=studies.sampler("random", 0, {"x": 0.5}))


def test_eight_processes_begin_one_study_at_the_same_moment(place):
    place("")

    def work(number):
        study = a_study()
        target = studies.aim(study, 20, 0)
        while len(studies.counted(found := study.get_trials(deepcopy=False))) < target:
            trial = studies.patiently(study.ask, KINDS)
            found = studies.patiently(study.get_trials, deepcopy=False)
            if studies.surplus(found[trial.number], found, target):
                studies.patiently(trial.set_user_attr, "kind", "withdrawn")
                studies.patiently(study.tell, trial, state=optuna.trial.TrialState.FAIL)
            else:
                studies.patiently(trial.set_user_attr, "by", number)
                studies.patiently(study.tell, trial, trial.params["x"])

    assert together(8, work) == [0] * 8
    found = trials("race")
    assert [trial.number for trial in found] == list(range(len(found)))
    counted = studies.counted(found)
    assert states(counted) == ["COMPLETE"] * 20 and len({trial.params["x"] for trial in counted}) == 20
    assert sum(trial.params["x"] == 0.5 for trial in counted) == 1 and len({trial.user_attrs["by"] for trial in counted}) > 1


@pytest.mark.slow
def test_eight_commands_begin_one_study_at_the_same_moment(offrl, data, place):
    """Each with two processes, on two cores: whoever is first makes the study, and all of them work on the same twenty trials."""
    folder = place("fine")
    processes = [offrl.start("tune", "bc", data, *PLANTED, "--trials", 20, "--workers", 2, cwd=folder) for _ in range(8)]
    for process in processes:
        ended = process.ended(timeout=600)
        assert ended.code == 0 and "20 trials, 20 complete" in ended.out, ended
    counted = studies.counted(trials())
    assert states(counted) == ["COMPLETE"] * 20 and calls() == 20


def test_a_locked_database_is_waited_for(place, monkeypatch):
    place("")
    monkeypatch.setattr(studies, "BUSY", 0.05)
    study = a_study()
    locker = sqlite3.connect("study.db", check_same_thread=False, isolation_level=None)
    locker.execute("BEGIN EXCLUSIVE")
    threading.Timer(0.8, lambda: locker.execute("ROLLBACK")).start()
    begun = time.monotonic()
    trial = studies.patiently(study.ask, KINDS)
    assert time.monotonic() - begun > 0.5, "the lock held"
    studies.patiently(study.tell, trial, 1.0)
    monkeypatch.setattr(studies, "PATIENCE", 0.2)
    locker.execute("BEGIN EXCLUSIVE")
    with pytest.raises(RunError, match="sqlite:///study.db: database is locked"), studies.told(URL):
        studies.patiently(study.tell, 1, 1.0)
    locker.execute("ROLLBACK")
    assert states(trials("race")) == ["COMPLETE"]


def test_what_was_told_is_there_after_a_kill(place):
    """Of a process that asks and tells as fast as it can, killed at any moment."""
    place("")
    a_study()
    told, moment = [], random.Random(0)
    for _ in range(4):
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            with contextlib.suppress(BaseException):
                study = a_study()
                while True:
                    trial = study.ask(KINDS)
                    study.tell(trial, trial.params["x"])
                    os.write(write, b"%d\n" % trial.number)
            os._exit(1)
        os.close(write)
        time.sleep(0.2 + moment.uniform(0, 0.3))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with open(read) as pipe:
            told += [int(line) for line in pipe]
    found = trials("race")
    assert told and {found[number].state.name for number in told} == {"COMPLETE"}
    assert len({*told}) == len(told) and states(found).count("COMPLETE") - len(told) <= 4 and states(found).count("RUNNING") <= 4


def test_a_damaged_database_is_refused(run, data, place):
    folder = place("fine")
    assert run("tune", "bc", data, *PLANTED, "--trials", 1)[0] == 0
    whole = (folder / "study.db").read_bytes()
    for damaged in (whole[:5000], b"\0" * len(whole), whole[:4096] + os.urandom(len(whole) - 4096)):
        (folder / "study.db").write_bytes(damaged)
        code, _, err = run("tune", "bc", data, *PLANTED, "--trials", 1)
        assert code == 1 and err.strip().startswith("offrl: sqlite:///study.db: ") and len(err.strip().splitlines()) == 1, err
        assert (folder / "study.db").read_bytes() == damaged
    (folder / "study.db").write_bytes(whole)
    assert run("tune", "bc", data, *PLANTED, "--trials", 1)[0] == 0 and states(trials()) == ["COMPLETE"] * 2
