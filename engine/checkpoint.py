"""Save and restore a run: named files of numpy arrays and one JSON state, committed whole.

    RUN_DIR/.lock                              held by the only process that may write in RUN_DIR
    RUN_DIR/step-00000020/model.safetensors    one file per name given to save()
    RUN_DIR/step-00000020/optimizer.safetensors
    RUN_DIR/step-00000020/manifest.json        {version, step, files: {name: {bytes, sha256}}, state, sha256}

The commit: write and fsync every file, and the manifest last, in a hidden directory; then rename it. So a
directory named step-N is complete whenever the writer is killed or the power fails. Two hidden names appear
next to it, and the next save() or prune() clears up what a killed process left of them:

    .tmp-step-N    not a checkpoint: being written or being deleted
    .old-step-N    a whole checkpoint: step N as it was, while a new step N takes its place
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import reprlib
import shutil
import socket
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from engine.disk import sync
from engine.errors import CheckpointError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 64 << 20  # a hostile manifest must not fill the memory before it is refused
SPACE_MARGIN = 1.1
READ_BYTES = 1 << 20
# safetensors' numpy reader cannot give bfloat16 back, so it is not accepted either.
DTYPES = frozenset(
    np.dtype(code).name for code in ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
)

CHECKPOINT_NAME = re.compile(r"(\.old-)?step-([0-9]{8,})")
HIDDEN_NAME = re.compile(r"\.(old|tmp)-(step-[0-9]{8,})")
# Basenames only: a manifest must not lead out of its directory, nor to a hidden file.
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")

Files = Mapping[str, Mapping[str, np.ndarray]]


class FileRecord(NamedTuple):
    """What the manifest says of one file."""

    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A directory whose manifest and files have been verified.

    step: optimizer steps done. state: the JSON object given to `save`. files: what the manifest lists.
    """

    path: Path
    step: int
    state: dict[str, Any]
    files: dict[str, FileRecord]

    def tensors(self, name: str) -> dict[str, np.ndarray]:
        """Arrays of file `name`, by tensor name, with the shapes and dtypes that were saved.

        The bytes are hashed again as they are read, so the arrays are those of the manifest even if the file
        has changed since it was verified. Raises CheckpointError if it has, or if there is no such file.
        """
        try:
            return _read_tensors(self.path, name, self.files)
        except _DamagedError as error:
            raise _unusable(self.path, error) from error


class RunLock:
    """The right to write in `run_dir`, which is made if missing; one process at a time has it.

    Held until `release`, the end of a `with` block or the end of the process: the kernel frees it even after
    kill -9, so there is never a stale lock to remove. Raises CheckpointError if another process holds it, or
    if `run_dir` cannot be made or written.
    """

    def __init__(self, run_dir: str | Path) -> None:
        self.path = Path(run_dir) / ".lock"
        try:
            if self.path.parent.exists() and not self.path.parent.is_dir():
                raise NotADirectoryError(f"{self.path.parent} is not a directory")
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                self._acquire()
            except BaseException:
                os.close(self._fd)
                raise
        except OSError as error:
            raise CheckpointError(
                f"cannot use {self.path.parent} as run directory\n"
                f"  why: {error}\n"
                "  fix: give a directory that can be written, on a file system that supports flock"
            ) from error

    def _acquire(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._fd, 300, 0).decode(errors="replace").strip()
            raise CheckpointError(
                f"{self.path.parent} is in use\n"
                f"  why: another process trains there: {holder or 'it has not yet written its name'}\n"
                "  fix: wait for it or stop it, or give another run directory"
            ) from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        """Let another process write. The file stays: deleting it would let two processes lock two files."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def save(run_dir: str | Path, step: int, files: Files, state: Mapping[str, Any]) -> Path:
    """Commit a checkpoint and return its directory, `run_dir`/step-<step, 8 digits>.

    step: optimizer steps done, >= 0; a checkpoint of the same step is replaced, and is there until it is.
    files: {file name: {tensor name: array}}, arrays of any shape with a dtype in DTYPES.
    state: what JSON can hold; its keys are strings, and tuples come back as lists.

    The caller holds the RunLock. On CheckpointError (disk full, read-only, ...) nothing incomplete is left
    and all older checkpoints are intact. Raises ValueError or TypeError for what can never be saved.
    """
    run_dir = Path(run_dir)
    _check_arguments(step, files)
    state = json.loads(json.dumps(dict(state)))  # a TypeError now, not when the large files are written
    final = run_dir / f"step-{step:08d}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        _tidy(run_dir)
        _check_space(final, files)
        try:
            tmp = _hidden(final, "tmp")
            _write(tmp, step, files, state)
            _publish(tmp, final)
        except BaseException:
            _tidy(run_dir)
            raise
    except (OSError, SafetensorError) as error:
        raise _unsaved(final, str(error)) from error
    return final


def load_latest(run_dir: str | Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that verifies, or None if `run_dir` has none at all.

    Each damaged one that is passed over is given to `report` as one line: which file, and why. Nothing on
    disk is changed. Raises CheckpointError if there are checkpoints but none verifies.
    """
    damage = []
    for path, step in _newest_first(Path(run_dir)):
        try:
            return _verify(path, step)
        except _DamagedError as error:
            damage.append(f"{path.name}: {error}")
            report(f"checkpoint skipped as damaged: {path}: {error}")
    if not damage:
        return None
    raise CheckpointError(
        f"no usable checkpoint in {run_dir}\n"
        + "".join(f"  why: {line}\n" for line in damage)
        + "  fix: put a good copy of one of them back, or start anew in another run directory"
    )


def load(path: str | Path) -> Checkpoint:
    """The checkpoint in directory `path`, of any name. Raises CheckpointError if it does not verify."""
    try:
        return _verify(Path(path))
    except _DamagedError as error:
        raise _unusable(Path(path), error) from error


def prune(run_dir: str | Path, *, keep: int, every_major: int) -> list[int]:
    """Delete old checkpoints and return their steps, newest first.

    Kept are the newest `keep` (0: all), those whose step is divisible by `every_major` (0: no such rule), and
    the newest that verifies, so that damage to newer ones never costs the last good one. The caller holds the
    RunLock. Raises CheckpointError if a directory cannot be deleted.
    """
    if keep < 0 or every_major < 0:
        raise ValueError(f"keep and every_major must be >= 0, got {keep} and {every_major}")
    run_dir = Path(run_dir)
    try:
        _tidy(run_dir)
        doomed = _doomed(run_dir, keep, every_major)
        for path, _ in doomed:
            path.rename(_hidden(path, "tmp"))
        # The new names must be on the disk before a file goes: step-N is whole or it is not there.
        sync(run_dir)
        _tidy(run_dir)
    except OSError as error:
        raise CheckpointError(
            f"cannot delete old checkpoints in {run_dir}\n"
            f"  why: {error}\n"
            "  fix: make the directory writable, or keep all checkpoints"
        ) from error
    return [step for _, step in doomed]


class _DamagedError(Exception):
    """One line: which file of a checkpoint cannot be trusted, and why."""


def _unusable(path: Path, why: Exception) -> CheckpointError:
    return CheckpointError(
        f"cannot use {path}\n  why: {why}\n  fix: put a good copy of it back, or give another checkpoint"
    )


def _unsaved(final: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"cannot save {final}\n"
        f"  why: {why}\n"
        "  older checkpoints are intact\n"
        f"  fix: see that {final.parent} can be written and has room (keep fewer checkpoints), then run again"
    )


def _hidden(path: Path, kind: str) -> Path:
    return path.with_name(f".{kind}-{path.name}")


# --- save


def _check_arguments(step: int, files: Files) -> None:
    if step < 0:
        raise ValueError(f"step must be >= 0, got {step}")
    for name, arrays in files.items():
        if not FILE_NAME.fullmatch(name) or name == MANIFEST:
            raise ValueError(f"not a plain file name: {name!r}")
        for tensor, array in arrays.items():
            if array.dtype.name not in DTYPES:
                raise ValueError(f"{name}: {tensor} is {array.dtype}, not one of {', '.join(sorted(DTYPES))}")


def _check_space(final: Path, files: Files) -> None:
    need = int(SPACE_MARGIN * sum(array.nbytes for arrays in files.values() for array in arrays.values()))
    free = shutil.disk_usage(final.parent).free
    if free < need:
        raise _unsaved(final, f"needs {need:,} bytes (10 % of them in reserve), {free:,} are free")


def _write(directory: Path, step: int, files: Files, state: Mapping[str, Any]) -> None:
    directory.mkdir()
    records = {name: _write_tensors(directory / name, arrays)._asdict() for name, arrays in files.items()}
    manifest = {"version": FORMAT_VERSION, "step": step, "files": records, "state": state}
    text = json.dumps({**manifest, "sha256": _seal(manifest)}, indent=1) + "\n"
    if len(text) > MAX_MANIFEST_BYTES:
        raise ValueError(f"state takes {len(text):,} bytes of JSON, the limit is {MAX_MANIFEST_BYTES:,}")
    (directory / MANIFEST).write_text(text, encoding="ascii")
    sync(directory / MANIFEST)
    sync(directory)


def _write_tensors(path: Path, arrays: Mapping[str, np.ndarray]) -> FileRecord:
    # safetensors takes an array's memory as it lies: of a transposed view it would save the wrong order.
    safetensors.numpy.save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, path)
    sync(path)
    return FileRecord(path.stat().st_size, _sha256(path))


def _seal(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of the manifest's content as JSON with sorted keys, without the field that holds it."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _publish(tmp: Path, final: Path) -> None:
    """The moment of commit. A directory cannot replace another in one rename, hence the step aside."""
    old = _hidden(final, "old")
    if os.path.lexists(final):
        final.rename(old)
    tmp.rename(final)
    sync(final.parent)
    if os.path.lexists(old):
        _remove(old)


def _tidy(run_dir: Path) -> None:
    """Finish or undo what a killed or failed `save` or `prune` began."""
    for path in list(run_dir.iterdir()):
        if match := HIDDEN_NAME.fullmatch(path.name):
            final = path.with_name(match[2])
            if match[1] == "old" and not os.path.lexists(final):
                path.rename(final)
            else:
                _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _doomed(run_dir: Path, keep: int, every_major: int) -> list[tuple[Path, int]]:
    checkpoints = _newest_first(run_dir)
    beyond = checkpoints[keep:] if keep else []
    doomed = [(path, step) for path, step in beyond if not (every_major and step % every_major == 0)]
    if not doomed:
        return []  # and spare the reading of a whole checkpoint
    for path, step in checkpoints:
        with contextlib.suppress(_DamagedError):
            _verify(path, step)
            return [entry for entry in doomed if entry[0] != path]
    return []


# --- load


def _newest_first(run_dir: Path) -> list[tuple[Path, int]]:
    """(directory, step) of all checkpoints; what is left of a step's former version stands behind the new."""
    try:
        names = [path.name for path in run_dir.iterdir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(
            f"cannot read {run_dir}\n  why: {error}\n  fix: give a directory that can be read"
        ) from error
    matches = filter(None, map(CHECKPOINT_NAME.fullmatch, names))
    found = sorted(((int(match[2]), match[1] is None, match[0]) for match in matches), reverse=True)
    return [(run_dir / name, step) for step, _, name in found]


def _verify(path: Path, expected_step: int | None = None) -> Checkpoint:
    step, files, state = _parse_manifest(_read_manifest(path))
    if expected_step not in (None, step):
        raise _DamagedError(f"{MANIFEST}: is of step {reprlib.repr(step)}, the directory's name is not")
    for name, record in files.items():
        _verify_file(path, name, record)
    return Checkpoint(path, step, state, files)


def _verify_file(directory: Path, name: str, record: FileRecord) -> None:
    with _blaming(name):
        _check_size(directory / name, record)
        _check_digest(_sha256(directory / name), record)
        with safe_open(directory / name, framework="np"):
            pass  # it has checked the header against the file


def _read_tensors(directory: Path, name: str, files: Mapping[str, FileRecord]) -> dict[str, np.ndarray]:
    with _blaming(name):
        if name not in files:
            raise _DamagedError(f"not in this checkpoint, which has {', '.join(files) or 'no files'}")
        _check_size(directory / name, files[name])
        content = (directory / name).read_bytes()
        _check_digest(hashlib.sha256(content).hexdigest(), files[name])
        return safetensors.numpy.load(content)


@contextlib.contextmanager
def _blaming(name: str) -> Iterator[None]:
    """Turn whatever is wrong with file `name` into one line that names it."""
    try:
        yield
    except _DamagedError as error:
        raise _DamagedError(f"{name}: {error}") from error
    except OSError as error:
        raise _DamagedError(f"{name}: {error.strerror or error}") from error
    except SafetensorError as error:
        # repr, because the text may quote what a hostile file says, line breaks and all
        raise _DamagedError(f"{name}: not a safetensors file: {str(error)!r}") from error
    except RecursionError as error:
        raise _DamagedError(f"{name}: nested too deeply") from error
    except (KeyError, ValueError) as error:  # of safetensors' numpy reader: the dtype, or the shape
        raise _DamagedError(f"{name}: has a tensor that numpy cannot hold: {error!r}") from error


def _check_size(path: Path, record: FileRecord) -> None:
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise _DamagedError("not a regular file")  # a link could lead elsewhere, a pipe would block for ever
    if found.st_size != record.bytes:
        raise _DamagedError(f"has {found.st_size:,} bytes, the manifest says {record.bytes:,}")


def _check_digest(found: str, record: FileRecord) -> None:
    if found != record.sha256:
        raise _DamagedError(f"its SHA-256 is {found[:12]}..., not that in the manifest")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(READ_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def _read_manifest(directory: Path) -> Any:
    with _blaming(MANIFEST):
        found = (directory / MANIFEST).lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_MANIFEST_BYTES:
            raise _DamagedError(f"not a regular file of at most {MAX_MANIFEST_BYTES:,} bytes")
        try:
            return json.loads((directory / MANIFEST).read_bytes())
        except ValueError as error:
            raise _DamagedError(f"not JSON: {error}") from error


def _parse_manifest(manifest: Any) -> tuple[int, dict[str, FileRecord], dict[str, Any]]:
    """(step, files, state) of a manifest that may hold anything; every type is checked, none is converted."""
    with _blaming(MANIFEST):
        version = _field(manifest, "version", int)
        if version != FORMAT_VERSION:
            raise _DamagedError(f"version is {reprlib.repr(version)}, this program reads {FORMAT_VERSION}")
        if _field(manifest, "sha256", str) != _seal(manifest):
            raise _DamagedError("its content does not have its own SHA-256")
        step = _field(manifest, "step", int)
        if step < 0:
            raise _DamagedError(f"step is {reprlib.repr(step)}")
        files = {name: _parse_record(name, entry) for name, entry in _field(manifest, "files", dict).items()}
        return step, files, _field(manifest, "state", dict)


def _parse_record(name: str, entry: Any) -> FileRecord:
    if not FILE_NAME.fullmatch(name) or name == MANIFEST:
        raise _DamagedError(f"{reprlib.repr(name)} is not a plain file name")
    with _blaming(name):
        return FileRecord(_field(entry, "bytes", int), _field(entry, "sha256", str))


def _field(holder: Any, key: str, kind: type) -> Any:
    value = holder.get(key) if type(holder) is dict else None
    if type(value) is not kind:  # not isinstance: JSON's true is an int to Python
        raise _DamagedError(f"{key!r} is {reprlib.repr(value)}, not of type {kind.__name__}")
    return value
