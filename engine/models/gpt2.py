"""GPT-2 (Radford et al. 2019): its tables, forward, and backward as forward read from the bottom.

    x = embedding(tokens)
    each layer:  x = x + attproj(attention(qkv(ln1(x))))
                 x = x + fcproj(gelu(fc(ln2(x))))
    logits = lnf(x) @ wte^T                                  (the embedding is the classifier too)

A residual connection sends its gradient down both branches unchanged. So backward keeps one gradient dx of the
residual stream, and each branch ends in a layernorm.backward that adds its share to it.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from engine.arena import Arena, Array, Slots, Tensor, own_slot, shape_of
from engine.config import GPT2Config
from engine.models.torch_random import TorchGenerator


@dataclass(frozen=True)
class Parameter:
    """A line of the parameter table. init: the standard deviation of a normal draw, or a constant as "0" or "1"."""

    name: str
    shape: str
    init: str
    decay: bool


# Matrices come before vectors in a layer, so that weight decay changes seldom along the flat buffer.
EMBEDDING_PARAMETERS = (
    #         name        shape     initial value     weight decay
    Parameter("wte", "Vp,C", "normal", True),
    Parameter("wpe", "maxT,C", "normal", True),
)
LAYER_PARAMETERS = (
    Parameter("qkvw", "3C,C", "normal", True),
    Parameter("attprojw", "C,C", "residual", True),
    Parameter("fcw", "4C,C", "normal", True),
    Parameter("fcprojw", "C,4C", "residual", True),
    Parameter("ln1w", "C", "1", False),
    Parameter("ln1b", "C", "0", False),
    Parameter("qkvb", "3C", "0", False),
    Parameter("attprojb", "C", "0", False),
    Parameter("ln2w", "C", "1", False),
    Parameter("ln2b", "C", "0", False),
    Parameter("fcb", "4C", "0", False),
    Parameter("fcprojb", "C", "0", False),
)
FINAL_PARAMETERS = (
    Parameter("lnfw", "C", "1", False),
    Parameter("lnfb", "C", "0", False),
)

NORMAL_STD = 0.02

MODEL_FILE = "model.safetensors"  # where a checkpoint keeps the parameters


NEVER = 3  # a level of -r that does not exist


@dataclass(frozen=True)
class Activation:
    """A line of the activation table.

    per_layer: backward needs every layer's, so each has its own; otherwise one serves the whole model. recomputed:
    from this level of -r on, backward computes it again, so one serves all layers. statistic: fp32 on every device.
    region: those of one name share one memory.
    """

    name: str
    shape: str
    per_layer: bool = False
    recomputed: int = NEVER
    statistic: bool = False
    region: str = ""


ACTIVATIONS = (
    Activation("encoded", "B,T,C"),
    Activation("ln1", "B,T,Cx", per_layer=True, recomputed=2),
    Activation("ln1_mean", "B,T", per_layer=True, statistic=True),
    Activation("ln1_rstd", "B,T", per_layer=True, statistic=True),
    Activation("qkv", "B,T,3C", per_layer=True),
    Activation("att", "B,T,C", per_layer=True),
    Activation("lse", "B,NH,T", per_layer=True, statistic=True),
    Activation("mid", "B,T,C", per_layer=True),  # the residual stream between the two branches
    Activation("ln2", "B,T,Cx", per_layer=True, recomputed=2),
    Activation("ln2_mean", "B,T", per_layer=True, statistic=True),
    Activation("ln2_rstd", "B,T", per_layer=True, statistic=True),
    Activation("fc", "B,T,4C", per_layer=True),  # before GELU
    Activation("gelu", "B,T,4C", per_layer=True, recomputed=1),
    Activation("out", "B,T,C", per_layer=True),  # the residual stream after the layer
    Activation("lnf", "B,T,C"),
    Activation("lnf_mean", "B,T", statistic=True),
    Activation("lnf_rstd", "B,T", statistic=True),
    # The logits become their gradient in backward, which is done with before the layers' wide gradients begin.
    Activation("logits", "B,T,Vp", region="wide"),
    Activation("losses", "B,T", statistic=True),
    Activation("dx", "B,T,C"),  # gradient of the residual stream
    Activation("dbranch", "B,T,C"),  # gradient of a branch's activations of width C
    Activation("dqkv", "B,T,3C", region="wide"),
    Activation("dfc", "B,T,4C", region="wide"),
)


def parameter_table(config: GPT2Config) -> Iterator[tuple[str, Parameter, int]]:
    """(name, line, bucket) of every parameter in memory order: embedding, layers "h.0.*" to "h.L-1.*", final layernorm.

    Buckets hold what backward finishes together: 0 the embedding, l + 1 layer l; the final layernorm goes with the
    last layer.
    """
    for line in EMBEDDING_PARAMETERS:
        yield line.name, line, 0
    for layer in range(config.L):
        for line in LAYER_PARAMETERS:
            yield f"h.{layer}.{line.name}", line, layer + 1
    for line in FINAL_PARAMETERS:
        yield line.name, line, config.L


def slots_by_turns(bucket: int) -> int:
    """Memory for gradients that are taken away as soon as they are ready: three layers' by turns, and the embedding's.

    Three, because a layer's backward gives the first gradient of the layer below, while those of the layer above are
    still being taken away. The embedding is also the classifier, whose gradient comes first, and is ready last.
    """
    return 0 if bucket == 0 else 1 + bucket % 3


def parameter_tensors(config: GPT2Config, dtype: Any) -> list[Tensor]:
    """The parameter table resolved: also that of gradients, moments and remainders, each in its dtype."""
    dims = config.dims()
    return [Tensor(name, shape_of(line.shape, dims), dtype, bucket) for name, line, bucket in parameter_table(config)]


def activation_tensors(
    config: GPT2Config, *, B: int, T: int, recompute: int, dtype: Any, statistic_dtype: Any
) -> list[Tensor]:
    """The activation table resolved for micro-batches of (B,T)."""
    dims = config.dims() | {"B": B, "T": T}
    tensors = []
    for line in ACTIVATIONS:
        shape = shape_of(line.shape, dims)
        kind = statistic_dtype if line.statistic else dtype
        if line.per_layer and recompute < line.recomputed:
            tensors += [Tensor(f"h.{layer}.{line.name}", shape, kind) for layer in range(config.L)]
        else:
            tensors.append(Tensor(line.name, shape, kind, region=line.region))
    return tensors


def decayed(config: GPT2Config) -> set[str]:
    """Names of the parameters that weight decay applies to: all matrices, the embeddings included."""
    return {name for name, line, _ in parameter_table(config) if line.decay}


def initialize(config: GPT2Config, params: dict[str, np.ndarray], seed: int) -> None:
    """params = GPT-2's initial values, drawn as PyTorch's generator with this seed draws them.

    Normal with standard deviation 0.02; projections into the residual stream 0.02 / sqrt(2 L), so that its variance
    does not grow with depth. Drawn in the order in which PyTorch's modules are visited: wte, wpe, then each layer's
    qkvw, attprojw, fcw, fcprojw. Rows of wte beyond the vocabulary stay zero.
    """
    std = {"normal": NORMAL_STD, "residual": NORMAL_STD / math.sqrt(2 * config.L)}
    generator = TorchGenerator(seed)
    for name, line, _ in parameter_table(config):
        if line.init in std:
            target = params[name][: config.V] if name == "wte" else params[name]
            target[...] = generator.normal(target.shape, std[line.init])
        else:
            params[name][...] = float(line.init)


class GPT2:
    """Parameters, gradients and activations in device memory, and the two passes over them.

    params: arena of the parameter table, whose buckets divide into `shares` parts. lanes: arenas like it for gradients;
    grads is the first, and most runs have no other. They are of grad_dtype, if that is given, else of dtype, as the
    activations are. With grad_slots=slots_by_turns nothing can accumulate: on_ready must take a bucket's gradients away
    before it returns for the bucket after it, and leave zeros, for where one bucket has gradients another has padding.
    on_need(bucket) is called before forward reads the parameters of a bucket, first layer first.
    """

    def __init__(
        self,
        config: GPT2Config,
        ops: ModuleType,
        device: ModuleType,
        *,
        B: int,
        T: int,
        recompute: int = 0,
        dtype: Any = np.float32,
        statistic_dtype: Any = np.float32,
        grad_dtype: Any = None,
        grad_slots: Slots = own_slot,
        lanes: int = 1,
        shares: int = 1,
    ):
        self.config, self.ops, self.recompute = config, ops, recompute
        self.params = Arena(parameter_tensors(config, dtype), device.zeros, shares)
        gradients = parameter_tensors(config, grad_dtype or dtype)
        self.lanes = [Arena(gradients, device.zeros, shares, grad_slots) for _ in range(lanes)]
        self.grads = self.lanes[0]
        self._activation_options = {
            "recompute": recompute,
            "dtype": dtype,
            "statistic_dtype": statistic_dtype,
        }
        self.acts = Arena(
            activation_tensors(config, B=B, T=T, **self._activation_options),
            device.zeros,
        )
        self.on_need: Callable[[int], None] = lambda bucket: None
        self._p, self._g = self._by_layer(self.params.views), [self._by_layer(lane.views) for lane in self.lanes]
        self._a: dict[tuple[int, int], SimpleNamespace] = {}

    def forward(self, inp: Array) -> Array:
        """logits (B,T,Vp) of the tokens inp (B,T) int32; everything that backward needs is kept."""
        ops, p, a = self.ops, self._p, self._activations(inp.shape)
        self.on_need(0)
        ops.embedding.forward(a.encoded, inp, p.wte, p.wpe)
        x = a.encoded
        for layer, (pl, al) in enumerate(zip(p.h, a.h, strict=True)):
            self.on_need(layer + 1)
            self._block_forward(x, pl, al)
            x = al.out
        ops.layernorm.forward(a.lnf, a.lnf_mean, a.lnf_rstd, x, p.lnfw, p.lnfb)
        ops.linear.forward(a.logits, a.lnf, p.wte)
        return a.logits

    def losses(self, targets: Array) -> Array:
        """Cross-entropy (B,T) in nats at targets (B,T) int32 of the last forward. Leaves the logits as they are."""
        a = self._activations(targets.shape)
        self.ops.classifier.forward(a.losses, a.logits, targets, self.config.V)
        return a.losses

    def backward(
        self,
        inp: Array,
        targets: Array,
        dloss: float,
        lane: int = 0,
        on_ready: Callable[[int], None] = lambda bucket: None,
        *,
        accumulate: bool,
    ) -> Array:
        """lanes[lane] = dloss * the gradient of the summed losses of the last forward, of inp; += with accumulate.

        Returns losses (B,T). on_ready(bucket) is called as soon as the gradients of a bucket are finished, last layer
        first.
        """
        ops, p, g, a = self.ops, self._p, self._g[lane], self._activations(inp.shape)
        ops.classifier.forward_backward(a.losses, a.logits, targets, self.config.V, dloss)
        ops.linear.backward(a.dbranch, g.wte, a.logits, a.lnf, p.wte, accumulate=accumulate)
        a.dx.fill(0)
        x, dbias_below = a.h[-1].out, g.h[-1].fcprojb
        ops.layernorm.backward(
            *(a.dx, g.lnfw, g.lnfb, a.dbranch, x, p.lnfw, a.lnf_mean, a.lnf_rstd, dbias_below), accumulate=accumulate
        )
        for layer in reversed(range(self.config.L)):
            x, dbias_below = (a.h[layer - 1].out, g.h[layer - 1].fcprojb) if layer else (a.encoded, None)
            self._block_backward(a, p.h[layer], g.h[layer], x, a.h[layer], dbias_below, accumulate)
            on_ready(layer + 1)
        ops.embedding.backward(g.wte, g.wpe, a.dx, inp, accumulate=accumulate)
        on_ready(0)
        return a.losses

    def _block_forward(self, x: Array, p: SimpleNamespace, a: SimpleNamespace) -> None:
        """a.out = one transformer block of x."""
        ops = self.ops
        ops.layernorm.forward(a.ln1, a.ln1_mean, a.ln1_rstd, x, p.ln1w, p.ln1b)
        ops.linear.forward(a.qkv, a.ln1, p.qkvw, p.qkvb)
        ops.attention.forward(a.att, a.lse, a.qkv)
        ops.linear.forward(a.mid, a.att, p.attprojw, p.attprojb, residual=x)

        ops.layernorm.forward(a.ln2, a.ln2_mean, a.ln2_rstd, a.mid, p.ln2w, p.ln2b)
        ops.linear.forward(a.gelu, a.ln2, p.fcw, p.fcb, pre_gelu=a.fc)
        ops.linear.forward(a.out, a.gelu, p.fcprojw, p.fcprojb, residual=a.mid)

    def _block_backward(
        self,
        s: SimpleNamespace,
        p: SimpleNamespace,
        g: SimpleNamespace,
        x: Array,
        a: SimpleNamespace,
        dbias_below: Array | None,
        accumulate: bool,
    ) -> None:
        """s.dx: the gradient of a.out on entry, of x on return. s holds the gradients that no layer keeps.

        The gradients of qkvb and fcb come with those of their weights; those of the two projections' biases, which are
        column sums of dx, from the layernorm.backward above each (dbias_below is that of the layer below).
        """
        ops = self.ops
        if self.recompute >= 1:
            ops.gelu.forward(a.gelu, a.fc)
        if self.recompute >= 2:
            ops.layernorm.forward(a.ln2, a.ln2_mean, a.ln2_rstd, a.mid, p.ln2w, p.ln2b)
        ops.linear.backward(s.dfc, g.fcprojw, s.dx, a.gelu, p.fcprojw, pre_gelu=a.fc, accumulate=accumulate)
        ops.linear.backward(s.dbranch, g.fcw, s.dfc, a.ln2, p.fcw, dbias=g.fcb, accumulate=accumulate)
        ops.layernorm.backward(
            *(s.dx, g.ln2w, g.ln2b, s.dbranch, a.mid, p.ln2w, a.ln2_mean, a.ln2_rstd, g.attprojb), accumulate=accumulate
        )

        if self.recompute >= 2:
            ops.layernorm.forward(a.ln1, a.ln1_mean, a.ln1_rstd, x, p.ln1w, p.ln1b)
        ops.linear.backward(s.dbranch, g.attprojw, s.dx, a.att, p.attprojw, accumulate=accumulate)
        ops.attention.backward(s.dqkv, s.dbranch, a.qkv, a.att, a.lse)
        ops.linear.backward(s.dbranch, g.qkvw, s.dqkv, a.ln1, p.qkvw, dbias=g.qkvb, accumulate=accumulate)
        ops.layernorm.backward(
            *(s.dx, g.ln1w, g.ln1b, s.dbranch, x, p.ln1w, a.ln1_mean, a.ln1_rstd, dbias_below), accumulate=accumulate
        )

    def _activations(self, shape: tuple[int, int]) -> SimpleNamespace:
        """Views of the activation arena for micro-batches of this shape (B,T), no larger than the declared one."""
        if shape not in self._a:
            B, T = shape
            tensors = activation_tensors(self.config, B=B, T=T, **self._activation_options)
            self._a[shape] = self._by_layer({tensor.name: self.acts.view(tensor) for tensor in tensors})
        return self._a[shape]

    def _by_layer(self, views: dict[str, Array]) -> SimpleNamespace:
        """views as attributes, with h[layer] for the layers; what all layers share is in each of them too."""
        shared = {name: view for name, view in views.items() if "." not in name}
        layers = [SimpleNamespace(**shared) for _ in range(self.config.L)]
        for name, view in views.items():
            if "." in name:
                _, layer, attribute = name.split(".")
                setattr(layers[int(layer)], attribute, view)
        return SimpleNamespace(**shared, h=layers)


def from_stacked(config: GPT2Config, stacked: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Parameters by our names from arrays that hold all layers at once, (L, ...), as llm.c's files do.

    Both pad the vocabulary with rows of zeros, but not always the same number of them.
    """
    params = {}
    for name, _, _ in parameter_table(config):
        if name.startswith("h."):
            _, layer, short = name.split(".")
            params[name] = stacked[short][int(layer)]
        else:
            params[name] = stacked[name]
    params["wte"] = np.zeros((config.Vp, config.C), np.float32)
    params["wte"][: config.V] = stacked["wte"][: config.V]
    return params
