"""Token shards: written is read back, damage is refused in a sentence, a target is whole or absent."""

import os
import resource
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import shards
from engine.errors import DataError
from engine.shards import Shard, ShardWriter, check_tokens, expand, open_shard

TOKENS = np.array([0, 1, 65535, 7, 7], np.uint16)


def write(path: Path, tokens=TOKENS, vocab_size: int = 0) -> Path:
    with ShardWriter(path, vocab_size) as writer:
        writer.append(tokens)
    return path


def raw(magic=20240520, version=1, num_tokens=5, vocab_size=0, body=None) -> bytes:
    """A shard's bytes, put together by hand: the format's definition, independent of the writer."""
    header = struct.pack("<4i", magic, version, num_tokens, vocab_size)
    return header.ljust(1024, b"\0") + (TOKENS.astype("<u2").tobytes() if body is None else body)


@given(parts=st.lists(st.lists(st.integers(0, 65535), max_size=20), max_size=6).filter(any))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_round_trip(tmp_path, parts):
    tokens = [token for part in parts for token in part]
    path = tmp_path / "a.bin"
    with ShardWriter(path, 0) as writer:
        for part in parts:
            writer.append(part)
    shard = open_shard(path)
    assert shard.tokens.tolist() == tokens
    assert shard.tokens.dtype == np.uint16
    assert writer.num_tokens == len(tokens)


def test_bytes_are_those_of_the_format(tmp_path):
    assert write(tmp_path / "a.bin").read_bytes() == raw()
    assert write(tmp_path / "b.bin", [1, 2], 256).read_bytes() == raw(num_tokens=2, vocab_size=256, body=b"\1\0\2\0")


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.uint32, np.int64, np.uint64, ">u2"])
def test_any_integer_dtype(tmp_path, dtype):
    tokens = np.arange(0, 100, 3).astype(dtype)[::2]
    assert open_shard(write(tmp_path / "a.bin", tokens)).tokens.tolist() == tokens.tolist()


def test_tokens_cannot_be_written_to(tmp_path):
    with pytest.raises(ValueError, match="read-only"):
        open_shard(write(tmp_path / "a.bin")).tokens[0] = 1


def test_vocabulary_is_remembered(tmp_path):
    assert open_shard(write(tmp_path / "a.bin", [1], 50257)).vocab_size == 50257
    assert open_shard(write(tmp_path / "b.bin", [1])).vocab_size == 0


def test_expand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b_000001.bin", "b_000000.bin", "odd[1].bin"):
        write(tmp_path / name)
    assert expand("b_*.bin") == [Path("b_000000.bin"), Path("b_000001.bin")]
    assert expand(str(tmp_path / "b_*.bin")) == [tmp_path / "b_000000.bin", tmp_path / "b_000001.bin"]
    assert expand("odd[1].bin") == [Path("odd[1].bin")]
    with pytest.raises(DataError, match=r"'none_\*.bin'.*working directory .*Check the path"):
        expand("none_*.bin")


# Damaged files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes is too short"),
        (raw()[:1023], "1,023 bytes is too short"),
        (b"not tokens " * 200, "magic is .*, expected 20240520"),
        (raw(magic=20240801), "Llama 3 shard"),
        (struct.pack(">4i", 20240520, 1, 5, 0).ljust(1034, b"\0"), "byte-swapped"),
        (raw(version=2), "version 2, expected 1"),
        (raw(num_tokens=0, body=b""), "0 tokens, expected at least 1"),
        (raw(num_tokens=-5), "-5 tokens, expected at least 1"),
        (raw(num_tokens=-(2**31)), "-2,147,483,648 tokens"),
        (raw(vocab_size=-1), "vocabulary of -1"),
        (raw(vocab_size=65537), "vocabulary of 65,537"),
        (raw()[:-2], "expected 1,034 bytes .* found 1,032: it is cut short by 2"),
        (raw()[:-1], "cut short by 1, and ends inside a token"),
        (raw() + b"\0", "1 too many, and ends inside a token"),
        (raw() + b"\0" * 2000, "found 3,034: it has 2,000 too many"),
        (raw(num_tokens=2**31 - 1), "expected 4,294,968,318 bytes"),
    ],
)
def test_damage_is_named(tmp_path, content, message):
    path = tmp_path / "hurt.bin"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        open_shard(path)
    assert str(path) in str(caught.value)
    assert str(caught.value).endswith(".")


def test_what_is_no_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.bin: cannot read .*No such file"):
        open_shard(tmp_path / "gone.bin")
    with pytest.raises(DataError, match="not a regular file"):
        open_shard(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="not a regular file"):
        open_shard(tmp_path / "pipe")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file_is_named(tmp_path):
    path = write(tmp_path / "secret.bin")
    path.chmod(0)
    with pytest.raises(DataError, match="Permission denied"):
        open_shard(path)


def opened(path: Path) -> Shard | None:
    """The shard, or None if it is refused by an error that names it; any other error fails the test."""
    try:
        return open_shard(path)
    except DataError as error:
        if str(path) not in str(error):
            raise AssertionError(f"{error} does not name {path}") from error
        return None


@given(
    start=st.integers(0, 1034),
    patch=st.binary(min_size=1, max_size=8),
    length=st.just(1034) | st.integers(0, 1040),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutations_load_what_they_say_or_are_refused(tmp_path, start, patch, length):
    content = bytearray(raw())
    content[start : start + len(patch)] = patch
    del content[length:]
    path = tmp_path / "mutated.bin"
    path.write_bytes(content)
    shard = opened(path)
    if shard is not None:
        assert bytes(content[:12]) == raw()[:12]
        assert shard.tokens.tobytes() == bytes(content[1024:])
    # What no check looks at may be anything: the rest of the header, and which tokens there are.
    if start >= 16 and len(content) == 1034:
        assert shard is not None


@given(values=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=4, max_size=4))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_header_is_believed(tmp_path, values):
    path = tmp_path / "hostile.bin"
    for magic, version in ((values[0], values[1]), (20240520, 1)):
        path.write_bytes(raw(magic, version, values[2], values[3]))
        shard = opened(path)
        assert shard is None or shard.tokens.tolist() == TOKENS.tolist()


# The vocabulary


def test_check_tokens_names_the_first_bad_one(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SCAN_TOKENS", 1000)
    tokens = np.arange(5000) % 256
    tokens[[3210, 4000]] = 300, 400
    shard = open_shard(write(tmp_path / "a.bin", tokens, 50257))
    check_tokens(shard, 401)
    with pytest.raises(DataError, match=r"a\.bin: token 300 at position 3,210 .* of 256,.* of 50,257"):
        check_tokens(shard, 256)
    with pytest.raises(DataError, match="token 400 at position 4,000"):
        check_tokens(shard, 400)


def test_check_tokens_at_the_edge_of_uint16(tmp_path):
    shard = open_shard(write(tmp_path / "a.bin", [65535]))
    check_tokens(shard, 65536)
    with pytest.raises(DataError, match="token 65,535 at position 0"):
        check_tokens(shard, 65535)


# Writing, or not


@pytest.mark.parametrize(
    ("vocab_size", "tokens"),
    [(0, [-1]), (0, [65536]), (256, [256]), (0, [0.5]), (0, [2**70]), (0, [[1, 2]]), (0, ["1"])],
)
def test_impossible_tokens_leave_no_file(tmp_path, vocab_size, tokens):
    with pytest.raises(ValueError, match="tokens must"):
        write(tmp_path / "a.bin", tokens, vocab_size)
    assert list(tmp_path.iterdir()) == []


def test_no_tokens_leave_no_file(tmp_path):
    with pytest.raises(ValueError, match="at least one token"):
        write(tmp_path / "a.bin", [])
    assert list(tmp_path.iterdir()) == []


def test_too_many_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_TOKENS", 4)
    with pytest.raises(ValueError, match="at most 4"):
        write(tmp_path / "a.bin")


def test_an_exception_leaves_the_target_as_it_was(tmp_path):
    path = write(tmp_path / "a.bin", [1, 2, 3])
    with pytest.raises(KeyboardInterrupt), ShardWriter(path, 0) as writer:  # noqa: PT012
        writer.append([9, 9])
        assert open_shard(path).tokens.tolist() == [1, 2, 3]
        raise KeyboardInterrupt
    assert open_shard(path).tokens.tolist() == [1, 2, 3]
    assert list(tmp_path.iterdir()) == [path]


def test_append_needs_the_with_block(tmp_path):
    with pytest.raises(ValueError, match="inside its `with` block"):
        ShardWriter(tmp_path / "a.bin", 0).append([1])


def test_short_writes_are_continued(tmp_path, monkeypatch):
    class Reluctant:
        """A raw file that takes at most three bytes at a time, as a nearly full disk or a signal may."""

        def __init__(self, file):
            self._file = file

        def write(self, data):
            return self._file.write(data[:3])

        def __getattr__(self, name):
            return getattr(self._file, name)

    path = tmp_path / "a.bin"
    with ShardWriter(path, 0) as writer:
        monkeypatch.setattr(writer, "_file", Reluctant(writer._file))
        writer.append(TOKENS)
    assert path.read_bytes() == raw()


def child(script: str, *args: object, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, args)],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


def test_kill_leaves_no_target(tmp_path):
    script = (
        "import sys; from engine.shards import ShardWriter\n"
        "with ShardWriter(sys.argv[1], 0) as writer:\n"
        "    while True: writer.append(range(60000)); print('more', flush=True)\n"
    )
    with child(script, tmp_path / "a.bin") as process:
        assert process.stdout.readline() == "more\n"
        assert process.stdout.readline() == "more\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    (hidden,) = tmp_path.iterdir()
    assert hidden.name.startswith(".a.bin.")
    with pytest.raises(DataError, match="magic is 0"):
        open_shard(hidden)


def test_full_disk_leaves_no_target(tmp_path):
    """A limit on the file's size acts as a disk that fills up: a short write, then an error."""
    script = (
        "import sys; from engine.shards import ShardWriter; from engine.errors import DataError\n"
        "try:\n"
        "    with ShardWriter(sys.argv[1], 0) as writer: writer.append([1] * 3000)\n"
        "except DataError as error: print(error)\n"
    )
    limit = 5001  # inside a token
    with child(
        script,
        tmp_path / "a.bin",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    ) as process:
        output = process.stdout.read()
    assert process.returncode == 0
    assert "a.bin: cannot write this token file: File too large" in output
    assert list(tmp_path.iterdir()) == []


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"a\.bin: cannot write this token file: No such file"):
        write(tmp_path / "gone" / "a.bin")
