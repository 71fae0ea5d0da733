"""GELU, the tanh form that GPT-2 uses (Hendrycks and Gimpel 2016, arXiv 1606.08415, section 2).

u(x)     = sqrt(2 / pi) * (x + 0.044715 * x^3)
gelu(x)  = x / 2 * (1 + tanh(u))
gelu'(x) = (1 + tanh(u)) / 2 + x / 2 * (1 - tanh(u)^2) * u'(x)
"""

import math

import numpy as np

from engine.ops.numpy.parallel import for_each_block
from engine.ops.numpy.scratch import rows, scratch

SCALE = math.sqrt(2 / math.pi)
CUBIC = 0.044715


def _tanh_u(x: np.ndarray) -> np.ndarray:
    """tanh(u(x)) for one block, in scratch memory."""
    t = np.multiply(x, x, out=scratch("gelu.tanh", x.shape, x.dtype))
    t *= SCALE * CUBIC
    t += SCALE
    t *= x
    return np.tanh(t, out=t)


def apply(out: np.ndarray, inp: np.ndarray) -> None:
    """out = gelu(inp), for one block of rows."""
    t = _tanh_u(inp)
    t += 1
    t *= 0.5
    np.multiply(inp, t, out=out)


def apply_backward(dinp: np.ndarray, inp: np.ndarray) -> None:
    """dinp *= gelu'(inp), for one block of rows."""
    t = _tanh_u(inp)
    du = np.multiply(inp, inp, out=scratch("gelu.du", inp.shape, inp.dtype))
    du *= 3 * SCALE * CUBIC / 2
    du += SCALE / 2
    du *= inp  # x / 2 * u'(x)
    # With s = 1 + t:  gelu' = s / 2 + x / 2 * u' * s * (2 - s) = s * (1 / 2 + du * (2 - s)) = s * (1/2 + du * (1 - t)).
    one_minus = np.subtract(1, t, out=scratch("gelu.one_minus", inp.shape, inp.dtype))
    du *= one_minus
    du += 0.5
    t += 1
    t *= du
    dinp *= t


def forward(out: np.ndarray, inp: np.ndarray) -> None:
    """out (B,T,C) = gelu(inp (B,T,C))."""
    out, inp = rows(out), rows(inp)
    for_each_block(lambda block: apply(out[block], inp[block]), *inp.shape)


def backward(dinp: np.ndarray, inp: np.ndarray) -> None:
    """dinp (B,T,C) *= gelu'(inp (B,T,C)): the gradient of gelu's output becomes that of its input, in place."""
    dinp, inp = rows(dinp), rows(inp)
    for_each_block(lambda block: apply_backward(dinp[block], inp[block]), *inp.shape)
