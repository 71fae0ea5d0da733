"""The whole GPT-2 on the CUDA operations, on a GPU and by the shim, against numpy in float64 and against transformers.

How far may it be off? Every operation rounds what it stores to bf16, and these errors go through the rest of the model.
How they add up there is measured, not guessed: numpy computes the same in float64, with every stored value multiplied
by 1 + u, u uniform in [-2^-8, 2^-8], the largest rounding error. What that does to a tensor, as a norm and the worst of
some draws, is what one rounding an operation explains. Attention rounds a second time inside, P and dS, so twice that
is the bound.
"""

import os
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest

from engine import device, ops
from engine.comm.one import OneRank
from engine.config import GPT2Config, RunConfig
from engine.device import cublaslt, cuda, kernels
from engine.models.gpt2 import GPT2, decayed
from engine.ops.cuda import linear, linear_hopper
from engine.ops.numpy import rounding
from engine.optimizer import AdamW
from engine.zero import Zero
from tests.test_gpt2 import batch, make_parameters
from tests.twins import BF16, EPS16, F32, on, rounded

DRAWS = 3
SMALL = GPT2Config(maxT=24, V=50, L=2, NH=2, C=32)
LARGE = GPT2Config(maxT=1024, V=50257, L=2, NH=12, C=768)
SIZES = {"small": (SMALL, 2, 20), "large": (LARGE, 1, 1000)}
STD = 0.05

# What operations store, by position or by name: all but statistics and losses, which are fp32.
STORED = {
    ("embedding", "forward"): (0,),
    ("embedding", "backward"): (0, 1),
    ("layernorm", "forward"): (0,),
    ("layernorm", "backward"): (0, 1, 2, 8),
    ("linear", "forward"): (0, "pre_gelu"),
    ("linear", "backward"): (0, 1, "dbias"),
    ("attention", "forward"): (0,),
    ("attention", "backward"): (0,),
    ("gelu", "forward"): (0,),
    ("classifier", "forward_backward"): (1,),
}


@pytest.fixture(params=["shuffled", pytest.param("gpu", marks=pytest.mark.gpu)])
def twin(request):
    with on(request.param) as the_twin:
        yield the_twin


def sizes(twin):
    return SIZES["large" if twin.on_gpu and not os.environ.get("SMALL_SIZES") else "small"]


def perturbed(seed):
    """numpy's operations, whose stored values are off at random by as much as rounding to bf16 can make them."""
    rng, exact = np.random.default_rng(seed), ops.load("numpy")

    def wrap(module, name, where):
        def call(*args, **kwargs):
            getattr(getattr(exact, module), name)(*args, **kwargs)
            for key in where:
                array = kwargs.get(key) if isinstance(key, str) else args[key] if key < len(args) else None
                if array is not None:
                    array *= 1 + rng.uniform(-EPS16, EPS16, array.shape)

        return call

    modules = {name: SimpleNamespace(**vars(getattr(exact, name))) for name in exact.__all__}
    for (module, name), where in STORED.items():
        setattr(modules[module], name, wrap(module, name, where))
    return SimpleNamespace(**modules)


def on_device(twin, config, B, T, *, recompute=0, grad_dtype=None, fusion=0):
    """A model on the CUDA operations with random parameters."""
    operations = ops.load("cuda")
    operations.linear.gelu_fusion = fusion
    model = GPT2(
        *(config, operations, device.load("cuda")),
        **{"B": B, "T": T, "recompute": recompute, "dtype": BF16, "grad_dtype": grad_dtype},
    )
    values = {name: np.empty(view.shape, F32) for name, view in model.params.views.items()}
    make_parameters(config, values, std=STD)
    for name, view in model.params.views.items():
        view[...] = twin.put(values[name])
    return model


def in_float64(config, B, T, operations=None):
    """The model in numpy, with the parameters as they are after rounding to bf16."""
    model = GPT2(
        *(config, operations or ops.load("numpy"), device.load("numpy")),
        **{"B": B, "T": T, "dtype": np.float64, "statistic_dtype": np.float64},
    )
    make_parameters(config, model.params.views, std=STD)
    for view in model.params.views.values():
        view[...] = rounded(view.astype(F32))
    return model


def results(model, tokens, targets, get):
    """(logits, losses, gradients by name) of one batch, on the host."""
    for view in model.grads.views.values():
        view.fill(np.nan)  # whatever there was before
    logits = get(model.forward(tokens))
    losses = get(model.backward(tokens, targets, 1 / tokens.size, accumulate=False))
    return logits, losses, {name: get(view) for name, view in model.grads.views.items()}


def run(twin, model, inp, targets):
    return results(model, twin.put(inp, np.int32), twin.put(targets, np.int32), twin.get)


def distances(actual, exact):
    """By name, how far results are from the exact ones: norms of the differences, relative to the exact."""
    (logits, losses, grads), (exact_logits, exact_losses, exact_grads) = actual, exact
    pairs = {"logits": (logits, exact_logits), "losses": (losses, exact_losses)}
    pairs |= {name: (grads[name], exact_grads[name]) for name in grads}
    return {name: np.linalg.norm(a - b) / np.linalg.norm(b) for name, (a, b) in pairs.items()}


@cache
def exact_and_explained(config, B, T):
    """The exact results of `batch`, and by name what rounding explains: see the module's docstring."""
    inp, targets = batch(config, B, T)
    exact = results(in_float64(config, B, T), inp, targets, np.copy)
    draws = (results(in_float64(config, B, T, perturbed(seed)), inp, targets, np.copy) for seed in range(DRAWS))
    found = [distances(draw, exact) for draw in draws]
    return exact, {name: 2 * max(each[name] for each in found) for name in found[0]}


@pytest.mark.parametrize("fusion", [0, 2])
def test_gpt2_is_numpy_s(twin, fusion):
    config, B, T = sizes(twin)
    inp, targets = batch(config, B, T)
    exact, bounds = exact_and_explained(config, B, T)
    found = distances(run(twin, on_device(twin, config, B, T, fusion=fusion), inp, targets), exact)
    too_far = {name: (found[name], bounds[name]) for name in found if not found[name] <= bounds[name]}
    assert not too_far


@pytest.mark.gpu
@pytest.mark.parametrize("fusion", [0, 2])
def test_gpt2_by_own_multiplies_is_numpy_s(monkeypatch, fusion):
    """By all that there are for Hopper."""
    if cuda.compute_capability() != 90:
        pytest.skip("this GPU is no Hopper")
    config, B, T = SIZES["large"]
    inp, targets = batch(config, B, T)
    exact, bounds = exact_and_explained(config, B, T)
    with on("gpu") as twin:
        monkeypatch.setattr(cublaslt, "own_multiply", linear_hopper.multiply_of)
        multiplies = linear.multiplies(config.dims() | {"B": B, "T": T}, BF16, fusion, False)
        own = {multiply.name: cublaslt.OWN for multiply in multiplies if linear_hopper.multiply_of(multiply)}
        assert len(own) == 2  # qkv and fc
        cublaslt.library().use(own)
        try:
            found = distances(run(twin, on_device(twin, config, B, T, fusion=fusion), inp, targets), exact)
        finally:
            cublaslt.library().use({})
    too_far = {name: (found[name], bounds[name]) for name in found if not found[name] <= bounds[name]}
    assert not too_far


def same_bits(a, b):
    np.testing.assert_array_equal(a[0], b[0], err_msg="logits")
    np.testing.assert_array_equal(a[1], b[1], err_msg="losses")
    for name, grad in a[2].items():
        np.testing.assert_array_equal(grad, b[2][name], err_msg=name)


def test_the_same_bits_twice(twin):
    config, B, T = sizes(twin)
    inp, targets = batch(config, B, T)
    same_bits(*(run(twin, on_device(twin, config, B, T), inp, targets) for _ in range(2)))


def test_recomputation_gives_the_same_bits(twin):
    """With GELU in a pass of its own. In the matrix multiply it sees more digits than are kept for recomputation."""
    config, B, T = sizes(twin)
    inp, targets = batch(config, B, T)
    first, *others = (run(twin, on_device(twin, config, B, T, recompute=level), inp, targets) for level in (0, 1, 2))
    for other in others:
        same_bits(first, other)


def test_recomputation_beside_fused_gelu_gives_the_same_losses_and_gradients_within_rounding(twin):
    config, B, T = sizes(twin)
    inp, targets = batch(config, B, T)
    exact, bounds = exact_and_explained(config, B, T)
    kept, again = (
        run(twin, on_device(twin, config, B, T, recompute=level, fusion=2), inp, targets) for level in (0, 1)
    )
    np.testing.assert_array_equal(kept[1], again[1])
    assert all(distance <= bounds[name] for name, distance in distances(again, exact).items())


@pytest.mark.parametrize("grad_dtype", [BF16, F32], ids=["bf16", "fp32"])
def test_gradients_accumulate(twin, grad_dtype):
    """Two micro-batches: what the second adds is what it gives alone, to one rounding of the sum."""
    config, B, T = sizes(twin)
    first, second = batch(config, B, T, seed=1), batch(config, B, T, seed=2)
    model = on_device(twin, config, B, T, grad_dtype=grad_dtype)
    alone = [run(twin, model, *each)[2] for each in (first, second)]
    for inp, targets in (first, second):
        tokens = twin.put(inp, np.int32)
        model.forward(tokens)
        model.backward(tokens, twin.put(targets, np.int32), 1 / inp.size, accumulate=inp is second[0])
    for name, view in model.grads.views.items():
        a, b = (grads[name] for grads in alone)
        total = twin.get(view)
        # Rounded once alone, at most four times on the way to the sum (wte: classifier and embedding, twice), whose
        # parts may be as large as the largest of either.
        eps = EPS16 if grad_dtype == BF16 else 2.0**-20
        bound = 5 * eps * (np.abs(a) + np.abs(b)) + 4 * eps * (np.abs(a).max() + np.abs(b).max()) * (name == "wte")
        assert (np.abs(total - a - b) <= bound + 2.0**-120).all(), name


def test_what_is_prepared_is_all_that_a_step_needs(twin, monkeypatch):
    """No kernel is compiled in a step, and no scratch memory taken; nor was there more of it than a step asks for."""
    config, B, T = sizes(twin)
    inp, targets = batch(config, B, T)
    operations, dims = ops.load("cuda"), config.dims() | {"B": B, "T": T}
    monkeypatch.setattr(cuda, "compute_capability", lambda: 80)
    operations.prepare(dims, -1, BF16)
    prepared, kernels_then = operations.scratch._buffer, set(kernels.KERNELS._modules)
    model = on_device(twin, config, B, T)
    run(twin, model, inp, targets)
    one, zeros = (
        twin.put(np.array(1.0), np.float64),
        [twin.put(np.zeros(model.params.flat.size), dtype) for dtype in (np.uint16, F32, F32)],
    )
    decision = operations.guard.Decision(*(twin.put(np.array(0.0), np.float64) for _ in range(5)))
    windows = [twin.put(np.zeros(operations.guard.WINDOW + 1), np.float64) for _ in range(2)]
    limits = {"max_norm": 1.0, "max_loss_z": 9.0, "max_norm_z": 9.0}
    schedule = twin.put(np.ones(4), np.float64)
    options = {"beta1": 0.9, "beta2": 0.9, "decayed": 0}
    slices = np.array([(bucket.start, bucket.stop) for bucket in model.grads.buckets])
    norms = twin.nan(len(slices), dtype=np.float64)
    operations.norm.squared(norms, model.grads.flat, twin.put(slices, np.int64))
    operations.guard.decide(decision, *windows, one, one, **limits)
    operations.adamw.update(model.params.flat, *zeros, model.grads.flat, one, decision.skip, schedule, **options)
    operations.sampling.sample(
        *(twin.put(np.zeros(1), np.int32), model.forward(twin.put(inp, np.int32))[:1, 0], config.V),
        *(twin.put(np.zeros(1), np.float64), 1.0),
    )
    assert operations.scratch._buffer is prepared
    assert set(kernels.KERNELS._modules) == kernels_then
    monkeypatch.setattr(operations.scratch, "_buffer", None)
    run(twin, model, inp, targets)
    assert operations.scratch._buffer.size >= prepared.size - operations.scratch.PADDING


def test_parameters_are_the_masters_rounded(twin):
    """After updates, and after what was saved is set again: bf16 parameters can always be rebuilt."""
    operations, dev = ops.load("cuda"), device.load("cuda" if twin.on_gpu else "numpy")
    config, B, T = SIZES["small"]
    model = on_device(twin, config, B, T)
    zero = Zero(OneRank(), model.params, model.lanes, 0, operations, dev)
    optimizer = AdamW(model.params, decayed(config), zero, RunConfig(), operations, dev)
    values = {name: np.random.default_rng(0).normal(size=v.shape).astype(F32) for name, v in model.params.views.items()}
    optimizer.set_parameters(values)
    inp, targets = batch(config, B, T)
    for step in (1, 2):
        run(twin, model, inp, targets)
        optimizer.step(step, 1e-3, twin.put(np.array(1.0), np.float64))
    kept = {name: twin.get(view) for name, view in optimizer.parameters().items()}
    after = {name: twin.get(view) for name, view in model.params.views.items()}
    for name, master in kept.items():
        np.testing.assert_array_equal(after[name], rounding.split(master.astype(F32))[0].astype(F32), err_msg=name)
        assert (master != values[name]).any(), name
    model.params.flat.fill(0)
    optimizer.set_parameters({name: master.astype(F32) for name, master in kept.items()})
    for name, view in model.params.views.items():
        np.testing.assert_array_equal(twin.get(view), after[name], err_msg=name)
    for name, view in optimizer.parameters().items():
        np.testing.assert_array_equal(twin.get(view), kept[name], err_msg=name)


@pytest.mark.gpu
def test_gpt2_is_transformers():
    """transformers' GPT-2, in float32 for the truth and in bfloat16 for a measure: ours is no further off than that.

    Both round every operation's result to bf16; that one's residual stream and layernorms do so too. A fifth more is
    left for chance.
    """
    torch = pytest.importorskip("torch", reason='PyTorch is not installed: pip install -e ".[oracle]"')
    transformers = pytest.importorskip(
        "transformers", reason='transformers is not installed: pip install -e ".[oracle]"'
    )
    from tests.test_oracle import peers

    config, B, T = SIZES["large"]
    sizes = {"vocab_size": config.V, "n_positions": config.maxT, "n_embd": config.C}
    options = {"n_layer": config.L, "n_head": config.NH, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    inp, targets = batch(config, B, T)
    values = in_float64(config, B, T).params.views

    def peer(dtype):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **options)).cuda().to(dtype)
        state = dict(model.named_parameters())
        with torch.no_grad():
            for name, view in values.items():
                peers(name, state)[...] = torch.from_numpy(view[: config.V] if name == "wte" else view)
        logits = model(torch.from_numpy(inp).long().cuda()).logits
        wanted = torch.from_numpy(targets).long().cuda().flatten()
        losses = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), wanted, reduction="none")
        losses.mean().backward()
        grads = {name: peers(name, {key: p.grad for key, p in state.items()}) for name in values}
        host = [x.detach().double().cpu().numpy() for x in (logits, losses)]
        return host[0], host[1].reshape(B, T), {name: g.double().cpu().numpy() for name, g in grads.items()}

    truth, measure = peer(torch.float32), peer(torch.bfloat16)
    with on("gpu") as twin:
        logits, losses, grads = run(twin, on_device(twin, config, B, T), inp, targets)
    grads["wte"] = grads["wte"][: config.V]
    found, allowed = distances((logits[..., : config.V], losses, grads), truth), distances(measure, truth)
    too_far = {name: (found[name], allowed[name]) for name in found if found[name] > 1.2 * allowed[name]}
    assert not too_far
