"""The owner of the CUDA kernels: compiles kernels_cu/*.cu, keeps the binaries on disk, checks arguments, launches.

Editing a .cu or .cuh file and running again is all that there is to changing a kernel. A source says for itself what
its kernels take, and a launch is held to it: the parameters of each `extern "C" __global__` function stand one to a
line, pointers with their shape behind them,

    extern "C" __global__ void layernorm_forward(
        bf16* __restrict__ out,        // (N,C)
        const float* __restrict__ x,   // (N,3C)
        int N, int C) {

in terms of the scalar parameters and of the -D definitions of the variant. A line `// target: sm_90a` in a source asks
for the instructions of that architecture alone, where the GPU has them; `// target: sm_90a alone` is of a source that
compiles for no other.
"""

import atexit
import fcntl
import hashlib
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
    "unsigned short": np.dtype(np.uint16),
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
    """One parameter of a kernel. Of a pointer: const, what it points to; shape, as written in the source ("N,3C");
    nullable, if the source says "or null" behind that.
    """

    name: str
    type: str
    pointer: bool = False
    const: bool = False
    shape: str = ""
    nullable: bool = False


class Source(NamedTuple):
    """A .cu file and the headers beside it, read once: what is hashed is what is compiled."""

    path: Path
    text: str
    headers: dict[str, str]


def read_source(path: Path) -> Source:
    return Source(path, path.read_text(), {header.name: header.read_text() for header in path.parent.glob("*.cuh")})


def signatures(source: str) -> dict[str, tuple[Parameter, ...]]:
    """The parameters of every kernel of a source, by the kernel's name."""
    found = {}
    for match in re.finditer(r'extern "C" __global__ void (?:__\w+__\([^)]*\)\s*)*(\w+)\(', source):
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
                shape = re.match(r"\s*\(([\w,]*)\)( or null)?", comment)
                assert shape, f"{words[-1]}: a pointer needs its shape in a comment behind it"
                yield Parameter(words[-1], kind, True, "const" in words, shape[1], bool(shape[2]))
            else:
                yield Parameter(words[-1], kind)


def dtype_of(type_name: str, defines: Defines) -> np.dtype:
    """What a C type of the sources is in numpy; grad_t depends on the variant."""
    if type_name == "grad_t":
        return DTYPES["float" if "GRAD_FP32" in defines else "bf16"]
    return DTYPES[type_name]


def grad_variant(grad_dtype: Any) -> dict[str, int]:
    """The definitions that make grad_t this dtype."""
    return {"GRAD_FP32": 1} if np.dtype(grad_dtype) == np.float32 else {}


def convert(name: str, parameters: Sequence[Parameter], args: Sequence[Any], defines: Defines) -> list[Any]:
    """The arguments as the kernel takes them: scalars of its types, arrays that are what it expects, or None for null.

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
        if not p.nullable:
            raise TypeError(f"{name}: {p.name} must not be null")
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
    """Every kernel of a folder of sources, compiled when it is first asked for.

    make(source, definitions, its signatures) gives the module: something with
    launch(kernel, grid, block, shared_bytes, converted arguments).
    """

    def __init__(self, make: Callable[[Source, Defines, dict[str, tuple[Parameter, ...]]], Any]):
        self._make = make
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
        module, parameters = self.load(source, defines)
        module.launch(name, grid, block, shared_bytes, convert(name, parameters[name], args, defines))

    def load(self, source: str, defines: Defines) -> tuple[Any, dict[str, tuple[Parameter, ...]]]:
        """The module of kernels_cu/`source`.cu in this variant, and its signatures. May raise KernelError."""
        key = (source, *sorted(defines.items()))
        if key not in self._modules:
            found = read_source(SOURCES / f"{source}.cu")
            parameters = signatures(found.text)
            self._modules[key] = self._make(found, defines, parameters), parameters
        return self._modules[key]


def compile_source(source: Source, architecture: str, defines: Defines) -> tuple[bytes, str]:
    """(cubin, the assembler's report) of a source, by NVRTC: no GPU is needed, nor any header of CUDA's.

    Always a cubin, never PTX: a driver refuses the PTX of a newer compiler. Raises KernelError.
    """
    from cupy.cuda import nvrtc

    headers = [text.encode() for text in source.headers.values()], [name.encode() for name in source.headers]
    program = nvrtc.createProgram(source.text, source.path.name, *headers)
    try:
        nvrtc.compileProgram(program, _options(architecture, defines))
        report = nvrtc.getProgramLog(program)
        # CuPy drops the last byte, as if it ended a string.
        return nvrtc.getCUBIN(program) + b"\0", report
    except nvrtc.NVRTCError as error:
        raise KernelError(
            f"{source.path} does not compile for {architecture}:\n{nvrtc.getProgramLog(program)}"
        ) from error
    finally:
        nvrtc.destroyProgram(program)


def _options(architecture: str, defines: Defines) -> tuple[str, ...]:
    # No -ftz or fast math: the numpy twins do not flush denormals either.
    definitions = (f"-D{name}={value}" for name, value in sorted(defines.items()))
    return (f"-arch={architecture}", "--std=c++17", *definitions, "-Xptxas=-v", "-lineinfo")


def target(source: str, capability: str) -> str:
    """The architecture to compile a source for, on a GPU of compute capability "90": sm_90, or sm_90a if it asks."""
    asked = re.search(r"^// target: ([\w ,]+)$", source, re.MULTILINE)
    special = f"sm_{capability}a"
    return special if asked and special in re.split(r"[ ,]+", asked[1]) else f"sm_{capability}"


def compiled(source: Source, capability: str, defines: Defines) -> Path:
    """Where the binary of a source lies: in the cache, compiled if need be by one of the processes that ask for it.

    A hash beside it tells whether it is whole. Where the cache can't be written any more it lies in a temporary folder.
    """
    from cupy.cuda import nvrtc

    architecture = target(source.text, capability)
    parts = [*nvrtc.getVersion(), *_options(architecture, defines), source.text, *sorted(source.headers.items())]
    key = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
    cubin = cache_dir() / f"{source.path.stem}-{architecture}-{key}.cubin"
    with locked(cubin.with_suffix(".lock")):
        if not _is_whole(cubin):
            code, _ = compile_source(source, architecture, defines)
            try:
                write_whole(cubin, code)
                write_whole(cubin.with_suffix(".sha256"), hashlib.sha256(code).hexdigest().encode())
            except OSError:
                cubin = _temporary_folder() / cubin.name
                cubin.write_bytes(code)
    return cubin


def _is_whole(cubin: Path) -> bool:
    try:
        return hashlib.sha256(cubin.read_bytes()).hexdigest() == cubin.with_suffix(".sha256").read_text()
    except FileNotFoundError:
        return False


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Alone among the processes that ask for the same. Without a lock where none can be made: then each compiles."""
    try:
        file = path.open("w")
    except OSError:
        yield
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_whole(path: Path, content: bytes) -> None:
    """Whole or not at all. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@cache
def cache_dir() -> Path:
    """Where binaries are kept: backhand/kernels in $BACKHAND_CACHE or in the user's cache; else a temporary folder.

    Never in a folder that others can write in: what lies there is run.
    """
    with suppress(OSError, RuntimeError):  # RuntimeError: a user without a home
        base = os.environ.get("BACKHAND_CACHE") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base).resolve() / "backhand" / "kernels"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        if os.access(folder, os.W_OK) and status.st_uid == os.getuid() and not status.st_mode & 0o022:
            return folder
    return _temporary_folder()


@cache
def _temporary_folder() -> Path:
    """Of this process, which takes it away when it ends."""
    folder = Path(tempfile.mkdtemp(prefix="backhand-kernels-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


class GpuModule:
    """A source on the GPU."""

    def __init__(self, source: Source, defines: Defines, names: Iterable[str]):
        import cupy

        device = cupy.cuda.Device()
        module = cupy.RawModule(path=str(compiled(source, device.compute_capability, defines)))
        self._functions = {name: module.get_function(name) for name in names}
        # What a block may have beside what the kernel declares, without asking.
        self._shared = {name: (48 << 10) - each.shared_size_bytes for name, each in self._functions.items()}

    def launch(self, name: str, grid: Dim3, block: Dim3, shared_bytes: int, args: Sequence[Any]) -> None:
        function = self._functions[name]
        if shared_bytes > self._shared[name]:
            function.max_dynamic_shared_size_bytes = self._shared[name] = shared_bytes
        function(grid, block, tuple(args), shared_mem=shared_bytes)


KERNELS = Kernels(GpuModule)


def launch(*args: Any, **options: Any) -> None:
    """KERNELS.launch: of this process's kernels."""
    KERNELS.launch(*args, **options)
