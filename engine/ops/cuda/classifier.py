"""Softmax, cross-entropy and its gradient: see engine/ops/numpy/classifier.py."""

from typing import Any

from engine.device import cuda, kernels

Array = Any

THREADS = 1024
STATIC_BYTES = 1 << 10  # of shared memory, at most: what the sums over a block take

# Rows of a multiprocessor from which on blocks of one row are faster than a block that has the next row come while it
# computes one: by then some read while others compute. (Measured with 62 and with 496 only: bench/LOG.md.)
MANY_ROWS = 200


def forward(losses: Array, logits: Array, targets: Array, V: int) -> None:
    N, Vp = losses.size, logits.shape[-1]
    kernels.launch("classifier", "classifier_forward", (N,), (THREADS,), losses, logits, targets, N, V, Vp)


def forward_backward(losses: Array, logits: Array, targets: Array, V: int, dloss: float) -> None:
    """Reads the logits once where a row fits into a block's shared memory, and twice where it does not."""
    N, Vp = losses.size, logits.shape[-1]
    held = rows_held(Vp, N)
    kernels.launch(
        "classifier",
        "classifier_forward_backward",
        (min(N, cuda.multiprocessors()) if held > 1 else N,),
        (THREADS,),
        *(losses, logits, targets, N, V, Vp, dloss),
        shared_bytes=2 * Vp * held,
        defines=variant(Vp, N),
    )


def rows_held(Vp: int, N: int) -> int:
    """How many of N rows of Vp logits a block keeps in its shared memory: one, or two of few rows, if they fit there,
    or none.
    """
    wanted = 2 if N < MANY_ROWS * cuda.multiprocessors() else 1
    return max(0, min(wanted, (cuda.shared_memory_limit() - STATIC_BYTES) // (2 * Vp)))


def variant(Vp: int, N: int) -> dict[str, int]:
    """The definitions that forward_backward is compiled with."""
    held = rows_held(Vp, N)
    return {"HOLD_ROWS": held} if held else {}


def add_mean(mean: Array, losses: Array, share: float) -> None:
    kernels.launch("classifier", "classifier_add_mean", (1,), (THREADS,), mean, losses, losses.size, share)
