"""How long a step takes on the CPU, and where the time goes: `python bench/cpu.py`, or `make bench`.

    python bench/cpu.py --beside-torch      beside PyTorch eager in the same run (needs the extra `oracle`)

Rounds of both alternate, so that whatever else the machine does falls on both. The table gives each operation's share
of a step, beside the time of one core for the step's bare matrix multiplies.
"""

import json
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.machine import processor
from bench.step import Recorded, make_step
from engine import device, ops
from engine.config import GPT2Config
from engine.ops.numpy.parallel import CORES

STEPS_PER_ROUND, WARM_UP = 20, 10


def matmul_milliseconds(config: GPT2Config, N: int) -> float:
    """The bare matrix multiplies of a step's linear layers: three for each, on random data of their shapes."""
    rng = np.random.default_rng(0)
    C = config.C
    total = 0.0
    shapes = [(3 * C, C), (C, C), (4 * C, C), (C, 4 * C)] * config.L + [(config.Vp, C)]
    for out_channels, channels in shapes:
        x = rng.normal(size=(N, channels)).astype(np.float32)
        w = rng.normal(size=(out_channels, channels)).astype(np.float32)
        y = np.empty((N, out_channels), np.float32)
        dx, dw = np.empty_like(x), np.empty_like(w)
        for timing in (False, True):
            began = time.perf_counter()
            np.matmul(x, w.T, out=y)
            np.matmul(y, w, out=dx)
            np.matmul(y.T, x, out=dw)
            total += (time.perf_counter() - began) if timing else 0.0
    return total * 1000


def one_round(step: Callable[[], Any]) -> float:
    """Milliseconds of a step, the mean of a round."""
    began = time.perf_counter()
    for _ in range(STEPS_PER_ROUND):
        step()
    return (time.perf_counter() - began) / STEPS_PER_ROUND * 1000


@click.command(context_settings={"show_default": True})
@click.option("-b", "B", default=12, help="Sequences in a batch.")
@click.option("-t", "T", default=64, help="Tokens in a sequence.")
@click.option("--layers", "L", default=4, help="Layers.")
@click.option("--heads", "NH", default=4, help="Heads.")
@click.option("--channels", "C", default=128, help="Channels.")
@click.option("--vocabulary", "V", default=256, help="Tokens in the vocabulary.")
@click.option("-r", "recompute", type=click.IntRange(0, 2), default=0, help="Recomputation, as in train.py.")
@click.option("--rounds", "num_rounds", type=click.IntRange(1), default=10, help=f"Of {STEPS_PER_ROUND} steps each.")
@click.option("--beside-torch", is_flag=True, help="Time PyTorch eager in the same run.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures here too.")
def main(
    B: int,
    T: int,
    L: int,
    NH: int,
    C: int,
    V: int,
    recompute: int,
    num_rounds: int,
    beside_torch: bool,
    json_path: Path | None,
) -> None:
    """Milliseconds of a training step on the CPU, and where they go."""
    config = GPT2Config(maxT=T, V=V, L=L, NH=NH, C=C)
    batch = np.random.default_rng(0).integers(0, V, (2, B, T)).astype(np.int32)
    dev, operations = device.load("numpy"), Recorded(ops.load("numpy"), device.load("numpy"))
    ours = make_step(config, batch[None], dev, operations, recompute=recompute)
    contenders: dict[str, Callable[[], Any]] = {"backhand": ours}
    if beside_torch:
        # The peer lives with the tests: nothing that is shipped imports PyTorch.
        from tests import torch_gpt2

        contenders[f"PyTorch {torch_gpt2.torch.__version__}"] = torch_gpt2.make_step(config, *batch)

    rounds: dict[str, list[float]] = {name: [] for name in contenders}
    for step in contenders.values():
        for _ in range(WARM_UP):
            step()
    for _ in range(num_rounds):
        for name, step in contenders.items():
            rounds[name].append(one_round(step))

    operations.calls = []
    whole = one_round(ours)
    seconds: defaultdict[str, float] = defaultdict(float)
    for call in operations.calls:
        seconds[call.name] += dev.seconds_between(call.began, call.ended)
    floor = min(matmul_milliseconds(config, B * T) for _ in range(5))

    print(f"{processor()}, {CORES} threads, Python {platform.python_version()}, numpy {np.__version__}")
    print(
        f"B={B} T={T} L={L} NH={NH} C={C} V={V} -r {recompute}, float32; {num_rounds} rounds of {STEPS_PER_ROUND} steps"
    )
    flops = config.flops_per_token(T, causal=True) * B * T
    for name, times in rounds.items():
        ms = float(np.median(times))
        spread = f"rounds {min(times):.2f} to {max(times):.2f}"
        print(f"{name:20} {ms:7.2f} ms a step, {flops / ms / 1e6:5.0f} GFLOP/s by 6N + 6LCT ({spread})")
    if beside_torch:
        our_ms, peer_ms = (float(np.median(times)) for times in rounds.values())
        print(f"{'ratio':20} {our_ms / peer_ms:7.2f}")
    print(f"\nwhere {whole:.2f} ms go; the bare matrix multiplies of the linear layers take {floor:.2f} ms of one core")
    for name, value in sorted(seconds.items(), key=lambda item: -item[1]):
        ms = value / STEPS_PER_ROUND * 1000
        print(f"  {name:28} {ms:7.2f} ms {ms / whole:7.1%}")
    if json_path:
        figures = {"rounds_ms": rounds, "operations_s": dict(seconds), "matmul_ms": floor, "steps": STEPS_PER_ROUND}
        json_path.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
