"""Text files -> documents, in pieces that can be tokenized apart from each other.

    .jsonl .jsonlines .ndjson    one document per line, in one field          (.gz too)
    .parquet                     one document per row, in one column
    anything else                UTF-8 text: one document, or several between separator lines (.gz too)

Memory stays bounded by a few pieces, a line or a group of rows, however large the files are.
"""

import codecs
import gzip
import io
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from engine.errors import DataError

PIECE_CHARS = 2**18
MAX_PIECE_CHARS = 2**22
MAX_LINE_BYTES = 2**26
ROWS = 64

JSON_LINES = {".jsonl", ".jsonlines", ".ndjson"}

# GPT-2's pre-tokenizer never joins a character with white space that follows it, so the tokens of pieces cut
# here are those of the whole. Only white space on which all definitions agree: Python's \s has four more.
_CUT = re.compile(r"\S(?=[ \t\n\r])")

Progress = Callable[[int], object]


class Piece(NamedTuple):
    """A document, or a stretch of a long one."""

    text: str
    starts_document: bool


def check(paths: Sequence[Path]) -> int:
    """Total size in bytes of the input files. DataError if one is missing, unreadable or no regular file."""
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: no such file (working directory {Path.cwd()}). Check the path.")
        if not path.is_file() or not os.access(path, os.R_OK):
            raise DataError(f"{path}: expected a readable file. Name the files themselves, as in {path}/*.txt.")
    return sum(path.stat().st_size for path in paths)


def read(
    paths: Iterable[Path],
    *,
    field: str = "text",
    separator: str | None = None,
    progress: Progress = lambda num_bytes: None,
) -> Iterator[Piece]:
    """The documents of the files in their order, without those that are empty or white space.

    field: JSON field or Parquet column of the text. separator: a line of a text file that is exactly this
    ends a document; the lines between are kept as they are. progress: told the bytes of input read since it
    was last called. DataError, naming the file and the line or row, for anything that is no such text.
    """
    reader = _Reader(field, separator, progress)
    for path in paths:
        try:
            for blocks in reader.documents(path):
                yield from _document_pieces(blocks, path)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: cannot read: {error}. Is it complete? Fetch it again.") from error
    if separator is not None and reader.num_separators == 0:
        raise DataError(f"no line of the input is exactly {separator!r}. Check --separator, or leave it out.")


def pieces(blocks: Iterable[str], *, num_chars: int = PIECE_CHARS, max_chars: int = MAX_PIECE_CHARS) -> Iterator[str]:
    """Cut a text, given in blocks, into pieces that tokenize as the whole: of num_chars or a little more.

    ValueError where there is no place to cut in max_chars.
    """
    rest = ""
    for block in blocks:
        rest += block
        start = 0
        while cut := _CUT.search(rest, start + num_chars - 1):
            yield rest[start : cut.end()]
            start = cut.end()
        if start:
            rest = rest[start:]
        if len(rest) > num_chars + max_chars:
            raise ValueError(f"no white space between words in {max_chars:,} characters")
    if rest:
        yield rest


def _document_pieces(blocks: Iterable[str], path: Path) -> Iterator[Piece]:
    starts_document = True
    try:
        for text in pieces(blocks):
            # White space alone has no place to be cut: a document of nothing else is one piece.
            if starts_document and text.isspace():
                return
            yield Piece(text, starts_document)
            starts_document = False
    except ValueError as error:
        raise DataError(f"{path}: {error}, expected text. Break it into lines.") from error


@dataclass
class _Reader:
    field: str
    separator: str | None
    progress: Progress
    num_separators: int = 0

    def documents(self, path: Path) -> Iterator[Iterable[str]]:
        """Each document as blocks of text, to be read before the next document is asked for."""
        suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
        kind = suffixes[-1] if suffixes else ""
        if kind == ".parquet":
            yield from _parquet_rows(path, self.field, self.progress)
            return
        with _open(path, self.progress) as file:
            if kind in JSON_LINES:
                yield from _json_lines(path, file, self.field)
            elif self.separator is None:
                yield _text_blocks(path, file)
            else:
                yield from self._separated(_lines(path, _text_blocks(path, file)))

    def _separated(self, lines: Iterable[str]) -> Iterator[Iterable[str]]:
        for is_separator, group in itertools.groupby(lines, self._is_separator):
            if is_separator:
                self.num_separators += 1
            else:
                yield group

    def _is_separator(self, line: str) -> bool:
        return line.rstrip("\r\n") == self.separator


class _ReportingFile(io.FileIO):
    """A file that reports how many of its bytes are read: under gzip, those of the compressed file."""

    def __init__(self, path: Path, progress: Progress):
        super().__init__(path)
        self._progress = progress

    def readinto(self, buffer: Any) -> int | None:
        num_bytes = super().readinto(buffer)
        self._progress(num_bytes or 0)
        return num_bytes


def _open(path: Path, progress: Progress) -> BinaryIO:
    file = io.BufferedReader(_ReportingFile(path, progress))
    return gzip.GzipFile(fileobj=file) if path.suffix.lower() == ".gz" else file  # type: ignore[return-value]


def _text_blocks(path: Path, file: BinaryIO) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    line = 1
    while True:
        block = file.read(PIECE_CHARS)
        try:
            yield decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            line += error.object[: error.start].count(b"\n")
            raise DataError(
                f"{path}, line {line:,}: byte 0x{error.object[error.start]:02X} is not UTF-8. Convert the "
                "file (iconv -f LATIN1 -t UTF-8), or decompress it."
            ) from error
        if not block:
            return
        line += block.count(b"\n")


def _lines(path: Path, blocks: Iterable[str]) -> Iterator[str]:
    rest = ""
    for block in blocks:
        *lines, rest = (rest + block).split("\n")
        yield from (f"{line}\n" for line in lines)
        if len(rest) > MAX_PIECE_CHARS:
            raise DataError(f"{path}: a line longer than {MAX_PIECE_CHARS:,} characters. Break it into lines.")
    if rest:
        yield rest


def _json_lines(path: Path, file: BinaryIO, field: str) -> Iterator[list[str]]:
    for number in itertools.count(1):
        line = file.readline(MAX_LINE_BYTES + 1)
        if not line:
            return
        if len(line) > MAX_LINE_BYTES:
            raise DataError(
                f"{path}, line {number:,}: longer than {MAX_LINE_BYTES:,} bytes. Write one JSON object per line."
            )
        if not line.isspace():
            yield [_json_field(line, field, f"{path}, line {number:,}")]


def _json_field(line: bytes, field: str, where: str) -> str:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected one JSON object in UTF-8: {error}. Mend or drop the line.") from error
    if not isinstance(record, dict) or field not in record:
        found = ", ".join(map(repr, record)) if isinstance(record, dict) else type(record).__name__
        raise DataError(f"{where}: expected an object with field {field!r}, found {found}. Choose by --field.")
    text = record[field]
    if not isinstance(text, str):
        raise DataError(
            f"{where}: field {field!r} holds {type(text).__name__}, expected text. Choose another by --field."
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: half a surrogate pair is no text ({error}). Mend or drop the line.") from error
    return text


def _parquet_rows(path: Path, column: str, progress: Progress) -> Iterator[list[str]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f'{path}: reading Parquet needs pyarrow: pip install -e ".[data]".') from error
    try:
        with parquet.ParquetFile(path) as file:
            _check_column(path, file.schema_arrow, column)
            num_rows = file.metadata.num_rows
            yield from _rows(path, file.iter_batches(ROWS, columns=[column]), num_rows, progress)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read as Parquet: {error}. Is it complete? Fetch it again.") from error


def _check_column(path: Path, schema: Any, column: str) -> None:
    if column not in schema.names:
        raise DataError(f"{path}: no column {column!r}, found {', '.join(schema.names)}. Choose by --field.")
    kind = str(schema.field(column).type)
    if kind not in ("string", "large_string", "string_view"):
        raise DataError(f"{path}: column {column!r} holds {kind}, expected text. Choose another by --field.")


def _rows(path: Path, batches: Iterable[Any], num_rows: int, progress: Progress) -> Iterator[list[str]]:
    num_bytes, row, reported = path.stat().st_size, 0, 0
    for batch in batches:
        for text in batch.column(0).to_pylist():
            row += 1
            if text is None:
                raise DataError(f"{path}, row {row:,}: null, expected text. Drop such rows.")
            yield [text]
        # Rows stand for bytes: Parquet's own reads jump about.
        progress(num_bytes * row // num_rows - reported)
        reported = num_bytes * row // num_rows
