"""Sums of few numbers: see engine/ops/numpy/scalars.py."""

from typing import Any

from engine.device import kernels

Array = Any


def total(out: Array, parts: Array, divisor: int = 1) -> None:
    kernels.launch("scalars", "scalars_total", (1,), (256,), out, parts, parts.size, divisor)
