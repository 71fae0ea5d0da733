"""The whole model: every parameter's gradient proved, and what must not change a result does not."""

import numpy as np
import pytest

from engine import device, ops
from engine.config import GPT2Config, model_from_descriptor
from engine.models.gpt2 import GPT2, initialize, parameter_table
from tests.gradcheck import STEP, assert_gradient

TINY = GPT2Config(maxT=7, V=11, L=2, NH=2, C=4)
B, T = 2, 5


def make(config=TINY, B=B, T=T, dtype=np.float64, recompute=0, seed=0, std=0.3) -> GPT2:
    """A model whose every parameter is random (at init biases are zero and layernorms do nothing)."""
    model = GPT2(
        config,
        ops.load("numpy"),
        device.load("numpy"),
        B=B,
        T=T,
        recompute=recompute,
        dtype=dtype,
        statistic_dtype=dtype,
    )
    make_parameters(config, model.params.views, seed, std)
    return model


def make_parameters(config, params, seed=0, std=0.3) -> None:
    """params = random values; those of the padded vocabulary zero."""
    rng = np.random.default_rng(seed)
    for name, line, _ in parameter_table(config):
        params[name][...] = rng.normal(1.0 if line.init == "1" else 0.0, std, params[name].shape)
    params["wte"][config.V :] = 0


def batch(config=TINY, B=B, T=T, seed=1):
    rng = np.random.default_rng(seed)
    inp, targets = rng.integers(0, config.V, (2, B, T)).astype(np.int32)
    return inp, targets


def gradients(model, inp, targets):
    """Of this batch, whatever there was before."""
    for view in model.grads.views.values():
        view.fill(np.nan)
    model.forward(inp)
    losses = model.backward(inp, targets, 1 / inp.size, accumulate=False)
    return losses.copy(), {name: grad.copy() for name, grad in model.grads.views.items()}


@pytest.mark.parametrize("recompute", [0, 1, 2])
def test_every_gradient_is_the_complex_step_derivative(recompute):
    inp, targets = batch()
    model, twin = make(recompute=recompute), make(dtype=np.complex128)
    _, grads = gradients(model, inp, targets)

    for name, view in twin.params.views.items():
        flat, exact = view.reshape(-1), np.empty(view.size)
        for i in range(view.size):
            flat[i] += 1j * STEP
            twin.forward(inp)
            exact[i] = twin.losses(targets).mean().imag / STEP
            flat[i] = flat[i].real
        assert_gradient(grads[name], exact.reshape(view.shape), name)


def test_padded_vocabulary_has_no_gradient():
    assert TINY.Vp == 128
    _, grads = gradients(make(), *batch())
    np.testing.assert_array_equal(grads["wte"][TINY.V :], 0)


def test_recomputation_gives_the_same_bits():
    results = [gradients(make(dtype=np.float32, recompute=level), *batch()) for level in (0, 1, 2)]
    for losses, grads in results[1:]:
        np.testing.assert_array_equal(losses, results[0][0])
        for name, grad in grads.items():
            np.testing.assert_array_equal(grad, results[0][1][name], err_msg=name)


def test_recomputation_takes_less_memory():
    sizes = [make(recompute=level).acts.nbytes for level in (0, 1, 2)]
    assert sizes[0] > sizes[1] > sizes[2]


def test_gradients_accumulate():
    model = make()
    first, second = batch(seed=1), batch(seed=2)
    (_, a), (_, b) = gradients(model, *first), gradients(model, *second)
    for inp, targets in (first, second):
        model.forward(inp)
        model.backward(inp, targets, 1 / inp.size, accumulate=inp is second[0])
    for name, grad in model.grads.views.items():
        np.testing.assert_allclose(grad, a[name] + b[name], rtol=0, atol=1e-14 * np.abs(a[name]).max() * 10)


def test_smaller_batches_use_the_same_memory_and_do_not_see_beyond_themselves():
    """A (1,3) batch in a (B,T) model gives what a (1,3) model gives, whatever lay in memory before."""
    model, small = make(dtype=np.float32), make(B=1, T=3, dtype=np.float32)
    gradients(model, *batch())
    inp, targets = batch(B=1, T=3)
    losses, grads = gradients(model, inp, targets)
    small_losses, small_grads = gradients(small, inp, targets)
    np.testing.assert_array_equal(losses, small_losses)
    for name, grad in grads.items():
        np.testing.assert_array_equal(grad, small_grads[name], err_msg=name)


def test_parameter_counts_are_llmc_s():
    published = {6: 30_357_504, 12: 124_475_904, 24: 354_871_296, 36: 774_090_240, 48: 1_557_686_400}
    for L, count in published.items():
        assert model_from_descriptor(f"d{L}", 50257, 1024).num_parameters == count
    assert model_from_descriptor("gpt3:c768", 50257, 2048).num_parameters == 125_262_336
    assert TINY.num_parameters == sum(tensor.size for tensor in make().params.tensors)


def test_initial_values():
    config = GPT2Config(maxT=8, V=200, L=2, NH=2, C=32)
    model = make(config, dtype=np.float32)
    initialize(config, model.params.views, 42)
    p = model.params.views
    for name, std in (
        ("wte", 0.02),
        ("h.1.fcw", 0.02),
        ("h.0.fcprojw", 0.02 / 2),
        ("h.1.attprojw", 0.02 / 2),
    ):
        values = p[name][: config.V]
        assert abs(values.std() / std - 1) < 0.1
    np.testing.assert_array_equal(p["wte"][config.V :], 0)
    np.testing.assert_array_equal(p["h.0.ln1w"], 1)
    np.testing.assert_array_equal(p["h.0.qkvb"], 0)
