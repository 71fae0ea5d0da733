"""The logs: llm.c's lines, JSON that is JSON, a resumed run's files, a disk that is full."""

import errno
import io
import json
import os
import pty
from pathlib import Path

import pytest

from engine.errors import CheckpointError
from engine.log import RunLog, duration, read_jsonl

STEP = {
    "lr": 3e-4,
    "norm": 1.234,
    "loss_z": 0.5,
    "norm_z": -0.5,
    "skipped": False,
    "tokens": 32,
    "seconds": 0.01,
}
NAN, INF = float("nan"), float("inf")


def strict(line: str) -> dict:
    """JSON without the NaN and Infinity that Python's reader also takes."""
    return json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def log_steps(folder: Path, first: int, end: int, *, start: int = 0, stream=None) -> None:
    log = RunLog(folder, start, end, stream or io.StringIO())
    for step in range(first, end):
        if step % 2 == 0:
            log.validation(step, 2 + step / 10)
        log.train(step, loss=3 + step / 10, **STEP)
    log.close()


def test_main_log_is_llmc_s(tmp_path):
    log = RunLog(tmp_path, 0, 20, io.StringIO())
    log.validation(0, 10.98765)
    log.train(0, loss=11.00004, **STEP)
    log.train(12, loss=3.5, **(STEP | {"lr": 6e-7, "norm": 123.456}))
    log.validation(20, 3.0)
    log.close()
    assert (tmp_path / "main.log").read_text() == (
        "s:0 tel:10.9877\n"
        "s:0 trl:11.0000 lr:0.000300 norm:1.23\n"
        "s:12 trl:3.5000 lr:0.000001 norm:123.46\n"
        "s:20 tel:3.0000\n"
    )


def test_jsonl_holds_every_value_unrounded(tmp_path):
    log = RunLog(tmp_path, 0, 5, io.StringIO())
    log.validation(0, 1 / 3)
    log.train(4, loss=1 / 7, **STEP)
    log.sample(5, 'a "quoted"\nline, \x00 and \U0001f600')
    log.close()
    assert [strict(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [
        {"step": 0, "kind": "val", "loss": 1 / 3},
        {
            "step": 4,
            "kind": "train",
            "loss": 1 / 7,
            "lr": 3e-4,
            "norm": 1.234,
            "loss_z": 0.5,
            "norm_z": -0.5,
            "skipped": False,
            "tokens": 32,
            "ms": 10.0,
        },
        {"step": 5, "kind": "sample", "text": 'a "quoted"\nline, \x00 and \U0001f600'},
    ]


def test_what_is_not_finite_is_null(tmp_path):
    stream = io.StringIO()
    log = RunLog(tmp_path, 0, 5, stream)
    log.validation(0, NAN)
    log.train(0, loss=INF, **(STEP | {"norm": NAN, "loss_z": NAN, "norm_z": NAN, "skipped": True}))
    log.close()
    val, train = map(strict, (tmp_path / "log.jsonl").read_text().splitlines())
    assert val["loss"] is None
    assert [train[key] for key in ("loss", "norm", "loss_z", "norm_z")] == [None] * 4
    assert train["skipped"] is True
    assert "step 1: update skipped" in stream.getvalue()


@pytest.mark.parametrize("start", range(7))
def test_a_resumed_run_s_logs_read_as_one_unbroken_run_s(tmp_path, start):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for folder in (whole, resumed):
        folder.mkdir()
        log_steps(folder, 0, 6)
    log_steps(resumed, start, 6, start=start)
    for name in ("main.log", "log.jsonl"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("cut", [2, 5, 8, 20, 45, 200])
def test_a_line_that_a_crash_cut_short_is_dropped(tmp_path, cut):
    """Of what a crash left of the steps before `start`, the whole lines stay."""
    log_steps(tmp_path, 0, 3)
    whole_lines = {}
    for name in ("main.log", "log.jsonl"):
        left = (tmp_path / name).read_bytes()[:-cut]
        (tmp_path / name).write_bytes(left)
        whole_lines[name] = left[: left.rfind(b"\n") + 1]
    RunLog(tmp_path, 3, 6, io.StringIO()).close()
    for name, lines in whole_lines.items():
        assert (tmp_path / name).read_bytes() == lines


def test_a_file_of_foreign_bytes_does_not_stop_a_resumed_run(tmp_path):
    (tmp_path / "main.log").write_bytes(b"s:0 tel:3.0000\n\xff\xfe\x00\n")
    RunLog(tmp_path, 3, 6, io.StringIO()).close()
    assert (tmp_path / "main.log").read_text() == "s:0 tel:3.0000\n"


def test_a_run_that_starts_anew_starts_its_logs_anew(tmp_path):
    log_steps(tmp_path, 0, 6)
    log_steps(tmp_path, 0, 2)
    assert len((tmp_path / "main.log").read_text().splitlines()) == 3


def test_a_directory_that_cannot_be_written_is_told_at_once(tmp_path):
    with pytest.raises(CheckpointError, match="cannot write the logs"):
        RunLog(tmp_path / "missing", 0, 5, io.StringIO())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk_warns_once_and_never_ends_a_run(tmp_path):
    stream = io.StringIO()
    log = RunLog(tmp_path, 0, 5, stream)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, log._files["main.log"].fileno())
    os.close(full)
    for step in range(3):
        log.train(step, loss=3.0, **STEP)
    log.close()
    assert stream.getvalue().count("main.log can't be written any more (No space left on device)") == 1
    assert len(read_jsonl(tmp_path / "log.jsonl")) == 3


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EPIPE, errno.EIO])
def test_a_stream_that_cannot_be_written_never_ends_a_run(tmp_path, error):
    """Output into a file on a full disk, a pipe that nobody reads any more, a terminal that is gone."""

    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(error, os.strerror(error))

    log = RunLog(tmp_path, 0, 5, Broken())
    log.validation(0, 3.0)
    log.train(0, loss=3.0, **STEP)
    log.close()
    assert len((tmp_path / "main.log").read_text().splitlines()) == 2


def test_a_stream_without_the_letters_shows_others(tmp_path):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    log = RunLog(tmp_path, 0, 5, stream)
    log.sample(2, "na\u00efve \ufffd")
    log.close()
    assert b"na" in stream.buffer.getvalue()
    assert read_jsonl(tmp_path / "log.jsonl")[0]["text"] == "na\u00efve \ufffd"


def test_status_lines_are_at_most_one_a_second_but_the_last_comes(tmp_path):
    stream = io.StringIO()
    log_steps(tmp_path, 0, 100, stream=stream)
    lines = [line for line in stream.getvalue().splitlines() if " | loss " in line]
    assert len(lines) < 50
    assert lines[0].split("|")[0].split() == ["step", "1/100"]
    assert lines[-1].split("|")[0].split() == ["step", "100/100"]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0s"),
        (5.4, "5s"),
        (59.6, "1m00s"),
        (185, "3m05s"),
        (3599.7, "1h00m"),
        (11100, "3h05m"),
        (360000, "100h00m"),
    ],
)
def test_duration(seconds, said):
    assert duration(seconds) == said


def test_read_jsonl_leaves_out_a_line_cut_short(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 0, "kind": "val", "loss": 1.0}\n{"step": 1, "ki')
    assert read_jsonl(path) == [{"step": 0, "kind": "val", "loss": 1.0}]


@pytest.mark.parametrize(("environ", "in_place"), [({}, True), ({"OMPI_COMM_WORLD_SIZE": "2"}, False)])
def test_the_status_line_is_overwritten_on_a_terminal_but_not_by_ranks(environ, in_place, monkeypatch):
    """Open MPI gives ranks a terminal, and what they print may go into a file."""
    for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    screen, terminal = pty.openpty()
    with os.fdopen(terminal, "w") as stream:
        log = RunLog(None, 0, 4, stream)
        log.train(0, loss=3.0, **STEP)
        log.close()
        shown = os.read(screen, 1000).decode()
    os.close(screen)
    assert ("\x1b[K" in shown) == in_place
    assert "loss 3.0" in shown or in_place  # a terminal without a size shows nothing of a line
