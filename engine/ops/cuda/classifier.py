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
    variant = holds_row(Vp)
    kernels.launch(
        "classifier",
        "classifier_forward_backward",
        (N,),
        (THREADS,),
        *(losses, logits, targets, N, V, Vp, dloss),
        shared_bytes=2 * Vp if variant else 0,
        defines=variant,
    )


def holds_row(Vp: int) -> dict[str, int]:
    """The definitions of the variant that keeps a row of Vp logits in a block's shared memory, if it fits there."""
    return {"HOLD_ROW": 1} if 2 * Vp + STATIC_BYTES <= cuda.shared_memory_limit() else {}


def add_mean(mean: Array, losses: Array, share: float) -> None:
    kernels.launch("classifier", "classifier_add_mean", (1,), (THREADS,), mean, losses, losses.size, share)
