"""Several ranks on CPUs, by the real mpirun: the same run as one rank's, and an end for all when one ends."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from engine import checkpoint
from engine.config import GPT2Config
from engine.launcher import ranks
from engine.models.gpt2 import MODEL_FILE
from engine.ops.numpy import rounding
from engine.training import OPTIMIZER_FILE
from tests.conftest import ROOT, TIMEOUT, TRAIN, Run, data, finish

MPIRUN = shutil.which("mpirun", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
pytest.importorskip("mpi4py", reason='mpi4py is not installed: pip install -e ".[mpi]"')
if not MPIRUN:
    pytest.skip(f'no mpirun beside {sys.executable}, nor in PATH: pip install -e ".[mpi]"', allow_module_level=True)

CONFIG = GPT2Config(maxT=16, V=256, L=2, NH=2, C=8)
T, GLOBAL_BATCH, STEPS = 16, 24, 10
WORLDS = (1, 2, 3, 4, 8)

# 24 sequences of 16 tokens in every step, however they are shared out
OPTIONS = ("--device", "cpu", "-e", "l2h2c16", "-t", 16, "-d", 384, "-l", 1e-2, "-v", 4, "-m", -1, "-s", 0, "-x", 8)


def start(world: int, *args: object, program: Path = TRAIN) -> subprocess.Popen:
    return subprocess.Popen(
        [str(MPIRUN), "-np", str(world), sys.executable, str(program), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"},
    )


def run(world: int, *args: object, **options: object) -> Run:
    return finish(start(world, *args, **options), TIMEOUT)


def trained(world: int, *args: object) -> Run:
    result = run(world, *OPTIONS, "-b", GLOBAL_BATCH // world, *args)
    assert result.code == 0, result.err
    return result


def losses(out_dir: Path) -> dict[tuple[int, str], float]:
    records = [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]
    return {(record["step"], record["kind"]): record["loss"] for record in records}


def tensors(out_dir: Path) -> dict[str, bytes]:
    """Everything in the newest checkpoint, as bytes."""
    saved = checkpoint.load_latest(out_dir, report=pytest.fail)
    assert saved
    arrays = saved.tensors(MODEL_FILE) | saved.tensors(OPTIMIZER_FILE)
    return {name: array.tobytes() for name, array in arrays.items()}


@pytest.fixture(scope="module")
def one_rank_in_float64(shards_dir, tmp_path_factory) -> dict[str, np.ndarray]:
    return in_float64(1, 0, shards_dir, tmp_path_factory.mktemp("one"))


def in_float64(world: int, stage: int, shards_dir: Path, folder: Path, reduce: str = "owner") -> dict[str, np.ndarray]:
    """Gradients of the first step, losses, and the parameters in the end: see rank_gradients.py."""
    target = folder / "results.npz"
    program = ROOT / "tests/rank_gradients.py"
    result = run(world, target, shards_dir / "train_000000.bin", stage, reduce, program=program)
    assert result.code == 0, result.err
    with np.load(target) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("world", WORLDS[1:])
def test_gradients_and_parameters_are_those_of_one_rank(world, stage, shards_dir, tmp_path, one_rank_in_float64):
    """In float64, to 1e-12 of each tensor's largest: ranks add up in another order, and nothing else differs.

    The key bias's true gradient is zero: what is computed is rounding, about 1e-17 here. AdamW divides it by its own
    size plus eps = 1e-8, so 10 steps at a rate of 1e-2 move that bias by 1e-17 / 1e-8 * 1e-2 * 10 = 1e-10 at random.
    """
    assert_those_of_one_rank(in_float64(world, stage, shards_dir, tmp_path), one_rank_in_float64)


@pytest.mark.parametrize(("world", "stage"), [(2, 0), (3, 1), (4, 2)])
def test_the_library_adds_up_as_well(world, stage, shards_dir, tmp_path, one_rank_in_float64):
    """--reduce nccl: an order of its own, so the bound is the same."""
    assert_those_of_one_rank(in_float64(world, stage, shards_dir, tmp_path, "nccl"), one_rank_in_float64)


def assert_those_of_one_rank(found: dict[str, np.ndarray], one_rank_in_float64: dict[str, np.ndarray]) -> None:
    assert found.keys() == one_rank_in_float64.keys()
    for name, expected in one_rank_in_float64.items():
        error = np.abs(found[name] - expected)
        if name.startswith("param.") and name.endswith("qkvb"):
            key_bias = slice(CONFIG.C, 2 * CONFIG.C)
            assert error[key_bias].max() < 1e-10
            error[key_bias] = 0
        assert error.max() <= 1e-12 * np.abs(expected).max(), name


def in_bf16(world: int, stage: int, folder: Path, grad_dtype: str = "bf16") -> dict[str, np.ndarray]:
    """Losses, first gradients, parameters and masters: see rank_bf16.py."""
    target = folder / f"{world}-{stage}-{grad_dtype}.npz"
    result = run(world, target, stage, grad_dtype, program=ROOT / "tests/rank_bf16.py")
    assert result.code == 0, result.err
    with np.load(target) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def one_rank_in_bf16(tmp_path_factory) -> dict[str, np.ndarray]:
    if not shutil.which("g++"):
        pytest.skip("g++ is missing: it runs the CUDA operations here")
    return in_bf16(1, 0, tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("world", [2, 4])
def test_in_bf16_the_stages_give_the_same_bits_and_the_gradients_of_one_rank(world, tmp_path, one_rank_in_bf16):
    """On the CUDA operations, with masters. One rank rounds a gradient to bf16 once, several round theirs and the sums.

    So a tensor's gradients are off by the roundings of the parts, each at most 2^-8 of its size, and one more of the
    sum's; as a norm, and the parts being no larger than the whole, within 2^-8 (1 + world).
    """
    first, *others = (in_bf16(world, stage, tmp_path) for stage in (0, 1, 2))
    for other in others:
        for name, values in first.items():
            np.testing.assert_array_equal(other[name], values, err_msg=name)
    for name, exact in one_rank_in_bf16.items():
        if name.startswith("grad."):
            error = np.linalg.norm(first[name] - exact) / np.linalg.norm(exact)
            assert error <= 2**-8 * (1 + world), name
    assert first["loss.0"] == pytest.approx(one_rank_in_bf16["loss.0"], rel=1e-6)  # the same tokens, summed differently
    for name, master in first.items():
        if name.startswith("master."):
            rounded = rounding.split(master)[0].astype(np.float32)
            np.testing.assert_array_equal(first[name.replace("master.", "param.")], rounded, err_msg=name)


def test_gradients_in_fp32_are_summed_in_fp32(tmp_path):
    one, two = (in_bf16(world, 2, tmp_path, "fp32") for world in (1, 2))
    for name, exact in one.items():
        if name.startswith("grad."):
            assert np.linalg.norm(two[name] - exact) <= 1e-5 * np.linalg.norm(exact), name


@pytest.mark.parametrize("world", WORLDS[1:])
def test_the_run_is_that_of_one_rank(world, shards_dir, tmp_path):
    """Through train.py in float32: every loss within rounding of one rank's, validation included."""
    trained(1, *data(shards_dir), "-o", tmp_path / "one")
    trained(world, *data(shards_dir), "-o", tmp_path / "many", "-z", 1)
    one, many = losses(tmp_path / "one"), losses(tmp_path / "many")
    assert one.keys() == many.keys()
    assert many[0, "val"] == pytest.approx(one[0, "val"], rel=1e-7)  # no step yet: sums in another order
    for key, loss in one.items():
        assert many[key] == pytest.approx(loss, rel=1e-4), key  # 8 steps of Adam on float32 gradients


@pytest.mark.parametrize("world", [2, 3])
def test_all_stages_and_every_repetition_give_the_same_bits(world, shards_dir, tmp_path):
    """Four layers, so that in stage 2 layers take the same memory by turns."""
    size = ("-e", "l4h2c16")
    for name, stage in (("a", 0), ("b", 1), ("c", 1), ("d", 2)):
        trained(world, *data(shards_dir), *size, "-o", tmp_path / name, "-z", stage, "-n", 8)
    first, *others = (tensors(tmp_path / name) for name in "abcd")
    assert all(other == first for other in others)
    logs = [(tmp_path / name / "main.log").read_text() for name in "abcd"]
    assert logs.count(logs[0]) == 4


@pytest.mark.parametrize("B", [3, 1], ids=["one micro-batch a lane", "three micro-batches a lane"])
def test_lanes_make_the_bits_independent_of_the_number_of_ranks(B, shards_dir, tmp_path):
    """The same parameters, moments, losses and norms on 1, 2, 4 and 8 ranks, in both stages."""
    results = []
    for world, stage in ((1, 0), (2, 1), (4, 0), (8, 1)):
        out_dir = tmp_path / str(world)
        result = run(
            world,
            *OPTIONS,
            *data(shards_dir),
            *("-b", B, "--lanes", 8, "-z", stage, "-n", 8, "-c", 0.1, "-o", out_dir),
        )
        assert result.code == 0, result.err
        results.append((tensors(out_dir), (out_dir / "main.log").read_text(), losses(out_dir)))
    assert all(found == results[0] for found in results[1:])


def test_lanes_that_do_not_fit_are_refused(shards_dir):
    for world, options, words in (
        (2, ("-b", 12, "--lanes", 3), "--lanes 3 cannot be shared out equally among 2 ranks"),
        (2, ("-b", 12, "--lanes", 8), "--lanes 8 do not divide the 2 micro-batches"),
    ):
        result = run(world, *OPTIONS, *data(shards_dir), *options)
        assert result.code == 2
        assert words in result.err


@pytest.mark.parametrize("stage", [1, 2])
def test_accumulation_on_several_ranks(stage, shards_dir, tmp_path):
    """Two ranks with three micro-batches each see the step that one rank sees whole."""
    trained(1, *data(shards_dir), "-o", tmp_path / "one")
    assert run(2, *OPTIONS, *data(shards_dir), "-b", 4, "-o", tmp_path / "many", "-z", stage).code == 0
    one, many = losses(tmp_path / "one"), losses(tmp_path / "many")
    assert one.keys() == many.keys()
    for key, loss in one.items():
        assert many[key] == pytest.approx(loss, rel=1e-4), key  # 8 steps of Adam on float32 gradients


def test_a_run_goes_on_with_another_number_of_ranks(shards_dir, tmp_path):
    """2 ranks, then 4, then 1: each takes the whole state over, and the losses stay those of an unbroken run."""
    whole, out_dir = tmp_path / "whole", tmp_path / "run"
    trained(2, *data(shards_dir), "-o", whole, "-n", 8)
    for world, steps in ((2, 3), (4, 6), (1, 8)):
        saved = tensors(out_dir) if out_dir.exists() else None
        result = run(
            world,
            *OPTIONS[:-2],
            *data(shards_dir),
            *("-b", GLOBAL_BATCH // world, "-x", steps, "-n", 100, "-o", out_dir, "-y", 1, "-z", 1, "-k", "constant"),
        )
        assert result.code == 0, result.err
        assert (saved is None) == ("starting at step 0" in result.out)
        assert len(checkpoint.load_latest(out_dir, report=pytest.fail).tensors(OPTIMIZER_FILE)) > 10
    trained(1, *data(shards_dir), "-o", tmp_path / "constant", "-k", "constant")
    expected, found = losses(tmp_path / "constant"), losses(out_dir)
    for step in range(8):
        assert found[step, "train"] == pytest.approx(expected[step, "train"], rel=1e-4)


def test_state_moves_between_numbers_of_ranks_bit_for_bit(shards_dir, tmp_path):
    """A checkpoint that 3 ranks wrote, loaded and saved again by 2 ranks and by 1, after no step at all."""
    trained(3, *data(shards_dir), "-o", tmp_path / "run", "-n", 8, "-z", 1)
    before = tensors(tmp_path / "run")
    for world in (2, 1):
        script = ROOT / "tests/rank_reload.py"
        result = run(world, tmp_path / "run", tmp_path / f"again{world}", program=script)
        assert result.code == 0, result.err
        assert tensors(tmp_path / f"again{world}") == before


def test_the_reference_command_on_eight_ranks(shards_dir, tmp_path):
    """As it is given for eight GPUs, but for the sizes: the model's, the batch's, and how long it goes on."""
    reference = "-r 1 -z 1 -c 0.1 -l 0.0006 -q 0.0 -u 700 -n 5000 -v 250 -s 20000".split()
    small = (
        "--device",
        "cpu",
        "-e",
        "l2h2c16",
        "-b",
        2,
        "-t",
        16,
        "-d",
        512,
        "-x",
        6,
        "-m",
        1,
        "-g",
        4,
        "-o",
        tmp_path / "run",
    )
    result = run(8, *data(shards_dir), *reference, *small)
    assert result.code == 0, result.err
    assert "8 ranks x 2 x 2 sequences of 16" in result.out
    lines = (tmp_path / "run/main.log").read_text()
    assert re.findall(r"s:(\d+) trl:", lines) == list("012345")
    assert re.findall(r"s:(\d+) tel:", lines) == list("06")
    assert checkpoint.load_latest(tmp_path / "run", report=pytest.fail).step == 6


def test_only_rank_0_speaks(shards_dir, tmp_path):
    result = trained(3, *data(shards_dir), "-o", tmp_path / "run")
    assert result.out.count("step 8: validation loss") == 1
    assert "3 ranks x 1 x 8 sequences of 16" in result.out
    assert result.err == ""


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("-i", "nothing.bin", "-v", 0), 3, "nothing.bin"),
        (("-z", 2, "--lanes", 2), 2, "-z 2"),
        (("--reduce", "nccl", "--lanes", 2), 2, "--reduce nccl"),
        (("-b", 7), 2, "-b 7 x"),
        (("-b", 24), 2, "2 ranks x -b 24"),
        (("-b", 0), 2, "-b must be"),
    ],
)
def test_a_mistake_is_one_message_and_its_exit_code(shards_dir, options, code, words):
    result = run(2, *data(shards_dir), *OPTIONS, "-b", 12, *options)
    assert result.code == code
    assert result.err.count("error (exit") == 1
    assert words in result.err
    assert "Traceback" not in result.err


def test_ranks_with_different_options_are_refused(shards_dir):
    """mpirun can start a program for each rank."""
    one = [sys.executable, str(TRAIN), *map(str, (*OPTIONS, *data(shards_dir), "-b", 12))]
    command = [str(MPIRUN), "-np", "1", *one, ":", "-np", "1", *one, "--seed", "7"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert result.returncode == 2
    assert "rank 1 was started with other options" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_rank_that_dies_takes_the_others_with_it(number, shards_dir, tmp_path):
    with start(3, *OPTIONS[:-2], *data(shards_dir), "-b", 8, "-x", 10**6, "-o", tmp_path / "run") as process:
        pids = wait_for_ranks(process, 3)
        os.kill(pids[1], signal.SIGKILL if number == signal.SIGKILL else signal.SIGUSR1)
        result = finish(process, timeout=15)
    assert result.code not in (0, None) if number == signal.SIGKILL else result.code == 75
    wait_for_end(pids)


BROKEN_RANK = """
import runpy, sys
import engine.data
from mpi4py import MPI
if MPI.COMM_WORLD.rank == 1:
    engine.data.Loader.next = lambda self: 1 / 0
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_an_exception_on_one_rank_ends_all(shards_dir, tmp_path):
    """A mistake in the program, not the user's: a traceback, and no rank that waits for ever."""
    result = run(3, *OPTIONS, *data(shards_dir), "-b", 8, program=altered(BROKEN_RANK, tmp_path))
    assert result.code == 1
    assert result.err.count("ZeroDivisionError: division by zero") == 1


def test_a_rank_that_is_stopped_is_named_and_ends_the_job(shards_dir, tmp_path):
    """SIGSTOP, which no launcher notices: the others say who is silent."""
    options = (*OPTIONS[:-2], *data(shards_dir), "-b", 8, "-x", 10**6, "--watchdog", 3)
    with start(3, *options, "-o", tmp_path / "run") as process:
        pids = wait_for_ranks(process, 3)
        os.kill(pids[1], signal.SIGSTOP)
        result = finish(process, timeout=20)
    assert result.code == 17
    assert result.err.count("watchdog (exit 17)") == 1
    assert re.search(r"rank 1 is silent, perhaps stopped or dead: step \d+, ", result.err)
    assert "rank 0 is" not in result.err
    wait_for_end(pids)


def test_a_job_that_is_suspended_as_a_whole_goes_on(shards_dir, tmp_path):
    options = (*OPTIONS[:-2], *data(shards_dir), "-b", 12, "-x", 10**6, "--watchdog", 3)
    with start(2, *options, "-o", tmp_path / "run") as process:
        pids = wait_for_ranks(process, 2)
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in pids:
                os.kill(pid, number)
            time.sleep(5)  # longer than the watchdog's limit
        os.kill(pids[0], signal.SIGUSR1)
        assert finish(process, timeout=20).code == 75


STUCK_RANK = """
import runpy, sys, threading
import engine.data
from mpi4py import MPI
if MPI.COMM_WORLD.rank == 2:
    engine.data.Loader.next = lambda self: threading.Event().wait()
runpy.run_path(sys.argv[0], run_name="__main__")
"""

SLOW_SAMPLE = """
import runpy, sys, time
from engine.ops.numpy import sampling
fast = sampling.sample
def slow(*args):
    time.sleep(0.5)
    fast(*args)
sampling.sample = slow
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def altered(script: str, folder: Path) -> Path:
    """train.py with something in the engine changed before it starts."""
    path = folder / "altered.py"
    path.write_text(f"import sys\nsys.argv[0] = {str(TRAIN)!r}\n{script}")
    return path


def test_a_rank_that_is_stuck_is_named_with_its_phase(shards_dir, tmp_path):
    """Alive, but getting nowhere: the furthest behind."""
    program = altered(STUCK_RANK, tmp_path)
    result = run(3, *OPTIONS, *data(shards_dir), "-b", 8, "--watchdog", 3, program=program)
    assert result.code == 17
    assert "rank 2 is the furthest behind: step 1, data" in result.err
    assert result.err.count("furthest behind") == 1


def test_a_long_phase_that_gets_on_is_no_alarm(shards_dir, tmp_path):
    """Rank 0 writes a sample for longer than the watchdog's limit, while the other waits for it."""
    options = (*OPTIONS[:-4], "-x", 2, "-s", 2, "-g", 9, "-b", 12, "--watchdog", 3)
    result = run(2, *data(shards_dir), *options, program=altered(SLOW_SAMPLE, tmp_path))
    assert result.code == 0, result.err
    assert "step 2: sample" in result.out


FLIPPED_BIT = """
import runpy, sys
import numpy as np
from engine.optimizer import AdamW
from mpi4py import MPI
step = AdamW.step
def flip(self, t, *args):
    step(self, t, *args)
    if t == 3 and MPI.COMM_WORLD.rank == 1:
        self._params.views["h.0.fcw"].view(np.uint32)[1, 2] ^= 1
AdamW.step = flip
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_flipped_bit_is_found_at_the_next_validation(shards_dir, tmp_path):
    result = run(3, *OPTIONS, *data(shards_dir), "-b", 8, program=altered(FLIPPED_BIT, tmp_path))
    assert result.code == 17
    assert "the parameters of rank 1 are not those of rank 0" in result.err
    assert "step 4: validation" not in result.out


TUNED_BY_RANK = """
import os, runpy, sys
from pathlib import Path
from engine import ops
from mpi4py import MPI
operations, rank = ops.load("numpy"), MPI.COMM_WORLD.rank
operations.tune = lambda *_, **__: {"chosen by": rank, "longer": "x" * 100 * rank}
operations.use_tuning = lambda table: Path(os.environ["TUNED"], str(rank)).write_text(str(table))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_all_ranks_use_what_rank_0_has_tuned(shards_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("TUNED", str(tmp_path))
    options = (*OPTIONS[:-2], "-x", 1, *data(shards_dir), "-b", 8)
    result = run(3, *options, program=altered(TUNED_BY_RANK, tmp_path))
    assert result.code == 0, result.err
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == ["{'chosen by': 0, 'longer': ''}"] * 3


def wait_for_ranks(process: subprocess.Popen, world: int) -> list[int]:
    """The ranks' process numbers, once the first step is done."""
    assert process.stdout
    for line in process.stdout:
        if re.search(r"step +\d+/", line):  # Open MPI gives ranks a terminal, on which they begin with a code
            break
    pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    ours = [pid for pid in pids if is_rank(pid) and descends_from(pid, process.pid)]
    assert len(ours) == world
    return sorted(ours, key=rank_of)


def is_rank(pid: int) -> bool:
    with contextlib.suppress(OSError):  # it may have ended since it was listed
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(f"{sys.executable}\0{TRAIN}\0".encode())
    return False


def wait_for_end(pids: list[int]) -> None:
    """mpirun may be gone a moment before the ranks that it has killed are."""
    for _ in range(50):
        alive = [pid for pid in pids if is_alive(pid)]
        if not alive:
            return
        time.sleep(0.1)
    pytest.fail(f"still there after 5 seconds: {alive}")


def is_alive(pid: int) -> bool:
    """A process that nobody has asked how it ended is listed, but holds nothing any more."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def rank_of(pid: int) -> int:
    variables = Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
    _, rank = ranks(dict(variable.split("=", 1) for variable in variables if "=" in variable))
    return rank


def descends_from(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    return False
