"""What tests of whole runs share: small data, and train.py as a process, or here where that proves as much."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from engine.config import BEHIND
from engine.device import cuda_problem
from engine.shards import ShardWriter
from engine.tokenizer import Bytes

ROOT = Path(__file__).parent.parent
TRAIN = ROOT / "train.py"
TINY = ("-e", "l2h2c16", "-b", "2", "-t", "16")
TIMEOUT = 60  # seconds after which a command is taken to hang

WORDS = (
    *(
        "the",
        "of",
        "and",
        "to",
        "in",
        "that",
        "it",
        "was",
        "for",
        "on",
        "are",
        "as",
        "with",
        "his",
        "they",
        "be",
    ),
    *(
        "at",
        "one",
        "have",
        "this",
        "from",
        "by",
        "hot",
        "word",
        "but",
        "what",
        "some",
        "we",
        "can",
        "out",
        "when",
    ),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU are skipped where there is none, and say why."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    problem = cuda_problem() if marked else ""
    for item in marked if problem else []:
        item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {problem}"))


PLANTED_FAULTS = pytest.StashKey[tuple[subprocess.Popen, Path]]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """The longest test begins with the first, of whose cores some are idle most of the time, and gives way to them. But
    where several processes share out the tests, the one that is to run it begins then.
    """
    waits = any(item.name == "test_all_are_caught" for item in session.items)
    is_one_of_several = hasattr(session.config, "workerinput")
    if waits and shutil.which("g++") and not session.config.option.collectonly and not is_one_of_several:
        plant_faults(session.config)


def plant_faults(config: pytest.Config) -> tuple[subprocess.Popen, Path]:
    """The process that plants them all, begun once, and the file with what it prints."""
    if PLANTED_FAULTS not in config.stash:
        printed = Path(tempfile.mkdtemp(prefix="backhand-planted-")) / "table.txt"
        command = ["nice", sys.executable, "-m", "tests.planted_faults"]
        with printed.open("w") as file:
            process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
        config.stash[PLANTED_FAULTS] = process, printed
    return config.stash[PLANTED_FAULTS]


def pytest_sessionfinish(session: pytest.Session) -> None:
    process, printed = session.config.stash.get(PLANTED_FAULTS, (None, None))
    if process and printed:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree(printed.parent)


class Run(NamedTuple):
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str


def text(length: int, seed: int = 0) -> str:
    """Sentences of common words: something that a model can learn a little of."""
    rng = random.Random(seed)
    sentences = ""
    while len(sentences) < length:
        sentences += " ".join(rng.choices(WORDS, k=rng.randint(4, 9))).capitalize() + ". "
    return sentences[:length]


def with_one_behind(x: np.ndarray) -> np.ndarray:
    """Each row with a one and zeros behind it."""
    behind = np.zeros((*x.shape[:-1], BEHIND), x.dtype)
    behind[..., 0] = 1
    return np.concatenate([x, behind], axis=-1)


def write_shards(folder: Path, sizes: dict[str, int]) -> Path:
    """Shards of bytes with so many tokens, {file name: tokens}, in a new folder."""
    folder.mkdir()
    for seed, (name, size) in enumerate(sizes.items()):
        with ShardWriter(folder / name, Bytes.vocab_size) as writer:
            writer.append([Bytes.eot])
            writer.append(Bytes().encode(text(size - 1, seed)))
    return folder


def data(folder: Path) -> tuple[str, ...]:
    """The options that name the shards of a folder."""
    return "-i", f"{folder}/train_*.bin", "-j", f"{folder}/val_*.bin"


@pytest.fixture(scope="session")
def shards_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards to train on and one to validate on."""
    sizes = {"train_000000.bin": 3001, "train_000001.bin": 2001, "val_000000.bin": 1001}
    return write_shards(tmp_path_factory.mktemp("data") / "shards", sizes)


@pytest.fixture(scope="session")
def few_shards_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An epoch of 7 samples of 16 tokens in two shards: batches of 2 and of 4 run over its end."""
    sizes = {"train_000000.bin": 70, "train_000001.bin": 50, "val_000000.bin": 90}
    return write_shards(tmp_path_factory.mktemp("data") / "few", sizes)


def start_train(*args: object, env: dict[str, str] | None = None, **options: object) -> subprocess.Popen:
    """`python train.py args` on the CPU, running, its output in pipes unless options say otherwise."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(  # type: ignore[call-overload]
        [sys.executable, str(TRAIN), "--device", "cpu", *map(str, args)],
        env=os.environ | (env or {}),
        text=True,
        **(pipes | options),
    )


@contextlib.contextmanager
def running(*args: object, **options: object) -> Iterator[subprocess.Popen]:
    """start_train, and the end of it if the test fails in between."""
    with start_train(*args, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def finish(process: subprocess.Popen, timeout: float = TIMEOUT) -> Run:
    """What the command leaves when it has ended; a failed test if it does not end in time."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        pytest.fail(f"still running after {timeout} seconds: {' '.join(process.args)}")
    return Run(process.returncode, out or "", err or "")


def run_command(script: str, *args: object, timeout: float = 4 * TIMEOUT) -> Run:
    """`python script args`, to its end."""
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    return finish(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True), timeout)


@pytest.fixture(scope="session")
def run_train() -> Callable[..., Run]:
    """run_train(*args, timeout=, cwd=, env=, ...): `python train.py args` as a process of its own."""

    def run(*args: object, timeout: float = TIMEOUT, **options: object) -> Run:
        return finish(start_train(*args, **options), timeout)

    return run


@contextlib.contextmanager
def signals_restored() -> Iterator[None]:
    """Whatever a run in this process does with signals, Ctrl-C ends the tests again afterwards."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def train_here() -> Iterator[Callable[..., int]]:
    """train_here(*args) -> exit code: the same main(), on the CPU, in this process, without the picture at the end."""
    import train

    def run(*args: object) -> int:
        with signals_restored(), pytest.raises(SystemExit) as end:
            train.main.main(["--device", "cpu", *map(str, args)], standalone_mode=False)
        return end.value.code  # type: ignore[return-value]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "have_matplotlib", lambda: False)
        yield run
