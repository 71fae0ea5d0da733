"""Documents -> a folder of token shards, committed whole.

    out_dir/NAME_val_000000.bin ...      the first val_tokens tokens
    out_dir/NAME_train_000000.bin ...    the rest

As llm.c's FineWeb: one stream of tokens, in which each document starts with the tokenizer's eot, is cut into
shards wherever they are full. The bytes do not depend on the number of workers.
"""

import fcntl
import multiprocessing
import os
import re
import shutil
import signal
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType

import numpy as np

from engine.disk import sync
from engine.errors import DataError
from engine.shards import ShardWriter
from engine.tokenizer import load
from prep.documents import PIECE_CHARS, Piece

SHARD_TOKENS = 10**8
SHARD_NAME = re.compile(r".+_(val|train)_\d{6}\.bin")


@dataclass
class Summary:
    """What a data set came to. files: (path, number of tokens) in the order of the text."""

    files: list[tuple[Path, int]] = field(default_factory=list)
    num_documents: int = 0
    seconds: float = 0.0

    @property
    def num_tokens(self) -> int:
        return sum(num_tokens for _, num_tokens in self.files)

    def __str__(self) -> str:
        rate = self.num_tokens / max(self.seconds, 1e-9)
        lines = [f"{path}  {num_tokens:>13,} tokens" for path, num_tokens in self.files]
        lines.append(
            f"{self.num_documents:,} documents, {self.num_tokens:,} tokens in {len(self.files):,} shards, "
            f"{self.seconds:.1f} s ({rate:,.0f} tokens/s)"
        )
        return "\n".join(lines)


def write_dataset(
    pieces: Iterable[Piece],
    out_dir: Path,
    name: str,
    tokenizer: str,
    *,
    val_tokens: int,
    shard_tokens: int = SHARD_TOKENS,
    workers: int = 1,
    overwrite: bool = False,
) -> Summary:
    """Tokenize documents into a new folder of shards; the folder appears when everything is in it.

    tokenizer: its name. workers: processes that tokenize; 1 does it in this process and starts none.
    overwrite: replace a folder that holds nothing but shards. DataError if out_dir exists otherwise, if
    another run is writing it, if the text has no more than val_tokens tokens, or if the disk refuses.
    """
    began = time.monotonic()
    load(tokenizer)  # a tokenizer that cannot be loaded fails here once, not in every worker
    summary = Summary()
    try:
        with _committed_whole(out_dir, overwrite) as building:
            shards = _Shards(building, name, load(tokenizer).vocab_size, val_tokens, shard_tokens)
            with closing(_tokenized(_counted(pieces, summary), tokenizer, workers)) as tokens:
                files = shards.write(tokens)
    except OSError as error:
        raise DataError(f"{out_dir}: cannot write: {error}. Make room or choose another --out.") from error
    summary.files = [(out_dir / path.name, num_tokens) for path, num_tokens in files]
    summary.seconds = time.monotonic() - began
    return summary


class _Shards:
    """One stream of tokens cut into shards: val_tokens of validation, then training, shard_tokens in each."""

    def __init__(self, folder: Path, name: str, vocab_size: int, val_tokens: int, shard_tokens: int):
        self._folder, self._name, self._vocab_size = folder, name, vocab_size
        self._val_tokens, self._shard_tokens = val_tokens, shard_tokens

    def write(self, tokens: Iterable[np.ndarray]) -> list[tuple[Path, int]]:
        stream = _Stream(tokens)
        files = [
            *self._write_split("val", stream, self._val_tokens),
            *self._write_split("train", stream, None),
        ]
        if stream.num_taken <= self._val_tokens:
            raise DataError(
                f"{self._name}: the text has {stream.num_taken:,} tokens, expected more than the "
                f"{self._val_tokens:,} for validation. Give more text or fewer --val-tokens."
            )
        return files

    def _write_split(self, split: str, stream: "_Stream", num_tokens: int | None) -> Iterator[tuple[Path, int]]:
        number = written = 0
        while not stream.is_empty() and (num_tokens is None or written < num_tokens):
            room = self._shard_tokens if num_tokens is None else min(self._shard_tokens, num_tokens - written)
            path = self._folder / f"{self._name}_{split}_{number:06d}.bin"
            with ShardWriter(path, self._vocab_size) as writer:
                for part in stream.take(room):
                    writer.append(part)
            yield path, writer.num_tokens
            number, written = number + 1, written + writer.num_tokens


class _Stream:
    """Arrays of tokens, taken as if they were one long one."""

    def __init__(self, arrays: Iterable[np.ndarray]):
        self._arrays = iter(arrays)
        self._ahead = np.empty(0, np.uint16)
        self.num_taken = 0

    def is_empty(self) -> bool:
        while self._ahead.size == 0:
            array = next(self._arrays, None)
            if array is None:
                return True
            self._ahead = array
        return False

    def take(self, num_tokens: int) -> Iterator[np.ndarray]:
        while num_tokens and not self.is_empty():
            part, self._ahead = self._ahead[:num_tokens], self._ahead[num_tokens:]
            num_tokens -= part.size
            self.num_taken += part.size
            yield part


def _counted(pieces: Iterable[Piece], summary: Summary) -> Iterator[Piece]:
    for piece in pieces:
        summary.num_documents += piece.starts_document
        yield piece


def _tokenized(pieces: Iterable[Piece], tokenizer: str, workers: int) -> Generator[np.ndarray, None, None]:
    """Tokens of the pieces, in their order, some pieces at a time."""
    tasks = _tasks(pieces)
    if workers == 1:
        yield from (_tokenize(task, tokenizer) for task in tasks)
        return
    with ExitStack() as stack:
        # Round robin: whoever has worked longest holds the next stretch of text. One task each, so that what
        # is in memory does not depend on how much text there is.
        busy: deque[_Worker] = deque()
        for task in tasks:
            if len(busy) < workers:
                busy.append(stack.enter_context(_Worker(tokenizer)))
                busy[-1].send(task)
                continue
            tokens = busy[0].receive()
            busy[0].send(task)
            busy.rotate(-1)
            yield tokens
        for worker in busy:
            yield worker.receive()


def _tasks(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces grouped so that to send a task costs little beside doing it."""
    task: list[Piece] = []
    num_chars = 0
    for piece in pieces:
        task.append(piece)
        num_chars += len(piece.text)
        if num_chars >= PIECE_CHARS:
            yield task
            task, num_chars = [], 0
    if task:
        yield task


def _tokenize(task: list[Piece], name: str) -> np.ndarray:
    tokenizer = load(name)  # once in each process
    eot = np.array([tokenizer.eot], np.uint16)
    parts = []
    for piece in task:
        if piece.starts_document:
            parts.append(eot)
        parts.append(tokenizer.encode(piece.text))
    return np.concatenate(parts)


class _Worker:
    """A process that tokenizes: one task, one answer.

    Over a pipe of its own, not in a process pool: there, a process killed while it sends a result leaves the
    parent waiting for the rest for ever, and a killed parent leaves its workers. Here each sees the other go.
    """

    def __init__(self, tokenizer: str):
        # Spawned, not forked: the caller may hold threads, MPI or a GPU, none of which survive a fork.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, tokenizer), daemon=True)
        with _interrupts_held():
            self._process.start()
        theirs.close()

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pipe.close()
        self._process.join()

    def send(self, task: list[Piece]) -> None:
        with _worker_errors():
            self._pipe.send(task)

    def receive(self) -> np.ndarray:
        with _worker_errors():
            return np.frombuffer(self._pipe.recv_bytes(), np.uint16)


@contextmanager
def _worker_errors() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as error:
        raise DataError("a worker process was killed, perhaps for want of memory. Use fewer --workers.") from error


def _work(pipe: Connection, tokenizer: str) -> None:
    # These say that the pipe's other end is gone: the parent is done, or dead.
    with suppress(EOFError, OSError):
        while True:
            pipe.send_bytes(_tokenize(pipe.recv(), tokenizer).tobytes())


@contextmanager
def _interrupts_held() -> Iterator[None]:
    # Ctrl-C reaches the whole process group, but what it means is the parent's to decide: a process started
    # in here inherits the mask, deaf from its first instruction on. The parent hears it afterwards.
    resource_tracker.ensure_running()  # first, because it unblocks the signal when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _committed_whole(out_dir: Path, overwrite: bool) -> Iterator[Path]:
    """A hidden folder beside out_dir that takes its name if the block ends well, and is removed if not.

    After a SIGKILL it stays, locked by nobody, and the next run into out_dir starts by emptying it.
    """
    out_dir = out_dir.resolve()
    building, replaced = (out_dir.with_name(f".{out_dir.name}.{state}") for state in ("building", "replaced"))
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with _locked(building):
        try:
            _settle(out_dir, replaced)
            _check_target(out_dir, overwrite)
            _empty(building)
            yield building
            if out_dir.exists():
                out_dir.rename(replaced)
            building.rename(out_dir)
            sync(out_dir.parent)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        _settle(out_dir, replaced)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between our mkdir and our lock another run may have ended, and given the folder its final name.
            ours = os.path.samestat(os.fstat(descriptor), folder.stat())
        except (BlockingIOError, FileNotFoundError):
            ours = False
        if not ours:
            raise DataError(f"{folder}: another run is writing this data set. Wait for it, or choose another --out.")
        yield
    finally:
        os.close(descriptor)


def _settle(out_dir: Path, replaced: Path) -> None:
    """Finish, or undo, the exchange of the old folder for the new one, wherever a kill left it."""
    if not replaced.exists():
        return
    if out_dir.exists():
        shutil.rmtree(replaced)
    else:
        replaced.rename(out_dir)


def _check_target(out_dir: Path, overwrite: bool) -> None:
    if not out_dir.exists():
        return
    if not overwrite:
        raise DataError(f"{out_dir}: exists already. Choose another --out, or add --overwrite.")
    # A slip of the finger after --out must not cost a home directory.
    others = [path.name for path in out_dir.iterdir() if not SHARD_NAME.fullmatch(path.name)]
    if others:
        raise DataError(
            f"{out_dir}: not replaced, because it holds more than token shards: {min(others)}. Choose another --out."
        )


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
