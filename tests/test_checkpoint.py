"""Checkpoints survive kill -9, full disks, damage and malice; each is tried for real, not described."""

import errno
import hashlib
import itertools
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from engine import checkpoint
from engine.checkpoint import MANIFEST, Checkpoint, RunLock, load, load_latest, prune, save
from engine.errors import CheckpointError

# The children forked here run plain Python and os._exit; they touch no lock that a thread could have held.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def content(seed: int) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    shapes = {"wte": (7, 4), "lnfw": (4,)}
    moments = {f"{moment}.{name}": shape for moment in "mv" for name, shape in shapes.items()}
    return {
        file: {name: rng.standard_normal(shape, np.float32) for name, shape in table.items()}
        for file, table in ((MODEL, shapes), (OPTIMIZER, moments))
    }


def save_seeded(run_dir: Path, step: int, seed: int | None = None) -> Path:
    seed = step if seed is None else seed
    return save(run_dir, step, content(seed), {"seed": seed, "tokens": step * 10})


def assert_whole(found: Checkpoint | None, step: int, seeds: set[int] | None = None) -> None:
    assert found is not None
    assert found.step == step
    assert found.state["seed"] in (seeds or {step})
    for name, arrays in content(found.state["seed"]).items():
        assert_same(found.tensors(name), arrays)


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype.newbyteorder("="))
        assert found[name].tobytes() == array.astype(found[name].dtype).tobytes()


def latest(run_dir: Path) -> Checkpoint:
    """load_latest where there must be a checkpoint and nothing may be damaged."""
    found = load_latest(run_dir, pytest.fail)
    assert found is not None
    return found


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in run_dir.iterdir())


def in_child(work: Callable[[], object]) -> int:
    """Exit status of a forked child that does `work`: 0, or minus the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at(line: int, work: Callable[[], object]) -> bool:
    """Whether a child doing `work` reached its `line`-th line of Python, where it is killed with SIGKILL.

    Lines are counted in checkpoint.py and in shutil.py, whose rmtree deletes file by file. Every system call
    of ours lies between two of them, so going through all lines kills before and after each.
    """
    counter = itertools.count(1)

    def trace(frame: Any, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in (checkpoint.__file__, shutil.__file__):
            return None
        if event == "line" and next(counter) == line:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    def traced() -> None:
        sys.settrace(trace)
        work()

    status = in_child(traced)
    assert status in (0, -signal.SIGKILL)
    return status != 0


def sweep_kills(tmp_path: Path, prepare: Callable, work: Callable, check: Callable) -> None:
    """work(run_dir) on a fresh prepare(run_dir), killed at its 1st, 2nd, ... line; then check(run_dir)."""
    template, run_dir = tmp_path / "template", tmp_path / "run"
    template.mkdir()
    prepare(template)
    for line in itertools.count(1):
        shutil.rmtree(run_dir, ignore_errors=True)
        shutil.copytree(template, run_dir)
        killed = killed_at(line, lambda: work(run_dir))
        check(run_dir)
        if not killed:
            break
    assert line > 50  # the tracer has really seen our code


# --- round trip


def test_round_trip_is_bit_exact(tmp_path):
    odd_nan = np.array([0x7FC01234, 0xFF800001, 0x80000000], np.uint32).view(np.float32)
    arrays = {
        "scalar": np.array(1.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "nan": odd_nan,
        "transposed": np.arange(12, dtype=np.float32).reshape(3, 4).T,
        "strided": np.arange(12, dtype=np.float64)[::2],
        "big-endian": np.arange(5, dtype=">f4"),
        "broadcast": np.broadcast_to(np.float32(7), (3, 2)),
        **{name: np.ones(3, name) for name in checkpoint.DTYPES},
    }
    state = {"tokens": 2**60, "lr": 0.1, "nested": {"list": [1, None, True, "é\ud800\n"]}}
    path = save(tmp_path, 20, {MODEL: arrays, "empty.safetensors": {}}, state)
    assert path == tmp_path / "step-00000020"
    assert names(path) == ["empty.safetensors", MANIFEST, MODEL]
    for found in (load(path), latest(tmp_path)):
        assert (found.step, found.path, found.state) == (20, path, state)
        assert_same(found.tensors(MODEL), arrays)
        assert found.tensors("empty.safetensors") == {}


def test_same_content_gives_the_same_bytes(tmp_path):
    one, two = save_seeded(tmp_path / "1", 5), save_seeded(tmp_path / "2", 5)
    for name in (MODEL, OPTIMIZER, MANIFEST):
        assert (one / name).read_bytes() == (two / name).read_bytes()


@quick
@given(state=st.dictionaries(st.text(max_size=5), json_values, max_size=4))
def test_any_json_state_comes_back(tmp_path, state):
    assert load(save(tmp_path, 0, {}, state)).state == state


def test_steps_of_any_length_are_ordered_as_numbers(tmp_path):
    for step in (9, 123_456_789, 99_999_999):
        save_seeded(tmp_path, step)
    assert_whole(latest(tmp_path), 123_456_789)


def test_no_checkpoints_at_all(tmp_path):
    assert load_latest(tmp_path / "missing", pytest.fail) is None
    (tmp_path / "step-1").mkdir()  # not our way of writing it
    (tmp_path / "log.jsonl").touch()
    assert load_latest(tmp_path, pytest.fail) is None


@pytest.mark.parametrize(
    ("step", "files", "state"),
    [
        (-1, {}, {}),
        (0, {"../model": {}}, {}),
        (0, {".hidden": {}}, {}),
        (0, {MANIFEST: {}}, {}),
        (0, {MODEL: {"w": np.ones(2, ml_dtypes.bfloat16)}}, {}),
        (0, {MODEL: {"w": np.ones(2, object)}}, {}),
        (0, {}, {"array": np.ones(2)}),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, step, files, state):
    with pytest.raises((ValueError, TypeError)):
        save(tmp_path, step, files, state)
    assert names(tmp_path) == []


def test_state_beyond_the_limit_of_load_is_not_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "MAX_MANIFEST_BYTES", 2_000)
    with pytest.raises(ValueError, match="limit is 2,000"):
        save(tmp_path, 0, content(0), {"long": "x" * 2_000})
    assert names(tmp_path) == []


# --- kill -9


def test_save_killed_at_every_line(tmp_path):
    def check(run_dir):
        found = latest(run_dir)
        assert_whole(found, found.step)
        assert found.step in (1, 2)
        assert (found.step == 2) == (run_dir / "step-00000002").exists()
        save_seeded(run_dir, 3)
        assert set(names(run_dir)) - {"step-00000002"} == {"step-00000001", "step-00000003"}
        assert_whole(latest(run_dir), 3)

    sweep_kills(tmp_path, lambda d: save_seeded(d, 1), lambda d: save_seeded(d, 2), check)


def test_saving_a_step_again_killed_at_every_line(tmp_path):
    def check(run_dir):
        assert_whole(latest(run_dir), 2, seeds={2, 77})
        save_seeded(run_dir, 3)
        assert names(run_dir) == ["step-00000002", "step-00000003"]
        assert_whole(load(run_dir / "step-00000002"), 2, seeds={2, 77})

    sweep_kills(tmp_path, lambda d: save_seeded(d, 2), lambda d: save_seeded(d, 2, seed=77), check)


def test_prune_killed_at_every_line(tmp_path):
    def prepare(run_dir):
        for step in (1, 2, 3):
            save_seeded(run_dir, step)

    def check(run_dir):
        assert_whole(latest(run_dir), 3)
        for path in run_dir.glob("step-*"):
            load(path)  # a name is whole or gone
        prune(run_dir, keep=1, every_major=0)
        assert names(run_dir) == ["step-00000003"]

    sweep_kills(tmp_path, prepare, lambda d: prune(d, keep=1, every_major=0), check)


def test_clearing_up_after_a_kill_killed_at_every_line(tmp_path):
    def prepare(run_dir):
        save_seeded(run_dir, 2)
        (run_dir / "step-00000002").rename(run_dir / ".old-step-00000002")
        shutil.copytree(run_dir / ".old-step-00000002", run_dir / ".tmp-step-00000002")

    def check(run_dir):
        found = latest(run_dir)
        assert_whole(found, found.step)
        save_seeded(run_dir, 4)
        assert (
            {"step-00000002", "step-00000004"}
            <= set(names(run_dir))
            <= {
                "step-00000002",
                "step-00000003",
                "step-00000004",
            }
        )

    sweep_kills(tmp_path, prepare, lambda d: save_seeded(d, 3), check)


def test_killed_in_the_midst_of_writing(tmp_path):
    """Where the sweeps cannot reach: inside one write of a large file."""
    arrays = {"w": np.arange(1 << 18, dtype=np.float32)}

    def save_for_ever():
        for step in itertools.count(latest(tmp_path).step + 1):
            save(tmp_path, step, {MODEL: arrays}, {})
            prune(tmp_path, keep=2, every_major=0)

    save(tmp_path, 0, {MODEL: arrays}, {})
    for delay in np.linspace(0.005, 0.06, 25):
        pid = os.fork()
        if pid == 0:
            save_for_ever()
            os._exit(0)
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        assert_same(latest(tmp_path).tensors(MODEL), arrays)
    before = latest(tmp_path).step
    assert before > 0
    save(tmp_path, before + 1, {MODEL: arrays}, {})
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_a_former_version_left_aside_is_found_and_put_back(tmp_path):
    save_seeded(tmp_path, 1)
    save_seeded(tmp_path, 2).rename(tmp_path / ".old-step-00000002")
    assert_whole(latest(tmp_path), 2)
    assert names(tmp_path) == [".old-step-00000002", "step-00000001"]  # a reader changes nothing
    save_seeded(tmp_path, 3)
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000003"]


def test_only_our_own_leavings_are_removed(tmp_path):
    for name in (".tmp-other", ".old-step-x", "step-1"):
        (tmp_path / name).mkdir()
    (tmp_path / ".tmp-step-00000007").mkdir()
    (tmp_path / ".tmp-step-00000008").touch()
    save_seeded(tmp_path, 1)
    assert names(tmp_path) == [".old-step-x", ".tmp-other", "step-00000001", "step-1"]


# --- power loss: the order in which things reach the disk


@pytest.fixture
def disk_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is fsynced, renamed and deleted, in order. Files are named by inode: a descriptor has no name."""
    order: list[str] = []
    fsync, rename, rmtree = os.fsync, Path.rename, shutil.rmtree

    def spy_fsync(fd):
        inode = os.fstat(fd).st_ino
        found = [path for path in (tmp_path, *tmp_path.rglob("*")) if path.stat().st_ino == inode]
        order.append(f"fsync {found[0].relative_to(tmp_path)}")
        fsync(fd)

    def spy_rename(path, target):
        order.append(f"rename {path.name} {target.name}")
        return rename(path, target)

    def spy_rmtree(path):
        order.append(f"delete {path.name}")
        rmtree(path)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "rename", spy_rename)
    monkeypatch.setattr(shutil, "rmtree", spy_rmtree)
    return order


def test_everything_is_on_the_disk_before_the_name(tmp_path, disk_order):
    writing = [
        f"fsync .tmp-step-00000001/{MODEL}",
        f"fsync .tmp-step-00000001/{OPTIMIZER}",
        f"fsync .tmp-step-00000001/{MANIFEST}",
        "fsync .tmp-step-00000001",
    ]
    save_seeded(tmp_path, 1)
    assert disk_order == [*writing, "rename .tmp-step-00000001 step-00000001", "fsync ."]
    disk_order.clear()
    save_seeded(tmp_path, 1)
    assert disk_order == [
        *writing,
        "rename step-00000001 .old-step-00000001",
        "rename .tmp-step-00000001 step-00000001",
        "fsync .",
        "delete .old-step-00000001",
    ]


def test_a_pruned_checkpoint_has_lost_its_name_before_its_files(tmp_path, disk_order):
    save_seeded(tmp_path, 1)
    save_seeded(tmp_path, 2)
    disk_order.clear()
    prune(tmp_path, keep=1, every_major=0)
    assert disk_order == [
        "rename step-00000001 .tmp-step-00000001",
        "fsync .",
        "delete .tmp-step-00000001",
    ]


# --- damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])  # the last byte of a manifest is a line break, and means nothing


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def zero_fill(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def block(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)  # a reader without a writer waits for ever


def nest(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [truncate, flip, zero_fill, Path.unlink, link, block, nest])
@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, MANIFEST])
def test_damage_is_reported_and_the_older_checkpoint_used(tmp_path, name, damage):
    save_seeded(tmp_path, 1)
    damaged = save_seeded(tmp_path, 2)
    damage(damaged / name)
    report: list[str] = []
    assert_whole(load_latest(tmp_path, report.append), 1)
    assert len(report) == 1
    assert str(damaged) in report[0]
    assert name in report[0]
    assert "\n" not in report[0]
    with pytest.raises(CheckpointError, match=name):
        load(damaged)
    shutil.rmtree(tmp_path / "step-00000001")
    with pytest.raises(CheckpointError, match=name) as error:
        load_latest(tmp_path, report.append)
    assert str(tmp_path) in str(error.value)
    assert "fix:" in str(error.value)


def test_every_byte_of_every_file_is_guarded(tmp_path):
    path = save(tmp_path, 1, {MODEL: {"w": np.arange(3, dtype=np.float32)}}, {"lr": 0.25, "name": "run"})
    for name in (MODEL, MANIFEST):
        original = (path / name).read_bytes()
        for position, byte in enumerate(original):
            if name == MANIFEST and chr(byte).isspace():
                continue  # a space between two fields may become another one: it says the same
            (path / name).write_bytes(original[:position] + bytes([byte ^ 4]) + original[position + 1 :])
            with pytest.raises(CheckpointError, match=name):
                load(path)
        (path / name).write_bytes(original)


def test_a_directory_of_another_step_is_skipped(tmp_path):
    save_seeded(tmp_path, 1)
    save_seeded(tmp_path, 2).rename(tmp_path / "step-00000009")
    report: list[str] = []
    assert_whole(load_latest(tmp_path, report.append), 1)
    assert "of step 2" in report[0]
    assert_whole(load(tmp_path / "step-00000009"), 2)  # asked for by its path, its name does not matter


def test_a_file_that_changed_after_it_was_verified_is_not_read(tmp_path):
    found = load(save_seeded(tmp_path, 1))
    flip(found.path / MODEL)
    with pytest.raises(CheckpointError, match=f"{MODEL}: its SHA-256"):
        found.tensors(MODEL)
    with pytest.raises(CheckpointError, match=r"other.safetensors: not in this checkpoint"):
        found.tensors("other.safetensors")


def test_a_missing_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        load(tmp_path / "step-00000001")


# --- malice: checkpoints whose hashes are right


def forge(path: Path, manifest: Any) -> None:
    """Write a manifest with the digest that it should have, as an adversary can."""
    if isinstance(manifest, dict) and "sha256" in manifest:
        rest = {key: value for key, value in manifest.items() if key != "sha256"}
        manifest = {
            **rest,
            "sha256": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest(),
        }
    (path / MANIFEST).write_text(json.dumps(manifest))


def forged_file(tmp_path: Path, data: bytes) -> Path:
    path = save(tmp_path, 1, {MODEL: {}}, {})
    (path / MODEL).write_bytes(data)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"][MODEL] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    forge(path, manifest)
    return path


PLACES: list[tuple[str, ...]] = [
    (),
    ("version",),
    ("step",),
    ("files",),
    ("files", MODEL),
    ("files", MODEL, "bytes"),
    ("files", MODEL, "sha256"),
    ("state",),
]


@quick
@given(place=st.sampled_from(PLACES), value=json_values)
@example(place=("step",), value=-1)
def test_any_json_in_any_field_is_refused_or_harmless(tmp_path, place, value):
    path = save_seeded(tmp_path, 1)
    manifest = json.loads((path / MANIFEST).read_text())
    holder = {"": manifest}
    for key in ("", *place)[:-1]:
        holder = holder[key]
    holder[("", *place)[-1]] = value
    forge(path, manifest if place else value)
    try:
        found = load(path)
    except CheckpointError:
        return
    assert (found.step, found.state) == (manifest["step"], manifest["state"])
    assert type(found.step) is int
    assert found.step >= 0
    assert type(found.state) is dict
    assert set(found.files) <= {MODEL, OPTIMIZER}


@quick
@given(data=st.binary(max_size=200))
def test_any_bytes_as_manifest_are_refused(tmp_path, data):
    path = save_seeded(tmp_path, 1)
    (path / MANIFEST).write_bytes(data)
    with pytest.raises(CheckpointError, match=MANIFEST):
        load(path)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"version": ' + "9" * 10_000 + "}",
        '{"version": 1e999}',
        '{"version": true}',
        '"\\ud800"',
        "\xff",
    ],
)
def test_absurd_manifests_are_refused(tmp_path, text):
    path = save_seeded(tmp_path, 1)
    (path / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=MANIFEST):
        load(path)


def test_a_manifest_of_absurd_size_is_not_read(tmp_path):
    path = save_seeded(tmp_path, 1)
    os.truncate(path / MANIFEST, 1 << 40)  # a hole: no disk is used, the memory would be
    with pytest.raises(CheckpointError, match="at most"):
        load(path)


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "/etc/hostname",
        "..",
        ".",
        "",
        ".lock",
        "a/b",
        "a\0b",
        "é",
        "\ud800",
        "a" * 300,
        MANIFEST,
    ],
)
def test_file_names_that_lead_elsewhere_are_refused(tmp_path, name):
    path = save_seeded(tmp_path / "run", 1)
    (tmp_path / "run" / "outside").write_bytes((path / MODEL).read_bytes())
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"][name] = manifest["files"].pop(MODEL)
    forge(path, manifest)
    with pytest.raises(CheckpointError, match="not a plain file name"):
        load(path)


def test_a_format_of_the_future_is_named(tmp_path):
    path = save_seeded(tmp_path, 1)
    forge(path, {**json.loads((path / MANIFEST).read_text()), "version": 2})
    with pytest.raises(CheckpointError, match="version is 2, this program reads 1"):
        load(path)


def tensor_file(header: object, data: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(dtype: str = "F32", shape: tuple[int, ...] = (2,), offsets: tuple[int, int] = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HOSTILE_FILES = {
    "pickle": pickle.dumps({"w": [1.0]}),
    "empty": b"",
    "header beyond the file": struct.pack("<Q", 10**18) + b"{}",
    "header of 2^64 - 1": struct.pack("<Q", 2**64 - 1) + b"{}",
    "not JSON": tensor_file(b"{]"),
    "not UTF-8": tensor_file(b'{"\xff": 1}'),
    "not an object": tensor_file([1]),
    "line break": tensor_file({"w": tensor("\n\x1b[31m")}),
    "offsets beyond the file": tensor_file({"w": tensor(shape=(4,), offsets=(0, 16))}),
    "offsets backwards": tensor_file({"w": tensor(offsets=(8, 0))}),
    "overlap": tensor_file({"w": tensor(), "x": tensor()}),
    "hole": tensor_file({"w": tensor(shape=(1,), offsets=(4, 8))}),
    "shape overflows": tensor_file({"w": tensor(shape=(2**63, 2**63))}),
    "shape is not the size": tensor_file({"w": tensor(shape=(3,))}),
    "bytes left over": tensor_file({"w": tensor()}, bytes(9)),
}
NUMPY_CANNOT_HOLD = {
    "dtype that numpy lacks": tensor_file({"w": tensor("BF16", (4,))}),
    "too many dimensions": tensor_file({"w": tensor(shape=(2, *[1] * 80))}),
    "zero times huge": tensor_file({"w": tensor(shape=(0, 2**40, 2**23), offsets=(0, 0))}, b""),
}


@pytest.mark.parametrize("kind", HOSTILE_FILES)
def test_hostile_tensor_files_are_refused(tmp_path, kind):
    path = forged_file(tmp_path, HOSTILE_FILES[kind])
    with pytest.raises(CheckpointError, match=MODEL) as error:
        load(path)
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize("kind", NUMPY_CANNOT_HOLD)
def test_tensors_that_numpy_cannot_hold_are_refused(tmp_path, kind):
    found = load(forged_file(tmp_path, NUMPY_CANNOT_HOLD[kind]))
    with pytest.raises(CheckpointError, match=f"{MODEL}: has a tensor that numpy cannot hold"):
        found.tensors(MODEL)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/")], ids=["pipe", "link"])
def test_a_special_file_of_the_promised_size_is_not_opened(tmp_path, make):
    path = forged_file(tmp_path, b"")
    (path / MODEL).unlink()
    make(path / MODEL)
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"][MODEL]["bytes"] = (path / MODEL).lstat().st_size
    forge(path, manifest)
    with pytest.raises(CheckpointError, match=f"{MODEL}: not a regular file"):
        load(path)


# --- full and unwritable disks


def save_within(limit: int, run_dir: Path, step: int) -> None:
    """Save where no file can grow beyond `limit` bytes; fails unless the outcome is the right one."""
    need = max(path.stat().st_size for path in (run_dir / "step-00000001").iterdir())
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # Python ignores SIGXFSZ: writes fail with EFBIG
    if limit >= need:
        save_seeded(run_dir, step, seed=1)
    else:
        with pytest.raises(CheckpointError, match=r"(?s)File too large.*fix:"):
            save_seeded(run_dir, step, seed=1)


@pytest.mark.parametrize("step", [1, 2], ids=["same step again", "next step"])
def test_full_disk_at_every_boundary(tmp_path, step):
    first = save_seeded(tmp_path, 1)
    sizes = [path.stat().st_size for path in first.iterdir()]
    limits = {size + extra for size in sizes for extra in (-1, 0, 1)} | set(range(0, max(sizes), 97))
    for limit in sorted(limits):
        assert in_child(partial(save_within, limit, tmp_path, step)) == 0
        if limit < max(sizes):
            assert names(tmp_path) == ["step-00000001"]
        assert_whole(load(first), 1)
    assert step == 1 or names(tmp_path) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("failing", range(5))
@pytest.mark.parametrize("step", [1, 2])
def test_disk_that_reports_its_fullness_at_fsync(tmp_path, monkeypatch, failing, step):
    """As network file systems do."""
    save_seeded(tmp_path, 1)
    calls, fsync = itertools.count(), os.fsync

    def full(fd):
        if next(calls) == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_seeded(tmp_path, step, seed=77)
    # The last fsync comes after the rename: what is there is whole, only perhaps not yet on the disk.
    renamed = failing == 4
    assert names(tmp_path) == [f"step-{there:08d}" for there in sorted({1, step if renamed else 1})]
    assert_whole(load(tmp_path / "step-00000001"), 1, seeds={77 if renamed and step == 1 else 1})
    if renamed:
        assert_whole(latest(tmp_path), step, seeds={77})


@pytest.mark.parametrize("failing", ["step-00000001", ".tmp-step-00000001"])
def test_rename_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch, failing):
    save_seeded(tmp_path, 1)
    rename = Path.rename

    def fail(path, target):
        if path.name == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        save_seeded(tmp_path, 1, seed=77)
    assert names(tmp_path) == ["step-00000001"]
    assert_whole(latest(tmp_path), 1)


def test_space_is_checked_before_anything_is_written(tmp_path, monkeypatch):
    save_seeded(tmp_path, 1)
    monkeypatch.setattr(safetensors.numpy, "save_file", None)  # must not be reached
    petabytes = np.broadcast_to(np.float32(0), (10**15,))
    with pytest.raises(CheckpointError, match=r"needs 4,400,000,000,000,000 bytes .* are free"):
        save(tmp_path, 2, {MODEL: {"w": petabytes}}, {})
    assert names(tmp_path) == ["step-00000001"]


def test_interrupted_save_leaves_nothing(tmp_path, monkeypatch):
    save_seeded(tmp_path, 1)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.numpy, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_seeded(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize(
    "use",
    [
        RunLock,
        lambda run_dir: save_seeded(run_dir, 1),
        lambda run_dir: prune(run_dir, keep=1, every_major=0),
        lambda run_dir: load_latest(run_dir, print),
    ],
    ids=["lock", "save", "prune", "load_latest"],
)
def test_a_file_in_the_way_of_the_run_directory(tmp_path, use):
    run_dir = tmp_path / "run"
    run_dir.write_text("mine")
    with pytest.raises(CheckpointError, match=str(run_dir)) as error:
        use(run_dir)
    assert "fix:" in str(error.value)
    assert error.value.exit_code == 4
    assert run_dir.read_text() == "mine"


def test_a_file_in_the_way_of_the_checkpoint_is_replaced(tmp_path):
    (tmp_path / "step-00000001").write_text("not a checkpoint")
    save_seeded(tmp_path, 1)
    assert names(tmp_path) == ["step-00000001"]
    assert_whole(latest(tmp_path), 1)


# --- prune


@pytest.mark.parametrize(
    ("keep", "every_major", "kept"),
    [
        (0, 0, [0, 10, 20, 30, 40, 50]),
        (0, 20, [0, 10, 20, 30, 40, 50]),
        (1, 0, [50]),
        (2, 0, [40, 50]),
        (9, 0, [0, 10, 20, 30, 40, 50]),
        (1, 20, [0, 20, 40, 50]),
        (2, 30, [0, 30, 40, 50]),
    ],
)
def test_prune_keeps(tmp_path, keep, every_major, kept):
    steps = [0, 10, 20, 30, 40, 50]
    for step in steps:
        save(tmp_path, step, {}, {})
    assert prune(tmp_path, keep=keep, every_major=every_major) == [s for s in reversed(steps) if s not in kept]
    assert names(tmp_path) == [f"step-{step:08d}" for step in kept]
    assert prune(tmp_path, keep=keep, every_major=every_major) == []


def test_prune_keeps_the_newest_that_verifies(tmp_path):
    for step in (1, 2, 3, 4):
        save_seeded(tmp_path, step)
    flip(tmp_path / "step-00000004" / MODEL)
    flip(tmp_path / "step-00000003" / MODEL)
    assert prune(tmp_path, keep=1, every_major=0) == [3, 1]
    assert names(tmp_path) == ["step-00000002", "step-00000004"]
    flip(tmp_path / "step-00000002" / MODEL)
    assert prune(tmp_path, keep=1, every_major=0) == []  # nothing verifies: what is left may still be mended


@pytest.mark.parametrize(("keep", "every_major"), [(-1, 0), (0, -1)])
def test_prune_refuses_nonsense(tmp_path, keep, every_major):
    with pytest.raises(ValueError, match=">= 0"):
        prune(tmp_path, keep=keep, every_major=every_major)


# --- lock


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    run_dir = tmp_path / "new" / "run"
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        RunLock(run_dir)
        os.write(write_end, b"locked")
        signal.pause()
    try:
        assert os.read(read_end, 6) == b"locked"
        with pytest.raises(CheckpointError, match=f"(?s){run_dir} is in use.*pid {pid} on .*fix:"):
            RunLock(run_dir)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read_end)
        os.close(write_end)
    with RunLock(run_dir):
        assert (run_dir / ".lock").read_text().startswith(f"pid {os.getpid()} on ")


def test_release_lets_the_next_one_in(tmp_path):
    first = RunLock(tmp_path)
    with pytest.raises(CheckpointError, match="in use"):
        RunLock(tmp_path)
    first.release()
    first.release()
    with RunLock(tmp_path):
        first.release()  # must not free what is now another's
        with pytest.raises(CheckpointError, match="in use"):
            RunLock(tmp_path)
    RunLock(tmp_path).release()


def test_a_refused_lock_leaks_no_descriptor(tmp_path):
    with RunLock(tmp_path):
        before = os.dup(0)
        os.close(before)
        for _ in range(3):
            with pytest.raises(CheckpointError):
                RunLock(tmp_path)
        after = os.dup(0)
        os.close(after)
    assert after == before


def test_a_lock_file_that_cannot_be_opened(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(CheckpointError, match="cannot use"):
        RunLock(tmp_path)


def test_lock_and_leavings_are_no_checkpoints(tmp_path):
    with RunLock(tmp_path):
        (tmp_path / ".tmp-step-00000009").mkdir()
        assert load_latest(tmp_path, pytest.fail) is None
        save_seeded(tmp_path, 1)
        assert names(tmp_path) == [".lock", "step-00000001"]
