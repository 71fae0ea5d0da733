"""Whole runs by the command that users type: what they write, that they repeat, resume, stop and refuse."""

import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import time
from functools import partial
from pathlib import Path

import click.testing
import numpy as np
import pytest

import train
from engine import checkpoint, device, llmc_model, ops, training
from engine.arena import Arena
from engine.comm.one import OneRank
from engine.config import GPT2Config, RunConfig, model_from_descriptor
from engine.data import Loader, Samples
from engine.errors import STOPPED, STOPPED_AND_SAVED
from engine.interrupt import StopRequest
from engine.log import printable
from engine.models import gpt2
from engine.optimizer import AdamW
from engine.shards import MAGIC, open_shard
from engine.training import Training
from engine.watchdog import Watchdog
from engine.zero import Zero
from tests.conftest import TINY, data, finish, running, signals_restored

QUIET = ("-v", 0, "-s", 0)  # neither validation nor samples
LOGS = ("main.log", "log.jsonl", "config.json")
QUICK = 4  # seconds: a mistake is told in 2 on an idle machine
MAIN_LOG = re.compile(r"s:\d+ (tel:\d+\.\d{4}|trl:\d+\.\d{4} lr:\d+\.\d{6} norm:\d+\.\d{2})")
TRAIN_FIELDS = {"step", "kind", "loss", "lr", "norm", "loss_z", "norm_z", "skipped", "tokens", "ms"}


def records(out_dir: Path) -> list[dict]:
    """log.jsonl, of which every line must be strict JSON."""
    lines = (out_dir / "log.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")) for line in lines]


def losses(out_dir: Path, kind: str = "train") -> list[float]:
    return [record["loss"] for record in records(out_dir) if record["kind"] == kind]


def tensors(out_dir: Path) -> dict[str, bytes]:
    """The bits of everything in the newest checkpoint."""
    found = checkpoint.load_latest(out_dir, pytest.fail)
    assert found is not None
    arrays = {f"{file}/{name}": array for file in found.files for name, array in found.tensors(file).items()}
    return {name: array.tobytes() for name, array in arrays.items()} | {"step": str(found.step).encode()}


def assert_same_run(found: Path, expected: Path) -> None:
    """Both directories hold the same run, bit by bit: its logs, the times aside, and its newest checkpoint."""
    assert (found / "main.log").read_text() == (expected / "main.log").read_text()
    timeless = [[{**record, "ms": None} for record in records(folder)] for folder in (found, expected)]
    assert timeless[0] == timeless[1]
    bits, expected_bits = tensors(found), tensors(expected)
    assert bits.keys() == expected_bits.keys()
    assert [name for name in bits if bits[name] != expected_bits[name]] == []


def steps_saved(out_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in out_dir.glob("step-*"))


def refused(*args: object, env: dict[str, str] | None = None) -> tuple[int, str]:
    """(exit code, message) of a command that must end before it trains, in this process."""
    with signals_restored():
        result = click.testing.CliRunner().invoke(train.main, [str(arg) for arg in args], env=env)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception  # the command would have shown a traceback
    assert "step 1/" not in result.output
    return result.exit_code, result.output


def assert_nothing_pretends_a_run(out_dir: Path) -> None:
    assert [name for name in LOGS if (out_dir / name).exists()] == []
    assert not list(out_dir.glob("step-*"))


# --- what a run leaves


@pytest.fixture(scope="module")
def short_run(run_train, shards_dir, tmp_path_factory):
    """(Run, its directory, the same again): 20 steps by the real command."""
    out_dir = tmp_path_factory.mktemp("short") / "run"
    again = out_dir.with_name("again")
    options = (*data(shards_dir), *TINY, "-x", 20, "-v", 7, "-s", 10, "-g", 20, "-n", 10, "-l", 1e-2, "-q", 0)
    run, _ = run_train(*options, "-o", out_dir), run_train(*options, "-o", again)
    assert run.code == 0
    assert "Traceback" not in run.err
    return run, out_dir, again


def test_main_log_has_llmc_s_lines_in_its_order(short_run):
    lines = (short_run[1] / "main.log").read_text().splitlines()
    assert all(MAIN_LOG.fullmatch(line) for line in lines)
    expected = [f"s:{step} {kind}" for step in range(20) for kind in (["tel"] if step % 7 == 0 else []) + ["trl"]]
    assert [re.match(r"s:\d+ [a-z]+", line)[0] for line in lines] == [*expected, "s:20 tel"]


def test_both_logs_say_the_same(short_run):
    told = [
        f"s:{r['step']} tel:{r['loss']:.4f}"
        if r["kind"] == "val"
        else f"s:{r['step']} trl:{r['loss']:.4f} lr:{r['lr']:.6f} norm:{r['norm']:.2f}"
        for r in records(short_run[1])
        if r["kind"] != "sample"
    ]
    assert told == (short_run[1] / "main.log").read_text().splitlines()


def test_log_jsonl_has_the_documented_fields(short_run):
    for record in records(short_run[1]):
        expected = {
            "train": TRAIN_FIELDS,
            "val": {"step", "kind", "loss"},
            "sample": {"step", "kind", "text"},
        }
        assert set(record) == expected[record["kind"]]
        if record["kind"] == "train":
            assert (record["tokens"], record["skipped"], record["loss_z"], record["norm_z"]) == (
                32,
                False,
                None,
                None,
            )
            assert record["ms"] > 0


def test_the_loss_falls_from_that_of_a_guess(short_run):
    val = losses(short_run[1], "val")
    assert val[0] == pytest.approx(np.log(256), abs=0.1)
    assert val[-1] < val[0] - 1
    assert losses(short_run[1])[-1] < losses(short_run[1])[0] - 1


def test_samples_are_shown_and_kept(short_run):
    run, out_dir, _ = short_run
    samples = [record for record in records(out_dir) if record["kind"] == "sample"]
    assert [record["step"] for record in samples] == [10, 20]
    for record in samples:
        assert record["text"]
        assert f"step {record['step']}: sample\n---\n{printable(record['text'])}" in run.out


def test_people_are_told_what_runs_and_how_far_it_is(short_run):
    out = short_run[0].out
    assert "10,944 parameters" in out
    assert re.search(r"^step +1/20 \| \d+s left \| loss \d", out, re.MULTILINE)
    assert re.search(r"^step 20/20 \| 0s left \| loss \d", out, re.MULTILINE)
    assert "step 20: validation loss" in out
    assert "\x1b" not in out.split("---")[0]  # no terminal, no terminal's codes


def test_checkpoints_and_config_are_kept(short_run):
    assert steps_saved(short_run[1]) == [10, 20]
    config = json.loads((short_run[1] / "config.json").read_text())
    assert config["model"] == {"maxT": 16, "V": 256, "L": 2, "NH": 2, "C": 16}
    assert config["options"]["lr"] == 1e-2


def test_a_picture_of_the_loss(short_run):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    assert (short_run[1] / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_same_command_gives_the_same_bits(short_run):
    assert_same_run(short_run[1], short_run[2])


# --- what must not change a result, and what must


def test_one_batch_is_learned_by_heart(train_here, shards_dir, tmp_path):
    assert train_here(*data(shards_dir), *TINY, "-a", 1, "-x", 150, "-l", 1e-2, *QUIET, "-o", tmp_path) == 0
    found = losses(tmp_path)
    assert found[0] > 5
    assert found[-1] < 0.2


def test_without_overfitting_the_same_steps_learn_less(train_here, shards_dir, tmp_path):
    """Or the test above would prove nothing about the batch."""
    assert train_here(*data(shards_dir), *TINY, "-x", 150, "-l", 1e-2, *QUIET, "-o", tmp_path) == 0
    assert losses(tmp_path)[-1] > 0.5


def test_recomputation_gives_the_same_bits(train_here, shards_dir, tmp_path):
    for level in (0, 1, 2):
        options = (*TINY, "-x", 5, "-n", 5, "-v", 5, "-s", 5, "-r", level, "-o", tmp_path / str(level))
        assert train_here(*data(shards_dir), *options) == 0
    for level in (1, 2):
        assert_same_run(tmp_path / str(level), tmp_path / "0")


def test_the_number_of_threads_changes_no_bit(run_train, shards_dir, tmp_path):
    """At a size at which every operation is shared out."""
    options = (*data(shards_dir), "-e", "l2h4c64", "-b", 4, "-t", 64, "-x", 4, "-n", 4, "-v", 2, "-s", 4, "-g", 8)
    for threads in (1, 2, 3):
        out_dir = tmp_path / str(threads)
        assert run_train(*options, "-o", out_dir, env={"OMP_NUM_THREADS": str(threads)}).code == 0
    for threads in (2, 3):
        assert_same_run(tmp_path / str(threads), tmp_path / "1")


def test_the_seed_matters(train_here, shards_dir, tmp_path):
    for seed in (1, 2):
        options = (*TINY, *QUIET, "-x", 2, "--seed", seed, "-o", tmp_path / str(seed))
        assert train_here(*data(shards_dir), *options) == 0
    assert losses(tmp_path / "1") != losses(tmp_path / "2")


BATCHES = [(4, ()), (2, ("-d", 64)), (1, ("-d", 64))]


def test_micro_batches_of_one_global_batch_start_with_the_same_loss(train_here, shards_dir, tmp_path):
    for B, total in BATCHES:
        options = ("-e", "l2h2c16", "-b", B, "-t", 16, *total, *QUIET, "-x", 1, "-o", tmp_path / str(B))
        assert train_here(*data(shards_dir), *options) == 0
    first = [records(tmp_path / str(B))[0] for B, _ in BATCHES]
    for key in ("loss", "norm"):
        values = [record[key] for record in first]
        assert values == pytest.approx([values[0]] * 3, rel=16 * float(np.finfo(np.float32).eps))
    assert [record["tokens"] for record in first] == [64] * 3


def training_in_float64(folder: Path, run: RunConfig) -> Training:
    """What training.build makes, in twice the precision."""
    dev, operations = device.load("numpy"), ops.load("numpy")
    config = model_from_descriptor(run.model, 256, run.T)
    model = gpt2.GPT2(
        config, operations, dev, B=run.B, T=run.T, recompute=1, dtype=np.float64, statistic_dtype=np.float64
    )
    host = Arena(gpt2.parameter_tensors(config, np.float32), dev.zeros)
    gpt2.initialize(config, host.views, run.seed)
    for name, view in model.params.views.items():
        view[...] = host.views[name]
    samples = Samples([open_shard(path) for path in sorted(folder.glob("train_*.bin"))], run.T)
    zero = Zero(OneRank(), model.params, model.lanes, run.zero_stage, operations, dev)
    return Training(
        run=run,
        comm=OneRank(),
        config=config,
        device=dev,
        ops=operations,
        model=model,
        zero=zero,
        optimizer=AdamW(model.params, gpt2.decayed(config), zero, run, operations, dev, np.float64),
        loader=Loader(samples, run.B, seed=run.seed),
        val=None,
        tokenizer=None,
        steps=run.steps,
        start=0,
        watchdog=Watchdog(OneRank(), 0),
        uploads=(dev.Upload((run.B, run.T), np.int32), dev.Upload((run.B, run.T), np.int32)),
        replay=dev.replay("off", print),
        lane_losses=dev.zeros((1,), np.float64),
        loss=dev.zeros((), np.float64),
        identity={},
    )


def test_micro_batches_of_one_global_batch_train_the_same_model(few_shards_dir):
    """In float64, where 20 steps of rounding stay far below what a wrong factor or a lost sample would do."""
    found = []
    for B, _ in BATCHES:
        run = RunConfig(model="l2h2c16", B=B, T=16, total_batch=64, steps=20, lr=1e-2, warmup=3, weight_decay=0.1)
        t = training_in_float64(few_shards_dir, run)
        found.append(([], t.model.params))
        for step in range(20):
            train.train_step(t, step)
            found[-1][0].append(float(t.loss))
        t.loader.close()
    first_losses, first_params = found[0]
    for these_losses, params in found[1:]:
        assert these_losses == pytest.approx(first_losses, rel=1e-10)
        for name, view in params.views.items():
            off = np.abs(view - first_params.views[name]).max() / np.abs(first_params.views[name]).max()
            assert off < 1e-10, name


def test_the_first_step_moves_by_the_learning_rate(few_shards_dir):
    """Adam's first update is lr * g / (|g| + eps'): lr wherever there is gradient enough, if both agree on step 1."""
    run = RunConfig(model="l2h2c16", B=4, T=16, steps=20, lr=1e-2, warmup=4)
    t = training_in_float64(few_shards_dir, run)
    before = t.model.params.flat.copy()
    assert train.train_step(t, 0) == 1e-2 / 4
    moved = np.abs(t.model.params.flat - before)
    assert moved.max() == pytest.approx(1e-2 / 4, rel=1e-4)
    assert np.median(moved[moved > 0]) == pytest.approx(1e-2 / 4, rel=1e-2)
    t.loader.close()


def test_one_epoch_is_what_the_data_hold(train_here, few_shards_dir, tmp_path):
    """7 samples make 3 steps of 2."""
    assert train_here(*data(few_shards_dir), *TINY, "-x", -1, *QUIET, "-o", tmp_path) == 0
    assert len(losses(tmp_path)) == 3


def test_off_means_off(train_here, shards_dir, tmp_path):
    train_only = data(shards_dir)[:2]  # no data to validate on is needed then
    assert train_here(*train_only, *TINY, "-v", 0, "-s", 0, "-x", 3, "-o", tmp_path) == 0
    assert {record["kind"] for record in records(tmp_path)} == {"train"}
    assert steps_saved(tmp_path) == []


@pytest.mark.parametrize(
    ("keep", "left"),
    [((), [2, 4, 6, 8, 9]), (("-nk", 2), [8, 9]), (("-nk", 1, "-nm", 4), [4, 8, 9])],
)
def test_checkpoints_to_keep(train_here, shards_dir, tmp_path, keep, left):
    assert train_here(*data(shards_dir), *TINY, *QUIET, "-x", 9, "-n", 2, *keep, "-o", tmp_path) == 0
    assert steps_saved(tmp_path) == left


# --- resuming

# 6 steps of 4 samples over epochs of 7, in two micro-batches, with a schedule that moves.
RESUMABLE = (
    *TINY,
    "-d",
    64,
    "-x",
    6,
    "-n",
    1,
    "-v",
    2,
    "-s",
    3,
    "-g",
    8,
    "-l",
    1e-2,
    "-u",
    2,
    "-q",
    0,
    "-c",
    0.1,
)


@pytest.fixture(scope="module")
def unbroken(train_here, few_shards_dir, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("unbroken") / "run"
    assert train_here(*data(few_shards_dir), *RESUMABLE, "-o", out_dir) == 0
    assert steps_saved(out_dir) == [1, 2, 3, 4, 5, 6]
    return out_dir


def broken_after(unbroken: Path, step: int, out_dir: Path) -> Path:
    """A copy of the run as if it had been killed some time after checkpoint `step`."""
    shutil.copytree(unbroken, out_dir)
    for path in out_dir.glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    return out_dir


@pytest.mark.parametrize("step", range(7))
def test_resumed_at_any_step_the_run_is_the_same(train_here, few_shards_dir, unbroken, tmp_path, step):
    """At 0 nothing is left to resume from, at 6 nothing is left to do."""
    out_dir = broken_after(unbroken, step, tmp_path / "run")
    assert train_here(*data(few_shards_dir), *RESUMABLE, "-y", 1, "-o", out_dir) == 0
    assert_same_run(out_dir, unbroken)


def test_resumed_with_other_micro_batches_the_run_reads_the_same_samples(
    train_here, few_shards_dir, unbroken, tmp_path
):
    out_dir = broken_after(unbroken, 3, tmp_path / "run")
    assert train_here(*data(few_shards_dir), *RESUMABLE, "-b", 4, "-y", 1, "-o", out_dir) == 0
    assert losses(out_dir) == pytest.approx(losses(unbroken), rel=1e-5)


@pytest.mark.parametrize("step", [65, 130])
def test_the_outlier_guard_remembers_what_it_saw_before(train_here, few_shards_dir, tmp_path, step):
    """The windows fill in 128 steps; thresholds this low make what they hold decide about updates."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    options = (*TINY, *QUIET, "-x", 145, "-n", 65, "-l", 1e-2, "-sl", 0.3, "-sg", 0.3)
    assert train_here(*data(few_shards_dir), *options, "-o", whole) == 0
    skipped = [record["step"] for record in records(whole) if record["skipped"]]
    assert skipped
    assert min(skipped) >= 128
    assert len(skipped) < 145 - 128
    broken_after(whole, step, resumed)
    assert train_here(*data(few_shards_dir), *options, "-y", 1, "-o", resumed) == 0
    assert_same_run(resumed, whole)


def read_until(process, text: str) -> str:
    """What the command prints up to the line that holds text."""
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    pytest.fail(f"ended without {text!r}: {seen}{process.stderr.read()}")


@pytest.mark.parametrize("works_alone", [False, True])
def test_a_step_that_was_done_is_logged_whatever_ends_the_next(
    train_here, few_shards_dir, tmp_path, monkeypatch, works_alone
):
    """Also where the log is one step late, as it is on a device that works alone."""
    train_step = train.train_step

    def failing(t, step):
        if step == 3:
            raise RuntimeError("planted")
        return train_step(t, step)

    monkeypatch.setattr(train, "train_step", failing)
    monkeypatch.setattr(device.load("numpy"), "WORKS_ALONE", works_alone)
    with pytest.raises(RuntimeError, match="planted"):
        train.main.main(
            [
                "--device",
                "cpu",
                *map(str, (*data(few_shards_dir), *TINY, "-s", 0, "-v", 0, "-x", 9, "-o", tmp_path / "run")),
            ],
            standalone_mode=False,
        )
    lines = (tmp_path / "run/main.log").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["s:0", "s:1", "s:2"]


def test_a_late_log_is_the_same_log(train_here, few_shards_dir, tmp_path, monkeypatch):
    """Validations, samples and checkpoints stand where they stand otherwise, and the last step is not lost."""
    options = (*data(few_shards_dir), *TINY, "-v", 2, "-m", 1, "-s", 3, "-g", 4, "-n", 4, "-x", 7)
    for name, works_alone in (("now", False), ("late", True)):
        monkeypatch.setattr(device.load("numpy"), "WORKS_ALONE", works_alone)
        assert train_here(*options, "-o", tmp_path / name) == 0
    now, late = ((tmp_path / name / "main.log").read_text() for name in ("now", "late"))
    assert now == late
    kinds = [
        [(r["step"], r["kind"]) for r in map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines())]
        for name in ("now", "late")
    ]
    assert kinds[0] == kinds[1]


def test_killed_at_random_moments_the_run_is_the_same(few_shards_dir, train_here, tmp_path):
    """kill -9, five times; the moment lies up to a step's time after a checkpoint that chance chose."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = (
        *data(few_shards_dir),
        *TINY,
        "-x",
        80,
        "-n",
        1,
        "-nk",
        3,
        "-v",
        3,
        "-s",
        7,
        "-g",
        4,
        "-l",
        1e-2,
    )
    assert train_here(*options, "-o", whole) == 0
    rng = random.Random(5)
    kills = 0
    for _ in range(5):
        with running(*options, "-y", 1, "-o", killed) as process:
            moments = []
            for _ in range(rng.randint(2, 12)):
                read_until(process, "saved ")
                moments.append(time.monotonic())
            time.sleep(rng.random() * (moments[-1] - moments[-2]))  # the event is chance itself
            process.kill()
            kills += process.wait() == -signal.SIGKILL
    assert kills == 5
    with running(*options, "-y", 1, "-o", killed) as process:
        run = finish(process)
    assert run.code == 0
    assert "resumed from" in run.out
    assert_same_run(killed, whole)
    assert not list(killed.glob(".tmp-*"))


STOPS = {
    "SIGUSR1": lambda process, out_dir: process.send_signal(signal.SIGUSR1),
    "SIGTERM": lambda process, out_dir: process.send_signal(signal.SIGTERM),
    "SIGINT": lambda process, out_dir: process.send_signal(signal.SIGINT),
    "STOP": lambda process, out_dir: (out_dir / "STOP").touch(),
}


@pytest.mark.parametrize("how", STOPS)
def test_stopped_from_outside_a_run_saves_and_goes_on(train_here, few_shards_dir, tmp_path, how):
    out_dir, whole = tmp_path / "run", tmp_path / "whole"
    options = (*data(few_shards_dir), *TINY, *QUIET, "-l", 1e-2)
    with running(*options, "-x", 10**6, "-o", out_dir) as process:
        read_until(process, " 1/1000000 |")
        STOPS[how](process, out_dir)
        run = finish(process)
    assert (run.code, run.err) == (STOPPED_AND_SAVED, "")
    (step,) = steps_saved(out_dir)
    assert step > 0
    assert f"saved {out_dir}/step-{step:08d}\n" in run.out
    assert f"after step {step}\n" in run.out
    assert how in run.out
    assert not (out_dir / "STOP").exists()

    # The default schedule does not depend on the number of steps, so a shorter run can end it.
    assert train_here(*options, "-x", step + 5, "-y", 1, "-n", 1, "-o", out_dir) == 0
    assert train_here(*options, "-x", step + 5, "-n", step + 5, "-o", whole) == 0
    assert_same_run(out_dir, whole)


def test_stopped_without_a_place_to_save_a_run_says_so(few_shards_dir):
    with running(*data(few_shards_dir), *TINY, *QUIET, "-x", 10**6) as process:
        read_until(process, " 1/1000000 |")
        process.send_signal(signal.SIGTERM)
        run = finish(process)
    assert run.code == STOPPED
    assert "not saved, for want of -o" in run.out


def test_a_second_ctrl_c_is_not_caught():
    with signals_restored():
        request = StopRequest(None)
        assert request.reason(OneRank()) == ""
        os.kill(os.getpid(), signal.SIGINT)
        assert request.reason(OneRank()) == "SIGINT"
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL


def test_stopped_before_its_first_step_a_run_claims_no_checkpoint(run_train, few_shards_dir, tmp_path):
    (tmp_path / "STOP").touch()
    run = run_train(*data(few_shards_dir), *TINY, *QUIET, "-x", 3, "-o", tmp_path)
    assert run.code == STOPPED_AND_SAVED  # the same command with -y 1 goes on: it begins
    assert steps_saved(tmp_path) == []
    assert "saved" not in run.out


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(run_train, few_shards_dir, unbroken, tmp_path):
    out_dir = broken_after(unbroken, 4, tmp_path / "run")
    path = out_dir / "step-00000004" / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    run = run_train(*data(few_shards_dir), *RESUMABLE, "-y", 1, "-o", out_dir)
    assert run.code == 0
    assert re.search(r"skipped as damaged: .*step-00000004: optimizer.safetensors: .*SHA-256", run.out)
    assert "resumed from" in run.out
    assert "step-00000003" in run.out
    assert_same_run(out_dir, unbroken)


def test_with_no_checkpoint_left_whole_nothing_is_trained(few_shards_dir, unbroken, tmp_path):
    out_dir = broken_after(unbroken, 1, tmp_path / "run")
    (out_dir / "step-00000001" / "model.safetensors").unlink()
    before = (out_dir / "main.log").read_bytes()
    code, message = refused(*data(few_shards_dir), *RESUMABLE, "-y", 1, "-o", out_dir)
    assert code == 4
    assert "model.safetensors" in message
    assert (out_dir / "main.log").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "code", "told"),
    [
        (("-y", 0), 2, ["step 6", "-y 1"]),
        (("-e", "l3h2c16"), 2, ["L", "2 there, 3 now"]),
        (("-e", "l2h4c16"), 2, ["NH", "2 there, 4 now"]),
        (("-e", "l2h2c32"), 2, ["C", "16 there, 32 now"]),
        (("-t", 8), 2, ["-t", "16 there, 8 now"]),
        (("--seed", 7), 2, ["--seed", "42 there, 7 now"]),
        (("-a", 1), 2, ["-a"]),
        (("-x", 3), 2, ["-x 3", "6"]),
    ],
)
def test_another_run_does_not_go_on_from_these_checkpoints(few_shards_dir, unbroken, tmp_path, change, code, told):
    out_dir = broken_after(unbroken, 6, tmp_path / "run")
    before = {path: path.read_bytes() for path in out_dir.rglob("*") if path.is_file() and path.name != ".lock"}
    found, message = refused(*data(few_shards_dir), *RESUMABLE, "-y", 1, "-o", out_dir, *change)
    assert found == code, message
    for word in told:
        assert re.search(rf"(?<![\w-]){re.escape(word)}(?!\w)", message), message
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("change", ["name", "size"])
def test_other_data_do_not_continue_a_run(few_shards_dir, shards_dir, unbroken, tmp_path, change):
    out_dir = broken_after(unbroken, 6, tmp_path / "run")
    other = tmp_path / "data"
    if change == "size":
        shutil.copytree(shards_dir, other)
        told = ["120", "5,002"]
    else:
        shutil.copytree(few_shards_dir, other)
        (other / "train_000001.bin").rename(other / "train_000007.bin")
        told = ["train_000001.bin", "train_000007.bin"]
    code, message = refused(*data(other), *RESUMABLE, "-y", 1, "-o", out_dir)
    assert code == 3
    for word in told:
        assert word in message


def test_a_refused_run_does_not_say_that_it_resumed(few_shards_dir, unbroken, tmp_path):
    out_dir = broken_after(unbroken, 6, tmp_path / "run")
    _, message = refused(*data(few_shards_dir), *RESUMABLE, "-y", 1, "-o", out_dir, "--seed", 7)
    assert "resumed from" not in message


def test_what_has_changed_is_told(run_train, few_shards_dir, unbroken, tmp_path):
    out_dir = broken_after(unbroken, 6, tmp_path / "run")
    run = run_train(*data(few_shards_dir), *RESUMABLE, "-y", 1, "-o", out_dir, "-x", 7, "-l", 2e-2)
    assert run.code == 0
    assert re.search(r"changed since the checkpoint: .*6 -> 7.*0\.01 -> 0\.02", run.out)


def test_two_processes_do_not_share_a_directory(run_train, few_shards_dir, tmp_path):
    options = (*data(few_shards_dir), *TINY, *QUIET, "-o", tmp_path)
    with running(*options, "-x", 10**6) as first:
        read_until(first, " 1/1000000 |")
        second = run_train(*options, "-x", 5, "-y", 1, timeout=QUICK)
        assert second.code == 4
        assert "in use" in second.err
        assert str(first.pid) in second.err
        first.send_signal(signal.SIGTERM)
        assert finish(first).code == STOPPED_AND_SAVED


# --- bad data


def write_raw(path: Path, tokens, *, magic: int = MAGIC, vocab_size: int = 256, count: int | None = None) -> None:
    header = struct.pack("<4i", magic, 1, len(tokens) if count is None else count, vocab_size)
    path.write_bytes(header.ljust(1024, b"\0") + np.asarray(tokens, "<u2").tobytes())


BAD_DATA = {
    "missing": (lambda path: path.unlink(), ["no token file matches", "train_"]),
    "truncated": (
        lambda path: path.write_bytes(path.read_bytes()[:-7]),
        ["cut short by 7", "inside a token"],
    ),
    "header only": (lambda path: path.write_bytes(path.read_bytes()[:100]), ["100 bytes"]),
    "empty": (lambda path: path.write_bytes(b""), ["0 bytes"]),
    "magic": (partial(write_raw, tokens=[1] * 100, magic=1234), ["1234", str(MAGIC)]),
    "count": (partial(write_raw, tokens=[1] * 100, count=101), ["101 tokens"]),
    "token": (
        partial(write_raw, tokens=[1] * 60 + [300] + [1] * 60),
        ["token 300", "position 60", "0 to 255"],
    ),
    "short": (partial(write_raw, tokens=[1] * 16), ["T = 16", "16 tokens", "17"]),
    "no step": (partial(write_raw, tokens=[1] * 17), ["not one step", "-b", "-x"]),
    "vocabulary": (
        partial(write_raw, tokens=[1] * 100, vocab_size=100),
        ["different vocabularies", "100", "256"],
    ),
}


@pytest.fixture
def one_shard(shards_dir, tmp_path) -> Path:
    """A folder with one shard to train on, to be spoiled, and one to validate on."""
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(shards_dir / "train_000000.bin", folder)
    shutil.copy(shards_dir / "val_000000.bin", folder)
    return folder


@pytest.mark.parametrize("fault", BAD_DATA)
def test_bad_data_is_told_before_anything_is_trained(one_shard, tmp_path, fault):
    spoil, told = BAD_DATA[fault]
    spoil(one_shard / "train_000000.bin")
    out_dir = tmp_path / "run"
    code, message = refused(*data(one_shard), *TINY, "-x", -1, "-o", out_dir)
    assert code == 3
    assert message.startswith("data error (exit 3): ")
    assert message.count("data error") == 1
    for word in told:
        assert word in message
    assert_nothing_pretends_a_run(out_dir)


@pytest.mark.parametrize("fault", ["missing", "truncated", "token", "short"])
def test_bad_validation_data_too(one_shard, tmp_path, fault):
    BAD_DATA[fault][0](one_shard / "val_000000.bin")
    code, message = refused(*data(one_shard), *TINY, "-x", 5, "-o", tmp_path / "run")
    assert code == 3
    assert "val_" in message
    assert_nothing_pretends_a_run(tmp_path / "run")


def test_bad_data_by_the_real_command(run_train, one_shard, tmp_path):
    BAD_DATA["truncated"][0](one_shard / "train_000000.bin")
    run = run_train(*data(one_shard), *TINY, "-o", tmp_path / "run", timeout=QUICK)
    assert (run.code, run.out) == (3, "")
    assert "Traceback" not in run.err
    assert run.err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "flag"), [(("-i", "{train}"), "-j"), (("-i", "", "-j", "{val}"), "-i"), (("-a", 1), "-j")]
)
def test_data_that_is_not_named_is_asked_for(shards_dir, options, flag):
    names = {"train": shards_dir / "train_*.bin", "val": shards_dir / "val_*.bin"}
    code, message = refused(*(str(option).format(**names) for option in options), *TINY, "-x", 1)
    assert code == 2
    assert f"{flag} is missing" in message
    assert ("-v 0" in message) == (flag == "-j" and "-a" not in options)  # a remedy only where it is one


# --- options

LLMC_FLAGS = (
    "-i -j -e -o -lg -n -nk -nm -y -b -t -d -x -k -l -u -q -c -sl -sg -v -m -s -g -h -a -f -w -ge -z -r "
    "-pn -pr -pg -pi -ps -pf"
).split(" ")


def test_help_alone_has_every_flag_of_llmc(run_train):
    run = run_train("--help", timeout=QUICK)
    assert (run.code, run.err) == (0, "")
    offered = re.findall(r"^  (-\w+), --[\w-]+", run.out, re.MULTILINE)
    assert set(offered) == set(LLMC_FLAGS)
    assert re.search(r"^  -h, --hellaswag ", run.out, re.MULTILINE)


def test_help_wins_over_mistakes(run_train):
    assert run_train("-i", "nowhere", "--help", timeout=QUICK).code == 0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--stpes", 5), ["--stpes", "--steps"]),
        (("--learning_rate", 1), ["--learning_rate", "--learning-rate"]),
        (("--step", 5), ["--step", "--steps"]),
        (("-Q", 5), ["-Q"]),
        (("-zz", 1), ["-z"]),
        (("stray",), ["stray"]),
        (("-x",), ["-x"]),
        (("-b", "many"), ["-b", "many"]),
        (("-b", "2.5"), ["-b", "2.5"]),
        (("-l", "fast"), ["-l", "fast"]),
        (("-y", "perhaps"), ["-y", "perhaps"]),
        (("-r", 3), ["-r", "3"]),
        (("-z", 3), ["-z", "3"]),
        (("-ge", 3), ["-ge", "3"]),
        (("-k", "sine"), ["-k", "sine", "cosine"]),
        (("-pi", "smoke"), ["-pi", "smoke", "mpi"]),
        (("--device", "tpu"), ["--device", "tpu", "cpu"]),
        (("--tokenizer", "words"), ["--tokenizer", "words", "bytes"]),
        (("-x", 0), ["-x", "0"]),
        (("-l", "nan"), ["-l", "nan"]),
        (("-q", 2), ["-q", "2"]),
        (("-d", 33), ["-d 33", "-d 32"]),
        (("-y", 1), ["-y 1", "-o"]),
        (("-n", 5), ["-n 5", "-o"]),
        (("-nk", 5), ["-nk", "-n"]),
        (("-h", 1), ["-h 1", "later version"]),
        (("-pn", 2), ["-pn 2", "later version"]),
        (("-lg", 1), ["-lg", "later version"]),
        (("-pi", "fs"), ["-pi fs", "later version"]),
        (("-e", "d13"), ["-e d13", "d12"]),
        (("-e", "l2h3c16"), ["-e", "3 heads"]),
        (("-e", "l1h1c1"), ["-e"]),
        (("-e", "gpt3:c5140"), ["-e gpt3:c5140", "5120"]),
        (("-e", "d12", "-t", 1025, "-x", 1), ["-t 1025", "1024"]),
        (("--tokenizer", "gpt2"), ["--tokenizer gpt2", "50,257", "256"]),
        (("-x", 3, "-b", -1, "-c", -1, "-h", 1), ["-b", "-c", "-h"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_mistaken_option_is_refused_by_its_name(shards_dir, tmp_path, options, told):
    code, message = refused(*data(shards_dir), *TINY, "-s", 0, *options)
    assert code == 2, message
    for word in told:
        assert word in message
    assert "Traceback" not in message


def test_several_mistakes_by_the_real_command(run_train, shards_dir, tmp_path):
    out_dir = tmp_path / "run"
    options = ("-b", 0, "-l", -1, "-nk", 3, "-h", 1, "-pn", 2)
    run = run_train(*data(shards_dir), *options, "-o", out_dir, timeout=QUICK)
    assert (run.code, run.out) == (2, "")
    lines = run.err.splitlines()
    assert lines[0].startswith("usage error (exit 2): -b ")
    assert len(lines) == 5
    assert not out_dir.exists()


@pytest.mark.parametrize(
    "variables",
    [
        {"PMI_SIZE": "2", "PMI_RANK": "0"},
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"},
        {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"},
        {"PMI_SIZE": "2", "PMI_RANK": "first"},
    ],
)
def test_several_ranks_are_refused_and_not_trained_side_by_side(shards_dir, tmp_path, variables):
    code, message = refused(*data(shards_dir), *TINY, "-o", tmp_path / "run", env=variables)
    assert code == 2
    assert "2 ranks" in message
    assert not (tmp_path / "run").exists()


def test_a_launcher_with_one_rank_is_fine(run_train, shards_dir):
    run = run_train(*data(shards_dir), *TINY, *QUIET, "-x", 1, env={"PMI_SIZE": "1", "PMI_RANK": "0"})
    assert run.code == 0


# --- memory


def limited(**limits: int) -> dict:
    """Popen's options for a process with these resource limits, by their names without RLIMIT_."""

    def apply() -> None:
        for name, limit in limits.items():
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))

    return {"preexec_fn": apply}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("-e", "gpt3:c12288", "-b", 64, "-t", 2048), ["activations", "no -b fits", "-e"]),
        (("-e", "l2h2c16", "-b", 10**9, "-t", 16), ["activations"]),
        (("-e", "l100000000h1c16", "-b", 1, "-t", 16), ["parameters"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if len(value) > 3 else "",
)
def test_what_can_never_fit_is_told_at_once_and_not_tried(run_train, shards_dir, tmp_path, options, told):
    options = (*data(shards_dir), *options, *QUIET, "-x", 1, "-o", tmp_path / "run")
    run = run_train(*options, timeout=QUICK, **limited(AS=16 << 30))
    assert (run.code, run.out) == (5, "")
    assert run.err.startswith("memory error (exit 5): ")
    for word in told:
        assert word in run.err
    assert_nothing_pretends_a_run(tmp_path / "run")


def test_the_remedy_for_too_little_memory_works(shards_dir, tmp_path, monkeypatch, train_here):
    """What the message says fits does fit, and trains the same."""
    options = (*data(shards_dir), "-e", "l2h2c16", "-t", 16, *QUIET, "-x", 2)
    assert train_here(*options, "-b", 64, "-o", tmp_path / "whole") == 0
    monkeypatch.setattr(device.load("numpy"), "available_bytes", lambda: 2 << 20)
    code, message = refused(*options, "-b", 64)
    assert code == 5
    remedy = re.search(r"this fits, with the same steps but for rounding: (-b \d+ -d \d+ -r \d)", message)[1].split()
    assert train_here(*options, *remedy, "-o", tmp_path / "remedied") == 0
    assert int(remedy[1]) < 64
    assert losses(tmp_path / "remedied") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert records(tmp_path / "remedied")[0]["tokens"] == 64 * 16


# --- numbers that are not finite


def write_model(path: Path, params: dict[str, np.ndarray], config: GPT2Config) -> Path:
    """An llm.c model file of our parameters."""
    dims = {
        "max_seq_len": config.maxT,
        "V": config.V,
        "L": config.L,
        "NH": config.NH,
        "C": config.C,
        "Vp": config.Vp,
    }
    stacked = {}
    for name, shape in llmc_model.shapes(dims).items():
        if name in params:
            stacked[name] = params[name]
        else:
            stacked[name] = np.stack([params[f"h.{layer}.{name}"] for layer in range(config.L)])
        assert stacked[name].shape == shape
    llmc_model.write(path, dims, stacked)
    return path


def initial(config: GPT2Config) -> dict[str, np.ndarray]:
    host = Arena(gpt2.parameter_tensors(config, np.float32), device.load("numpy").zeros)
    gpt2.initialize(config, host.views, 42)
    return host.views


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_model_gone_bad_gives_up_with_readable_logs(run_train, shards_dir, tmp_path, value):
    config = model_from_descriptor("l2h2c16", 256, 16)
    params = initial(config)
    params["h.1.fcw"][3, 5] = value
    model = write_model(tmp_path / "bad.bin", params, config)
    out_dir = tmp_path / "run"
    options = ("-e", model, "-b", 2, "-t", 16, "-x", 50, "-v", 5, "-s", 5, "-g", 4, "-o", out_dir)
    run = run_train(*data(shards_dir), *options)
    assert run.code == 6
    assert "Traceback" not in run.err
    assert "20 steps in a row" in run.err
    assert run.out.count("update skipped") == 20
    steps = [record for record in records(out_dir) if record["kind"] == "train"]
    assert [(record["loss"], record["skipped"]) for record in steps] == [(None, True)] * 20
    assert set(losses(out_dir, "val")) == {None}
    assert (out_dir / "main.log").read_text().startswith("s:0 tel:nan\ns:0 trl:nan lr:0.000300 norm:nan\n")


def test_a_run_that_diverges_gives_up_in_one_message(run_train, shards_dir):
    run = run_train(*data(shards_dir), *TINY, *QUIET, "-x", 40, "-l", 1e30, "--clip", 0)
    assert run.code == 6
    assert run.out.count("update skipped") == 20
    assert "Lower -l" in run.err
    assert [line for line in run.err.splitlines() if "Warning" in line] == []


def test_one_bad_gradient_changes_nothing_and_training_goes_on(shards_dir, monkeypatch):
    """A NaN that comes up once, in the middle of a run, as a bit flip in memory would make it."""
    run = RunConfig(
        train_data=data(shards_dir)[1],
        model="l2h2c16",
        B=2,
        T=16,
        steps=10,
        val_every=0,
        sample_every=0,
        lr=1e-2,
    )
    t = training.build(run, OneRank(), say=pytest.fail)
    backward = t.model.backward

    def backward_with_nan(*args, **options):
        found = backward(*args, **options)
        t.model.grads.views["h.0.qkvw"][1, 1] = np.nan
        return found

    def bits() -> list[bytes]:
        return [t.model.params.flat.tobytes(), t.optimizer.m.tobytes(), t.optimizer.v.tobytes()]

    for step in range(10):
        before = bits()
        with monkeypatch.context() as patch:
            if step == 4:
                patch.setattr(t.model, "backward", backward_with_nan)
            train.train_step(t, step)
        assert bool(t.optimizer.decision.skip) == (step == 4)
        same = [old == new for old, new in zip(before, bits(), strict=True)]
        assert same == [step == 4] * 3
    assert float(t.loss) < 5
    t.loader.close()


# --- disks


def test_a_disk_that_is_full_costs_checkpoints_but_no_training(run_train, few_shards_dir, tmp_path):
    """No file may grow beyond 16 KiB, where a checkpoint has 43: until the last step, a warning is enough."""
    out_dir = tmp_path / "run"
    options = (*data(few_shards_dir), *TINY, *QUIET, "-x", 6, "-n", 2, "-o", out_dir)
    run = run_train(*options, **limited(FSIZE=16 << 10))
    assert run.code == 4
    assert run.out.count("training goes on") == 2
    assert "warning" in run.out
    assert run.err.startswith("checkpoint error (exit 4): cannot save")
    assert "step-00000006" in run.err
    assert "Traceback" not in run.err
    assert len(losses(out_dir)) == 6
    assert not list(out_dir.glob("*step-*"))
    assert not list(out_dir.glob(".*step-*"))


def test_a_disk_that_has_room_again_is_used_again(run_train, few_shards_dir, unbroken, tmp_path):
    out_dir = broken_after(unbroken, 3, tmp_path / "run")
    full = run_train(*data(few_shards_dir), *RESUMABLE, "-y", 1, "-o", out_dir, **limited(FSIZE=16 << 10))
    assert full.code == 4
    assert steps_saved(out_dir) == [1, 2, 3]
    assert run_train(*data(few_shards_dir), *RESUMABLE, "-y", 1, "-o", out_dir).code == 0
    assert_same_run(out_dir, unbroken)


def test_logs_that_cannot_grow_are_told_once_and_end_nothing(run_train, few_shards_dir, tmp_path):
    """No file may grow beyond 2 KiB: that of both logs, and of the picture of the loss at the end."""
    options = (*data(few_shards_dir), *TINY, *QUIET, "-x", 80, "-o", tmp_path)
    run = run_train(*options, **limited(FSIZE=2 << 10))
    for name in ("main.log", "log.jsonl"):
        assert run.out.count(f"{name} can't be written any more (File too large)") == 1
    assert "step 80/80" in run.out
    assert "Traceback" not in run.err
    assert run.code == 0


def test_a_directory_without_room_for_anything_is_told_at_once(run_train, few_shards_dir, tmp_path):
    options = (*data(few_shards_dir), *TINY, *QUIET, "-x", 5, "-o", tmp_path)
    run = run_train(*options, **limited(FSIZE=64))
    assert run.code == 4
    assert "Traceback" not in run.err


def test_an_output_directory_that_is_a_file_is_told(shards_dir, tmp_path):
    (tmp_path / "run").write_text("mine")
    code, message = refused(*data(shards_dir), *TINY, "-o", tmp_path / "run")
    assert code == 4
    assert "not a directory" in message.lower()
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize("stdout", ["ascii", "full"])
def test_an_output_that_cannot_be_shown_ends_nothing(run_train, few_shards_dir, tmp_path, stdout):
    """The output of a terminal without the letters; or a file, on a disk that is full."""
    options = (*data(few_shards_dir), *TINY, "-x", 6, "-v", 2, "-s", 2, "-g", 40, "-o", tmp_path)
    if stdout == "ascii":
        run = run_train(*options, env={"PYTHONIOENCODING": "ascii"})
    else:
        with Path("/dev/full").open("w") as full:
            run = run_train(*options, stdout=full)
    assert "Traceback" not in run.err
    assert run.code == 0
    assert len(losses(tmp_path)) == 6


def test_a_reader_that_leaves_ends_nothing(few_shards_dir, tmp_path):
    """As in `python train.py ... | head -1`."""
    options = (*data(few_shards_dir), *TINY, *QUIET, "-x", 300, "-n", 300, "-o", tmp_path)
    with (tmp_path / "stderr").open("w") as err, running(*options, stderr=err) as process:
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=60) == 0
    assert "Traceback" not in (tmp_path / "stderr").read_text()
    assert steps_saved(tmp_path) == [300]


# --- llm.c's model file


def test_a_model_file_goes_on_with_the_loss_it_was_saved_with(train_here, shards_dir, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    options = (*data(shards_dir), "-b", 2, "-t", 16, "-v", 5, "-s", 0, "-m", -1)
    assert train_here(*options, "-e", "l2h2c16", "-x", 5, "-n", 5, "-l", 1e-2, "-o", first) == 0
    saved = checkpoint.load_latest(first, pytest.fail)
    params = saved.tensors(gpt2.MODEL_FILE)
    model = write_model(tmp_path / "x.bin", params, model_from_descriptor("l2h2c16", 256, 16))
    assert train_here(*options, "-e", model, "-x", 1, "-o", second) == 0
    assert losses(second, "val")[0] == losses(first, "val")[-1]
    assert losses(second, "val")[0] < losses(first, "val")[0] - 0.5  # it is no new model


def test_a_model_file_can_be_trained_on_shorter_sequences_but_not_on_longer(train_here, shards_dir, tmp_path):
    config = model_from_descriptor("l2h2c16", 256, 16)
    model = write_model(tmp_path / "x.bin", initial(config), config)
    options = (*data(shards_dir), *QUIET, "-e", model, "-b", 2, "-x", 2)
    assert train_here(*options, "-t", 8, "-o", tmp_path / "run") == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["maxT"] == 16
    code, message = refused(*options, "-t", 17)
    assert code == 2
    assert "-t 17" in message
    assert "16 positions" in message


@pytest.mark.parametrize("fault", ["missing", "truncated", "vocabulary"])
def test_a_bad_model_file_is_refused(shards_dir, tmp_path, fault):
    config = model_from_descriptor("l2h2c16", 200 if fault == "vocabulary" else 256, 16)
    path = write_model(tmp_path / "x.bin", initial(config), config)
    if fault == "missing":
        path.unlink()
    elif fault == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    code, message = refused(*data(shards_dir), "-e", path, "-b", 2, "-t", 16, "-x", 1)
    assert code == (2 if fault == "vocabulary" else 4)
    assert str(path) in message


def test_what_was_tuned_is_kept_with_the_run_and_used_again(train_here, shards_dir, tmp_path, monkeypatch):
    """In config.json and in the checkpoint, from which the run that goes on has it; never where it is switched off."""
    operations, given, used = ops.load("numpy"), [], []

    def tune(dims, gelu_fusion, grad_dtype, accumulates, saved, say, *, thorough):
        given.append((gelu_fusion, accumulates, saved, thorough))
        return saved or {"algorithms": {"a multiply": {"algo": "ab"}}}

    monkeypatch.setattr(operations, "tune", tune)
    monkeypatch.setattr(operations, "use_tuning", used.append)
    options = (*data(shards_dir), "-e", "l2h2c16", "-b", 2, "-t", 16, *QUIET, "-n", 1, "-o", tmp_path)
    table = {"algorithms": {"a multiply": {"algo": "ab"}}}
    assert train_here(*options, "-x", 1) == 0
    assert train_here(*options, "-x", 2, "-y", 1, "-ge", 1, "-d", 64, "--gemm-search", "full") == 0
    assert given == [(-1, False, {}, False), (1, True, table, True)]
    assert used == [table, table]
    saved = checkpoint.load_latest(tmp_path, pytest.fail)
    assert saved
    assert saved.state["tuning"] == json.loads((tmp_path / "config.json").read_text())["tuning"] == table
    assert train_here(*options, "-x", 3, "-y", 1, "--gemm-search", "off") == 0
    assert len(given) == 2
    assert used[-1] == json.loads((tmp_path / "config.json").read_text())["tuning"] == {}
