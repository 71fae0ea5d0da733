"""Drawing the next token."""

import numpy as np


def sample(out: np.ndarray, logits: np.ndarray, V: int, coin: np.ndarray, temperature: float) -> None:
    """out (B) int32 = a token of softmax(logits (B,Vp)[:, :V] / temperature) for each coin (B) in [0, 1).

    By inversion: the first token at which the cumulative probability exceeds the coin. temperature 0 takes the most
    likely token.
    """
    x = logits[:, :V].astype(np.float64)
    if temperature == 0:
        out[...] = x.argmax(axis=1)
        return
    p = np.exp((x - x.max(axis=1, keepdims=True)) / temperature)
    cumulative = p.cumsum(axis=1)
    # Rounding can leave the last sum at or below the coin: the last token of the vocabulary catches it.
    out[...] = np.minimum((cumulative <= coin[:, None] * cumulative[:, -1:]).sum(axis=1), V - 1)
