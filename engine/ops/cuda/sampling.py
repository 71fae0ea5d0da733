"""Drawing the next token: see engine/ops/numpy/sampling.py."""

from typing import Any

from engine.device import kernels

Array = Any


def sample(out: Array, logits: Array, V: int, coin: Array, temperature: float) -> None:
    B, Vp = logits.shape
    kernels.launch("sampling", "sampling_sample", (B,), (256,), out, logits, coin, B, V, Vp, temperature)
