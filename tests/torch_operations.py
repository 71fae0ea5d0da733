"""Single operations in PyTorch, as peers of bench/operations.py: the same work on the very arrays of a call of ours."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.step import Call
from engine.device.kernels import BF16

# On a GPU, PyTorch's flash attention is FlashAttention-2.
ATTENTION = {"SDPA cuDNN": SDPBackend.CUDNN_ATTENTION, "SDPA flash": SDPBackend.FLASH_ATTENTION}
DETERMINISTIC = "SDPA flash, deterministic"


def peers(call: Call) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """({name: what does the same, and returns its results}, {name: why PyTorch can't do that here}).

    Of a linear layer the bare products, without bias, GELU or residual. The gradients of q, k and v stay apart, as
    PyTorch leaves them. Results go into the call's own arrays where PyTorch lets them.
    """
    if call.name == "linear.forward":
        out, inp, weight = (matrix(call.arrays[n]) for n in range(3))
        return {"torch.mm": partial(torch.mm, inp[:, : weight.shape[1]], weight.T, out=out)}, {}
    if call.name == "linear.backward":
        dinp, dweight, dout, inp, weight = (matrix(call.arrays[n]) for n in range(5))
        inp = inp[:, : weight.shape[1]]
        return {"2 torch.mm": lambda: (torch.mm(dout, weight, out=dinp), torch.mm(dout.T, inp, out=dweight))}, {}
    found: dict[str, Callable[[], Any]] = {}
    missing: dict[str, str] = {}
    if call.name.startswith("attention"):
        for name, backend in ATTENTION.items():
            try:
                found[name] = attention(call, backend)
                found[name]()
            except RuntimeError as error:
                found.pop(name, None)
                missing[name] = str(error).partition("\n")[0]
        if call.name.endswith("backward") and "SDPA flash" in found:
            found[DETERMINISTIC] = deterministically(found["SDPA flash"])
    return found, missing


def attention(call: Call, backend: SDPBackend) -> Callable[[], Any]:
    """out (B,NH,T,HS), or the gradients of q, k and v; all of them views of (B,T,...), as ours are."""
    forward = call.name == "attention.forward"
    NH, qkv = call.arrays[1 if forward else 4].shape[1], tensor(call.arrays[2])
    B, T, _ = qkv.shape
    q, k, v = (x.detach().requires_grad_() for x in qkv.view(B, T, 3, NH, -1).permute(2, 0, 3, 1, 4))

    def attend() -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    if forward:
        return attend
    out = attend()
    dout = torch.empty_like(out)  # with out's strides: no kernel has to copy it first
    dout.copy_(tensor(call.arrays[1]).view(B, T, NH, -1).transpose(1, 2))
    return lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)


def deterministically(function: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> Any:
        with determinism():
            return function()

    return call


@contextmanager
def determinism() -> Iterator[None]:
    """PyTorch's deterministic algorithms, without its filling of new memory, which nothing here reads."""
    settings: Any = torch.utils.deterministic  # a module whose class has it as a property
    fills = settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        settings.fill_uninitialized_memory = fills


def bits(function: Callable[[], tuple[torch.Tensor, ...]]) -> bytes:
    """Of the tensors that it returns."""
    return b"".join(x.contiguous().view(torch.uint8).cpu().numpy().tobytes() for x in function())


def matrix(x: Any) -> torch.Tensor:
    """x as (N, last dimension)."""
    return tensor(x).flatten(0, -2)


def tensor(x: Any) -> torch.Tensor:
    """A numpy or CuPy array as PyTorch's, in the same memory."""
    if x.dtype == BF16:  # which numpy hands on under no name that PyTorch knows
        return torch.from_dlpack(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_dlpack(x)
