"""The CUDA twins of engine/ops/numpy: the same names, argument order and meaning, on CuPy arrays.

Parameters, activations and their gradients are bf16 (gradients of parameters fp32 if the caller allocates them so),
statistics and moments fp32, scalars that the guard handles float64. Kernels compute in fp32 and round once, when they
store. Each module launches the kernels of kernels_cu/ under its name; matrix multiplies are cublasLt's. Everything is
put on the current stream, and nothing waits for it.
"""

from collections.abc import Callable, Mapping
from typing import Any

from engine.device import cublaslt, cuda, kernels, tuning
from engine.ops.cuda import (
    adamw,
    attention,
    classifier,
    embedding,
    gelu,
    guard,
    layernorm,
    linear,
    linear_hopper,
    norm,
    reduce,
    sampling,
    scalars,
    scratch,
)

__all__ = [
    "adamw",
    "attention",
    "classifier",
    "embedding",
    "gelu",
    "guard",
    "layernorm",
    "linear",
    "norm",
    "reduce",
    "sampling",
    "scalars",
]


MOST_SEQUENCES = 65_535  # in a grid's last dimension


def unsupported(B: int, C: int, HS: int) -> str:
    if MOST_SEQUENCES < B:
        return f"a GPU takes up to {MOST_SEQUENCES:,} sequences at a time, not -b {B:,}"
    if HS not in attention.HEAD_SIZES:
        sizes = ", ".join(map(str, attention.HEAD_SIZES))
        return f"attention has kernels for heads of {sizes} channels, not of {HS}"
    needed, limit = max(attention.shared_bytes(HS).values()), cuda.shared_memory_limit()
    if needed > limit:
        return f"attention with heads of {HS} takes {needed:,} bytes of shared memory, this GPU gives {limit:,}"
    if layernorm.MAX_C < C:
        return f"layernorm has kernels for up to {layernorm.MAX_C} channels, not {C}"
    return ""


def scratch_bytes(dims: Mapping[str, int], grad_dtype: Any) -> int:
    return _most_scratch(dims, grad_dtype) + cublaslt.WORKSPACE_BYTES


def _most_scratch(dims: Mapping[str, int], grad_dtype: Any) -> int:
    """Operations run one after the other, so the one that asks for most says how much there must be."""
    others = (attention, embedding, layernorm, norm)
    return max(linear.scratch_bytes(dims, grad_dtype), *(op.scratch_bytes(dims) for op in others)) + scratch.PADDING


def prepare(dims: Mapping[str, int], gelu_fusion: int, grad_dtype: Any) -> None:
    """Compiles and loads every kernel of a run, so that no mistake in one, nor an edit, shows in the middle of it; and
    takes the scratch memory. Where nothing is timed GELU is fused from Hopper on: before, cublasLt does it in a pass of
    its own, slowly.
    """
    grads, HS = kernels.grad_variant(grad_dtype), dims["C"] // dims["NH"]
    attention.for_hopper = hopper = cuda.compute_capability() == 90
    for source, *variants in (
        ("adamw", grads),
        ("attention", {"HS": HS}),
        ("classifier", {}, classifier.holds_row(dims["Vp"])),
        ("embedding", {}, grads),
        ("gelu", {}),
        ("guard", {}),
        ("layernorm", layernorm.packs(dims["C"]), layernorm.packs(dims["C"]) | grads),
        ("linear", grads),
        ("norm", grads),
        ("reduce", grads),
        ("sampling", {}),
        ("scalars", {}),
    ):
        for defines in variants:
            kernels.KERNELS.load(source, defines)
    if attention.on_hopper(HS):
        kernels.KERNELS.load("attention_hopper", {"HS": HS})
    linear_hopper.use(hopper)
    if hopper:
        linear_hopper.load()
    scratch.reserve(_most_scratch(dims, grad_dtype))
    fastest = 2 if cuda.compute_capability() >= 90 else 0
    linear.gelu_fusion = fastest if gelu_fusion == -1 else gelu_fusion


def tune(
    dims: Mapping[str, int],
    gelu_fusion: int,
    grad_dtype: Any,
    accumulates: bool,
    saved: Mapping[str, Any],
    say: Callable[[str], None],
    *,
    thorough: bool = False,
) -> dict[str, Any]:
    """Algorithms for the matrix multiplies of a step's micro-batches, and with gelu_fusion -1 which of them GELU is
    inside of. Those of samples, of which there are few, and of a validation's last batch take cublasLt's first
    proposal. Before the arrays of a run are made: there is room.
    """
    if gelu_fusion != -1:
        multiplies = linear.multiplies(dims, grad_dtype, gelu_fusion, accumulates)
        return tuning.tune(multiplies, saved, say, thorough=thorough)
    apart, fused = (linear.multiplies(dims, grad_dtype, level, accumulates) for level in (0, 2))

    def choose() -> dict[str, Any]:
        record = linear.time_fusion(dims)
        told = (f"{name} {us['fused']} instead of {us['apart']} us" for name, us in record["us"].items())
        say(f"timed GELU inside the matrix multiply: {', '.join(told)}: -ge {record['level']}")
        return record

    sizes = f"{dims['B'] * dims['T']}x{dims['C']}"
    choice = tuning.Choice("gelu_fusion", sizes, choose)
    return tuning.tune(list(dict.fromkeys(apart + fused)), saved, say, choice, thorough=thorough)


def use_tuning(table: Mapping[str, Any]) -> None:
    tuning.use(table)
    if "gelu_fusion" in table:
        linear.gelu_fusion = table["gelu_fusion"]["level"]
