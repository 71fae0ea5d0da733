"""Softmax, cross-entropy and its gradient: see engine/ops/numpy/classifier.py."""

from typing import Any

from engine.device import cuda, kernels

Array = Any

THREADS = 1024
STATIC_BYTES = 1 << 10  # of shared memory, at most: what the sums over a block take


def forward(losses: Array, logits: Array, targets: Array, V: int) -> None:
    N, Vp = losses.size, logits.shape[-1]
    kernels.launch("classifier", "classifier_forward", (N,), (THREADS,), losses, logits, targets, N, V, Vp)


def forward_backward(losses: Array, logits: Array, targets: Array, V: int, dloss: float) -> None:
    """Reads the logits once where a row fits into a block's shared memory, and twice where it does not."""
    N, Vp = losses.size, logits.shape[-1]
    held = rows_held(Vp)
    kernels.launch(
        "classifier",
        "classifier_forward_backward",
        (min(N, cuda.multiprocessors()) if held else N,),
        (THREADS,),
        *(losses, logits, targets, N, V, Vp, dloss),
        shared_bytes=2 * Vp * held,
        defines=variant(Vp),
    )


def rows_held(Vp: int) -> int:
    """How many rows of Vp logits a block keeps in its shared memory: two, if they fit there, or one, or none."""
    return max(0, min(2, (cuda.shared_memory_limit() - STATIC_BYTES) // (2 * Vp)))


def variant(Vp: int) -> dict[str, int]:
    """The definitions that forward_backward is compiled with."""
    held = rows_held(Vp)
    return {"HOLD_ROWS": held} if held else {}


def add_mean(mean: Array, losses: Array, share: float) -> None:
    kernels.launch("classifier", "classifier_add_mean", (1,), (THREADS,), mean, losses, losses.size, share)
