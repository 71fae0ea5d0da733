"""GPT-2 against independent implementations: transformers' GPT2LMHeadModel, and PyTorch's generator."""

import numpy as np
import pytest

from engine.config import GPT2Config
from engine.models.gpt2 import initialize
from engine.models.torch_random import TorchGenerator
from tests.test_gpt2 import batch, gradients, make

torch = pytest.importorskip("torch", reason='PyTorch is not installed: pip install -e ".[oracle]"')

CONFIG = GPT2Config(maxT=32, V=97, L=3, NH=4, C=32)
B, T = 3, 24

# Ours -> transformers', whose Conv1D keeps matrices as (in, out)
NAMES = {
    "ln1w": "ln_1.weight",
    "ln1b": "ln_1.bias",
    "qkvw": "attn.c_attn.weight",
    "qkvb": "attn.c_attn.bias",
    "attprojw": "attn.c_proj.weight",
    "attprojb": "attn.c_proj.bias",
    "ln2w": "ln_2.weight",
    "ln2b": "ln_2.bias",
    "fcw": "mlp.c_fc.weight",
    "fcb": "mlp.c_fc.bias",
    "fcprojw": "mlp.c_proj.weight",
    "fcprojb": "mlp.c_proj.bias",
}
TRANSPOSED = {"qkvw", "attprojw", "fcw", "fcprojw"}
TOP = {"wte": "wte.weight", "wpe": "wpe.weight", "lnfw": "ln_f.weight", "lnfb": "ln_f.bias"}


def peers(name: str, state: dict) -> "torch.Tensor":
    """The tensor of transformers' state that our `name` is, in our layout, without the padding of the vocabulary."""
    if name in TOP:
        return state[f"transformer.{TOP[name]}"].detach()
    _, layer, short = name.split(".")
    value = state[f"transformer.h.{layer}.{NAMES[short]}"].detach()
    return value.T if short in TRANSPOSED else value


def in_our_layout(name: str, state: dict) -> np.ndarray:
    return peers(name, state).numpy()


def test_gpt2_is_transformers_gpt2():
    """Same random weights: logits, loss and every gradient agree, in float64.

    The bound: both round in different orders. A sum of n terms is off by about sqrt(n) * 2^-53 of the terms' size; the
    longest here has B * T * 4C = 9,216 terms, which is 1e-14; the network is 3 layers deep, and softmax and layernorm
    enlarge what comes in. 1e-12 of each tensor's largest value leaves them a factor of 30, and no room for a mistake.
    """
    transformers = pytest.importorskip(
        "transformers", reason='transformers is not installed: pip install -e ".[oracle]"'
    )
    peer = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=CONFIG.V,
            n_positions=CONFIG.maxT,
            n_embd=CONFIG.C,
            n_layer=CONFIG.L,
            n_head=CONFIG.NH,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    ).double()
    ours = make(CONFIG, B=B, T=T, dtype=np.float64, std=0.15)
    state = dict(peer.named_parameters())
    with torch.no_grad():
        for name, view in ours.params.views.items():
            in_our_layout(name, state)[...] = view[: CONFIG.V] if name == "wte" else view
    inp, targets = batch(CONFIG, B=B, T=T)

    logits = peer(torch.from_numpy(inp).long()).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).long().flatten())
    loss.backward()
    our_logits = ours.forward(inp)[..., : CONFIG.V].copy()
    losses, grads = gradients(ours, inp, targets)

    def assert_close(actual, expected, name):
        assert actual.shape == expected.shape
        error = np.abs(actual - expected).max() / np.abs(expected).max()
        assert error < 1e-12, f"{name}: off by {error:.1e} of its largest value"

    assert_close(our_logits, logits.detach().numpy(), "logits")
    assert abs(losses.mean() - loss.item()) < 1e-12 * loss.item()
    expected = {name: parameter.grad for name, parameter in state.items()}
    for name, grad in grads.items():
        assert_close(grad[: CONFIG.V] if name == "wte" else grad, in_our_layout(name, expected), name)


@pytest.mark.parametrize("shape", [(16,), (4, 8), (17,), (5, 13), (300, 257)])
def test_normal_draws_are_pytorch_s(shape):
    """To float32 rounding: PyTorch's vectorised logarithm and cosine round differently in the last place."""
    generator, peer = TorchGenerator(42), torch.Generator().manual_seed(42)
    for _ in range(3):
        expected = torch.empty(shape).normal_(0.0, 0.02, generator=peer).numpy()
        np.testing.assert_allclose(generator.normal(shape, 0.02), expected, rtol=0, atol=0.02 * 2**-20)


def test_initial_values_are_those_of_a_pytorch_gpt2_with_seed_42():
    from tests.torch_gpt2 import TorchGPT2

    ours, peer = make(CONFIG, B=1, T=1, dtype=np.float32), TorchGPT2(CONFIG, seed=42)
    initialize(CONFIG, ours.params.views, 42)
    names = {"attn.c_attn": "c_attn", "attn.c_proj": "attn_proj", "mlp.c_fc": "c_fc", "mlp.c_proj": "mlp_proj"}
    state = dict(peer.named_parameters())
    for name, view in ours.params.views.items():
        if name in TOP:
            expected = state[TOP[name]]
        else:
            _, layer, short = name.split(".")
            module, kind = NAMES[short].rsplit(".", 1)
            expected = state[f"h.{layer}.{names.get(module, module)}.{kind}"]
        actual = view[: CONFIG.V] if name == "wte" else view
        np.testing.assert_allclose(actual, expected.detach().numpy(), rtol=0, atol=0.02 * 2**-20, err_msg=name)
