"""Which device a run is on: what --device means, on machines with a GPU, without, and with a broken installation."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from engine import device, ops
from engine.device import cuda
from engine.errors import UsageError
from tests.conftest import TINY, data, run_command


@pytest.fixture
def machine(monkeypatch):
    """machine(driver, problem): a machine with a driver or without, whose GPU can't train for this reason."""

    def pretend(driver, problem):
        monkeypatch.setattr(device, "_has_driver", lambda: driver)
        monkeypatch.setattr(device, "cuda_problem", lambda: problem)

    return pretend


def choose(wanted):
    said = []
    return device.choose(wanted, said.append), said


def test_a_gpu_is_taken_unless_the_cpu_is_asked_for(machine):
    machine(driver=True, problem="")
    assert choose("auto") == ("cuda", [])
    assert choose("cuda") == ("cuda", [])
    assert choose("cpu") == ("numpy", [])


def test_without_a_gpu_auto_is_the_cpu(machine):
    machine(driver=False, problem="there is no NVIDIA driver")
    assert choose("auto") == ("numpy", [])
    with pytest.raises(UsageError, match=r"--device cuda: there is no NVIDIA driver.*doctor.*--device cpu"):
        choose("cuda")


def test_where_there_is_a_driver_the_cpu_is_not_taken_in_silence(machine):
    machine(driver=True, problem="CuPy is broken")
    where, said = choose("auto")
    assert where == "numpy"
    assert len(said) == 1
    assert "CuPy is broken" in said[0]
    with pytest.raises(UsageError, match="CuPy is broken"):
        choose("cuda")


@pytest.mark.gpu
def test_what_is_put_on_a_gpu_takes_no_more_of_its_memory():
    host = np.arange(1 << 20, dtype=np.float32).astype(cuda.COMPUTE_DTYPE).reshape(-1, 8)
    array = cuda.zeros((2, *host.shape), cuda.COMPUTE_DTYPE)
    cuda.free_unused()
    free = cuda.available_bytes()
    cuda.put(array[1], host)
    assert cuda.available_bytes() == free
    before, after = cuda.to_host(array)
    assert not before.any()
    assert after.tobytes() == host.tobytes()
    with pytest.raises((TypeError, ValueError)):
        cuda.put(array[1], host[1:])


def test_each_rank_takes_a_gpu_of_those_it_sees(monkeypatch):
    taken = []

    class Device:
        def __init__(self, index):
            self.id, self.pci_bus_id = index, f"0000:0{index}:00.0"

        def use(self):
            taken.append(self.id)

    properties = {"uuid": b"same for all"}
    runtime = SimpleNamespace(getDeviceCount=lambda: 2, getDeviceProperties=lambda index: properties)
    pretended = ModuleType("cupy.cuda")
    pretended.Device, pretended.runtime = Device, runtime
    monkeypatch.setitem(sys.modules, "cupy", ModuleType("cupy"))
    monkeypatch.setitem(sys.modules, "cupy.cuda", pretended)
    names, counts = zip(*map(cuda.take, range(3)), strict=True)
    assert taken == [0, 1, 0]
    assert names[0] == names[2] != names[1]
    assert counts == (2, 2, 2)


@pytest.mark.skipif(not device.cuda_problem(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_a_usage_error(shards_dir, tmp_path):
    result = run_command("train.py", *data(shards_dir), *TINY, "--device", "cuda", "-x", 1, "-o", tmp_path / "run")
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("usage error (exit 2): --device cuda: ")
    assert "--device cpu" in result.err


@pytest.mark.parametrize(
    ("C", "HS", "limit", "words"),
    [
        (768, 64, 99 << 10, ""),
        (768, 128, 227 << 10, ""),
        (768, 128, 99 << 10, "shared memory"),
        (768, 48, 227 << 10, "heads of 16, 32, 64"),
        (16384, 128, 227 << 10, "up to 8192 channels"),
    ],
)
def test_models_that_have_no_kernel_are_known_before_the_first_step(monkeypatch, C, HS, limit, words):
    """99 KB a block is what consumer GPUs give, 163 KB an A100 and 227 KB an H100."""
    monkeypatch.setattr(cuda, "shared_memory_limit", lambda: limit)
    problem = ops.load("cuda").unsupported(4, C, HS)
    assert words in problem
    assert bool(problem) == bool(words)


def pretend_packages(monkeypatch, *, capability="90", gpus=True, nvrtc=True, cublaslt=True, starts=True):
    """CuPy and nvmath-python as they would be on a machine with a driver."""

    def fails(*_):
        raise OSError("lib.so: cannot open shared object file")

    class CUDARuntimeError(Exception):
        pass

    def current():
        if not starts:
            raise CUDARuntimeError("cudaErrorNoDevice")
        return SimpleNamespace(compute_capability=capability)

    cupy = ModuleType("cupy")
    cupy.cuda = SimpleNamespace(
        nvrtc=SimpleNamespace(getVersion=(lambda: (13, 0)) if nvrtc else fails),
        is_available=lambda: gpus,
        Device=current,
        runtime=SimpleNamespace(CUDARuntimeError=CUDARuntimeError),
    )
    bindings = ModuleType("nvmath.bindings")
    bindings.cublasLt = SimpleNamespace(get_version=(lambda: 130100) if cublaslt else fails)
    for name, module in (("cupy", cupy), ("nvmath", ModuleType("nvmath")), ("nvmath.bindings", bindings)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(device, "_has_driver", lambda: True)


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ({}, ""),
        ({"capability": "75"}, "compute capability 7.5"),
        ({"gpus": False}, "finds no GPU"),
        ({"nvrtc": False}, "cannot be loaded (lib.so"),
        ({"cublaslt": False}, "cannot be loaded (lib.so"),
        ({"starts": False}, "CUDA does not start (cudaErrorNoDevice)"),
    ],
)
def test_why_a_gpu_cannot_train(monkeypatch, missing, words):
    pretend_packages(monkeypatch, **missing)
    problem = device.cuda_problem()
    assert words in problem
    assert bool(problem) == bool(words)


def test_without_a_driver_nothing_else_is_asked(monkeypatch):
    monkeypatch.setattr(device, "_has_driver", lambda: False)
    assert device.cuda_problem() == "there is no NVIDIA driver"


def test_without_cupy_the_remedy_is_told(monkeypatch):
    monkeypatch.setattr(device, "_has_driver", lambda: True)
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert 'pip install -e ".[cuda13]"' in device.cuda_problem()


def test_a_batch_that_no_grid_holds_is_refused(monkeypatch):
    monkeypatch.setattr(cuda, "shared_memory_limit", lambda: 227 << 10)
    assert not ops.load("cuda").unsupported(65_535, 768, 64)
    assert "-b 65,536" in ops.load("cuda").unsupported(65_536, 768, 64)


@pytest.mark.parametrize(("wanted", "taken"), [("", 90), ("80", 80), ("86", 86), ("90", 90)])
def test_an_older_gpu_s_kernels_are_taken_if_wanted(monkeypatch, wanted, taken):
    pretend_packages(monkeypatch)
    monkeypatch.setenv("BACKHAND_CAPABILITY", wanted)
    assert device.load("cuda").compute_capability() == taken
    said = []
    assert device.choose("auto", said.append) == "cuda"
    assert said == ([f"note       by BACKHAND_CAPABILITY, kernels of compute capability {taken}"] if wanted else [])


@pytest.mark.parametrize("wanted", ["100", "75", "9.0", "ampere"])
def test_kernels_that_the_gpu_does_not_take_are_refused(monkeypatch, wanted):
    pretend_packages(monkeypatch)
    monkeypatch.setenv("BACKHAND_CAPABILITY", wanted)
    with pytest.raises(UsageError, match=f"BACKHAND_CAPABILITY={wanted}: .* 80 .* to 90"):
        device.load("cuda").compute_capability()
