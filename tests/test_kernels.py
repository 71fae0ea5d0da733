"""The owner of the kernels, without a GPU: signatures, checked arguments, the compiler, the cache."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from engine.device import kernels
from engine.device.kernels import BF16, KernelError, Parameter, convert, read_source, signatures, target
from engine.ops.cuda import layernorm
from tests.conftest import ROOT

SOURCE = """
// target: sm_90a, sm_100a
extern "C" __global__ void __launch_bounds__(128) scale(
    bf16* __restrict__ out,        // (N,3C)
    const float* __restrict__ x,   // (N,HS)
    grad_t* sums,                  // () or null
    long long n, int N, int C, float factor) {
    out[0] = x[0];
}
extern "C" __global__ void other(int* p,  // (2)
    unsigned q) {}
"""
ARCHITECTURES = ("sm_80", "sm_90", "sm_90a", "sm_100a", "sm_120")
SOURCES = sorted(kernels.SOURCES.glob("*.cu"))


def variants(source: str) -> list[dict[str, int]]:
    """What a source says that it is compiled as: the plain one, and the variants of its line `// variants: ...`."""
    line = re.search(r"^// variants: (.*)$", source, re.MULTILINE)
    found: list[dict[str, int]] = [{}]
    for item in line[1].split(";") if line else []:
        name, _, values = item.partition("=")
        found += [{name.strip(): int(value)} for value in values.split(",") or ["1"] if value] or [{name.strip(): 1}]
    return found


def test_signatures_are_read_from_the_source():
    found = signatures(SOURCE)
    assert list(found) == ["scale", "other"]
    assert found["scale"] == (
        Parameter("out", "bf16", True, False, "N,3C"),
        Parameter("x", "float", True, True, "N,HS"),
        Parameter("sums", "grad_t", True, False, "", True),
        Parameter("n", "long long"),
        Parameter("N", "int"),
        Parameter("C", "int"),
        Parameter("factor", "float"),
    )
    assert found["other"] == (Parameter("p", "int", True, False, "2"), Parameter("q", "unsigned"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_every_kernel_has_a_signature(path):
    text = path.read_text()
    assert len(signatures(text)) == text.count('extern "C" __global__') > 0


def aligned(shape, dtype):
    raw = np.zeros(int(np.prod(shape)) * np.dtype(dtype).itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 16
    return raw[start : start + int(np.prod(shape)) * np.dtype(dtype).itemsize].view(dtype).reshape(shape)


def arguments(**changed):
    """Arguments of `scale` that are right, but for the changed ones."""
    args = {
        "out": aligned((4, 6), BF16),
        "x": aligned((4, 16), np.float32),
        "sums": np.zeros((), BF16),
        **{"n": 5, "N": 4, "C": 2, "factor": 1},
    } | changed
    return list(args.values())


def test_scalars_become_what_the_kernel_takes():
    converted = convert("scale", signatures(SOURCE)["scale"], arguments(), {"HS": 16})
    assert [value.dtype for value in converted[3:]] == [np.int64, np.int32, np.int32, np.float32]
    nothing = convert("scale", signatures(SOURCE)["scale"], arguments(sums=None), {"HS": 16})[2]
    assert nothing == 0
    assert nothing.dtype == np.uintp


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"out": aligned((4, 6), np.float32)}, "scale: out must be bfloat16, not float32"),
        ({"sums": aligned((), np.float32)}, "scale: sums must be bfloat16"),
        ({"out": aligned((4, 5), BF16)}, "scale: out must have 24 elements"),
        ({"N": 5}, "must have"),
        ({"x": None}, "scale: x must not be null"),
        ({"x": aligned((16, 4), np.float32).T}, "scale: x is not contiguous"),
        ({"x": aligned((65,), np.float32)[1:].reshape(4, 16)}, "multiple of 16 bytes"),
        ({"n": 2**70}, "too large"),
        ({"N": 2**31}, "must have"),
    ],
)
def test_wrong_arguments_are_refused_before_a_launch(changed, words):
    with pytest.raises((TypeError, ValueError, OverflowError), match=re.escape(words)):
        convert("scale", signatures(SOURCE)["scale"], arguments(**changed), {"HS": 16})
    with pytest.raises(TypeError, match="takes 7 arguments, not 6"):
        convert("scale", signatures(SOURCE)["scale"], arguments()[:-1], {"HS": 16})


def test_the_gradient_type_is_the_variant_s():
    sums = aligned((), np.float32)
    convert("scale", signatures(SOURCE)["scale"], arguments(sums=sums), {"HS": 16, "GRAD_FP32": 1})


def test_a_source_may_ask_for_an_architecture_s_own_instructions():
    assert [target(SOURCE, capability) for capability in ("80", "90", "100", "120")] == [
        *("sm_80", "sm_90a", "sm_100a", "sm_120")
    ]
    assert target("", "90") == "sm_90"
    assert target("// target: sm_90a alone\n", "90") == "sm_90a"


def needs_nvrtc():
    cupy = pytest.importorskip("cupy", reason='CuPy is not installed: pip install -e ".[nvrtc]"')
    try:
        cupy.cuda.nvrtc.getVersion()
    except Exception as error:
        pytest.skip(f'NVRTC cannot be loaded: pip install -e ".[nvrtc]" ({error})')


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_every_kernel_compiles_and_spills_nothing(path, architecture):
    """No GPU is needed. Prints registers (pytest -rP); those that are spilled go through memory, slowly."""
    needs_nvrtc()
    source = read_source(path)
    alone = re.search(r"^// target: (\w+) alone$", source.text, re.MULTILINE)
    if alone and alone[1] != architecture:
        pytest.skip(f"for {alone[1]} alone")
    for defines in variants(source.text):
        _, report = kernels.compile_source(source, architecture, defines)
        pattern = (
            r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) reg"
        )
        found = re.findall(pattern, report, re.DOTALL)
        assert {name for name, *_ in found} == set(signatures(source.text))
        for name, stores, loads, registers in found:
            print(f"{architecture} {path.name} {defines or ''} {name}: {registers} registers")
            assert stores == loads == "0", f"{name} {defines} spills {stores} bytes of registers"


@pytest.mark.parametrize("grads", [{}, {"GRAD_FP32": 1}], ids=["bf16", "fp32"])
@pytest.mark.parametrize("packs", layernorm.REGISTERS)
def test_layernorm_backward_takes_the_registers_that_its_launcher_reckons_with(packs, grads):
    """They are given out in eights: with more, the last of its blocks would run alone."""
    needs_nvrtc()
    _, report = kernels.compile_source(read_source(kernels.SOURCES / "layernorm.cu"), "sm_90", {"PACKS": packs} | grads)
    (used,) = re.findall(r"Compiling entry function 'layernorm_backward'.*?Used (\d+) reg", report, re.DOTALL)
    assert layernorm.REGISTERS[packs] - 8 < int(used) <= layernorm.REGISTERS[packs]


def test_a_kernel_that_does_not_compile_says_what_the_compiler_says(tmp_path):
    needs_nvrtc()
    path = tmp_path / "broken.cu"
    path.write_text('extern "C" __global__ void broken(int n) { n = undeclared; }')
    with pytest.raises(KernelError, match=r"(?s)broken\.cu does not compile for sm_80.*undeclared"):
        kernels.compile_source(read_source(path), "sm_80", {})


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A folder with a source and a header, and an empty cache."""
    folder = tmp_path / "kernels_cu"
    folder.mkdir()
    (folder / "a.cu").write_text(
        '#include <b.cuh>\nextern "C" __global__ void a(float* x,  // (1)\n int n) { *x = F; }'
    )
    (folder / "b.cuh").write_text("#define F 1.0f\n")
    monkeypatch.setenv("BACKHAND_CACHE", str(tmp_path / "cache"))
    kernels.cache_dir.cache_clear()
    yield folder
    kernels.cache_dir.cache_clear()


def compiled(path, capability="80", defines=None):
    return kernels.compiled(read_source(path), capability, defines or {})


def test_binaries_are_kept_by_all_that_changes_them(sources):
    needs_nvrtc()
    path = sources / "a.cu"
    first = compiled(path)
    stamp = first.stat().st_mtime_ns
    assert compiled(path) == first
    assert first.stat().st_mtime_ns == stamp
    assert first.read_bytes()[:4] == b"\x7fELF"
    others = [compiled(path, "90"), compiled(path, "80", {"GRAD_FP32": 1})]
    (sources / "b.cuh").write_text("#define F 2.0f\n")
    others.append(compiled(path))
    path.write_text(path.read_text() + "\n")
    others.append(compiled(path))
    assert len({first, *others}) == 5


@pytest.mark.parametrize("damage", ["empty", "cut", "no hash", "gone"])
def test_what_is_damaged_in_the_cache_is_compiled_again(sources, damage):
    needs_nvrtc()
    cubin = compiled(sources / "a.cu")
    whole = cubin.read_bytes()
    if damage in ("empty", "cut"):
        cubin.write_bytes(whole[: 100 if damage == "cut" else 0])
    else:
        (cubin if damage == "gone" else cubin.with_suffix(".sha256")).unlink()
    assert compiled(sources / "a.cu") == cubin
    assert cubin.read_bytes() == whole


def test_a_full_disk_costs_the_cache_and_not_the_run(sources, monkeypatch):
    needs_nvrtc()

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kernels, "sync", full)
    cubin = compiled(sources / "a.cu")
    assert cubin.read_bytes()[:4] == b"\x7fELF"
    assert kernels.cache_dir() not in cubin.parents
    assert not [path for path in kernels.cache_dir().iterdir() if path.suffix != ".lock"]


COMPILE = """
import sys
from pathlib import Path
from types import SimpleNamespace
from engine.device import kernels
compile_source = kernels.compile_source
def counted(*args):
    print("compiled", flush=True)
    return compile_source(*args)
kernels.compile_source = counted
print(kernels.compiled(kernels.read_source(Path(sys.argv[1])), "80", {}))
"""


def test_ranks_share_one_compile(sources):
    needs_nvrtc()
    processes = [
        subprocess.Popen([sys.executable, "-c", COMPILE, sources / "a.cu"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    outputs = [process.communicate()[0].splitlines() for process in processes]
    assert sum(lines.count("compiled") for lines in outputs) == 1
    assert len({lines[-1] for lines in outputs}) == 1


@pytest.mark.parametrize("why", ["a file", "others can write", "no home"])
def test_without_a_safe_place_for_the_cache_a_temporary_one_is_taken(monkeypatch, tmp_path, why):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("BACKHAND_CACHE", str(tmp_path / "base"))
    if why == "a file":
        (tmp_path / "base").write_text("")
    elif why == "others can write":
        (tmp_path / "base/backhand/kernels").mkdir(parents=True)
        (tmp_path / "base/backhand/kernels").chmod(0o777)
    else:
        monkeypatch.delenv("BACKHAND_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", homeless)
    kernels.cache_dir.cache_clear()
    folder = kernels.cache_dir()
    kernels.cache_dir.cache_clear()
    assert folder.is_dir()
    assert tmp_path not in folder.parents
    assert folder.stat().st_mode & 0o077 == 0


def test_a_module_of_the_gpu_loads_the_binary_and_asks_for_shared_memory_once(sources, monkeypatch):
    """With a stand-in for what a driver does: load a binary by its path, and launch."""
    needs_nvrtc()
    import cupy

    launches, asked = [], []

    class Function:
        shared_size_bytes = 2 << 10  # that the kernel declares

        def __setattr__(self, name, value):
            asked.append((name, value))

        def __call__(self, grid, block, args, shared_mem):
            launches.append((grid, block, args, shared_mem))

    def raw_module(path):
        assert Path(path).read_bytes()[:4] == b"\x7fELF"
        return SimpleNamespace(get_function=lambda name: Function())

    monkeypatch.setattr(cupy, "RawModule", raw_module)
    monkeypatch.setattr(cupy.cuda, "Device", lambda: SimpleNamespace(compute_capability="90"))
    monkeypatch.setattr(kernels, "SOURCES", sources)
    owner = kernels.Kernels(kernels.GpuModule)
    x = aligned((1,), np.float32)
    for shared_bytes in (0, 46 << 10, 48 << 10, 60 << 10, 60 << 10):
        owner.launch("a", "a", (2,), (32,), x, 5, shared_bytes=shared_bytes)
    assert asked == [("max_dynamic_shared_size_bytes", 48 << 10), ("max_dynamic_shared_size_bytes", 60 << 10)]
    assert [launch[3] for launch in launches] == [0, 46 << 10, 48 << 10, 60 << 10, 60 << 10]
    assert launches[0][:2] == ((2,), (32,))
    assert launches[0][2][0] is x
    assert launches[0][2][1] == np.int32(5)
