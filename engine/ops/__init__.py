"""The vocabulary of operations in which the model, the optimizer and the trainer are written.

`numpy` is the specification and the CPU device. Another device's implementation is a twin: the same names, argument
order and meaning. Every operation is a module with its forward and backward side by side.

What every operation promises:
- Outputs come first, then inputs, then what forward saved, then options. The gradient of `x` is `dx`.
- `=` or `+=` is part of the contract: the gradient of the residual stream is added to (`+=`), those of parameters are
  with `accumulate`, other outputs are overwritten (`=`) or, where a docstring says so, changed in place.
- A device's package also says what it can't run (`unsupported`), what it takes (`scratch_bytes`), can get ready
  (`prepare`), and can choose by timing how it computes (`tune`), which a run keeps to (`use_tuning`).
- Arrays are C-contiguous and allocated by the caller. Scratch memory belongs to the implementation.
- Shapes: B sequences, T tokens, C channels, NH heads of HS = C / NH, V tokens in the vocabulary padded to Vp,
  N = B * T rows, OC output channels. Cx: a row of C channels with a one and zeros behind it.
"""

from importlib import import_module
from types import ModuleType


def load(device: str) -> ModuleType:
    """The operations of `device`: a namespace with one module for each operation."""
    return import_module(f"engine.ops.{device}")
