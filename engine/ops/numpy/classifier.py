"""Softmax, cross-entropy and its gradient, over logits whose last Vp - V columns are padding.

losses  = log(sum_v(exp(logits))) - logits[target]
dlogits = (exp(logits) / sum_v(exp(logits)) - [v == target]) * dloss      0 in the padding
"""

import numpy as np

from engine.ops.numpy.parallel import for_each_block
from engine.ops.numpy.scratch import rows, scratch


def forward(losses: np.ndarray, logits: np.ndarray, targets: np.ndarray, V: int) -> None:
    """losses (B,T) = cross-entropy in nats of logits (B,T,Vp) at targets (B,T) int32. logits stay as they are."""
    logits, losses, targets = rows(logits), losses.reshape(-1), targets.reshape(-1)

    def classify(block: slice) -> None:
        x = logits[block, :V]
        _, top, total = _softmax_parts(scratch("classifier.exp", x.shape, x.dtype), x)
        losses[block] = _cross_entropy(x, top, total, targets[block])

    for_each_block(classify, len(losses), V)


def forward_backward(losses: np.ndarray, logits: np.ndarray, targets: np.ndarray, V: int, dloss: float) -> None:
    """losses (B,T) = as forward, and logits (B,T,Vp) become dlogits in place: their gradient times dloss."""
    logits, losses, targets = rows(logits), losses.reshape(-1), targets.reshape(-1)

    def classify(block: slice) -> None:
        x = logits[block, :V]
        exp, top, total = _softmax_parts(scratch("classifier.exp", x.shape, x.dtype), x)
        losses[block] = _cross_entropy(x, top, total, targets[block])
        np.multiply(exp, dloss / total, out=x)
        x[np.arange(len(x)), targets[block]] -= dloss
        logits[block, V:] = 0

    for_each_block(classify, len(losses), V)


def add_mean(mean: np.ndarray, losses: np.ndarray, share: float) -> None:
    """mean () += share * the mean of losses (B,T). share is 1 / the number of micro-batches of a lane."""
    mean += share * losses.mean(dtype=mean.dtype)


def _softmax_parts(out: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """exp(x - top) in out (n,V), the real maximum top (n,1) and the sums of exp (n,1)."""
    top = x.real.max(axis=1, keepdims=True)
    np.subtract(x, top, out=out)
    np.exp(out, out=out)
    return out, top, out.sum(axis=1, keepdims=True)


def _cross_entropy(x: np.ndarray, top: np.ndarray, total: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return (top + np.log(total))[:, 0] - x[np.arange(len(x)), targets]
