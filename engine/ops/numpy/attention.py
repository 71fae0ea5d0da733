"""Causal self-attention (Vaswani et al. 2017, arXiv 1706.03762, section 3.2) that keeps no (T,T) matrix.

forward   S = q k^T / sqrt(HS), for keys at or before the query      lse = log(sum_k(exp(S)))
          P = exp(S - lse)      out = P v

backward  P again, from q, k and lse; then with D = sum_hs(dout * out)
          dv = P^T dout     dP = dout v^T     dS = P * (dP - D)     dq = dS k / sqrt(HS)     dk = dS^T q / sqrt(HS)
          (D is sum_k(P * dP): Dao et al. 2022, arXiv 2205.14135, appendix B.2)

Queries go in blocks: a block needs only the keys up to its own end, which halves the work and bounds the memory.
Scores are held transposed, (keys, queries): sums over keys then run along whole vectors of queries.
"""

import math
from collections.abc import Iterator

import numpy as np

from engine.ops.numpy.parallel import for_each_block
from engine.ops.numpy.scratch import scratch

QUERIES = 64  # in a block: enough for a matrix multiply, few enough that little of the masked half is computed


def forward(out: np.ndarray, lse: np.ndarray, qkv: np.ndarray) -> None:
    """out (B,T,C) =, lse (B,NH,T) = log-sum-exp of the scores, kept for backward; qkv (B,T,3C), NH by lse."""
    q, k, v, o = *_heads(qkv, lse, 3), *_heads(out, lse, 1)
    T = q.shape[2]

    def attend(batch: slice) -> None:
        for queries, keys in _query_blocks(T):
            S = _scores(q[batch, :, queries], k[batch, :, keys])
            top = S.real.max(axis=2, keepdims=True)
            S -= top
            P = np.exp(S, out=S)  # not yet divided by its sums: out is, which is smaller
            total = P.sum(axis=2, keepdims=True)
            lse[batch, :, queries] = (top + np.log(total))[:, :, 0]
            np.matmul(P.swapaxes(2, 3), v[batch, :, keys], out=o[batch, :, queries])
            o[batch, :, queries] /= total.swapaxes(2, 3)

    for_each_block(attend, len(q), q[0].size + lse[0].size * T)


def backward(
    dqkv: np.ndarray,
    dout: np.ndarray,
    qkv: np.ndarray,
    out: np.ndarray,
    lse: np.ndarray,
) -> None:
    """dqkv (B,T,3C) =; dout (B,T,C), and qkv, out and lse as forward saw and left them."""
    q, k, v, o = *_heads(qkv, lse, 3), *_heads(out, lse, 1)
    dq, dk, dv, do = *_heads(dqkv, lse, 3), *_heads(dout, lse, 1)
    T, HS = q.shape[2:]

    def attend(batch: slice) -> None:
        D = np.einsum("bhtd,bhtd->bht", do[batch], o[batch])
        for queries, keys in _query_blocks(T):
            qb, kb, vb, dob = (
                q[batch, :, queries],
                k[batch, :, keys],
                v[batch, :, keys],
                do[batch, :, queries],
            )
            P = _scores(qb, kb)
            P -= lse[batch, :, None, queries]
            np.exp(P, out=P)
            dS = np.matmul(vb, dob.swapaxes(2, 3), out=scratch("attention.dS", P.shape, P.dtype))
            dS -= D[:, :, None, queries]
            dS *= P
            dS *= 1 / math.sqrt(HS)
            np.matmul(dS.swapaxes(2, 3), kb, out=dq[batch, :, queries])
            if keys.stop == T:  # the first block in this order sees every key: it writes, the others add
                np.matmul(P, dob, out=dv[batch])
                np.matmul(dS, qb, out=dk[batch])
            else:
                dv[batch, :, keys] += P @ dob
                dk[batch, :, keys] += dS @ qb

    for_each_block(attend, len(q), q[0].size + lse[0].size * T)


def _heads(packed: np.ndarray, lse: np.ndarray, parts: int) -> list[np.ndarray]:
    """The `parts` arrays that lie side by side in packed (B,T,parts*C), each as a view (B,NH,T,HS)."""
    B, NH, T = lse.shape
    split = packed.reshape(B, T, parts, NH, -1)
    return [split[:, :, part].swapaxes(1, 2) for part in range(parts)]


def _query_blocks(T: int) -> Iterator[tuple[slice, slice]]:
    """(queries, the keys that they see), last block first."""
    for start in reversed(range(0, T, QUERIES)):
        end = min(start + QUERIES, T)
        yield slice(start, end), slice(0, end)


def _scores(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """S transposed, (B,NH,keys,queries), in scratch memory; -inf where the key comes after the query."""
    B, NH, queries, HS = q.shape
    keys = k.shape[2]
    S = np.matmul(k, q.swapaxes(2, 3), out=scratch("attention.S", (B, NH, keys, queries), q.dtype))
    S *= 1 / math.sqrt(HS)
    S[:, :, keys - queries :] += np.tril(np.full((queries, queries), -np.inf, S.real.dtype), -1)
    return S
