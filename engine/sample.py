"""Generation: text from a model, one token after the other."""

from types import ModuleType

import numpy as np

from engine.models.gpt2 import GPT2

# Contexts are padded to a multiple of this, so that few shapes occur. What comes after a token never reaches it.
PADDING = 64

SAMPLING = 1 << 63  # sets these draws apart from the data order's, whose keys have the seed and no such bit


def generate(
    model: GPT2,
    device: ModuleType,
    prompt: list[int],
    count: int,
    *,
    T: int,
    seed: int,
    step: int,
    temperature: float,
) -> list[int]:
    """`count` tokens that follow prompt (at least one token), each drawn from softmax(logits / temperature).

    The model sees the last T tokens at most. The same seed and step give the same draws.
    """
    coins = np.random.Philox(key=[seed, SAMPLING | step]).random_raw(count) / 2**64
    context = list(prompt)
    drawn = device.zeros((1,), np.int32)
    for coin in coins:
        window = context[-T:]
        padded = min(-(-len(window) // PADDING) * PADDING, T)
        inp = np.zeros((1, padded), np.int32)
        inp[0, : len(window)] = window
        logits = model.forward(device.to_device(inp))
        model.ops.sampling.sample(
            drawn, logits[:, len(window) - 1], model.config.V, device.to_device(np.array([coin])), temperature
        )
        context.append(int(device.to_host(drawn)[0]))
    return context[len(prompt) :]
