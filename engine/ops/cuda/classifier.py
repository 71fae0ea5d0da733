"""Softmax, cross-entropy and its gradient: see engine/ops/numpy/classifier.py."""

from typing import Any

from engine.device import kernels

Array = Any

THREADS = 1024


def forward(losses: Array, logits: Array, targets: Array, V: int) -> None:
    N, Vp = losses.size, logits.shape[-1]
    kernels.launch("classifier", "classifier_forward", (N,), (THREADS,), losses, logits, targets, N, V, Vp)


def forward_backward(losses: Array, logits: Array, targets: Array, V: int, dloss: float) -> None:
    N, Vp = losses.size, logits.shape[-1]
    kernels.launch(
        "classifier", "classifier_forward_backward", (N,), (THREADS,), losses, logits, targets, N, V, Vp, dloss
    )


def add_mean(mean: Array, losses: Array, share: float) -> None:
    kernels.launch("classifier", "classifier_add_mean", (1,), (THREADS,), mean, losses, losses.size, share)
