"""llm.c's model file: 256 int32 of header, then the 16 parameter tensors of GPT-2, little-endian.

    header    [0] 20240326   [1] 3: all float32, 5: all bfloat16
              [2] max_seq_len   [3] V   [4] L   [5] NH   [6] C   [7] Vp   the rest 0
    tensors   in the order of `shapes`, each contiguous over the layers, weights as (out, in)

Dimensions: V tokens in the vocabulary, Vp rows of `wte` (V padded), L layers, NH heads, C channels. The
output projection is `wte` again and is not stored.
"""

import math
import stat
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from engine.disk import sync
from engine.errors import CheckpointError

MAGIC = 20240326
HEADER_BYTES = 1024
DIMS = {"max_seq_len": 2, "V": 3, "L": 4, "NH": 5, "C": 6, "Vp": 7}  # name: place in the header
STORED = {"float32": (3, np.dtype("<f4")), "bfloat16": (5, np.dtype(ml_dtypes.bfloat16))}
MAX_INT32 = 2**31 - 1


def shapes(dims: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor, in the order of the file."""
    T, Vp, L, C = dims["max_seq_len"], dims["Vp"], dims["L"], dims["C"]
    return {
        "wte": (Vp, C),
        "wpe": (T, C),
        "ln1w": (L, C),
        "ln1b": (L, C),
        "qkvw": (L, 3 * C, C),
        "qkvb": (L, 3 * C),
        "attprojw": (L, C, C),
        "attprojb": (L, C),
        "ln2w": (L, C),
        "ln2b": (L, C),
        "fcw": (L, 4 * C, C),
        "fcb": (L, 4 * C),
        "fcprojw": (L, C, 4 * C),
        "fcprojb": (L, C),
        "lnfw": (C,),
        "lnfb": (C,),
    }


def file_bytes(dims: Mapping[str, int], dtype: str) -> int:
    """Size of the file with `dtype` "float32" or "bfloat16"."""
    return HEADER_BYTES + _num_elements(dims) * STORED[dtype][1].itemsize


def read(path: str | Path) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """(dims, tensors): the entries of DIMS, and the float32 arrays of `shapes`.

    bfloat16 is widened, which is exact. float32 arrays are read-only views of the mapped file: no copy is
    made, and the file must not change while they are in use. Raises CheckpointError if the file cannot be
    read or is not exactly what its header says.
    """
    path = Path(path)
    try:
        header, size = _read_header(path)
        dtype = _check_version(path, header)
        dims = {name: int(header[place]) for name, place in DIMS.items()}
        _check_dims(path, dims, dtype, size)
        body = np.memmap(path, STORED[dtype][1], mode="r", offset=HEADER_BYTES).view(np.ndarray)
    except (OSError, ValueError) as error:  # mmap's ValueError: the file shrank since its size was read
        raise _unreadable(path, str(error)) from error
    return dims, _split(body, dims)


def write(path: str | Path, dims: Mapping[str, int], tensors: Mapping[str, np.ndarray], dtype: str = "float32") -> None:
    """Write float32 `tensors`, all those of `shapes(dims)`, as "float32" or "bfloat16" (nearest, ties even).

    The file appears under its name only when it is whole and on the disk. Raises CheckpointError if it cannot
    be written, and ValueError if dims, tensors and dtype do not fit together.
    """
    path = Path(path)
    _check_arguments(dims, tensors, dtype)
    tmp = path.with_name(f".{path.name}.tmp")
    try:
        try:
            _write_body(tmp, dims, tensors, dtype)
            tmp.replace(path)
            sync(path.parent)
        finally:
            tmp.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}\n"
            f"  why: {error}\n"
            f"  fix: give a place that can be written and has {file_bytes(dims, dtype):,} bytes free"
        ) from error


def _num_elements(dims: Mapping[str, int]) -> int:
    return sum(math.prod(shape) for shape in shapes(dims).values())


def _dims_fault(dims: Mapping[str, int]) -> str | None:
    for name in DIMS:
        if not 1 <= dims[name] <= MAX_INT32:
            return f"{name} is {dims[name]}, expected 1 to {MAX_INT32}"
    if dims["C"] % dims["NH"]:
        return f"C is {dims['C']}, expected a multiple of NH, {dims['NH']}"
    if dims["Vp"] < dims["V"]:
        return f"Vp is {dims['Vp']}, expected at least V, {dims['V']}"
    return None


def _unreadable(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"cannot read {path} as a model of llm.c\n"
        f"  why: {why}\n"
        "  fix: give a model file that llm.c or this program has written, complete"
    )


def _read_header(path: Path) -> tuple[np.ndarray, int]:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise _unreadable(path, "not a regular file")
    with path.open("rb") as file:
        content = file.read(HEADER_BYTES)
    if len(content) < HEADER_BYTES:
        raise _unreadable(path, f"it has {len(content):,} bytes, the header alone has {HEADER_BYTES:,}")
    return np.frombuffer(content, "<i4"), found.st_size


def _check_version(path: Path, header: np.ndarray) -> str:
    if header[0] != MAGIC:
        raise _unreadable(path, f"its first number is {header[0]}, expected {MAGIC}")
    for dtype, (version, _) in STORED.items():
        if header[1] == version:
            return dtype
    raise _unreadable(path, f"its version is {header[1]}, expected 3 (float32) or 5 (bfloat16)")


def _check_dims(path: Path, dims: Mapping[str, int], dtype: str, size: int) -> None:
    if fault := _dims_fault(dims):
        raise _unreadable(path, f"its header says {fault}")
    if size != file_bytes(dims, dtype):
        raise _unreadable(
            path, f"it has {size:,} bytes, its header needs {file_bytes(dims, dtype):,} ({dtype}, {dims})"
        )


def _split(body: np.ndarray, dims: Mapping[str, int]) -> dict[str, np.ndarray]:
    tensors, start = {}, 0
    for name, shape in shapes(dims).items():
        end = start + math.prod(shape)
        tensors[name] = body[start:end].reshape(shape).astype(np.float32, copy=False)
        start = end
    return tensors


def _check_arguments(dims: Mapping[str, int], tensors: Mapping[str, np.ndarray], dtype: str) -> None:
    if dtype not in STORED:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(STORED)}")
    if fault := _dims_fault(dims):
        raise ValueError(fault)
    if tensors.keys() != shapes(dims).keys():
        raise ValueError(f"tensors are {sorted(tensors)}, expected {sorted(shapes(dims))}")
    for name, shape in shapes(dims).items():
        if (found := tensors[name]).shape != shape or found.dtype != np.float32:
            raise ValueError(f"{name} is {found.dtype}{found.shape}, expected float32{shape}")


def _write_body(path: Path, dims: Mapping[str, int], tensors: Mapping[str, np.ndarray], dtype: str) -> None:
    version, stored = STORED[dtype]
    header = np.zeros(HEADER_BYTES // 4, "<i4")
    header[:2] = MAGIC, version
    for name, place in DIMS.items():
        header[place] = dims[name]
    with path.open("wb") as file:
        file.write(header.data)
        for name in shapes(dims):
            # bytes, because bfloat16 has no buffer interface
            file.write(np.asarray(tensors[name], stored, order="C").view(np.uint8).data)
    sync(path)
