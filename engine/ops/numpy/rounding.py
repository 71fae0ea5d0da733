"""Rounding parameters to bfloat16: to nearest, keeping the digits that are cut off, or at random, without them.

An update that is smaller than half a parameter's last place must not be lost every time. Either a master has room for
it, which is float32: the parameter and a remainder, the lower half of the master's bits. Or it counts on average: each
of the two neighbours is taken as often as the value is near to it. The random bits are those of a counter,
Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): nothing to save, and the same whoever
draws them.
"""

import ml_dtypes
import numpy as np

MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
KEY_STEPS = 0x9E3779B9, 0xBB67AE85


def split(master: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """master float32 rounded to nearest, a tie away from zero, as bfloat16, and its remainder uint16, of one shape.

    A tie to even would leave open what `join` undoes: whether there was one up or one down. A NaN stays one.
    """
    assert master.dtype == np.float32
    bits = master.view(np.uint32)
    upper = np.where(np.isnan(master), np.uint32(0x7FFF), (bits + np.uint32(0x8000)) >> np.uint32(16))
    return upper.astype(np.uint16).view(ml_dtypes.bfloat16), bits.astype(np.uint16)


def join(params: np.ndarray, remainder: np.ndarray) -> np.ndarray:
    """The masters, float32, that `split` took apart: all bits, but for NaNs'."""
    upper = params.view(np.uint16) - (remainder >> 15)  # as it was before it was rounded up
    return (upper.astype(np.uint32) << 16 | remainder).view(np.float32)


def philox(counters: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Four random words (n,4) uint32 for each counter (n,4) uint32 under a key of two words."""
    c0, c1, c2, c3 = (column.astype(np.uint64) for column in counters.T)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    for number in range(10):
        k0, k1 = (np.uint64((k + number * step) & 0xFFFFFFFF) for k, step in zip(key, KEY_STEPS, strict=True))
        first, second = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (second >> half) ^ c1 ^ k0, second & low, (first >> half) ^ c3 ^ k1, first & low
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def random_bits(first: int, n: int, *, seed: int, t: int, stream: int) -> np.ndarray:
    """16 random bits (n) uint32 for each of the elements first, first + 1, ... of a stream: eight to a counter."""
    indices = np.arange(first // 8, -(-(first + n) // 8), dtype=np.uint64)
    low, high = indices & np.uint64(0xFFFFFFFF), indices >> np.uint64(32)
    counters = np.stack([low, high, np.full_like(low, stream), np.zeros_like(low)], axis=1)
    return philox(counters, (seed, t)).view(np.uint16).reshape(-1)[first % 8 :][:n].astype(np.uint32)


def stochastic(x: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """x (n) float32 as bfloat16; bits (n) uint32 are 16 random bits. NaN and infinity stay what they are."""
    raised = ((x.view(np.uint32) + bits) & np.uint32(0xFFFF0000)).view(np.float32)
    return np.where(np.isfinite(x), raised, x).astype(ml_dtypes.bfloat16)
