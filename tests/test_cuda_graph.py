"""--cuda-graph: a step that is recorded and replayed is the step, bit for bit; where it can't be, the run says so."""

import inspect
import shutil
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

import train
from engine import device, training
from engine.comm.one import OneRank
from engine.config import RunConfig
from engine.device import cublaslt, cuda, eagerly, kernels, tuning
from engine.errors import UsageError
from tests.conftest import TINY, data, run_command, write_shards
from tests.test_cuda_train import GPU, assert_same_checkpoint, checkpoint, losses, records
from tests.twins import ShimModule, matmul, on

# --- recording, on a stand-in for CuPy


class Array:
    """As much of a CuPy array as tells it from others."""

    def __init__(self, address, size=4):
        self.data, self.shape, self.dtype = SimpleNamespace(ptr=address), (size,), np.dtype(np.float32)


class Gpu:
    """A GPU with streams: what is launched is done at once, unless it is recorded."""

    def __init__(self):
        self.done, self.graphs_launched = [], 0
        self._recording, self._allocator = None, None
        self.fails = ""  # what to refuse: "begin", "launch" or "end" of a recording

    def launch(self, what):
        """A kernel that does nothing but be noted."""
        self.run(lambda: self.done.append(what))

    def run(self, kernel):
        if self._recording is None:
            kernel()
        elif self.fails == "launch":
            raise RuntimeError("cudaErrorStreamCaptureUnsupported")
        else:
            self._recording.append(kernel)

    def allocate(self, nbytes):
        if self._allocator:
            self._allocator(nbytes)

    @property
    def is_recording(self):
        return self._recording is not None

    def cupy(self):
        gpu = self

        class Graph:
            def __init__(self, launches):
                self._launches = launches

            def launch(self):
                gpu.graphs_launched += 1
                for kernel in self._launches:
                    kernel()

        class Stream:
            def __init__(self, non_blocking):
                assert non_blocking  # another kind may not be recorded while the default stream is used

            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

            def begin_capture(self):
                if gpu.fails == "begin":
                    raise RuntimeError("cudaErrorNotSupported")
                gpu._recording = []

            def end_capture(self):
                assert gpu.is_recording
                launches, gpu._recording = gpu._recording, None
                if gpu.fails == "end":
                    raise RuntimeError("cudaErrorStreamCaptureInvalidated")
                return Graph(launches)

        class UsingAllocator:
            def __init__(self, allocator):
                self._allocator = allocator

            def __enter__(self):
                gpu._allocator = self._allocator

            def __exit__(self, *_):
                gpu._allocator = None

        cupy = ModuleType("cupy")
        cupy.ndarray = Array
        cupy.cuda = SimpleNamespace(Stream=Stream, using_allocator=UsingAllocator)
        return cupy


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    monkeypatch.setitem(sys.modules, "cupy", gpu.cupy())
    return gpu


def test_the_first_call_is_a_usual_one_the_second_is_recorded_and_all_others_are_replayed(gpu):
    calls = []

    def step(name):
        calls.append((name, gpu.is_recording))
        gpu.launch(f"{name} forward")
        gpu.launch(f"{name} backward")

    replay = cuda.replay("on", pytest.fail)
    for number in range(1, 6):
        replay(step, "a")
        assert gpu.done == number * ["a forward", "a backward"]
    assert calls == [("a", False), ("a", True)]
    assert gpu.graphs_launched == 4


def test_other_arguments_have_graphs_of_their_own_and_arrays_are_told_by_where_they_lie(gpu):
    launched = []

    def step(lane, array):
        launched.append((lane, array.data.ptr, array.shape))
        gpu.launch(launched[-1])

    replay = cuda.replay("auto", pytest.fail)
    arguments = [(0, Array(512)), (1, Array(512)), (0, Array(1024)), (0, Array(512, size=2))]
    for _ in range(4):
        gpu.done.clear()
        for lane, array in arguments:
            replay(step, lane, Array(array.data.ptr, array.shape[0]))  # another object for the same memory
        assert gpu.done == [(lane, array.data.ptr, array.shape) for lane, array in arguments]
    assert len(launched) == 2 * len(arguments)


def test_off_records_nothing(gpu):
    gpu.fails = "begin"
    replay = cuda.replay("off", pytest.fail)
    for _ in range(4):
        replay(gpu.launch, "a")
    assert gpu.done == 4 * ["a"]


@pytest.mark.parametrize("fails", ["begin", "launch", "end"])
def test_where_recording_fails_auto_says_so_once_and_goes_on_without(gpu, fails):
    gpu.fails, said, calls = fails, [], []

    def step(name):
        calls.append(name)
        gpu.launch(name)

    replay = cuda.replay("auto", said.append)
    for _ in range(4):
        for name in ("a", "b"):
            replay(step, name)
    assert gpu.done == 4 * ["a", "b"]  # nothing twice, nothing not at all
    assert gpu.graphs_launched == 0
    assert not gpu.is_recording
    assert len(said) == 1
    assert "without a CUDA graph" in said[0]
    assert "RuntimeError: cudaError" in said[0]
    assert "\n" not in said[0]


@pytest.mark.parametrize("fails", ["begin", "launch", "end"])
def test_where_recording_fails_on_is_refused_with_the_reason(gpu, fails):
    gpu.fails = fails
    replay = cuda.replay("on", pytest.fail)
    replay(gpu.launch, "a")
    with pytest.raises(UsageError, match=r"--cuda-graph on: .*cudaError.*--cuda-graph off does without"):
        replay(gpu.launch, "a")
    assert gpu.done == ["a"]


def test_what_allocates_is_not_recorded(gpu):
    """A graph would go on writing where others have been given the memory."""

    def step():
        gpu.allocate(4096)
        gpu.launch("a")

    said = []
    replay = cuda.replay("auto", said.append)
    for _ in range(3):
        replay(step)
    assert gpu.done == 3 * ["a"]
    assert "4,096 bytes are allocated" in said[0]
    gpu.allocate(4096)  # outside, memory is given as ever


def test_ctrl_c_is_not_taken_for_a_failure_to_record(gpu):
    def step():
        if gpu.is_recording:
            raise KeyboardInterrupt

    replay = cuda.replay("auto", pytest.fail)
    replay(step)
    with pytest.raises(KeyboardInterrupt):
        replay(step)
    assert not gpu.is_recording


# --- a whole step of the CUDA operations, by the shim


class Memory(np.ndarray):
    """A GPU's memory: what is done to it is launched, and can be recorded."""

    gpu: Gpu

    @property
    def data(self):
        return SimpleNamespace(ptr=self.ctypes.data)

    def fill(self, value):
        self.gpu.run(lambda: np.ndarray.fill(self, value))

    def __iadd__(self, other):
        self.gpu.run(lambda: np.add(self, other, out=self))
        return self

    def __setitem__(self, where, values):
        self.gpu.run(lambda: np.ndarray.__setitem__(self, where, values))


@pytest.fixture
def train_by_shim(gpu, tmp_path):
    """train_by_shim(cuda_graph, steps, **options) trains on CUDA's operations, whose launches the stand-in records.

    Gives the losses, the decisions of the guard, and the optimizer's state.
    """
    folder = write_shards(tmp_path / "shards", {"train_000000.bin": 3001})

    class Module(ShimModule):
        def launch(self, *args):
            gpu.run(lambda: ShimModule.launch(self, *args))

    def zeros(shape, dtype):
        return np.zeros(shape, dtype).view(Memory)

    def run(cuda_graph, steps, before_step=lambda t, step: None, **options):
        values = {"model": "l2h1c16", "B": 1, "T": 16, "steps": steps, "val_every": 0, "sample_every": 0, "lr": 1e-2}
        values |= {"warmup": 2, "final_lr": 0.1, "weight_decay": 0.1, "train_data": f"{folder}/train_*.bin"}
        values |= {"gemm_search": "off"}
        config = RunConfig(**(values | options), cuda_graph=cuda_graph)
        t = training.build(config, OneRank(), lambda line: None)
        found = []
        for step in range(steps):
            before_step(t, step)
            train.train_step(t, step)
            found.append([float(x) for x in (t.loss, *t.optimizer.decision)])
        t.loader.close()
        return found, {name: np.array(x) for name, x in (t.optimizer.state() | t.optimizer.parameters()).items()}

    # Undone before the shim's own, which it is laid upon.
    with on("forward"), pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys.modules["cupy"], "ndarray", Memory)
        monkeypatch.setattr(Memory, "gpu", gpu, raising=False)
        monkeypatch.setattr(device, "choose", lambda *_: "cuda")
        monkeypatch.setattr(kernels, "KERNELS", kernels.Kernels(Module))
        monkeypatch.setattr(cublaslt, "matmul", lambda *args, **options: gpu.run(lambda: matmul(*args, **options)))
        monkeypatch.setattr(tuning, "use", lambda table: None)
        monkeypatch.setattr(cuda, "zeros", zeros)
        monkeypatch.setattr(cuda, "to_device", lambda host: host)
        monkeypatch.setattr(cuda, "to_host", np.asarray)
        monkeypatch.setattr(cuda, "available_bytes", lambda: 1 << 40)
        monkeypatch.setattr(cuda, "compute_capability", lambda: 90)
        monkeypatch.setattr(cuda, "shared_memory_limit", lambda: 227 << 10)
        yield run


NEEDS_GCC = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is missing")


@NEEDS_GCC
@pytest.mark.parametrize(
    ("options", "graphs"),
    [
        ({}, 2),
        ({"master_weights": False}, 2),
        ({"total_batch": 48, "recompute": 2, "gelu_fusion": 0}, 4),
        ({"total_batch": 64, "lanes": 2, "grad_dtype": "fp32"}, 5),
    ],
    ids=["plain", "-w 0", "-d 48", "--lanes 2"],
)
def test_replayed_steps_of_the_cuda_operations_are_the_steps(gpu, train_by_shim, options, graphs):
    """Whatever a step took from the host, pointer or number, would be that of the step that was recorded."""
    steps = 5
    usual, kept = train_by_shim("off", steps, **options)
    assert gpu.graphs_launched == 0
    replayed, ours = train_by_shim("on", steps, **options)
    calls = steps * (options.get("total_batch", 16) // 16 + 1)
    assert gpu.graphs_launched == calls - graphs  # all but the first of each
    assert repr(replayed) == repr(usual)  # NaN, too
    assert replayed[-1][0] < replayed[0][0]
    for name, values in kept.items():
        np.testing.assert_array_equal(ours[name], values, err_msg=name)


@NEEDS_GCC
def test_the_guard_is_asked_in_every_replayed_step(train_by_shim):
    """A parameter that is NaN in the fourth step: its update is skipped, and those around it are not."""
    kept = []

    def spoil(t, step):
        view = t.model.params.views["lnfb"]
        if step == 3:
            kept[:] = [view[0].copy()]
            view[0] = np.nan
        if step == 4:
            view[0] = kept[0]

    (usual, state), (replayed, ours) = (train_by_shim(name, 6, before_step=spoil) for name in ("off", "on"))
    assert [bool(skip) for _, _, skip, *_ in usual] == [False, False, False, True, False, False]
    assert repr(replayed) == repr(usual)
    for name, values in state.items():
        np.testing.assert_array_equal(ours[name], values, err_msg=name)


# --- on the CPU


def test_the_cpu_calls_functions_and_refuses_to_be_asked_for_graphs(shards_dir, tmp_path):
    numpy = device.load("numpy")
    for wanted in ("auto", "off"):
        assert numpy.replay(wanted, pytest.fail) is eagerly
    result = run_command(
        *("train.py", *data(shards_dir), *TINY, "--device", "cpu", "--cuda-graph", "on"),
        *("-x", 1, "-o", tmp_path / "run"),
    )
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("usage error (exit 2): --cuda-graph on: the CPU has no CUDA graphs")
    assert not (tmp_path / "run" / "main.log").exists()


def test_a_step_is_the_same_calls_with_the_same_arguments_every_time(tmp_path):
    """All that is replayed: whatever else a step took from the host would stay what it was when it was recorded.

    Numbers, strings and where arrays lie must be the same in every step, and only what is uploaded may change.
    """
    folder = write_shards(tmp_path / "shards", {"train_000000.bin": 3001})
    run = RunConfig(
        train_data=f"{folder}/train_*.bin",
        **{"model": "l2h2c16", "B": 2, "T": 16, "total_batch": 96, "steps": 6, "lanes": 1, "device": "cpu"},
        **{"val_every": 0, "sample_every": 0, "warmup": 2, "final_lr": 0.1, "weight_decay": 0.1},
    )
    t = training.build(run, OneRank(), lambda line: None)
    seen: list[tuple] = []
    is_replayed = False

    def told(argument):
        return (argument.ctypes.data, argument.shape) if isinstance(argument, np.ndarray) else argument

    def watched(name, function):
        def call(*args, **kwargs):
            if is_replayed:
                flat = [item for arg in args for item in (arg if isinstance(arg, tuple) else (arg,))]
                seen.append((name, *map(told, flat), *((key, told(value)) for key, value in kwargs.items())))
            return function(*args, **kwargs)

        return call

    def replay(function, *args):
        nonlocal is_replayed
        seen.append((function.__name__, *map(told, args)))
        is_replayed = True
        function(*args)
        is_replayed = False

    operations = SimpleNamespace()
    for name in t.ops.__all__:
        members = vars(getattr(t.ops, name)).items()
        own = {key: watched(f"{name}.{key}", value) if inspect.isfunction(value) else value for key, value in members}
        setattr(operations, name, SimpleNamespace(**own))
    t.ops = t.model.ops = t.optimizer._ops = operations
    t.replay = replay
    steps = []
    for step in range(3):
        train.train_step(t, step)
        steps.append(list(seen))
        seen.clear()
    t.loader.close()
    names = {call[0] for call in steps[0]}
    assert {"accumulate", "classifier.add_mean", "_update", "guard.decide", "adamw.update"} <= names
    assert len(steps[0]) > 100
    assert steps[0] == steps[1] == steps[2]
    assert len({train.learning_rate(step, run.steps, run) for step in range(3)}) == 3


# --- on a GPU

SCHEDULED = ("-u", 3, "-q", 0.1, "-c", 0.1)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    sizes = {"train_000000.bin": 9001, "val_000000.bin": 1001}
    return data(write_shards(tmp_path_factory.mktemp("data") / "shards", sizes))


def run_on_gpu(*args):
    result = run_command("train.py", *GPU, *args)
    assert result.code == 0, result.err
    assert "without a CUDA graph" not in result.out
    return result


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("-d", 192),
        ("-w", 0),
        ("-w", 0, "-d", 192, "--grad-dtype", "fp32"),
        ("-r", 2, "-ge", 0),
        ("--lanes", 2, "-d", 256),
        ("-v", 3, "-s", 4, "-g", 20),
        ("-a", 1),
        ("-z", 1),
    ],
    ids=lambda options: " ".join(map(str, options)) or "plain",
)
def test_a_replayed_run_is_the_run(shards, tmp_path, options):
    """Losses, norms, learning rates, masters and moments, bit for bit; from the start, and from a checkpoint on."""
    common = (*options, *SCHEDULED, *shards, "-x", 12, "-n", 6)
    run_on_gpu(*common, "--cuda-graph", "off", "-o", tmp_path / "off")
    run_on_gpu(*common, "--cuda-graph", "on", "-o", tmp_path / "on")
    assert records(tmp_path / "on") == records(tmp_path / "off")
    assert losses(tmp_path / "on")[-1] < losses(tmp_path / "on")[0]
    assert_same_checkpoint(checkpoint(tmp_path / "on", 12), checkpoint(tmp_path / "off", 12))

    shutil.copytree(tmp_path / "off" / "step-00000006", tmp_path / "parts" / "step-00000006")
    run_on_gpu(*common, "--cuda-graph", "on", "-o", tmp_path / "parts", "-y", 1)
    assert records(tmp_path / "parts") == records(tmp_path / "off")[6:]
    assert_same_checkpoint(checkpoint(tmp_path / "parts", 12), checkpoint(tmp_path / "off", 12))


@pytest.mark.gpu
def test_the_guard_skips_the_same_updates(shards, tmp_path):
    """Beyond the window of 128 steps, a loss above the mean is skipped: about half of them, as it hardly falls."""
    for name in ("off", "on"):
        run_on_gpu(*shards, "-l", 1e-6, "-sl", 0.01, "-x", 160, "-n", 160, "--cuda-graph", name, "-o", tmp_path / name)
    assert records(tmp_path / "on") == records(tmp_path / "off")
    skipped = [record["skipped"] for record in records(tmp_path / "on")]
    assert any(skipped)
    assert not all(skipped[128:])
    assert_same_checkpoint(checkpoint(tmp_path / "on", 160), checkpoint(tmp_path / "off", 160))


@pytest.mark.gpu
def test_a_replayed_step_launches_graphs_alone_and_takes_no_memory(tmp_path, monkeypatch):
    """Three micro-batches: a graph for the first, for the second and for the last, and one for the update."""
    import cupy

    folder = write_shards(tmp_path / "shards", {"train_000000.bin": 3001})
    run = RunConfig(
        train_data=f"{folder}/train_*.bin",
        **{"model": "l2h2c32", "B": 4, "T": 16, "total_batch": 192, "steps": 20, "device": "cuda", "cuda_graph": "on"},
        **{"val_every": 0, "sample_every": 0},
    )
    t = training.build(run, OneRank(), lambda line: None)
    launched = []
    launch = kernels.KERNELS.launch
    monkeypatch.setattr(
        kernels.KERNELS, "launch", lambda *args, **options: (launched.append(args[1]), launch(*args, **options))
    )
    pool = cupy.get_default_memory_pool()

    def step(number):
        train.train_step(t, number)
        t.device.download([t.loss, *t.optimizer.decision])()

    for number in range(3):
        step(number)
    assert len(launched) > 100
    launched.clear()
    used, total = pool.used_bytes(), pool.total_bytes()
    for number in range(3, 10):
        step(number)
        assert launched == ["scalars_total"]
        launched.clear()
        assert (pool.used_bytes(), pool.total_bytes()) == (used, total)
    assert len(t.replay._graphs) == 4
    assert all(t.replay._graphs.values())
    t.loader.close()


@pytest.mark.gpu
def test_a_step_that_waits_for_the_device_is_not_recorded_and_nothing_is_broken_by_it():
    """By CUDA itself: what failed leaves the streams as they were."""
    import cupy

    x, y = cuda.zeros((4,), np.float32), cuda.zeros((4,), np.float32)

    def waits():
        x.get()
        y.fill(0)

    def allocates():
        y[...] = x + 1

    for function, words in ((waits, "captur"), (allocates, "bytes are allocated")):
        said = []
        replay = cuda.replay("auto", said.append)
        for _ in range(3):
            replay(function)
        assert len(said) == 1
        assert words in said[0].lower()
        replay = cuda.replay("on", pytest.fail)
        replay(function)
        with pytest.raises(UsageError, match="--cuda-graph on"):
            replay(function)
    cupy.cuda.get_current_stream().synchronize()
    np.testing.assert_array_equal(y.get(), np.ones(4))
