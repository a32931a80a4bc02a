import csv
import errno
import json
import math
import os
import resource
import sys
import types

import numpy as np
import pytest
import torch

from offrl.core.log import Log, LogError, read, write_csv


def strict(text):
    """The JSON of a parser that knows no NaN."""

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_rows_come_back_as_they_were_written(tmp_path):
    with Log(tmp_path / "run") as log:
        log.write(10, {"critic/loss": torch.tensor(0.1), "a": 0.1, "n": torch.tensor(2**60), "half": torch.tensor(1.5).bfloat16()})
        log.write(20, {"np": np.float32(0.5), "int": 3, "flag": torch.tensor(True), "double": torch.tensor(0.1, dtype=torch.float64)})
        rows = read(tmp_path / "run")
        assert rows == [
            {"step": 10, "critic/loss": torch.tensor(0.1).item(), "a": 0.1, "n": 2**60, "half": 1.5},
            {"step": 20, "np": 0.5, "int": 3, "flag": 1.0, "double": 0.1},
        ], "at once, not only after closing"
    assert list(rows[0]) == ["step", "critic/loss", "a", "n", "half"]


def test_numbers_that_are_not_finite_are_strict_json(tmp_path):
    with Log(tmp_path) as log:
        log.write(1, {"a": math.nan, "b": torch.tensor(math.inf), "c": -math.inf})
    assert strict((tmp_path / "log.jsonl").read_text()) == {"step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity"}
    row = read(tmp_path)[0]
    assert math.isnan(row["a"]) and row["b"] == math.inf and row["c"] == -math.inf


@pytest.mark.parametrize(
    "metrics, error, words",
    [
        ({"q": torch.ones(2)}, TypeError, r"'q' is a tensor of shape \(2,\)"),
        ({"q": "high"}, TypeError, "'q' is str"),
        ({"q": None}, TypeError, "'q' is NoneType"),
        ({"step": 1}, ValueError, "'step'"),
    ],
)
def test_only_numbers_are_logged(tmp_path, metrics, error, words):
    with Log(tmp_path) as log:
        with pytest.raises(error, match=words):
            log.write(1, {"a": 1.0} | metrics)
        assert read(tmp_path) == []


def test_the_table_has_every_column_whenever_it_appeared(tmp_path):
    with Log(tmp_path) as log:
        log.write(1, {"loss": 0.5})
        log.write(2, {"loss": math.nan, "eval/return_mean": -7})
    with open(tmp_path / "log.csv", newline="") as file:
        assert list(csv.reader(file)) == [["step", "loss", "eval/return_mean"], ["1", "0.5", ""], ["2", "nan", "-7"]]
    Log(tmp_path).write(3, {"late": 1.0})  # a run that was killed and never closed its log
    write_csv(tmp_path)
    assert (tmp_path / "log.csv").read_text().splitlines()[0] == "step,loss,eval/return_mean,late"


def train(folder, start, steps, rate):
    """Rows of a run from step `start`; `time/...` tells one process from another."""
    with Log(folder) as log:
        if start:
            log.truncate(start)
        for step in range(start + 1, steps + 1):
            log.write(step, {"loss": torch.tensor(1.0 / step), "time/updates_per_s": rate})
            if step % 5 == 0:
                log.write(step, {"eval/return_mean": float(step)})


def timeless(folder):
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in read(folder)]


@pytest.mark.parametrize("cut, checkpoint", [(17, 15), (15, 15), (14, 10)])
def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path, cut, checkpoint):
    train(tmp_path / "whole", 0, 20, 1.0)
    train(tmp_path / "cut", 0, cut, 2.0)
    train(tmp_path / "cut", checkpoint, 20, 3.0)
    assert timeless(tmp_path / "cut") == timeless(tmp_path / "whole")
    assert read(tmp_path / "cut") != read(tmp_path / "whole")


def test_truncating_takes_the_stale_table_along(tmp_path):
    train(tmp_path, 0, 5, 1.0)
    log = Log(tmp_path)
    log.truncate(2)
    assert not (tmp_path / "log.csv").exists() and [row["step"] for row in read(tmp_path)] == [1, 2]


@pytest.mark.parametrize("left", range(1, 40, 5))
def test_a_torn_last_line_is_not_read_and_is_cut_off(tmp_path, left):
    train(tmp_path, 0, 3, 1.0)
    path = tmp_path / "log.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines()[-1][:left])
    assert [row["step"] for row in read(tmp_path)] == [1, 2, 3]
    with Log(tmp_path) as log:
        log.write(4, {})
    assert path.read_bytes() == whole + b'{"step": 4}\n'


def test_a_row_that_does_not_fit_on_the_disk_leaves_no_half_behind(tmp_path):
    with Log(tmp_path) as log:
        log.write(1, {"a": 1.0})
        whole = (tmp_path / "log.jsonl").read_bytes()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 20, hard))
        try:
            with pytest.raises(LogError, match="log.jsonl"):
                log.write(2, {"a": 1.0, "b": 2.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert (tmp_path / "log.jsonl").read_bytes() == whole
        log.write(2, {"a": 2.0})
    assert [row["a"] for row in read(tmp_path)] == [1.0, 2.0]


def test_rows_that_do_not_reach_the_disk_are_said(tmp_path, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Log(tmp_path) as log:
        log.sync()
        with monkeypatch.context() as patch, pytest.raises(LogError, match="log.jsonl: No space left on device"):
            patch.setattr(os, "fsync", full)
            log.sync()


def test_what_a_killed_writer_left_is_swept(tmp_path):
    (tmp_path / ".offrl-0123.tmp").write_bytes(b"half a lo")
    Log(tmp_path).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv", "log.jsonl"]


@pytest.mark.parametrize("line", [b"{}", b"[1]", b'{"step": 1, "a": "high"}', b"\x80\x04.", b'{"step": 1', b"[" * 100_000])
def test_a_damaged_line_is_named(tmp_path, line):
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(LogError, match="log.jsonl, line 2, is damaged"):
        read(tmp_path)


def test_a_log_that_is_not_there_or_cannot_be_written(tmp_path):
    with pytest.raises(LogError, match="cannot read .*log.jsonl: No such file"):
        read(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(LogError, match="cannot write .*log.jsonl: Not a directory"):
        Log(tmp_path / "file" / "run")


def test_a_path_that_is_not_utf8(tmp_path):
    folder = os.path.join(os.fsencode(tmp_path), "with space \u6728".encode() + (b"" if sys.platform == "darwin" else b"\xff"))
    train(folder, 0, 2, 1.0)
    assert len(read(folder)) == 2


def test_tensorboard_gets_the_numbers_and_forgets_what_was_truncated(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Log(tmp_path, tensorboard=True) as log:
        for step in (1, 2, 3):
            log.write(step, {"loss": torch.tensor(float(step))})
    with Log(tmp_path, tensorboard=True) as log:
        log.truncate(1)
        log.write(2, {"loss": 20.0})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(1, 1), (2, 20)]


def test_wandb_gets_the_numbers(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finish"))
    fake = types.SimpleNamespace(init=lambda **options: calls.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with Log(tmp_path, wandb={"project": "p", "resume": "must"}) as log:
        log.write(3, {"loss": torch.tensor(1.5)})
    assert calls == [{"dir": str(tmp_path), "resume": "must", "project": "p"}, (3, {"loss": 1.5}), "finish"]


@pytest.mark.parametrize("extra, module", [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_missing_extra_is_named(tmp_path, monkeypatch, extra, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'pip install "offrl\[{extra}\]"'):
        Log(tmp_path, tensorboard=extra == "tensorboard", wandb={} if extra == "wandb" else None)
