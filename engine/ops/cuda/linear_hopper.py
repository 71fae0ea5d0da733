"""Forward multiplies of linear layers, for Hopper: see kernels_cu/linear_hopper.cu."""

from functools import partial

from engine.device import cublaslt, cuda, kernels, tensor_map
from engine.device.cublaslt import Array, Multiply, Operation
from engine.device.kernels import BF16
from engine.ops.cuda.scratch import blocks

# As in that file.
CLUSTER = 2  # blocks; there are none on a CPU
THREADS, GROUPS, ROWS, COLUMNS, DEPTH, STAGES, FINISHING = 384, 2, 64, 256, 64, 4, 8

KERNELS = {"BIAS": "forward", "GELU_AUX_BIAS": "gelu"}  # by what follows the product


def multiply_of(op: Operation) -> Multiply | None:
    """As cublaslt.own_multiply. A sum is rounded before GELU sees it."""
    fits = op.transpose_b and not op.transpose_a and not op.add and op.dtype == BF16 and op.epilogue in KERNELS
    deep = op.K % DEPTH == 0 and op.K // DEPTH >= FINISHING
    return partial(_forward, op) if fits and deep and op.N % 32 == 0 else None


def _forward(op: Operation, out: Array, a: Array, b: Array, add: None, bias: Array, aux: Array | None) -> None:
    M, N, K = op.M, op.N, op.K
    maps = tensor_map.rows(a, 1, M, op.a_width), tensor_map.spread(b, N, K)
    tiles = blocks(M, CLUSTER * GROUPS * ROWS) * blocks(N, COLUMNS)
    clusters = min(cuda.multiprocessors() // CLUSTER, tiles)  # no result depends on how many there are
    kernels.launch(
        "linear_hopper",
        f"linear_hopper_{KERNELS[op.epilogue]}",
        (clusters * CLUSTER,),
        (THREADS,),
        *(out, *(() if aux is None else (aux,)), *maps, bias, M, N, K),
        shared_bytes=STAGES * (GROUPS * ROWS + COLUMNS) * DEPTH * 2 + 2 * COLUMNS * 2,
        defines=_variant(),
    )


def _variant() -> dict[str, int]:
    return {"CLUSTER": CLUSTER}


def load() -> None:
    """The kernels, ahead of the first step."""
    kernels.KERNELS.load("linear_hopper", _variant())


def use(on: bool) -> None:
    """Whether these are raced with cublasLt's algorithms."""
    cublaslt.own_multiply = multiply_of if on else cublaslt.nothing_else
