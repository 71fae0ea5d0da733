"""llm.c's token shards: a header of 256 little-endian int32, then one uint16 per token.

    header[0] magic 20240520 · [1] version 1 · [2] number of tokens · [3] vocabulary size, 0 if unsaid

header[3] is our extension, so that a model and a data set of different tokenizers are told apart at once;
llm.c ignores it, and leaves 0. Whatever a header says is checked against the file before it is believed.
"""

import glob
import hashlib
import os
import secrets
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from engine.disk import sync
from engine.errors import DataError

MAGIC, VERSION = 20240520, 1
BYTE_SWAPPED_MAGIC = struct.unpack("<i", struct.pack(">i", MAGIC))[0]
LLAMA3_MAGIC = 20240801  # llm.c's other shard format: uint32 tokens of Llama 3's vocabulary
HEADER_BYTES, TOKEN_BYTES = 1024, 2
MAX_TOKENS = 2**31 - 1  # what the header's int32 can say
MAX_VOCAB_SIZE = 2**16  # what a uint16 token can say
SCAN_TOKENS = 2**20
PIECES, PIECE_TOKENS = 64, 2048  # of a fingerprint

_HEADER = struct.Struct("<4i")
_TOKEN = np.dtype("<u2")
_PREPARE_AGAIN = "Download it or prepare it again (python -m prep.text)."


@dataclass(frozen=True, eq=False)
class Shard:
    """An open token file. tokens: (num_tokens,) uint16, a read-only memory map; vocab_size: 0 if unsaid."""

    path: Path
    tokens: np.ndarray
    vocab_size: int


def expand(pattern: str) -> list[Path]:
    """The files that a path or glob pattern (`**` included) names, sorted. DataError if there are none."""
    # A file may have brackets or stars in its very name.
    # glob and not Path.glob, which refuses absolute patterns.
    paths = [pattern] if os.path.lexists(pattern) else sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207
    if not paths:
        raise DataError(
            f"no token file matches {pattern!r} (working directory {Path.cwd()}). Check the path, quote the "
            "pattern so that the shell leaves it alone, or prepare the data first: python -m prep.text."
        )
    return [Path(path) for path in paths]


def open_shard(path: str | os.PathLike[str]) -> Shard:
    """Check a token file's header and size, and map its tokens. DataError if anything is wrong with it."""
    path = Path(path)
    try:
        # Before opening: to open a pipe is to wait for whoever writes into it.
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{path}: not a regular file. Name the shards themselves, as in '{path}/*.bin'.")
        with path.open("rb") as file:
            return _read(path, file)
    except OSError as error:
        raise DataError(
            f"{path}: cannot read this token file: {error.strerror}. Check its path and permissions."
        ) from error


def fingerprint(shard: Shard) -> str:
    """Tells a shard from another of the same name and length: a hash of pieces spread over its tokens.

    PIECES of PIECE_TOKENS each, so that a data set of any size takes milliseconds; a small shard is read whole.
    """
    starts = np.linspace(0, max(0, len(shard.tokens) - PIECE_TOKENS), PIECES).astype(int)
    digest = hashlib.sha256()
    for start in starts:
        digest.update(shard.tokens[start : start + PIECE_TOKENS].tobytes())
    return digest.hexdigest()[:16]


def check_tokens(shard: Shard, V: int) -> None:
    """DataError unless every token of the shard lies in [0, V). Reads the whole file, a piece at a time."""
    if V >= MAX_VOCAB_SIZE:
        return
    for start in range(0, len(shard.tokens), SCAN_TOKENS):
        tokens = shard.tokens[start : start + SCAN_TOKENS]
        if tokens.max() < V:
            continue
        first = int(np.argmax(tokens >= V))
        written = f" It was written with a vocabulary of {shard.vocab_size:,}." if shard.vocab_size else ""
        raise DataError(
            f"{shard.path}: token {int(tokens[first]):,} at position {start + first:,} is outside the "
            f"model's vocabulary of {V:,}, expected 0 to {V - 1:,}.{written} Was it made by another "
            "tokenizer? Prepare it with the model's own, or give the model this data's vocabulary."
        )


def _read(path: Path, file: BinaryIO) -> Shard:
    num_bytes = os.fstat(file.fileno()).st_size
    if num_bytes < HEADER_BYTES:
        raise DataError(
            f"{path}: {num_bytes:,} bytes is too short for a token shard, whose header alone takes "
            f"{HEADER_BYTES:,}. {_PREPARE_AGAIN}"
        )
    # As Python's integers: int32 arithmetic on a hostile count would wrap round.
    magic, version, num_tokens, vocab_size = _HEADER.unpack_from(file.read(HEADER_BYTES))
    _check_header(path, magic, version, num_tokens, vocab_size)
    _check_size(path, num_bytes, num_tokens)
    mapped = np.memmap(file, _TOKEN, mode="r", offset=HEADER_BYTES, shape=(num_tokens,))
    # As a plain array, whose slices are made several times faster than a memmap's.
    return Shard(path, np.asarray(mapped), vocab_size)


def _check_header(path: Path, magic: int, version: int, num_tokens: int, vocab_size: int) -> None:
    if magic == LLAMA3_MAGIC:
        raise DataError(
            f"{path}: this is a Llama 3 shard (magic {LLAMA3_MAGIC}, 4 bytes a token), expected magic "
            f"{MAGIC} and 2 bytes a token. Use shards of at most {MAX_VOCAB_SIZE:,} tokens, such as GPT-2's."
        )
    if magic == BYTE_SWAPPED_MAGIC:
        raise DataError(f"{path}: byte-swapped: written big-endian, expected little-endian. {_PREPARE_AGAIN}")
    if magic != MAGIC:
        raise DataError(f"{path}: not a token shard: its magic is {magic}, expected {MAGIC}. {_PREPARE_AGAIN}")
    if version != VERSION:
        raise DataError(f"{path}: shard version {version}, expected {VERSION}. {_PREPARE_AGAIN}")
    if num_tokens <= 0:
        raise DataError(f"{path}: its header says {num_tokens:,} tokens, expected at least 1. {_PREPARE_AGAIN}")
    if not 0 <= vocab_size <= MAX_VOCAB_SIZE:
        raise DataError(
            f"{path}: its header says a vocabulary of {vocab_size:,}, expected 0 (unsaid) to "
            f"{MAX_VOCAB_SIZE:,}. {_PREPARE_AGAIN}"
        )


def _check_size(path: Path, num_bytes: int, num_tokens: int) -> None:
    expected = HEADER_BYTES + TOKEN_BYTES * num_tokens
    if num_bytes == expected:
        return
    difference = (
        f"is cut short by {expected - num_bytes:,}"
        if num_bytes < expected
        else f"has {num_bytes - expected:,} too many"
    )
    inside_token = ", and ends inside a token" if num_bytes % TOKEN_BYTES else ""
    raise DataError(
        f"{path}: expected {expected:,} bytes for the {num_tokens:,} tokens in its header, found "
        f"{num_bytes:,}: it {difference}{inside_token}. {_PREPARE_AGAIN}"
    )


class ShardWriter:
    """Write one shard, whole or not at all.

    Used in a `with` block: tokens stream into a hidden file beside `path`, which takes its name when the
    block ends well (by then the disk has it) and is removed when it does not; until then, what was at `path`
    stays. vocab_size: of the tokenizer, 0 to leave it unsaid. DataError if the disk refuses, ValueError if
    there is no token.
    """

    def __init__(self, path: str | os.PathLike[str], vocab_size: int):
        if not 0 <= vocab_size <= MAX_VOCAB_SIZE:
            raise ValueError(f"vocab_size must be 0 (unsaid) to {MAX_VOCAB_SIZE:,}, not {vocab_size:,}")
        self.path = Path(path)
        self.vocab_size = vocab_size
        self.num_tokens = 0
        self._hidden = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.tmp")
        self._file: BinaryIO | None = None

    def __enter__(self) -> "ShardWriter":
        try:
            # Unbuffered: an error belongs to the append that met it, not to some later flush.
            self._file = self._hidden.open("xb", buffering=0)
        except OSError as error:
            raise self._refused(error) from error
        # Zeros until the count is known: should this file ever be read half-written, it has no magic.
        self._write(bytes(HEADER_BYTES))
        return self

    def append(self, tokens: Sequence[int] | np.ndarray) -> None:
        """Add tokens: (n,) integers of any dtype. ValueError if one is negative or not in the vocabulary."""
        array = np.asarray(tokens)
        if array.size == 0:
            return
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValueError(f"tokens must be one row of integers, not {array.dtype} of shape {array.shape}")
        limit = self.vocab_size or MAX_VOCAB_SIZE
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= limit:
            raise ValueError(f"tokens must lie in [0, {limit:,}), not in [{low:,}, {high:,}]")
        if self.num_tokens + array.size > MAX_TOKENS:
            raise ValueError(f"a shard holds at most {MAX_TOKENS:,} tokens")
        self._write(np.ascontiguousarray(array, _TOKEN).data.cast("B"))
        self.num_tokens += array.size

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._commit()
        except OSError as os_error:
            raise self._refused(os_error) from os_error
        finally:
            self._discard()

    def _write(self, data: bytes | memoryview) -> None:
        file = self._open_file()
        rest = memoryview(data)
        try:
            # A disk that fills up takes part of a write and says so in the count alone; the next one raises.
            while rest:
                rest = rest[file.write(rest) :]
        except OSError as error:
            self._discard()
            raise self._refused(error) from error

    def _commit(self) -> None:
        if self.num_tokens == 0:
            raise ValueError(f"{self.path}: a shard needs at least one token")
        file = self._open_file()
        file.seek(0)
        self._write(_HEADER.pack(MAGIC, VERSION, self.num_tokens, self.vocab_size))
        os.fsync(file.fileno())
        self._hidden.replace(self.path)
        sync(self.path.parent)

    def _open_file(self) -> BinaryIO:
        if self._file is None:
            raise ValueError(f"{self.path}: a ShardWriter writes inside its `with` block, until a write fails")
        return self._file

    def _discard(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self._hidden.unlink(missing_ok=True)

    def _refused(self, error: OSError) -> DataError:
        return DataError(
            f"{self.path}: cannot write this token file: {error.strerror}. Make room on the disk or choose "
            "another folder; nothing was left behind."
        )
