"""Generation: text from a model, one token after the other.

`python -m engine.sample RUN_DIR --prompt "My fellow citizens"` writes what the newest checkpoint of a run goes on with.
"""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import click
import numpy as np

from engine import checkpoint, device, ops, tokenizer
from engine.config import GPT2Config
from engine.errors import CheckpointError, UsageError, exit_on_user_error
from engine.log import printable
from engine.models.gpt2 import GPT2, MODEL_FILE

# Contexts are padded to a multiple of this, so that few shapes occur. What comes after a token never reaches it.
PADDING = 64

SAMPLING = 1 << 63  # sets these draws apart from the data order's, whose keys have the seed and no such bit


def generate(
    model: GPT2,
    dev: ModuleType,
    prompt: list[int],
    count: int,
    *,
    T: int,
    seed: int,
    step: int,
    temperature: float,
    tick: Callable[[], None] = lambda: None,
) -> list[int]:
    """`count` tokens that follow prompt (at least one token), each drawn from softmax(logits / temperature).

    The model sees the last T tokens at most. The same seed and step give the same draws. tick is
    called for each token.
    """
    coins = (np.random.Philox(key=np.array([seed, SAMPLING | step], np.uint64)).random_raw(count) >> 11) / 2**53
    context = list(prompt)
    drawn = dev.zeros((1,), np.int32)
    for coin in coins:
        window = context[-T:]
        padded = min(-(-len(window) // PADDING) * PADDING, T)
        inp = np.zeros((1, padded), np.int32)
        inp[0, : len(window)] = window
        logits = model.forward(dev.to_device(inp))
        model.ops.sampling.sample(
            drawn, logits[:, len(window) - 1], model.config.V, dev.to_device(np.array([coin])), temperature
        )
        context.append(int(dev.to_host(drawn)[0]))
        tick()
    return context[len(prompt) :]


@click.command(context_settings={"show_default": True})
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--prompt", default="", help="Text to go on with.")
@click.option("--tokens", "count", type=click.IntRange(1), default=400, help="Tokens to generate.")
@click.option("--temperature", type=click.FloatRange(0), default=0.8, help="0 takes the most likely token.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=42, help="Of the draws.")
@exit_on_user_error
def main(run_dir: Path, prompt: str, count: int, temperature: float, seed: int) -> None:
    """Write text with the newest checkpoint of RUN_DIR."""
    saved = checkpoint.load_latest(run_dir, report=lambda line: click.echo(line, err=True))
    if not saved:
        raise CheckpointError(f"{run_dir} holds no checkpoint; a run keeps them with -n")
    if saved.state["tokenizer"] is None:
        raise UsageError(f"{run_dir}: its data came from an unknown tokenizer, so its tokens can't be read as text")
    tokens, config = tokenizer.load(saved.state["tokenizer"]), GPT2Config(**saved.state["model"])
    T, dev = saved.state["options"]["T"], device.load("numpy")
    model = GPT2(config, ops.load("numpy"), dev, B=1, T=T, recompute=2)
    for name, values in saved.tensors(MODEL_FILE).items():
        dev.put(model.params.views[name], values)
    context = [tokens.eot, *tokens.encode(prompt).tolist()]
    drawn = generate(model, dev, context, count, T=T, seed=seed, step=saved.step, temperature=temperature)
    click.echo(prompt + printable(tokens.decode(drawn)))


if __name__ == "__main__":
    main()
