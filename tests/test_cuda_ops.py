"""Every CUDA operation against its numpy twin, within counted roundings: on a GPU, and by the shim on the CPU.

On the CPU the matrix multiplies are numpy's; everything else is what runs on a GPU, from the same sources.
"""

import math
import os
from itertools import combinations

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from engine import ops
from engine.config import BEHIND
from engine.device import cublaslt, cuda, kernels, race, tuning
from engine.ops.cuda import linear_hopper, scratch
from engine.ops.numpy import rounding
from tests.conftest import with_one_behind
from tests.twins import BF16, EPS16, EPS32, F32, assert_within, on, rounded, stored, sum_error

CUDA, EXACT = ops.load("cuda"), ops.load("numpy")
RNG = np.random.default_rng(0)
CPU_ORDERS = ("forward", "reversed", "shuffled")


@pytest.fixture(params=[*CPU_ORDERS, pytest.param("gpu", marks=pytest.mark.gpu)])
def twin(request):
    # The float64 side of large sizes is worth all cores; the engine keeps BLAS to one thread otherwise.
    with on(request.param) as device, threadpool_limits(os.cpu_count() if device.on_gpu else 1, user_api="blas"):
        # Scratch memory begins as NaN, whatever it is taken for, or -1: what is read there must have been written.
        scratch._buffer = device.put(np.full(1 << 20, 0xFF), np.uint8)
        yield device


@pytest.fixture
def sizes(twin):
    """Chooses among sizes: the first are for the CPU too, the others, after None, for a GPU.

    Those are left out where $SMALL_SIZES is set: compute-sanitizer makes everything a hundred times slower.
    """

    def choose(*groups):
        cut = groups.index(None)
        return groups[:cut] + (groups[cut + 1 :] if twin.on_gpu and not os.environ.get("SMALL_SIZES") else ())

    return choose


def normal(*shape, scale=1.0):
    return RNG.normal(size=shape) * scale


def tokens(V, *shape):
    return RNG.integers(0, V, shape).astype(np.int32)


GRAD_DTYPES = [pytest.param(BF16, id="bf16"), pytest.param(F32, id="fp32")]
ACCUMULATE = [pytest.param(True, id="added"), pytest.param(False, id="written")]


def gradient(twin, accumulate, dtype, *shape):
    """A gradient before an operation, NaN where that must write it; and what the operation adds to."""
    before = normal(*shape)
    if accumulate:
        return twin.put(before, dtype), rounded(before, dtype)
    return twin.nan(*shape, dtype=dtype), np.zeros(shape)


def test_embedding_forward(twin, sizes):
    for B, T, C, V in sizes((1, 1, 8, 3), (2, 5, 24, 7), None, (4, 1000, 1600, 50304)):
        inp, wte, wpe = tokens(V, B, T), normal(V, C), normal(T + 3, C)
        out = twin.nan(B, T, C)
        CUDA.embedding.forward(out, twin.put(inp, np.int32), twin.put(wte), twin.put(wpe))
        exact = rounded(wte)[inp] + rounded(wpe)[:T]
        assert_within(twin.get(out), exact, stored(exact, EPS32 * np.abs(exact), BF16), "out")


@pytest.mark.parametrize("dtype", GRAD_DTYPES)
@pytest.mark.parametrize("accumulate", ACCUMULATE)
def test_embedding_backward(twin, sizes, accumulate, dtype):
    """Tokens at one position, at as many as a chunk has, at one more, at several chunks; one that never occurs; more
    tokens than one block takes.
    """
    ragged = np.repeat([0, 1, 2, 3, 5, 6], [1, 64, 1, 62, 131, 65]).astype(np.int32)
    text = np.minimum(RNG.zipf(1.3, (16, 1024)) - 1, 50256).astype(np.int32)
    same = np.full((2, 70), 4, np.int32)
    cases = sizes(
        (np.zeros((1, 1), np.int32), 8, 2),
        (RNG.permutation(ragged).reshape(2, 162), 24, 7),
        (same, 8, 5),
        (tokens(2500, 1, 200), 8, 2500),
        None,
        (text, 768, 50304),
        (np.full((64, 1024), 17, np.int32), 64, 128),
        (tokens(50257, 1, 1000), 1600, 50304),
    )
    for inp, C, V in cases:
        (B, T), dout = inp.shape, normal(*inp.shape, C)
        dwte, before_e = gradient(twin, True, dtype, V, C)
        dwpe, before_p = gradient(twin, accumulate, dtype, T + 2, C)
        CUDA.embedding.backward(dwte, dwpe, twin.put(dout), twin.put(inp, np.int32), accumulate=accumulate)

        def sums(dout, before_e, before_p, inp=inp):
            e, p = before_e.copy(), before_p.copy()
            EXACT.embedding.backward(e, p, dout, inp, accumulate=accumulate)
            return e, p

        args = rounded(dout), before_e, before_p
        size_e, size_p = sums(*map(np.abs, args))
        exact_e, exact_p = sums(*args)
        most = np.bincount(inp.ravel()).max()
        assert_within(twin.get(dwte), exact_e, stored(exact_e, sum_error(most + 1) * size_e, dtype), "dwte")
        assert_within(twin.get(dwpe), exact_p, stored(exact_p, sum_error(B + 1) * size_p, dtype), "dwpe")


@pytest.mark.parametrize("dtype", GRAD_DTYPES)
@pytest.mark.parametrize("orders", [CPU_ORDERS, pytest.param(("gpu",) * 10, marks=pytest.mark.gpu)])
def test_embedding_backward_has_one_order(orders, dtype):
    """Whatever order threads come in, a token's gradients are added in that of its positions: the same bits."""
    (B, T), C, V = (2, 300), 8, 4
    inp, dout = tokens(V, B, T), normal(B, T, C) * 2.0 ** RNG.integers(-12, 12, (B, T, C))
    results = []
    for order in orders:
        with on(order) as twin:
            dwte, dwpe = twin.put(np.zeros((V, C)), dtype), twin.put(np.zeros((T, C)), dtype)
            CUDA.embedding.backward(dwte, dwpe, twin.put(dout), twin.put(inp, np.int32), accumulate=True)
            results.append((twin.get(dwte), twin.get(dwpe)))
    for other in results[1:]:
        for first, again in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(again, first)


def layernorm_statistics(inp):
    mean = inp.mean(axis=-1)
    return mean, 1 / np.sqrt(inp.var(axis=-1) + 1e-5)


def test_layernorm_forward(twin, sizes):
    narrow, wide = ((1, 1, 8), (3, 7, 40), (1, 9, 768), (1, 2, 2048)), ((1, 3, 2056), (1, 2, 4096))
    for B, T, C in sizes(*narrow, *wide, None, (1, 1000, 1600), (8, 1024, 768), (1, 300, 8192)):
        inp, weight, bias = normal(B, T, C) * 3 + 1, normal(C) + 1, normal(C)
        out, mean, rstd = twin.nan(B, T, C), twin.nan(B, T, dtype=F32), twin.nan(B, T, dtype=F32)
        wide, *statistics = twin.nan(B, T, C + BEHIND), twin.nan(B, T, dtype=F32), twin.nan(B, T, dtype=F32)
        for each in ((out, mean, rstd), (wide, *statistics)):
            CUDA.layernorm.forward(*each, *(twin.put(x) for x in (inp, weight, bias)))
        np.testing.assert_array_equal(twin.get(wide), with_one_behind(twin.get(out)))
        x, w, b = rounded(inp), rounded(weight), rounded(bias)
        m, r = layernorm_statistics(x)
        centred = np.abs(x - m[..., None])
        # The mean is a sum of C terms; the variance too, of squares of differences that the mean's error has shifted.
        mean_error = sum_error(C) * np.abs(x).mean(axis=-1) + EPS32 * np.abs(m)
        var_error = (centred * (mean_error[..., None] + EPS32 * centred)).mean(axis=-1) * 2 + sum_error(C) / r**2
        rstd_error = 0.5 * var_error * r**3 + 4 * EPS32 * r
        assert_within(twin.get(mean), m, mean_error + EPS32 * np.abs(m), "mean")
        assert_within(twin.get(rstd), r, rstd_error, "rstd")
        exact = (x - m[..., None]) * r[..., None] * w + b
        before = np.abs(w) * (
            r[..., None] * (mean_error[..., None] + 4 * EPS32 * centred) + centred * rstd_error[..., None]
        ) + EPS32 * (np.abs(exact) + np.abs(b))
        assert_within(twin.get(out), exact, stored(exact, before, BF16), "out")


def test_layernorm_forward_of_rows_that_hardly_vary(twin):
    """Of equal values EPS alone is the variance; of neighbours in bf16 it is not lost beside the mean's square."""
    C = 24
    inp, bias = np.stack([np.full(C, 1.5), np.where(np.arange(C) % 3, 256.0, 258.0)])[None], normal(C)
    out, mean, rstd = twin.nan(1, 2, C), twin.nan(1, 2, dtype=F32), twin.nan(1, 2, dtype=F32)
    CUDA.layernorm.forward(out, mean, rstd, *(twin.put(x) for x in (inp, normal(C), bias)))
    m, r = layernorm_statistics(inp)
    mean_error = sum_error(C) * m
    assert_within(twin.get(mean), m, mean_error, "mean")
    # The mean's error adds its square to the variance.
    assert_within(twin.get(rstd), r, r * (mean_error**2 * r**2 + sum_error(C) + 4 * EPS32), "rstd")
    np.testing.assert_array_equal(twin.get(out)[0, 0], rounded(bias))


LAYERNORM_BACKWARD_SIZES = (
    *((1, 1, 8), (3, 7, 40), (1, 17, 264), (1, 270, 8), (1, 2, 6160)),
    None,
    *((1, 1000, 1600), (16, 1024, 768), (1, 9, 8192)),
)


@pytest.mark.parametrize("dtype", GRAD_DTYPES)
@pytest.mark.parametrize("with_sum", [True, False])
@pytest.mark.parametrize("accumulate", ACCUMULATE)
def test_layernorm_backward(twin, sizes, accumulate, dtype, with_sum):
    for B, T, C in sizes(*LAYERNORM_BACKWARD_SIZES):
        inp, weight, dout, before_x = normal(B, T, C) * 3 + 1, normal(C) + 1, normal(B, T, C), normal(B, T, C)
        (dweight, w0), (dbias, b0), (dsum, s0) = (gradient(twin, accumulate, dtype, C) for _ in range(3))
        mean, rstd = layernorm_statistics(rounded(inp))
        dinp = twin.put(before_x)
        CUDA.layernorm.backward(
            *(dinp, dweight, dbias, twin.put(dout), twin.put(inp), twin.put(weight)),
            *(twin.put(mean, F32), twin.put(rstd, F32), dsum if with_sum else None),
            accumulate=accumulate,
        )
        x, w, dy, dx0 = rounded(inp), rounded(weight), rounded(dout), rounded(before_x)
        m, r = rounded(mean, F32)[..., None], rounded(rstd, F32)[..., None]
        xhat, g = (x - m) * r, dy * w
        xhat_error = 2 * EPS32 * (np.abs(x) + np.abs(m)) * r
        g_mean, gx_mean = g.mean(axis=-1, keepdims=True), (g * xhat).mean(axis=-1, keepdims=True)
        g_error = sum_error(C + 2) * np.abs(g).mean(axis=-1, keepdims=True)
        gx_error = sum_error(C + 4) * np.abs(g * xhat).mean(axis=-1, keepdims=True)
        gx_error = gx_error + (np.abs(g) * xhat_error).mean(axis=-1, keepdims=True)
        exact = dx0 + r * (g - g_mean - xhat * gx_mean)
        size = np.abs(g) + np.abs(g_mean) + np.abs(xhat * gx_mean)
        update_error = r * (g_error + np.abs(xhat) * gx_error + xhat_error * np.abs(gx_mean) + 6 * EPS32 * size)
        bound = stored(exact, update_error + EPS32 * (np.abs(dx0) + r * size), BF16)
        assert_within(twin.get(dinp), exact, bound, "dinp")

        axes, N = (0, 1), B * T
        exact_w, size_w = w0 + (dy * xhat).sum(axis=axes), np.abs(w0) + np.abs(dy * xhat).sum(axis=axes)
        error_w = sum_error(N + 1) * size_w + (np.abs(dy) * xhat_error).sum(axis=axes)
        assert_within(twin.get(dweight), exact_w, stored(exact_w, error_w, dtype), "dweight")
        exact_b, size_b = b0 + dy.sum(axis=axes), np.abs(b0) + np.abs(dy).sum(axis=axes)
        assert_within(twin.get(dbias), exact_b, stored(exact_b, sum_error(N + 1) * size_b, dtype), "dbias")
        after = twin.get(dinp)  # the sums are those of dinp as it was stored
        exact_s, size_s = s0 + after.sum(axis=axes), np.abs(s0) + np.abs(after).sum(axis=axes)
        if with_sum:
            assert_within(twin.get(dsum), exact_s, stored(exact_s, sum_error(N + 1) * size_s, dtype), "dinp_sum")
        else:
            np.testing.assert_array_equal(twin.get(dsum), s0 if accumulate else np.nan)


def gelu(x):
    out = np.empty_like(x)
    EXACT.gelu.forward(out, x)
    return out


def gelu_slope(x):
    slope = np.ones_like(x)
    EXACT.gelu.backward(slope, x)
    return slope


def gelu_error(x):
    """Of gelu in fp32: tanh and its sum with 1 are some last places of 1 off, whatever is left of it."""
    return 8 * EPS32 * np.abs(x)


def slope_error(x):
    """Of gelu' in fp32: the same of both terms, and the second has a factor of x u'(x) / 2."""
    return 8 * EPS32 * (1 + 0.4 * np.abs(x) * (1 + 0.135 * x**2))


def test_gelu(twin, sizes):
    for shape in sizes((1, 1, 8), (3, 5, 40), None, (1, 1000, 6400), (8, 1024, 3072)):
        inp, dout = normal(*shape) * 3, normal(*shape)
        x, dy = rounded(inp), rounded(dout)
        out, dinp = twin.nan(*shape), twin.put(dout)
        CUDA.gelu.forward(out, twin.put(inp))
        CUDA.gelu.backward(dinp, twin.put(inp))
        assert_within(twin.get(out), gelu(x), stored(gelu(x), gelu_error(x), BF16), "out")
        exact = dy * gelu_slope(x)
        assert_within(twin.get(dinp), exact, stored(exact, np.abs(dy) * slope_error(x), BF16), "dinp")


LINEAR_SIZES = (
    *((1, 1, 8, 8), (2, 5, 24, 40), (1, 70, 264, 272)),
    None,
    *((1, 1000, 1600, 4800), (1, 7, 64, 128), (4, 1024, 768, 2304), (4, 1024, 3072, 768)),
)
CLASSIFIER_SIZE = (1, 1000, 768, 50304)
TANH_ERROR = 2.0**-10.5  # cublasLt's GELU uses the hardware's tanh: PTX ISA, tanh.approx.f32


@pytest.mark.parametrize(("kind", "fusion"), [("plain", 0), ("bias", 0), ("residual", 0), ("gelu", 0), ("gelu", 2)])
def test_linear_forward(twin, sizes, monkeypatch, kind, fusion):
    monkeypatch.setattr(CUDA.linear, "gelu_fusion", fusion)
    for B, T, C, OC in sizes(*LINEAR_SIZES, *[CLASSIFIER_SIZE] * (kind == "plain")):
        inp, weight, bias, skip = normal(B, T, C), normal(OC, C, scale=C**-0.5), normal(OC), normal(B, T, OC)
        out, pre = twin.nan(B, T, OC), twin.nan(B, T, OC)
        options = {"residual": twin.put(skip)} if kind == "residual" else {"pre_gelu": pre} if kind == "gelu" else {}
        given = twin.put(with_one_behind(inp) if kind in ("bias", "gelu") else inp)
        CUDA.linear.forward(*(out, given, twin.put(weight), None if kind == "plain" else twin.put(bias)), **options)
        x, w = rounded(inp).reshape(-1, C), rounded(weight)
        b = 0 if kind == "plain" else rounded(bias)
        r = rounded(skip).reshape(-1, OC) if kind == "residual" else 0
        exact, size = x @ w.T + b + r, np.abs(x) @ np.abs(w).T + np.abs(b) + np.abs(r)
        before = sum_error(C + 2) * size
        actual, pre = (twin.get(array).reshape(-1, OC) for array in (out, pre))
        if kind != "gelu":
            assert_within(actual, exact, stored(exact, before, BF16), "out")
            continue
        assert_within(pre, exact, stored(exact, before, BF16), "pre_gelu")
        if fusion:  # GELU sees the sum before it is rounded; gelu' is at most 1.13
            error = 1.13 * before + gelu_error(exact) + TANH_ERROR * np.abs(exact) / 2
            assert_within(actual, gelu(exact), stored(gelu(exact), error, BF16), "out")
        else:
            assert_within(actual, gelu(pre), stored(gelu(pre), gelu_error(pre), BF16), "out")


# Rows, columns, depth: on the CPU two blocks take several tiles each, the last of which are not whole.
HOPPER_SIZES = ((1, 256, 512), (300, 320, 640), (64, 800, 512), None, (1000, 4096, 1024), (4096, 1600, 4800))


@pytest.fixture
def multiply(twin, monkeypatch):
    """A multiply by Hopper's own kernels."""
    if not hopper(twin):
        pytest.skip("this GPU is no Hopper")
    if not twin.on_gpu:
        monkeypatch.setattr(linear_hopper, "CLUSTER", 1)
        monkeypatch.setattr(cuda, "multiprocessors", lambda: 2)

    def run(epilogue, out, inp, weight, bias, aux=None):
        (M, N), (K, width) = out.shape, (weight.shape[1], inp.shape[1])
        operation = cublaslt.Operation(M, N, K, False, True, BF16, False, epilogue, width)
        linear_hopper.multiply_of(operation)(out, inp, weight, None, bias, aux)
        twin.check_guards()

    return run


@pytest.mark.parametrize("kind", ["plain", "gelu"])
def test_linear_hopper_forward(twin, sizes, multiply, kind):
    for M, N, K in sizes(*HOPPER_SIZES):
        inp, weight, bias = normal(M, K), normal(N, K, scale=K**-0.5), normal(N)
        out, pre = twin.nan(M, N), twin.nan(M, N)
        arrays = out, twin.put(with_one_behind(inp)), twin.put(weight), twin.put(bias)
        if kind == "gelu":
            multiply("GELU_AUX_BIAS", *arrays, pre)
        else:
            multiply("BIAS", *arrays)
        x, w, b = rounded(inp), rounded(weight), rounded(bias)
        exact = x @ w.T + b
        error = stored(exact, sum_error(K + 2) * (np.abs(x) @ np.abs(w).T + np.abs(b)), BF16)
        if kind == "gelu":
            pre = twin.get(pre)
            assert_within(pre, exact, error, "pre")
            exact = gelu(pre)
            error = stored(exact, gelu_error(pre) + TANH_ERROR * np.abs(pre) / 2, BF16)
        assert_within(twin.get(out), exact, error, "out")


@pytest.mark.parametrize(
    "other",
    [
        {"N": 528},  # no multiple of 32
        {"K": 520},
        {"K": 448},  # fewer stages than a tile is finished in
        {"dtype": F32},
        {"transpose_a": True},
        {"transpose_b": False},
        {"epilogue": "DEFAULT"},
        {"add": True},
    ],
    ids=str,
)
def test_what_hopper_s_multiplies_are_not_for(other):
    operation = cublaslt.Operation(64, 512, 512, False, True, BF16, False, "BIAS", 512)
    assert linear_hopper.multiply_of(operation)
    assert linear_hopper.multiply_of(operation._replace(**other)) is None


@pytest.mark.parametrize("dtype", GRAD_DTYPES)
@pytest.mark.parametrize(("kind", "fusion"), [("plain", 0), ("bias", 0), ("gelu", 0), ("gelu", 2)])
@pytest.mark.parametrize("accumulate", ACCUMULATE)
def test_linear_backward(twin, sizes, monkeypatch, accumulate, kind, fusion, dtype):
    monkeypatch.setattr(CUDA.linear, "gelu_fusion", fusion)
    for B, T, C, OC in sizes(*LINEAR_SIZES, *[CLASSIFIER_SIZE] * (kind == "plain")):
        N = B * T
        pre, weight, dout = normal(B, T, C), normal(OC, C, scale=OC**-0.5), normal(B, T, OC)
        inp = gelu(rounded(pre)) if kind == "gelu" else pre
        dinp = twin.nan(B, T, C)
        (dweight, w0), (dbias, b0) = (gradient(twin, accumulate, dtype, *shape) for shape in ((OC, C), (OC,)))
        options = {"gelu": {"pre_gelu": twin.put(pre)}, "bias": {"dbias": dbias}}.get(kind, {})
        given = twin.put(with_one_behind(inp) if kind == "bias" else inp)
        CUDA.linear.backward(
            *(dinp, dweight, twin.put(dout), given, twin.put(weight)), **options, accumulate=accumulate
        )
        x, p = rounded(inp).reshape(N, C), rounded(pre).reshape(N, C)
        w, dy = rounded(weight), rounded(dout).reshape(N, OC)
        exact, error = dy @ w, sum_error(OC) * (np.abs(dy) @ np.abs(w))
        if kind == "gelu":
            slope = gelu_slope(p)
            # Rounded once before, and once after; the fused path seems to do so too.
            tanh = TANH_ERROR * (1 + np.abs(p)) if fusion else 0
            error = stored(exact, error, BF16) * np.abs(slope) + np.abs(exact) * (slope_error(p) + tanh) * (1 + EPS16)
            exact = exact * slope
        assert_within(twin.get(dinp).reshape(N, C), exact, stored(exact, error, BF16), "dinp")
        product, error_w = dy.T @ x, sum_error(N + 1) * (np.abs(w0) + np.abs(dy).T @ np.abs(x))
        if accumulate:  # a product is rounded, by cublasLt if the sum is to be bf16, before what was there is added
            error_w = stored(product, error_w, dtype)
        assert_within(twin.get(dweight), w0 + product, stored(w0 + product, error_w, dtype), "dweight")
        if kind == "bias":
            sums, error_b = dy.sum(axis=0), sum_error(N + 1) * (np.abs(b0) + np.abs(dy).sum(axis=0))
            if accumulate:
                error_b = stored(sums, error_b, dtype)
            assert_within(twin.get(dbias), b0 + sums, stored(b0 + sums, error_b, dtype), "dbias")


@pytest.fixture
def tuned_anew(monkeypatch, tmp_path):
    """cublasLt with an empty cache on the disk, and no table in use."""
    monkeypatch.setattr(tuning, "cache_dir", lambda: tmp_path)
    cublaslt.library.cache_clear()
    yield
    cublaslt.library.cache_clear()


TUNED_SIZES = (
    {"B": 1, "T": 72, "C": 64, "Cx": 80, "Vp": 384},
    {"B": 2, "T": 1024, "C": 768, "Cx": 784, "Vp": 1152},
)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GRAD_DTYPES)
@pytest.mark.parametrize("fusion", [0, 2])
@pytest.mark.parametrize("dims", TUNED_SIZES, ids=lambda dims: f"C={dims['C']}")
def test_each_algorithm_that_may_be_chosen_computes_the_multiply(tuned_anew, dims, fusion, dtype):
    library = cublaslt.library()
    with on("gpu") as twin:
        for op in CUDA.linear.multiplies(dims, dtype, fusion, accumulates=True):
            K, has_gelu = op.K, op.epilogue == "GELU_AUX_BIAS"
            a, b = normal(op.M, K), normal(K, op.N, scale=K**-0.5)
            add, bias, aux = normal(op.M, op.N), normal(op.N), normal(op.M, op.N)
            wide = twin.nan(op.a_shape[0], op.a_width)  # what is behind a row is no part of it
            wide[:, : op.a_shape[1]] = twin.put(a.T if op.transpose_a else a)
            given = (
                wide,
                twin.put(b.T if op.transpose_b else b),
                twin.put(add, op.dtype) if op.add else None,
                twin.put(bias) if "BIAS" in op.epilogue else None,
                twin.nan(op.M, op.N) if has_gelu else twin.put(aux) if op.epilogue == "DGELU" else None,
            )
            x, y = rounded(a), rounded(b)
            product, terms = x @ y, np.abs(x) @ np.abs(y)
            more = [rounded(add, op.dtype)] * op.add + [rounded(bias)] * ("BIAS" in op.epilogue)
            exact = product + sum(more)
            error = sum_error(K + 2) * (terms + sum(np.abs(part) for part in more))
            if op.add:  # the product may be rounded before the sum
                error = stored(product, error, op.dtype)
            summed, summed_error = exact, error
            if has_gelu:  # as in test_linear_forward
                error = 1.13 * error + gelu_error(exact) + TANH_ERROR * np.abs(exact) / 2
                exact = gelu(exact)
            if op.epilogue == "DGELU":  # as in test_linear_backward
                p = rounded(aux)
                slope, tanh = gelu_slope(p), TANH_ERROR * (1 + np.abs(p))
                of_slope = np.abs(exact) * (slope_error(p) + tanh) * (1 + EPS16)
                exact, error = exact * slope, stored(exact, error, BF16) * np.abs(slope) + of_slope
            plan = library._describe(op)
            candidates = library._candidates(op, plan)
            assert 1 <= len(candidates) <= cublaslt.CANDIDATES
            for candidate in candidates:
                out = twin.nan(op.M, op.N, dtype=op.dtype)
                settings = library._settings(candidate)
                assert settings["reduction_scheme"] in (0, 2)  # none, or in fp32
                assert library.accepts(op, candidate.tobytes().hex()), (op.name, settings)
                library._launch(plan._replace(algorithm=candidate), out, *given)
                first = twin.get(out)
                assert_within(first, exact, stored(exact, error, op.dtype), f"{op.name} {settings}")
                if has_gelu:
                    bound = stored(summed, summed_error, BF16)
                    assert_within(twin.get(given[-1]), summed, bound, f"pre_gelu of {op.name} {settings}")
                library._launch(plan._replace(algorithm=candidate), out, *given)
                np.testing.assert_array_equal(twin.get(out), first, err_msg=f"{op.name} {settings}")
            twin.check_guards()


@pytest.mark.gpu
@pytest.mark.parametrize("fusion", [-1, 0])
def test_a_table_gives_the_same_bits_and_the_cache_spares_the_search(tuned_anew, monkeypatch, fusion):
    dims, lines = TUNED_SIZES[1], []
    N, C = dims["B"] * dims["T"], dims["C"]

    def products(twin):
        out, pre, dpre, dweight = (
            twin.nan(N, 4 * C),
            twin.nan(N, 4 * C),
            twin.nan(N, 4 * C),
            twin.put(np.ones((C, 4 * C))),
        )
        inp, wide, weight, bias = (
            twin.put(np.cos(np.arange(math.prod(s))).reshape(s))
            for s in ((N, C), (N, dims["Cx"]), (4 * C, C), (4 * C,))
        )
        CUDA.linear.forward(out, wide, weight, bias, pre_gelu=pre)
        results = [twin.get(out), twin.get(pre)]
        for accumulate in (False, True):
            operands = dpre, dweight, inp, out, weight.reshape(C, 4 * C)
            CUDA.linear.backward(*operands, pre_gelu=pre, accumulate=accumulate)
            results += [twin.get(dpre), twin.get(dweight)]
        return results

    with on("gpu") as twin:
        table = CUDA.tune(dims, fusion, BF16, True, {}, lines.append)
        assert len(table["algorithms"]) == (20 if fusion == -1 else 18)
        assert [line.startswith("timed ") for line in lines] == [True] * (2 if fusion == -1 else 1)
        CUDA.use_tuning(table)
        chosen = CUDA.linear.gelu_fusion
        first = products(twin)
        cublaslt.library.cache_clear()
        monkeypatch.setattr(cublaslt.Library, "fastest", lambda _, op, *__: pytest.fail(f"timed {op.name} again"))
        for saved in ({}, table):
            CUDA.linear.gelu_fusion = 0 if fusion == 0 else (chosen + 1) % 3
            assert CUDA.tune(dims, fusion, BF16, True, saved, pytest.fail) == table
            CUDA.use_tuning(table)
            assert CUDA.linear.gelu_fusion == chosen
            for array, again in zip(first, products(twin), strict=True):
                np.testing.assert_array_equal(array, again)


@pytest.mark.gpu
@pytest.mark.parametrize("dims", TUNED_SIZES, ids=lambda dims: f"C={dims['C']}")
def test_where_gelu_is_follows_from_what_was_timed(tuned_anew, dims):
    with on("gpu"):
        found = CUDA.tune(dims, -1, BF16, False, {}, print)["gelu_fusion"]
    forward, backward = found["us"]["forward"], found["us"]["backward"]
    assert all(us > 0 for us in (*forward.values(), *backward.values()))
    by_level = [
        forward["apart"] + backward["apart"],
        forward["fused"] + backward["apart"],
        forward["fused"] + backward["fused"],
    ]
    # Up to what counts as equal, of either multiply, and the last digit that is told.
    assert by_level[found["level"]] <= min(by_level) + (race.TIE - 1) * max(by_level) + 0.2


class Attention:
    """Attention in float64, with what its roundings in bf16 and fp32 may come to."""

    def __init__(self, qkv, NH):
        B, T, C3 = qkv.shape
        self.shape, self.NH, self.HS = (B, T, C3 // 3), NH, C3 // 3 // NH
        self.q, self.k, self.v = (self.heads(part) for part in np.split(qkv, 3, axis=-1))
        self.scale = self.HS**-0.5
        S = self.scale * self.q @ self.k.swapaxes(2, 3)
        self.masked = np.triu(np.ones((T, T), bool), 1)
        # Of a score: a sum of HS products, and its scaling
        error = self.scale * sum_error(self.HS) * (np.abs(self.q) @ np.abs(self.k).swapaxes(2, 3))
        self.score_error = np.where(self.masked, 0, error + 4 * EPS32 * np.abs(S))
        self.S = np.where(self.masked, -np.inf, S)

    def heads(self, x):
        return x.reshape(*self.shape[:2], self.NH, self.HS).swapaxes(1, 2)

    def joined(self, x):
        return x.swapaxes(1, 2).reshape(self.shape)

    def forward(self):
        """out, its bound, lse, its bound."""
        T = self.S.shape[-1]
        top = self.S.max(axis=-1, keepdims=True)
        P = np.exp(self.S - top)
        total = P.sum(axis=-1, keepdims=True)
        P /= total
        lse = (top + np.log(total))[..., 0]
        # An exponential is off by its argument's error, some last places, and those of the maximum that is subtracted.
        p_error = self.score_error.max(axis=-1, keepdims=True) + 4 * EPS32 * (2 + np.abs(top))
        total_error = p_error + sum_error(T + 2)
        before = (P @ np.abs(self.v)) * (EPS16 + 2 * p_error + total_error + sum_error(T + T // 64 + 2))
        out = P @ self.v
        return (
            self.joined(out),
            self.joined(stored(out, before, BF16)),
            lse,
            total_error[..., 0] + 4 * EPS32 * (np.abs(lse) + 1),
        )

    def backward(self, dout, out, lse):
        """dqkv and its bound, with out and lse as they were stored."""
        T = self.S.shape[-1]
        dy, o, lse = self.heads(dout), self.heads(out), lse[..., None]
        P = np.where(self.masked, 0, np.exp(self.S - lse))
        p_error = P * (self.score_error + 4 * EPS32 * (2 + np.abs(lse)))
        dP, D = dy @ self.v.swapaxes(2, 3), (dy * o).sum(axis=-1, keepdims=True)
        d_error = sum_error(self.HS) * (np.abs(dy) @ np.abs(self.v).swapaxes(2, 3))
        d_error = d_error + sum_error(self.HS) * (np.abs(dy) * np.abs(o)).sum(axis=-1, keepdims=True)
        dS = P * (dP - D)
        s_error = p_error * np.abs(dP - D) + P * d_error + 2 * EPS32 * np.abs(dS)
        # P and dS are rounded to bf16 on their way into the products.
        p_error, s_error = p_error + EPS16 * (P + p_error), s_error + EPS16 * (np.abs(dS) + s_error)
        products = {
            "q": (dS, s_error, self.k, self.scale),
            "k": (dS.swapaxes(2, 3), s_error.swapaxes(2, 3), self.q, self.scale),
            "v": (P.swapaxes(2, 3), p_error.swapaxes(2, 3), dy, 1.0),
        }
        exact, bounds = [], []
        for a, a_error, b, factor in products.values():
            value = factor * a @ b
            before = factor * (a_error @ np.abs(b) + sum_error(T + 2) * (np.abs(a) @ np.abs(b)))
            exact.append(self.joined(value))
            bounds.append(self.joined(stored(value, before + 2 * EPS32 * np.abs(value), BF16)))
        return np.concatenate(exact, axis=-1), np.concatenate(bounds, axis=-1)


ATTENTION_SIZES = (
    *((1, 1, 1, 16), (2, 7, 2, 16), (1, 130, 1, 16), (1, 65, 2, 32), (1, 70, 2, 64), (2, 330, 2, 64), (1, 34, 1, 80)),
    (2, 130, 1, 128),
    None,
    *((2, T, 2, HS) for T in (1, 7, 64, 1000, 1024, 2048) for HS in (64, 128)),
    *((1, 1000, 25, 64), (2, 200, 2, 16), (2, 200, 2, 32), (2, 200, 2, 80), (2, 200, 2, 96)),
)


def among_nan(twin, values, dtype=BF16):
    """values on the device, with 64 rows of NaN before and behind them: even 0 times what is read there shows."""
    rows = values.reshape(-1, values.shape[-1])
    around = np.full((64, rows.shape[1]), np.nan)
    return twin.put(np.concatenate([around, rows, around]), dtype)[64:-64].reshape(values.shape)


@pytest.mark.parametrize("for_hopper", [False, True])
def test_attention(twin, sizes, monkeypatch, for_hopper):
    if for_hopper and not hopper(twin):
        pytest.skip("this GPU is no Hopper")
    monkeypatch.setattr(CUDA.attention, "for_hopper", for_hopper)
    for B, T, NH, HS in sizes(*ATTENTION_SIZES):
        if for_hopper and HS not in CUDA.attention.HOPPER:
            continue
        C = NH * HS
        qkv, dout = normal(B, T, 3 * C) * 1.5, normal(B, T, C)
        later = np.linspace(1, 2.5, T)[:, None]  # in the first head scores grow along the keys
        qkv[..., :HS] *= later
        qkv[..., C : C + HS] *= later
        out, lse = twin.nan(B, T, C), twin.nan(B, NH, T, dtype=F32)
        device_qkv = among_nan(twin, qkv)
        CUDA.attention.forward(out, lse, device_qkv)
        exact = Attention(rounded(qkv), NH)
        exact_out, out_bound, exact_lse, lse_bound = exact.forward()
        assert_within(twin.get(lse), exact_lse, lse_bound, f"lse {B, T, NH, HS}")
        assert_within(twin.get(out), exact_out, out_bound, f"out {B, T, NH, HS}")

        dqkv = twin.nan(B, T, 3 * C)
        device_lse = among_nan(twin, twin.get(lse), F32)
        CUDA.attention.backward(dqkv, among_nan(twin, dout), device_qkv, out, device_lse)
        exact_dqkv, bound = exact.backward(rounded(dout), twin.get(out), twin.get(lse))
        assert_within(twin.get(dqkv), exact_dqkv, bound, f"dqkv {B, T, NH, HS}")
        twin.check_guards()


def test_attention_in_float64_is_the_specification():
    """The bounds above hold to the numpy twin, not to a second opinion."""
    B, T, NH, HS = 2, 70, 2, 16
    qkv, dout = normal(B, T, 3 * NH * HS), normal(B, T, NH * HS)
    out, lse, dqkv = np.empty_like(dout), np.empty((B, NH, T)), np.empty_like(qkv)
    EXACT.attention.forward(out, lse, qkv)
    EXACT.attention.backward(dqkv, dout, qkv, out, lse)
    exact = Attention(qkv, NH)
    again, _, lse_again, _ = exact.forward()
    np.testing.assert_allclose(again, out, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(lse_again, lse, rtol=1e-12)
    np.testing.assert_allclose(exact.backward(dout, out, lse)[0], dqkv, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("for_hopper", [False, True])
def test_attention_is_stable_and_causal(twin, monkeypatch, for_hopper):
    """Scores of 1e4 do not overflow, and what comes later reaches nothing before it."""
    if for_hopper and not hopper(twin):
        pytest.skip("this GPU is no Hopper")
    monkeypatch.setattr(CUDA.attention, "for_hopper", for_hopper)
    B, T, NH, HS = 1, 70, 1, 64 if for_hopper else 16
    qkv = normal(B, T, 3 * HS) * 100
    results = []
    for _ in range(2):
        out, lse = twin.nan(B, T, HS), twin.nan(B, NH, T, dtype=F32)
        CUDA.attention.forward(out, lse, twin.put(qkv))
        results.append((twin.get(out)[:, :66], twin.get(lse)[..., :66]))
        qkv[:, 66:] = -qkv[:, 66:]
    assert np.isfinite(results[0][0]).all()
    assert np.isfinite(results[0][1]).all()
    for first, second in zip(*results, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("for_hopper", [False, True])
@pytest.mark.parametrize("row", [65, 74])
def test_attention_of_one_row_that_grows(twin, monkeypatch, for_hopper, row):
    """A score of 512, 64 keys on, whatever the other rows of its warp have: either row that a thread has a part of."""
    if for_hopper and not hopper(twin):
        pytest.skip("this GPU is no Hopper")
    monkeypatch.setattr(CUDA.attention, "for_hopper", for_hopper)
    B, T, NH, HS = 1, 80, 1, 64
    qkv = np.zeros((B, T, 3, HS))
    qkv[:, row, :2], qkv[:, :, 2] = 8, normal(B, T, HS)
    out, lse = twin.nan(B, T, HS), twin.nan(B, NH, T, dtype=F32)
    CUDA.attention.forward(out, lse, twin.put(qkv.reshape(B, T, 3 * HS)))
    np.testing.assert_array_equal(twin.get(out)[0, row], rounded(qkv[0, row, 2]))
    np.testing.assert_allclose(twin.get(lse)[0, 0, [row - 1, row]], [np.log(row), 512], rtol=1e-6)


@pytest.fixture
def hopper_attention(twin, monkeypatch):
    """Runs Hopper's kernels with so many heads in the tail; of a kernel named, its first blocks alone.

    Returns (out, lse, dqkv).
    """
    if not hopper(twin):
        pytest.skip("this GPU is no Hopper")
    attention, launch = CUDA.attention, kernels.launch
    monkeypatch.setattr(attention, "for_hopper", True)

    def run(B, T, NH, HS, tail, qkv, dout, named="", first_blocks=0):
        tails = []

        def launched(source, name, grid, *rest, **options):
            if source == "attention_hopper":
                tails.append(rest[-4])
                grid = (first_blocks,) if name == f"attention_hopper_{named}" else grid
            launch(source, name, grid, *rest, **options)

        monkeypatch.setattr(kernels, "launch", launched)
        with_tail = {
            name: block._replace(room=2 * (-(-T // (64 * block.groups)) + 1) * tail // 5)
            for name, block in attention.HOPPER[HS].items()
        }
        monkeypatch.setattr(attention, "HOPPER", {HS: with_tail})
        monkeypatch.setattr(attention, "MULTIPROCESSORS", 1)
        C = NH * HS
        out, lse, dqkv = twin.nan(B, T, C), twin.nan(B, NH, T, dtype=F32), twin.nan(B, T, 3 * C)
        device_qkv = twin.put(qkv)
        attention.forward(out, lse, device_qkv)
        attention.backward(dqkv, twin.put(dout), device_qkv, out, lse)
        assert tails == 3 * [tail]
        twin.check_guards()
        return [twin.get(array) for array in (out, lse, dqkv)]

    return run


@pytest.mark.parametrize("HS", [64, 128])
def test_hopper_attention_in_any_order(hopper_attention, HS):
    """No bit depends on the order in which blocks start."""
    B, T, NH = 2, 150, 2
    qkv, dout = normal(B, T, 3 * NH * HS), normal(B, T, NH * HS)
    results = [hopper_attention(B, T, NH, HS, tail, qkv, dout) for tail in (0, 1, 3, B * NH)]
    for arrays in zip(*results, strict=True):
        assert np.isfinite(arrays[0]).all()
        for other in arrays[1:]:
            np.testing.assert_array_equal(other, arrays[0])


@pytest.mark.parametrize("HS", [64, 128])
@pytest.mark.parametrize(("name", "array", "part"), [("forward", 0, 0), ("backward_q", 2, 0), ("backward_kv", 2, 1)])
def test_hopper_attention_begins_with_the_longest(hopper_attention, HS, name, array, part):
    """A head's longest block, and where the tail begins its heads' longest: by what the first blocks alone have stored.

    Of forward and over queries the last blocks have the longest way to go, over keys the first.
    """
    B, T, NH, tail = 2, 150, 2, 3
    rows = 64 * CUDA.attention.HOPPER[HS][name].groups
    shares = range(-(-T // rows))
    order = [(0, share) for share in shares] + [(head, share) for share in shares for head in range(1, B * NH)]
    qkv, dout = normal(B, T, 3 * NH * HS), normal(B, T, NH * HS)
    for first_blocks in (1, len(shares) + 2):
        result = hopper_attention(B, T, NH, HS, tail, qkv, dout, name, first_blocks)[array]
        stored_rows = np.isfinite(result.reshape(B, T, -1, NH, HS)[:, :, part]).all(-1)
        expected = np.zeros((B, NH, T), bool)
        for head, share in order[:first_blocks]:
            block = share if name == "backward_kv" else shares[-1] - share
            expected[head // NH, head % NH, block * rows : (block + 1) * rows] = True
        np.testing.assert_array_equal(stored_rows, expected.swapaxes(1, 2))


def hopper(twin):
    """Whether Hopper's kernels run here: on the CPU they do."""
    return twin.name != "gpu" or cuda.compute_capability() == 90


CLASSIFIER_SIZES = ((1, 1, 1, 8), (1, 3, 50, 128), (1, 2, 9000, 9088), None, (1, 1000, 50257, 50304))


@pytest.mark.parametrize("held", [True, False])
def test_classifier(twin, sizes, monkeypatch, held):
    """With the row in shared memory, and as on a device that has too little of it."""
    if not held:
        monkeypatch.setattr(cuda, "shared_memory_limit", lambda: 0)
    dloss = 0.3
    for B, T, V, Vp in sizes(*CLASSIFIER_SIZES):
        logits, targets = normal(B, T, Vp) * 4, tokens(V, B, T)
        targets[0, 0] = V - 1
        logits[..., V:] = 100.0  # padding that would win
        x = rounded(logits)
        # A thread adds up its part of a row, and then 10 additions join the threads.
        n = -(-Vp // 1024) + 16
        top = x[..., :V].max(axis=-1, keepdims=True)
        p = np.exp(x[..., :V] - top)
        total = p.sum(axis=-1, keepdims=True)
        p /= total
        picked = np.take_along_axis(x, targets[..., None], 2)
        exact = (np.log(total) + top - picked)[..., 0]
        bound = (n * EPS32 + 4 * EPS32 * (np.abs(top) + np.abs(np.log(total)) + np.abs(picked)))[..., 0]

        losses, device_targets = twin.nan(B, T, dtype=F32), twin.put(targets, np.int32)
        CUDA.classifier.forward(losses, twin.put(logits), device_targets, V)
        assert_within(twin.get(losses), exact, bound, "losses")

        again, dlogits = twin.nan(B, T, dtype=F32), twin.put(logits)
        CUDA.classifier.forward_backward(again, dlogits, device_targets, V, dloss)
        np.testing.assert_array_equal(twin.get(again), twin.get(losses))
        gradient = p.copy()
        np.put_along_axis(gradient, targets[..., None], np.take_along_axis(p, targets[..., None], 2) - 1, 2)
        before = dloss * ((n + 8) * EPS32 * p + 2 * EPS32 * np.abs(gradient))
        actual = twin.get(dlogits)
        bound = stored(dloss * gradient, before, BF16)
        assert_within(actual[..., :V], dloss * gradient, bound, "dlogits")
        np.testing.assert_array_equal(actual[..., V:], 0)

        mean = twin.put(np.array(0.5), np.float64)
        CUDA.classifier.add_mean(mean, losses, 0.25)
        np.testing.assert_allclose(twin.get(mean), 0.5 + 0.25 * twin.get(losses).mean(), rtol=1e-13)


@pytest.mark.parametrize("shift", [0.0, -3e4])
def test_classifier_is_stable(twin, shift):
    logits = np.full((1, 1, 128), -np.inf)
    logits[0, 0, :3] = np.array([1e4, -1e4, 0.0]) + shift
    losses = twin.nan(1, 1, dtype=F32)
    CUDA.classifier.forward(losses, twin.put(logits), twin.put(np.array([[1]]), np.int32), 3)
    highest, target = rounded(logits)[0, 0, :2]
    np.testing.assert_allclose(twin.get(losses), highest - target)


@pytest.mark.gpu
def test_more_than_two_to_the_31_logits():
    """The last rows lie beyond what 32 bits can index: they get what the same rows get at the beginning."""
    if os.environ.get("SMALL_SIZES"):
        pytest.skip("$SMALL_SIZES is set, and this takes 4 GB")
    rows, copies, V, Vp = 100, 430, 50257, 50304
    assert rows * copies * Vp > 2**31
    with on("gpu") as twin:
        import cupy

        some, targets = normal(rows, Vp) * 4, tokens(V, rows)
        logits = cupy.tile(twin.put(some), (copies, 1)).reshape(1, rows * copies, Vp)
        losses = twin.nan(1, rows * copies, dtype=F32)
        CUDA.classifier.forward_backward(losses, logits, twin.put(np.tile(targets, copies), np.int32), V, 0.3)
        for found in (losses[0], logits[0]):
            np.testing.assert_array_equal(twin.get(found[:rows]), twin.get(found[-rows:]))
        assert (twin.get(losses) > 0).all()


# Slices of a buffer, in any order: of one block, of several, of one more than a launch takes.
NORM_SLICES = (
    *([(0, 8)], [(128, 20_000), (0, 128)], [(8 * i, 8 * (i + 1 + i % 3)) for i in range(65)]),
    None,
    *([(0, 10_000_000)], [(30_000_000, 31_000_000), (0, 30_000_000)]),
)


@pytest.mark.parametrize("dtype", GRAD_DTYPES)
def test_global_norm(twin, sizes, dtype):
    for slices in sizes(*NORM_SLICES):
        grads, out = normal(max(map(max, slices)) + 8), twin.nan(len(slices), dtype=np.float64)
        CUDA.norm.squared(out, twin.put(grads, dtype), twin.put(np.array(slices), np.int64))
        exact = [(rounded(grads[start:stop], dtype) ** 2).sum() for start, stop in slices]
        # A thread adds up 8 squares in fp32; everything else is added in fp64.
        np.testing.assert_allclose(twin.get(out), exact, rtol=10 * EPS32)


@pytest.mark.parametrize("dtype", GRAD_DTYPES)
def test_global_norm_of_a_slice_depends_on_its_elements_alone(twin, dtype):
    """Nor on where they lie, nor on what there is beside them: then ranks share a model out as they like."""
    some, others = (normal(n) * 2.0 ** RNG.integers(-30, 30, n) for n in (20_000, 50_000))
    found = []
    for before, behind in ((0, 0), (1000, 0), (800, 40_000)):
        grads = np.concatenate([others[:before], some, others[:behind]])
        out, slices = twin.nan(2, dtype=np.float64), [(0, 8), (before, before + some.size)]
        CUDA.norm.squared(out, twin.put(grads, dtype), twin.put(np.array(slices), np.int64))
        found.append(twin.get(out)[1])
    assert found == [found[0]] * 3


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", GRAD_DTYPES)
def test_sum_slices(twin, sizes, dtype, add):
    """Bit for bit what numpy gives: the same additions of fp32 numbers, in the same order, and one rounding."""
    for W, n in sizes((1, 8), (3, 128), (8, 40), (9, 2056), (19, 16), None, (4, 10_000_000), (8, 1_000_000)):
        slices, before = normal(W, n) * 2.0 ** RNG.integers(-12, 12, (W, 1)), normal(n)
        out = twin.put(before, dtype)
        CUDA.reduce.sum_slices(out, twin.put(slices, dtype), add)
        exact = before.astype(dtype)
        EXACT.reduce.sum_slices(exact, slices.astype(dtype), add)
        np.testing.assert_array_equal(twin.get(out), exact.astype(np.float64))


def test_total(twin):
    for n in (1, 5, 1000):
        parts, out = normal(n), twin.put(np.array(np.nan), np.float64)
        CUDA.scalars.total(out, twin.put(parts, np.float64), 4)
        np.testing.assert_allclose(twin.get(out), math.fsum(parts) / 4, atol=n * 2**-53 * np.abs(parts).sum(), rtol=0)


ADAMW = {"beta1": 0.9, "beta2": 0.95, "decayed": 1032}


def schedule(t):
    return np.array(EXACT.adamw.Schedule.of(t, 0.01, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1))


@pytest.mark.parametrize("dtype", GRAD_DTYPES)
def test_adamw(twin, sizes, dtype):
    """The moments and masters to some roundings in fp32; the parameters are the masters, rounded to nearest."""
    for n in sizes(8, 2056, None, 1 << 20):
        values, grads, m0, v0 = normal(n), normal(n), normal(n) * 0.1, normal(n) ** 2
        grads[0], m0[0], v0[0] = 0, 1e-7, 1e-12  # where eps counts
        m, v = (twin.put(x, F32) for x in (m0, v0))
        params, remainder = in_bf16(twin, values)
        scalars = [twin.put(x, np.float64) for x in (np.array(0.5), np.array(0.0), schedule(3))]
        CUDA.adamw.update(params, remainder, m, v, twin.put(grads, dtype), *scalars, **ADAMW)
        x, em, ev, g = (rounded(value, F32) for value in (values, m0, v0, rounded(grads, dtype)))
        size_m, before = 0.9 * np.abs(em) + 0.05 * np.abs(g), x.copy()
        EXACT.adamw.update(x, None, em, ev, g, np.array(0.5), np.array(0), schedule(3), **ADAMW)
        assert_within(twin.get(m), em, 4 * EPS32 * size_m, "m")
        assert_within(twin.get(v), ev, 6 * EPS32 * ev, "v")
        step = 0.01 / (1 - 0.9**3) * math.sqrt(1 - 0.95**3) * size_m / np.sqrt(ev)
        master = masters(twin, params, remainder)
        assert_within(master, x, 4 * EPS32 * np.abs(before) + 16 * EPS32 * step, "master")
        np.testing.assert_array_equal(twin.get(params), rounding.split(master)[0].astype(np.float64))


def in_bf16(twin, values):
    """Parameters and their remainders."""
    params, remainder = rounding.split(values.astype(F32))
    return twin.put(params), twin.put(remainder, np.uint16)


def masters(twin, params, remainder):
    """Parameters and their remainders, in float32."""
    return rounding.join(twin.get(params).astype(BF16), twin.get(remainder))


def test_adamw_loses_no_digit_of_its_parameters(twin):
    """Decay alone, whose one product is rounded alike in numpy: of ties too, of 0, and of what is not a number."""
    values = np.concatenate([normal(2048), [np.inf, -np.inf, 0.0, -0.0, 1 + 2**-8, -1 - 2**-8, 2**-126, -(2**-130)]])
    n = values.size
    moments = np.zeros((2, n), F32)
    moments[0, 5] = np.array(0x7FFFFFFF, np.uint32).view(F32)  # the NaN that a GPU computes: rounded up it is -0
    for decayed in (0, n):
        params, remainder = in_bf16(twin, values)
        m, v = (twin.put(x, F32) for x in moments)
        scalars = [twin.put(x, np.float64) for x in (np.array(1.0), np.array(0.0), schedule(5))]
        options = ADAMW | {"decayed": decayed}
        CUDA.adamw.update(params, remainder, m, v, twin.put(np.zeros(n)), *scalars, **options)
        expected = values.astype(F32) * (F32.type(1 - 0.01 * 0.1) if decayed else F32.type(1))
        expected[5] = np.nan
        rounds, rest = rounding.split(expected)
        np.testing.assert_array_equal(masters(twin, params, remainder), expected)
        np.testing.assert_array_equal(twin.get(params), rounds.astype(np.float64))
        numbers = ~np.isnan(expected)
        np.testing.assert_array_equal(twin.get(remainder)[numbers], rest[numbers])


def test_adamw_takes_its_schedule_from_memory(twin):
    """The same call with the same arrays, whose values have changed: as if it had been given other arrays."""
    n = 2056
    values, scalars = [normal(n), normal(n) ** 2], [twin.put(np.array(x), np.float64) for x in (1.0, 0.0)]
    grads, now = twin.put(normal(n)), twin.put(schedule(1), np.float64)

    def updated(at, decayed):
        moments = [twin.put(values[1], F32) for _ in range(2)]
        both = in_bf16(twin, values[0]), (twin.put(values[0]), None)
        for params, remainder in both:
            options = {"seed": 7, "beta1": 0.9, "beta2": 0.95, "decayed": decayed}
            CUDA.adamw.update(params, remainder, *moments, grads, *scalars, at, **options)
        return [twin.get(x) for x in (*(params for params, _ in both), both[0][1], *moments)]

    found = []
    for t in (1, 900):
        now[:] = twin.put(schedule(t), np.float64)
        for decayed in (n, 0):
            found.append(updated(now, decayed))
            for ours, fresh in zip(found[-1], updated(twin.put(schedule(t), np.float64), decayed), strict=True):
                np.testing.assert_array_equal(ours, fresh)
    for one, other in combinations(found, 2):
        assert (one[0] != other[0]).any()
        assert (one[1] != other[1]).any()


def test_adamw_without_remainders_rounds_at_random_as_numpy_does(twin):
    """Decay alone, whose one product both sides round alike in fp32: then every random bit shows."""
    n, first = 2056, (5 << 35) + (1 << 12)
    values = np.concatenate([normal(n - 2), [np.inf, 0.0]])
    moments = np.zeros((2, n), F32)
    moments[0, 5] = np.array(0x7FFFFFFF, np.uint32).view(F32)  # the NaN that a GPU computes: rounded up it is -0
    params, m, v = twin.put(values), *(twin.put(x, F32) for x in moments)
    scalars = [twin.put(x, np.float64) for x in (np.array(1.0), np.array(0.0), schedule(5))]
    key = {"seed": 7, "stream": 3, "first": first}
    CUDA.adamw.update(params, None, m, v, twin.put(np.zeros(n)), *scalars, **ADAMW, **key)
    decayed = values.astype(BF16).astype(F32)
    decayed[: ADAMW["decayed"]] *= F32.type(1 - 0.01 * 0.1)
    decayed[5] = np.nan
    bits = rounding.random_bits(first, n, seed=7, t=5, stream=3)
    np.testing.assert_array_equal(twin.get(params), rounding.stochastic(decayed, bits).astype(np.float64))
    spec = values.astype(BF16)
    EXACT.adamw.update(spec, None, *moments, np.zeros(n, F32), np.array(1.0), np.array(0), schedule(5), **ADAMW, **key)
    np.testing.assert_array_equal(twin.get(params), spec.astype(np.float64))


def test_adamw_skips(twin):
    n = 2056
    values = [normal(n) for _ in range(3)]
    params, remainder = in_bf16(twin, values[0])
    moments = [twin.put(x, F32) for x in values[1:]]
    scalars = [twin.put(x, np.float64) for x in (np.array(1.0), np.array(1.0), schedule(1))]
    for those in (remainder, None):
        CUDA.adamw.update(params, those, *moments, twin.put(np.full(n, np.nan)), *scalars, **ADAMW)
    np.testing.assert_array_equal(masters(twin, params, remainder), values[0].astype(F32))
    for array, kept in zip(moments, values[1:], strict=True):
        np.testing.assert_array_equal(twin.get(array), rounded(kept, F32))


@pytest.mark.parametrize("limits", [{}, {"max_loss_z": 2.0, "max_norm": 1.1}, {"max_norm_z": 2.0}])
def test_guard(twin, limits):
    """Decision by decision as numpy's, over a run with spikes, NaN and infinity in it."""
    limits = {"max_norm": 1.0, "max_loss_z": math.inf, "max_norm_z": math.inf} | limits
    count = 300 if twin.on_gpu else 150
    losses, norms = RNG.normal(size=count) + 3, RNG.random(count) + 0.5
    losses[[20, 140]], norms[[30, 145]] = (np.nan, 50.0), (np.inf, 40.0)
    exact = EXACT.guard.Decision(*(np.zeros(()) for _ in EXACT.guard.Decision._fields))
    windows = np.zeros((2, EXACT.guard.WINDOW + 1))
    ours = CUDA.guard.Decision(*(twin.put(np.array(np.nan), np.float64) for _ in exact))
    our_windows = [twin.put(window, np.float64) for window in windows]
    for loss, norm in zip(losses, norms, strict=True):
        scalars = np.array(loss), np.array(norm**2)
        EXACT.guard.decide(exact, *windows, *scalars, **limits)
        CUDA.guard.decide(ours, *our_windows, *(twin.put(x, np.float64) for x in scalars), **limits)
        for name, a, b in zip(exact._fields, ours, exact, strict=True):
            np.testing.assert_allclose(twin.get(a), b, rtol=1e-10, atol=1e-12, err_msg=name)
    for a, b in zip(our_windows, windows, strict=True):
        np.testing.assert_allclose(twin.get(a), b, rtol=1e-14)


def test_guard_of_a_run_that_stands_still(twin):
    """Without any deviation a score is 0, not a quotient of zeros."""
    window = np.full(EXACT.guard.WINDOW + 1, 3.0)
    window[-1] = EXACT.guard.WINDOW
    ours = CUDA.guard.Decision(*(twin.put(np.array(np.nan), np.float64) for _ in EXACT.guard.Decision._fields))
    arrays = (twin.put(x, np.float64) for x in (window, window, np.array(3.0), np.array(9.0)))
    CUDA.guard.decide(ours, *arrays, max_norm=1.0, max_loss_z=2.0, max_norm_z=2.0)
    assert (twin.get(ours.loss_z), twin.get(ours.norm_z), twin.get(ours.skip)) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_sampling(twin, sizes, temperature):
    for B, V, Vp in sizes((1, 1, 8), (3, 50, 128), (4, 1000, 1024), None, (50, 50257, 50304)):
        logits, coins = normal(B, Vp) * 3, RNG.random(B)
        logits[1:2] -= 100  # none above 0
        logits[:, V:] = 100.0
        logits[0, V // 2] = logits[0, V - 1] = logits[0, :V].max()  # of equals the first
        coins[-1] = 1 - 2**-53
        out, exact = twin.put(np.full(B, -1), np.int32), np.empty(B, np.int32)
        CUDA.sampling.sample(out, twin.put(logits), V, twin.put(coins, np.float64), temperature)
        EXACT.sampling.sample(exact, rounded(logits), V, coins, temperature)
        np.testing.assert_array_equal(twin.get(out), exact)
