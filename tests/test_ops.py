"""Every numpy operation: backward against the complex step, and what its contract says of = and +=."""

import math

import numpy as np
import pytest

from engine import ops
from engine.config import BEHIND
from engine.ops.numpy import parallel, rounding
from tests.conftest import with_one_behind
from tests.gradcheck import assert_gradient, complex_step

OPS = ops.load("numpy")
RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape)


def tokens(V: int, *shape: int) -> np.ndarray:
    return RNG.integers(0, V, shape).astype(np.int32)


def gradient(accumulate: bool, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    """A gradient before an operation, NaN where that must write it; and what the operation adds to."""
    before = normal(*shape)
    return (before.copy(), before) if accumulate else (np.full(shape, np.nan), np.zeros(shape))


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Several blocks even at test sizes, so that their borders are tested."""
    monkeypatch.setattr(OPS.attention, "QUERIES", 3)
    for name, value in (("MATMUL_ROWS", 4), ("ELEMENTS", 20), ("FEW_ELEMENTS", 2)):
        monkeypatch.setattr(parallel, name, value)


@pytest.mark.parametrize("accumulate", [True, False])
def test_embedding(accumulate):
    B, T, C, V = 3, 5, 4, 6
    inp, wte, wpe, dout = tokens(V, B, T), normal(V, C), normal(8, C), normal(B, T, C)

    def loss(wte, wpe):
        dtype = np.result_type(wte, wpe)
        out = np.empty((B, T, C), dtype)
        OPS.embedding.forward(out, inp, wte.astype(dtype), wpe.astype(dtype))
        return (out * dout).sum()

    (dwte, before_e), (dwpe, before_p) = gradient(True, V, C), gradient(accumulate, 8, C)
    OPS.embedding.backward(dwte, dwpe, dout, inp, accumulate=accumulate)
    assert_gradient(dwte - before_e, complex_step(lambda z: loss(z, wpe), wte), "wte")
    assert_gradient(dwpe - before_p, complex_step(lambda z: loss(wte, z), wpe), "wpe")


def test_layernorm_puts_a_one_behind_each_row_where_there_is_room():
    B, T, C = 2, 5, 6
    inp, weight, bias = normal(B, T, C), normal(C), normal(C)
    out, wide = np.empty((B, T, C)), np.full((B, T, C + BEHIND), np.nan)
    for each in (out, wide):
        OPS.layernorm.forward(each, np.empty((B, T)), np.empty((B, T)), inp, weight, bias)
    np.testing.assert_array_equal(wide, with_one_behind(out))


@pytest.mark.parametrize("accumulate", [True, False])
def test_layernorm(accumulate):
    B, T, C = 2, 5, 6
    inp, weight, bias, dout = normal(B, T, C), normal(C), normal(C), normal(B, T, C)

    def forward(inp, weight, bias):
        dtype = np.result_type(inp, weight, bias)
        out, mean, rstd = np.empty((B, T, C), dtype), np.empty((B, T), dtype), np.empty((B, T), dtype)
        OPS.layernorm.forward(out, mean, rstd, inp.astype(dtype), weight, bias)
        return out, mean, rstd

    def loss(inp, weight, bias):
        return (forward(inp, weight, bias)[0] * dout).sum()

    _, mean, rstd = forward(inp, weight, bias)
    dinp, before_x = gradient(True, B, T, C)
    (dweight, before_w), (dbias, before_b), (dsum, before_s) = (gradient(accumulate, C) for _ in range(3))
    OPS.layernorm.backward(dinp, dweight, dbias, dout, inp, weight, mean, rstd, dsum, accumulate=accumulate)
    assert_gradient(dinp - before_x, complex_step(lambda z: loss(z, weight, bias), inp), "inp")
    assert_gradient(dweight - before_w, complex_step(lambda z: loss(inp, z, bias), weight), "weight")
    assert_gradient(dbias - before_b, complex_step(lambda z: loss(inp, weight, z), bias), "bias")
    np.testing.assert_allclose(dsum - before_s, dinp.sum(axis=(0, 1)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("with_gelu", [True, False])
def test_linear(with_bias, with_residual, with_gelu, accumulate):
    """A linear layer whose input was gelu(pre) if with_gelu, and whose output goes through GELU if with_gelu too. With
    a bias, a one is behind each row of its input.
    """
    B, T, C, OC = 2, 5, 4, 6
    pre, weight, dout = normal(B, T, C), normal(OC, C), normal(B, T, OC)
    bias = normal(OC) if with_bias else None
    residual = normal(B, T, OC) if with_residual else None

    def gelu(x):
        out = np.empty_like(x)
        OPS.gelu.forward(out, x)
        return out

    def input_of(pre):
        inp = gelu(pre) if with_gelu else pre
        return with_one_behind(inp) if with_bias else inp

    def forward(pre, weight, bias):
        dtype = np.result_type(pre, weight, bias if with_bias else pre)
        inp = input_of(pre)
        out, pre_gelu = np.empty((B, T, OC), dtype), np.empty((B, T, OC), dtype)
        OPS.linear.forward(out, inp, weight, bias, residual=residual, pre_gelu=pre_gelu if with_gelu else None)
        if with_gelu:
            np.testing.assert_array_equal(out, gelu(pre_gelu))
            return pre_gelu
        return out

    def loss(pre, weight, bias):
        return (forward(pre, weight, bias) * dout).sum()

    dinp = np.full((B, T, C), np.nan)
    (dweight, before_w), (dbias, before_b) = gradient(accumulate, OC, C), gradient(accumulate, OC)
    options = {"pre_gelu": pre if with_gelu else None, "dbias": dbias if with_bias else None}
    OPS.linear.backward(dinp, dweight, dout, input_of(pre), weight, **options, accumulate=accumulate)
    assert_gradient(dinp, complex_step(lambda z: loss(z, weight, bias), pre), "inp")
    assert_gradient(dweight - before_w, complex_step(lambda z: loss(pre, z, bias), weight), "weight")
    if with_bias:
        assert_gradient(dbias - before_b, complex_step(lambda z: loss(pre, weight, z), bias), "bias")
    expected = (
        (gelu(pre) if with_gelu else pre) @ weight.T + (bias if with_bias else 0) + (residual if with_residual else 0)
    )
    np.testing.assert_allclose(forward(pre, weight, bias), expected, rtol=1e-12, atol=1e-12)


def test_gelu():
    x, dout = normal(3, 5, 4) * 3, normal(3, 5, 4)

    def loss(x):
        out = np.empty_like(x)
        OPS.gelu.forward(out, x)
        return (out * dout).sum()

    dx = dout.copy()
    OPS.gelu.backward(dx, x)
    assert_gradient(dx, complex_step(loss, x))
    expected = [0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in x.ravel()]
    out = np.empty_like(x)
    OPS.gelu.forward(out, x)
    # 1 + tanh cancels where x is far below zero: the rounding is relative to x, not to the result.
    assert (np.abs(out.ravel() - expected) <= 2**-52 * np.abs(x.ravel())).all()


@pytest.mark.parametrize("T", [1, 3, 7])
def test_attention(T):
    B, NH, HS = 2, 2, 3
    C = NH * HS
    qkv, dout = normal(B, T, 3 * C), normal(B, T, C)

    def forward(qkv):
        out, lse = np.empty((B, T, C), qkv.dtype), np.empty((B, NH, T), qkv.dtype)
        OPS.attention.forward(out, lse, qkv)
        return out, lse

    out, lse = forward(qkv)
    dqkv = np.full_like(qkv, np.nan)
    OPS.attention.backward(dqkv, dout, qkv, out, lse)
    assert_gradient(dqkv, complex_step(lambda z: (forward(z)[0] * dout).sum(), qkv))

    for b, h, t in np.ndindex(B, NH, T):
        q, k, v = (qkv[b, :, i * C + h * HS : i * C + (h + 1) * HS] for i in range(3))
        score = k[: t + 1] @ q[t] / math.sqrt(HS)
        p = np.exp(score) / np.exp(score).sum()
        np.testing.assert_allclose(out[b, t, h * HS : (h + 1) * HS], p @ v[: t + 1], rtol=1e-12)
        np.testing.assert_allclose(lse[b, h, t], np.log(np.exp(score).sum()), rtol=1e-12)


def test_attention_is_stable_and_causal():
    """Scores of 1e4 do not overflow, and what comes later, even NaN, reaches nothing before it."""
    qkv = normal(1, 7, 12) * 100
    out, lse = np.empty((1, 7, 4)), np.empty((1, 2, 7))
    OPS.attention.forward(out, lse, qkv)
    assert np.isfinite(out).all()
    assert np.isfinite(lse).all()
    first = out[:, :4].copy()
    qkv[:, 4:, 4:] += 1e6
    OPS.attention.forward(out, lse, qkv)
    np.testing.assert_array_equal(out[:, :4], first)


def test_classifier():
    B, T, V, Vp, dloss = 2, 5, 6, 8, 0.3
    logits, targets = normal(B, T, Vp), tokens(V, B, T)
    targets[0, 0], targets[0, 1] = V - 1, 0

    def forward(logits):
        losses = np.empty((B, T), logits.dtype)
        OPS.classifier.forward(losses, logits, targets, V)
        return losses

    losses, dlogits = np.empty((B, T)), logits.copy()
    OPS.classifier.forward_backward(losses, dlogits, targets, V, dloss)
    assert_gradient(dlogits, complex_step(lambda z: dloss * forward(z).sum(), logits))
    np.testing.assert_array_equal(dlogits[..., V:], 0)
    np.testing.assert_array_equal(losses, forward(logits))
    p = np.exp(logits[..., :V]) / np.exp(logits[..., :V]).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(losses, -np.log(np.take_along_axis(p, targets[..., None], 2)[..., 0]), rtol=1e-12)

    mean = np.array(0.5)
    OPS.classifier.add_mean(mean, losses, 0.25)
    np.testing.assert_allclose(mean, 0.5 + 0.25 * losses.mean(), rtol=1e-14)


def test_classifier_is_stable():
    logits = np.array([[[1e4, -1e4, 0.0]]])
    losses = np.empty((1, 1))
    OPS.classifier.forward(losses, logits, np.array([[1]], np.int32), 3)
    np.testing.assert_allclose(losses, 2e4)


def test_global_norm():
    grads, slices = normal(10).astype(np.float32), np.array([[0, 4], [7, 10], [4, 7]])
    out = np.full(3, np.nan)
    OPS.norm.squared(out, grads, slices)
    exact = [(grads[start:stop].astype(np.float64) ** 2).sum() for start, stop in slices]
    np.testing.assert_allclose(out, exact, rtol=1e-6)


@pytest.mark.parametrize("W", [1, 2, 3, 8, 9, 17])
def test_sum_slices(W):
    slices, before = normal(W, 300), normal(300)
    for add in (False, True):
        out = before.copy()
        OPS.reduce.sum_slices(out, slices, add)
        np.testing.assert_allclose(out, slices.sum(axis=0) + add * before, rtol=0, atol=1e-13)


def test_sum_slices_rounds_bfloat16_once():
    """256 + 1 is 256 in bfloat16, and 256 + 1 + 1 is 258."""
    slices = np.array([[256.0], [1.0], [1.0]]).astype("bfloat16")
    for add, expected in ((False, 258.0), (True, 260.0)):
        out = np.full(1, 2.0).astype("bfloat16")
        OPS.reduce.sum_slices(out, slices, add)
        assert out.dtype == slices.dtype
        assert out[0] == expected


def test_sum_slices_has_one_order():
    """A tree of neighbours among eight, then the next eight: each of these sums depends on where it is rounded."""
    slices = normal(11, 64).astype(np.float32) * np.float32(2) ** np.arange(11, dtype=np.float32)[:, None]
    s = list(slices)
    first = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]))
    out = np.empty(64, np.float32)
    OPS.reduce.sum_slices(out, slices)
    np.testing.assert_array_equal(out, first + ((s[8] + s[9]) + s[10]))


BETAS = {"beta1": 0.9, "beta2": 0.95}


def schedule(t, lr=0.01):
    return np.array(OPS.adamw.Schedule.of(t, lr, **BETAS, eps=1e-8, weight_decay=0.1))


def test_adamw():
    """Three updates against the textbook's formulas, clipped."""
    params, clip = normal(10), np.array(0.5)
    x, m, v = params.copy(), np.zeros(10), np.zeros(10)
    ref, ref_m, ref_v = params.copy(), np.zeros(10), np.zeros(10)
    for t in (1, 2, 3):
        grads = normal(10)
        OPS.adamw.update(x, None, m, v, grads, clip, np.array(0), schedule(t), **BETAS, decayed=10)
        g = 0.5 * grads
        ref_m = 0.9 * ref_m + 0.1 * g
        ref_v = 0.95 * ref_v + 0.05 * g**2
        step = (ref_m / (1 - 0.9**t)) / (np.sqrt(ref_v / (1 - 0.95**t)) + 1e-8)
        ref = ref - 0.01 * (step + 0.1 * ref)
        np.testing.assert_allclose(x, ref, rtol=1e-12)


def test_adamw_of_bf16_and_remainders_is_that_of_fp32():
    n = 20_000
    masters = normal(n).astype(np.float32)
    params, remainder = rounding.split(masters)
    moments = np.zeros((2, 2, n), np.float32)
    for t in (1, 2, 3):
        given = normal(n).astype(np.float32), np.array(0.5), np.array(0), schedule(t)
        OPS.adamw.update(masters, None, *moments[0], *given, **BETAS, decayed=10_000)
        OPS.adamw.update(params, remainder, *moments[1], *given, **BETAS, decayed=10_000)
        np.testing.assert_array_equal(rounding.join(params, remainder), masters)
        np.testing.assert_array_equal(params.view(np.uint16), rounding.split(masters)[0].view(np.uint16))
    np.testing.assert_array_equal(*moments)


def test_split_rounds_to_nearest_and_join_gives_all_digits_back():
    """Every upper half, with lower halves around each rounding."""
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    masters = (np.arange(1 << 16, dtype=np.uint32)[:, None] << 16 | lower).view(np.float32)
    params, remainder = rounding.split(masters)
    again, nan = rounding.join(params, remainder), np.isnan(masters)
    for each in (again, params.astype(np.float32)):
        np.testing.assert_array_equal(np.isnan(each), nan)
    np.testing.assert_array_equal(again[~nan].view(np.uint32), masters[~nan].view(np.uint32))
    # numpy takes ties to even, here they go away from zero: as the next number does.
    nearest = np.where(lower == 0x8000, (masters.view(np.uint32) + np.uint32(1)).view(np.float32), masters)
    np.testing.assert_array_equal(params[~nan].view(np.uint16), nearest[~nan].astype(params.dtype).view(np.uint16))


def test_adamw_decays_where_it_is_told_to():
    """Without gradients, all that is left."""
    n = 600_000  # which several cores share
    for decayed in (0, 10, 400_000, n):
        params = normal(n)
        x = params.copy()
        OPS.adamw.update(x, None, *np.zeros((3, n)), np.array(1.0), np.array(0), schedule(1), **BETAS, decayed=decayed)
        np.testing.assert_array_equal(x[:decayed], params[:decayed] * (1 - 0.01 * 0.1))
        np.testing.assert_array_equal(x[decayed:], params[decayed:])


def test_adamw_takes_its_schedule_from_memory():
    """The same call with the same arrays, whose values have changed: t and the learning rate are the new ones."""
    grads, moments, now = normal(10), np.zeros((2, 10)), schedule(1)
    x = before = normal(10)
    for t, lr in ((1, 0.01), (2, 0.5), (1000, 0.25)):
        now[:], before, kept = schedule(t, lr), x.copy(), moments.copy()
        OPS.adamw.update(x, None, *moments, grads, np.array(1.0), np.array(0), now, **BETAS, decayed=0)
        m, v = 0.9 * kept[0] + 0.1 * grads, 0.95 * kept[1] + 0.05 * grads**2
        step = lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
        np.testing.assert_allclose(before - x, step, rtol=1e-9)


def test_adamw_skips():
    x, m, v = normal(10), normal(10), normal(10) ** 2
    before = [a.copy() for a in (x, m, v)]
    OPS.adamw.update(x, None, m, v, np.full(10, np.nan), np.array(1.0), np.array(1), schedule(1), **BETAS, decayed=10)
    for after, kept in zip((x, m, v), before, strict=True):
        np.testing.assert_array_equal(after, kept)


class Guard:
    """guard.decide with its state."""

    def __init__(self, **limits):
        self.limits = {"max_norm": 1.0, "max_loss_z": math.inf, "max_norm_z": math.inf} | limits
        self.decision = OPS.guard.Decision(*(np.zeros(()) for _ in OPS.guard.Decision._fields))
        self.windows = np.zeros((2, OPS.guard.WINDOW + 1))

    def __call__(self, loss, norm):
        OPS.guard.decide(self.decision, *self.windows, np.array(loss), np.array(norm) ** 2, **self.limits)
        return self.decision


def test_guard_clips():
    guard = Guard(max_norm=2.0)
    assert guard(3.0, 1.0).clip == 1
    assert guard(3.0, 8.0).clip == 0.25
    assert guard(3.0, 8.0).norm == 8
    assert Guard(max_norm=math.inf)(3.0, 8.0).clip == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["loss", "norm"])
def test_guard_skips_what_is_not_finite_and_keeps_its_windows_clean(bad, where):
    guard = Guard()
    for _ in range(200):
        guard(RNG.normal(), 1 + RNG.random())
    kept = guard.windows.copy()
    decision = guard(bad if where == "loss" else 0.0, bad if where == "norm" else 1.0)
    assert decision.skip == 1
    row = 0 if where == "loss" else 1
    np.testing.assert_array_equal(guard.windows[row], kept[row])
    assert guard(0.0, 1.5).skip == 0


def test_guard_scores():
    """No score in the first 128 values; small ones on uniform noise; a large one for a spike."""
    guard = Guard(max_loss_z=5.0)
    scores = [float(guard(RNG.uniform(-1, 1), 1.0).loss_z) for _ in range(400)]
    assert np.isnan(scores[:128]).all()
    assert np.abs(scores[128:]).max() <= 3
    spike = guard(10.0, 1.0)
    assert spike.loss_z > 5
    assert spike.skip == 1
    assert spike.norm_z == 0


def test_sampling():
    logits = np.log(np.array([[0.5, 0.25, 0.25, 99.0]] * 4))
    out = np.empty(4, np.int32)
    OPS.sampling.sample(out, logits, 3, np.array([0.0, 0.49, 0.51, 0.999]), 1.0)
    assert out.tolist() == [0, 0, 1, 2]
    OPS.sampling.sample(out, logits, 3, np.array([0.0, 0.49, 0.51, 0.999]), 0.0)
    assert out.tolist() == [0, 0, 0, 0]
    coins = RNG.random(20_000)
    out = np.empty(20_000, np.int32)
    OPS.sampling.sample(out, np.log(np.tile([[0.6, 0.3, 0.1]], (20_000, 1))), 3, coins, 1.0)
    np.testing.assert_allclose(np.bincount(out) / 20_000, [0.6, 0.3, 0.1], atol=0.02)
