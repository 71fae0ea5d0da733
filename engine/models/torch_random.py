"""Normal draws as PyTorch's CPU generator makes them, so that losses can be compared step by step with other trainers.

The Mersenne Twister (Matsumoto and Nishimura 1998) gives 32-bit words, of which a uniform draw keeps 24 bits. A tensor
takes its uniforms in order; then every 16 of them become 16 normals by Box-Muller, the first 8 paired with the last 8.
"""

import math

import numpy as np

GROUP = 16
PIECE = GROUP * 2**12  # values made at a time, so that they stay in the cache


class TorchGenerator:
    """The stream of torch.Generator().manual_seed(seed)."""

    def __init__(self, seed: int):
        self._words = np.random.RandomState(seed)  # the same twister and seeding; numpy promises this stream for good

    def normal(self, shape: tuple[int, ...], std: float) -> np.ndarray:
        """float32 (shape): torch.empty(shape).normal_(0, std), up to float32 rounding. At least 16 elements."""
        size = math.prod(shape)
        if size < GROUP:
            raise ValueError(f"PyTorch draws tensors of fewer than {GROUP} elements another way, shape is {shape}")
        out = np.empty(size, np.float32)
        whole = size // GROUP * GROUP
        for start in range(0, whole, PIECE):
            piece = out[start : min(start + PIECE, whole)]
            piece[...] = self._box_muller(self._uniform(piece.size), std)
        if whole < size:
            # The uniforms of the ragged end are drawn and dropped: PyTorch draws the last 16 values anew.
            self._uniform(size - whole)
            out[-GROUP:] = self._box_muller(self._uniform(GROUP), std)
        return out.reshape(shape)

    def _uniform(self, size: int) -> np.ndarray:
        words = self._words.randint(0, 2**32, size, np.uint32)
        return (words & (2**24 - 1)).astype(np.float32) * np.float32(2**-24)

    @staticmethod
    def _box_muller(uniform: np.ndarray, std: float) -> np.ndarray:
        u1, u2 = uniform.reshape(-1, 2, GROUP // 2).swapaxes(0, 1)
        radius = np.sqrt(-2 * np.log(1 - u1))
        theta = np.float32(2 * math.pi) * u2
        normal = np.stack([radius * np.cos(theta), radius * np.sin(theta)], axis=1)
        return normal.reshape(-1) * np.float32(std)
