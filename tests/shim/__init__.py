"""CUDA kernels on the CPU: .cu files compiled as they are by g++, every CUDA thread a fiber (cuda_on_cpu.h).

It shows what a kernel computes, and races and deadlocks that a GPU shows now and then; not how fast it is.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ORDERS = ("forward", "reversed", "shuffled")
HERE = Path(__file__).parent
COMPILER = "g++"
FLAGS = (
    *("-std=c++17", "-O2", "-w", "-fPIC", "-ffp-contract=off"),
    "-fno-strict-aliasing",  # kernels read 16 bytes of bf16 as a uint4
    "-fsanitize=alignment,bounds",  # a GPU traps on the first; what is found comes back through cuda_on_cpu.h
    "-U_FORTIFY_SOURCE",  # longjmp to another stack is not an error here
    # Two libraries may have variables of the same name: each must keep its own.
    *("-fvisibility=hidden", "-fno-gnu-unique"),
)

_order = 0


class ShimError(RuntimeError):
    """A source that does not compile, or a launch that failed."""


def set_order(order: str) -> None:
    """The order in which blocks, warps and lanes take turns in all launches that follow."""
    global _order
    _order = ORDERS.index(order)


class ShimModule:
    """A .cu file compiled for this process."""

    def __init__(
        self, source: Path, defines: Mapping[str, str], include: Sequence[Path], kernels: Mapping[str, Sequence[str]]
    ):
        """kernels: the name of each extern "C" __global__ kernel -> its C parameter types in order."""
        macros = [f"-D{name}={value}" for name, value in defines.items()]
        more = "".join(_trampoline(*kernel) for kernel in kernels.items())
        self.library = ctypes.PyDLL(str(_compile(Path(source), more, [*FLAGS, *macros], [HERE, *map(Path, include)])))
        self.sizes = {
            name: list((ctypes.c_uint * len(types)).in_dll(self.library, f"shim_sizes_{name}"))
            for name, types in kernels.items()
        }

    def launch(
        self, name: str, grid: tuple[int, int, int], block: tuple[int, int, int], shared_bytes: int, args: Sequence[Any]
    ) -> None:
        """args: numpy arrays, of which the address is passed, or numpy scalars of the parameter's size."""
        sizes = self.sizes[name]
        if len(args) != len(sizes):
            raise ShimError(f"{name} takes {len(sizes)} arguments, not {len(args)}")
        values = [_value(name, i, arg, size) for i, (arg, size) in enumerate(zip(args, sizes, strict=True))]
        addresses = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        function = getattr(self.library, f"shim_launch_{name}")
        function.restype = ctypes.c_char_p
        triple = ctypes.c_uint * 3
        error = function(triple(*grid), triple(*block), ctypes.c_size_t(shared_bytes), _order, addresses)
        if error:
            raise ShimError(error.decode())


def tensor_map(array: np.ndarray, dims: Sequence[int], strides: Sequence[int], box: Sequence[int]) -> np.ndarray:
    """What hopper.cuh's copies of boxes take on the CPU: 16 uint64. It has the array's address: keep the array.

    dims: of the tensor, in elements, innermost first, three or five; strides: bytes from one to the next in all but the
    first; box: what one copy takes, in elements. Raises ValueError for what the GPU's driver would refuse,
    and for rows that are not 128 bytes of two-byte elements.
    """
    rank = len(dims)
    if rank not in (3, 5) or len(strides) != rank - 1 or len(box) != rank:
        raise ValueError(f"three dimensions, or five: dims {dims}, strides {strides}, box {box}")
    if array.itemsize != 2 or 2 * box[0] != 128:
        raise ValueError(f"rows of a box are 64 elements of two bytes: {box[0]} of {array.itemsize}")
    if not all(1 <= n <= 256 for n in box) or not all(1 <= n <= 1 << 32 for n in dims):
        raise ValueError(f"a box has 1 to 256 elements a side, a tensor at least one: box {box}, dims {dims}")
    if array.ctypes.data % 16 or any(stride % 16 or not 0 < stride < 1 << 40 for stride in strides):
        raise ValueError(f"not in multiples of 16 bytes: address {array.ctypes.data:#x}, strides {strides}")
    more = 5 - rank
    return np.array(
        [0x70616D726F736E74, array.ctypes.data, *dims, *[1] * more, *strides, *[0] * more, *box, *[1] * more], np.uint64
    )


def _value(name: str, i: int, arg: Any, size: int) -> np.ndarray:
    """The parameter's bytes."""
    if isinstance(arg, np.ndarray):
        if not arg.flags.c_contiguous:
            raise ShimError(f"{name}: argument {i} is not contiguous")
        arg = np.uintp(arg.ctypes.data)
    if not isinstance(arg, np.generic):
        raise ShimError(f"{name}: argument {i} is neither a numpy array nor a numpy scalar: {arg!r}")
    if arg.itemsize != size:
        raise ShimError(f"{name}: argument {i} has {arg.itemsize} bytes, the parameter {size}")
    return np.asarray(arg)


def _trampoline(name: str, types: Sequence[str]) -> str:
    """What launch calls: takes the arguments out of void** and hands the kernel to the shim."""
    values = ", ".join(f"*static_cast<{kind}*>(args[{i}])" for i, kind in enumerate(types))
    export = 'extern "C" __attribute__((visibility("default")))'
    return f"""
static_assert(std::is_same_v<decltype(&{name}), void (*)({", ".join(types)})>, "{name} has other parameters");
{export} unsigned shim_sizes_{name}[] = {{{"".join(f"sizeof({kind}), " for kind in types)}0}};
{export} const char* shim_launch_{name}(unsigned* grid, unsigned* block, size_t bytes, int order, void** args) {{
    return shim::launch("{name}", grid, block, bytes, order, args, [](void** args) {{ {name}({values}); }});
}}
"""


def _compile(source: Path, more: str, flags: Sequence[str], include: Sequence[Path]) -> Path:
    """The library of a source and what comes behind it, compiled unless the same, with the same headers beside it, has
    been before, wherever it lay. (To preprocess it first, to see which headers matter, takes longer than most tests.)
    """
    headers = [(path.name, path.read_text()) for folder in include for path in sorted(folder.glob("*.*h"))]
    compiler = Path(shutil.which(COMPILER) or COMPILER)
    parts = [str(compiler), compiler.stat().st_mtime_ns, *flags, source.read_text(), more, *headers]
    folder = Path(tempfile.gettempdir()) / f"backhand-shim-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{hashlib.sha256(repr(parts).encode()).hexdigest()}.so"
    if not library.exists():
        # Under another name first: two processes may do so at once.
        partial = folder / f"{library.stem}.{os.getpid()}.so"
        paths = [argument for path in include for argument in ("-I", str(path.resolve()))]
        text = f'#include "{source.resolve()}"\n{more}'
        command = [
            *(COMPILER, *flags, *paths, "-include", "cuda_on_cpu.h"),
            *("-shared", "-x", "c++", "-", "-o", partial),
        ]
        result = subprocess.run(command, input=text.encode(), capture_output=True, check=False)
        if result.returncode:
            raise ShimError(f"{' '.join(map(str, command))}\n{result.stderr.decode(errors='replace')}")
        partial.replace(library)
    return library
