"""The owner of the CUDA kernels: compiles kernels_cu/*.cu, keeps the binaries on disk, checks arguments, launches.

Editing a .cu or .cuh file and running again is all that there is to changing a kernel. A source says for itself what
its kernels take, and a launch is held to it: the parameters of each `extern "C" __global__` function stand one to a
line, pointers with their shape behind them,

    extern "C" __global__ void layernorm_forward(
        bf16* __restrict__ out,        // (N,C)
        const float* __restrict__ x,   // (N,3C)
        int N, int C) {

in terms of the scalar parameters and of the -D definitions of the variant. A line `// target: sm_90a` in a source asks
for the instructions of that architecture alone, where the GPU has them.
"""

import fcntl
import hashlib
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from engine.disk import sync
from engine.errors import UserError

SOURCES = Path(__file__).parent.parent.parent / "kernels_cu"
ALIGNMENT = 16  # bytes, of every array: kernels take that many at a time

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {
    "bf16": BF16,
    "float": np.dtype(np.float32),
    "double": np.dtype(np.float64),
    "int": np.dtype(np.int32),
    "unsigned": np.dtype(np.uint32),
    "long long": np.dtype(np.int64),
    "unsigned long long": np.dtype(np.uint64),
}

Defines = Mapping[str, int]
Dim3 = tuple[int, ...]


class KernelError(UserError):
    """A kernel that does not compile: the compiler's words, for whoever edited it."""

    exit_code, kind = 2, "kernel error"


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel. shape: of a pointer, as written in the source ("N,3C"). const: what it points to."""

    name: str
    type: str
    pointer: bool = False
    const: bool = False
    shape: str = ""


class Binary(NamedTuple):
    """A compiled source: where the cubin lies, and what the assembler said of registers and spills."""

    path: Path
    report: str


def signatures(source: str) -> dict[str, tuple[Parameter, ...]]:
    """The parameters of every kernel of a source, by the kernel's name."""
    found = {}
    for match in re.finditer(r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(', source):
        end = source.index("{", match.end())
        found[match[1]] = tuple(_parameters(source[match.end() : end]))
    return found


def _parameters(text: str) -> Iterator[Parameter]:
    """The parameters in text, which goes from behind the opening parenthesis to the body."""
    for line in text.splitlines():
        code, _, comment = line.partition("//")
        for item in re.split(r"[,)]", code):
            words = item.replace("__restrict__", " ").replace("*", " * ").split()
            if not words:
                continue
            kind = " ".join(word for word in words[:-1] if word not in ("const", "*"))
            if "*" in words:
                shape = re.match(r"\s*\(([\w,]*)\)", comment)
                assert shape, f"{words[-1]}: a pointer needs its shape in a comment behind it"
                yield Parameter(words[-1], kind, True, "const" in words, shape[1])
            else:
                yield Parameter(words[-1], kind)


def dtype_of(type_name: str, defines: Defines) -> np.dtype:
    """What a C type of the sources is in numpy; grad_t depends on the variant."""
    if type_name == "grad_t":
        return DTYPES["float" if "GRAD_FP32" in defines else "bf16"]
    return DTYPES[type_name]


def convert(name: str, parameters: Sequence[Parameter], args: Sequence[Any], defines: Defines) -> list[Any]:
    """The arguments as the kernel takes them: scalars of its types, arrays that are what it expects, None as null.

    Raises TypeError or ValueError, which name the kernel and the parameter, before anything is launched: a kernel that
    gets a wrong pointer or a scalar of another size computes nonsense in silence.
    """
    if len(args) != len(parameters):
        raise TypeError(f"{name} takes {len(parameters)} arguments, not {len(args)}")
    sizes = dict(defines)
    sizes.update((p.name, arg) for p, arg in zip(parameters, args, strict=True) if not p.pointer)
    return [
        _array(name, p, arg, defines, sizes) if p.pointer else dtype_of(p.type, defines).type(arg)
        for p, arg in zip(parameters, args, strict=True)
    ]


def _array(name: str, p: Parameter, array: Any, defines: Defines, sizes: Mapping[str, Any]) -> Any:
    if array is None:
        return np.uintp(0)
    dtype, size = dtype_of(p.type, defines), _size(p.shape, sizes)
    if array.dtype != dtype:
        raise TypeError(f"{name}: {p.name} must be {dtype}, not {array.dtype}")
    if array.size != size:
        raise ValueError(f"{name}: {p.name} must have {size} elements ({p.shape}), not {array.size}: {array.shape}")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name}: {p.name} is not contiguous")
    if size > 1 and address_of(array) % ALIGNMENT:
        raise ValueError(f"{name}: {p.name} does not begin at a multiple of {ALIGNMENT} bytes")
    return array


@cache
def _terms(shape: str) -> tuple[tuple[int, str], ...]:
    """The shape N,3C as ((1, "N"), (3, "C"))."""
    matches = [re.fullmatch(r"(\d*)([A-Za-z_]\w*)?", term) for term in shape.split(",") if term]
    return tuple((int(match[1] or 1), match[2] or "") for match in matches if match)


def _size(shape: str, sizes: Mapping[str, Any]) -> int:
    return math.prod(factor * (int(sizes[name]) if name else 1) for factor, name in _terms(shape))


def address_of(array: Any) -> int:
    """Where a numpy or CuPy array begins."""
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr


class Kernels:
    """Every kernel of a folder of sources, compiled when it is first launched.

    load(path of a source, definitions, its signatures) gives the module: something with
    launch(kernel, grid, block, shared_bytes, converted arguments).
    """

    def __init__(self, load: Callable[[Path, Defines, dict[str, tuple[Parameter, ...]]], Any]):
        self._load = load
        self._modules: dict[tuple, tuple[Any, dict[str, tuple[Parameter, ...]]]] = {}

    def launch(
        self,
        source: str,
        name: str,
        grid: Dim3,
        block: Dim3,
        *args: Any,
        shared_bytes: int = 0,
        defines: Defines | None = None,
    ) -> None:
        """Kernel `name` of kernels_cu/`source`.cu, in the variant with these definitions, on the current stream."""
        defines = defines or {}
        key = (source, *defines.items())
        if key not in self._modules:
            path = SOURCES / f"{source}.cu"
            parameters = signatures(path.read_text())
            self._modules[key] = self._load(path, defines, parameters), parameters
        module, parameters = self._modules[key]
        module.launch(name, grid, block, shared_bytes, convert(name, parameters[name], args, defines))


def compile_source(path: Path, architecture: str, defines: Defines) -> tuple[bytes, str]:
    """(cubin, the assembler's report) of a source, by NVRTC: no GPU is needed, nor any header of CUDA's.

    Always a cubin, never PTX: a driver refuses the PTX of a newer compiler. Raises KernelError.
    """
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(path.read_text(), path.name, (), ())
    try:
        nvrtc.compileProgram(program, _options(path, architecture, defines))
        report = nvrtc.getProgramLog(program)
        # CuPy drops the last byte, as if it ended a string.
        return nvrtc.getCUBIN(program) + b"\0", report
    except nvrtc.NVRTCError as error:
        raise KernelError(f"{path} does not compile for {architecture}:\n{nvrtc.getProgramLog(program)}") from error
    finally:
        nvrtc.destroyProgram(program)


def _options(path: Path, architecture: str, defines: Defines) -> tuple[str, ...]:
    # No -ftz or fast math: the numpy twins do not flush denormals either.
    definitions = (f"-D{name}={value}" for name, value in defines.items())
    return (f"-I{path.parent}", f"-arch={architecture}", "--std=c++17", *definitions, "-Xptxas=-v", "-lineinfo")


def target(source: str, capability: str) -> str:
    """The architecture to compile a source for, on a GPU of compute capability "90": sm_90, or sm_90a if it asks."""
    asked = re.search(r"^// target: ([\w ,]+)$", source, re.MULTILINE)
    special = f"sm_{capability}a"
    return special if asked and special in re.split(r"[ ,]+", asked[1]) else f"sm_{capability}"


def compiled(path: Path, capability: str, defines: Defines) -> Binary:
    """The binary of a source from the cache on disk, compiled if need be by one of the processes that ask for it."""
    from cupy.cuda import nvrtc

    architecture = target(path.read_text(), capability)
    files = [path, *sorted(path.parent.glob("*.cuh"))]
    parts = [nvrtc.getVersion(), *_options(Path(path.name), architecture, defines)]
    key = hashlib.sha256("\n".join(map(str, parts)).encode() + b"".join(map(_content, files))).hexdigest()[:32]
    cubin = cache_dir() / f"{path.stem}-{architecture}-{key}.cubin"
    report = cubin.with_suffix(".txt")
    with _locked(cubin.with_suffix(".lock")):
        if not cubin.exists():
            code, text = compile_source(path, architecture, defines)
            _write(report, text.encode())
            _write(cubin, code)
    return Binary(cubin, report.read_text())


def _content(path: Path) -> bytes:
    return f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all: a process that is killed here must not leave half a binary under the name of a whole one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    sync(temporary)
    temporary.replace(path)


@cache
def cache_dir() -> Path:
    """Where binaries are kept: $BACKHAND_CACHE, or the user's cache; else, if that can't be written, a temporary place.

    Never a folder that others can write in: what lies there is run.
    """
    base = os.environ.get("BACKHAND_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "backhand" / "kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="backhand-kernels-"))


class GpuModule:
    """A source on the GPU."""

    def __init__(self, path: Path, defines: Defines, names: Iterable[str]):
        import cupy

        device = cupy.cuda.Device()
        module = cupy.RawModule(path=str(compiled(path, device.compute_capability, defines).path))
        self._functions = {name: module.get_function(name) for name in names}
        self._shared = dict.fromkeys(self._functions, 48 << 10)  # what a block may have without asking

    def launch(self, name: str, grid: Dim3, block: Dim3, shared_bytes: int, args: Sequence[Any]) -> None:
        function = self._functions[name]
        if shared_bytes > self._shared[name]:
            function.max_dynamic_shared_size_bytes = self._shared[name] = shared_bytes
        function(grid, block, tuple(args), shared_mem=shared_bytes)


KERNELS = Kernels(GpuModule)


def launch(*args: Any, **options: Any) -> None:
    """KERNELS.launch: of this process's kernels."""
    KERNELS.launch(*args, **options)
