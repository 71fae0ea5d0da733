"""How fast a training step is, and where each millisecond goes: `python bench/mfu.py`.

The whole step under sustained load: milliseconds, tokens/s, and model FLOPs utilisation by both formulas in use,

    6N + 6LCT     with the causal half of attention, which is what is computed
    6N + 12LCT    with the whole square, as most published figures have it

of the GPU's dense bf16 peak. Then each operation, beside its floor: the time that its FLOPs take at the rate of a large
matrix multiply, or its bytes at the rate of a large copy, whichever is more, both measured in the same run. An input is
read once and an output written once; what is added to is read and written.
"""

import json
import math
import re
import shlex
import sys
import time
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.machine import machine, versions, watched_gpu
from bench.step import Call, Recorded, make_step
from engine import device, ops
from engine.comm.one import OneRank
from engine.config import GPT2Config, RunConfig, model_from_descriptor
from engine.errors import UsageError, exit_on_user_error
from engine.memory import require_memory
from engine.report import have_matplotlib
from engine.training import tune_together

# Dense bf16 TFLOP/s with fp32 accumulation, from NVIDIA's data sheets.
PEAKS = (
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.4),
    ("H200", 989.4),
    ("B200", 2250.0),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("L4", 121.0),
    ("A10", 125.0),
    ("RTX 3080", 59.5),
    ("RTX 3090", 71.0),
    ("RTX 4080", 97.5),
    ("RTX 4090", 165.2),
    ("RTX 5080", 112.6),
    ("RTX 5090", 209.5),
)

# Arguments that are both read and written, by position or keyword.
ADDED_TO = {
    "layernorm.backward": (0, 1, 2, 8),
    "linear.backward": (1, "dbias_below"),
    "attention.backward": (5,),
    "gelu.backward": (0,),
    "classifier.forward_backward": (1,),
    "adamw.update": (1, 2, 3),
}


class Row(NamedTuple):
    """An operation in a step, all its calls of one size together. Times in ms."""

    name: str
    calls: int
    ms: float
    floor: float
    flops: float
    nbytes: float


class Rates(NamedTuple):
    """What this device reaches: FLOP/s of a large matrix multiply, bytes/s (read and written) of a large copy."""

    flops: float
    nbytes: float


def flops(call: Call) -> float:
    """Of the matrix products in a call; what the rest takes is not counted."""
    kind, shapes = call.name, call.shapes
    if kind == "linear.forward":
        return 2.0 * math.prod(shapes[0]) * shapes[1][-1]
    if kind == "linear.backward":
        return 4.0 * math.prod(shapes[0]) * shapes[2][-1]
    if kind.startswith("attention"):
        (B, T, C), products = shapes[0 if kind == "attention.forward" else 1], 2 if kind == "attention.forward" else 5
        return 2.0 * products * B * T * (T + 1) / 2 * C
    return 0.0


def nbytes(call: Call) -> float:
    """The least that a call moves. Of an embedding's tables, the rows that occur at most."""
    if call.name.startswith("embedding"):
        tokens = 3 if call.name.endswith("backward") else 2
        activations = call.nbytes[0 if call.name.endswith("forward") else 2]
        return tokens * activations
    return sum(call.nbytes.values()) + sum(call.nbytes.get(key, 0) for key in ADDED_TO.get(call.name, ()))


def label(call: Call) -> str:
    """The operation, and of a linear layer its channels."""
    if call.name == "linear.forward":
        return f"{call.name} {call.shapes[1][-1]}>{call.shapes[0][-1]}"
    if call.name == "linear.backward":
        return f"{call.name} {call.shapes[0][-1]}<{call.shapes[2][-1]}"
    return call.name


def table(calls: list[Call], dev: ModuleType, rates: Rates) -> list[Row]:
    """The operations, the longest first."""
    rows: dict[str, Row] = {}
    for call in calls:
        name, did, moved = label(call), flops(call), nbytes(call)
        before = rows.get(name, Row(name, 0, 0.0, 0.0, 0.0, 0.0))
        rows[name] = Row(
            name,
            before.calls + 1,
            before.ms + dev.seconds_between(call.began, call.ended) * 1000,
            before.floor + max(did / rates.flops, moved / rates.nbytes) * 1000,
            before.flops + did,
            before.nbytes + moved,
        )
    return sorted(rows.values(), key=lambda row: -row.ms)


def seconds_of(dev: ModuleType, function: Callable[[], Any], repeat: int) -> float:
    """The median of some repetitions, after one."""
    function()
    times = []
    for _ in range(repeat):
        began = dev.mark()
        function()
        times.append(dev.seconds_between(began, dev.mark()))
    return float(np.median(times))


def measure_rates(dev: ModuleType, operations: ModuleType) -> Rates:
    """On random data: zeros are faster, for they cost less power."""
    n, size = (8192, 1 << 30) if dev.WORKS_ALONE else (1024, 1 << 25)
    rng = np.random.default_rng(0)
    a, b = (dev.to_device(rng.normal(size=(n, n)).astype(np.float32).astype(dev.COMPUTE_DTYPE)) for _ in range(2))
    out, source, target = dev.zeros((n, n), dev.COMPUTE_DTYPE), dev.zeros((size,), "uint8"), dev.zeros((size,), "uint8")
    source[...] = 123

    def copy() -> None:
        target[...] = source

    multiply = seconds_of(dev, lambda: operations.linear.forward(out, a, b), 10)
    return Rates(2.0 * n**3 / multiply, 2.0 * size / seconds_of(dev, copy, 10))


def sustained(dev: ModuleType, step: Callable[[], Any], warm_up: float, seconds: float) -> list[float]:
    """Seconds of each step, for `seconds` after so much load: a card's clock falls while it gets warm."""
    times: list[float] = []
    began, marks = time.monotonic(), [dev.mark()]
    while not times or time.monotonic() - began < warm_up + seconds:
        step()
        marks = [*marks[-2:], dev.mark()]
        if len(marks) == 3 and time.monotonic() - began >= warm_up:
            times.append(dev.seconds_between(*marks[:2]))  # one step late: the device always has one to go on with
    return times


@click.command(context_settings={"show_default": True})
@click.option("-e", "model", default="d12", help="Size, as in train.py.")
@click.option("-b", "B", default=64, help="Sequences in a step.")
@click.option("-t", "T", default=1024, help="Tokens in a sequence.")
@click.option("-r", "recompute", type=click.IntRange(0, 2), default=0, help="Recomputation, as in train.py.")
@click.option("-ge", "gelu_fusion", type=click.IntRange(-1, 2), default=-1, help="GELU fusion, as in train.py.")
@click.option("--gemm-search", type=click.Choice(["auto", "off"]), default="auto", help="As in train.py.")
@click.option(
    "--cuda-graph", type=click.Choice(["auto", "on", "off"]), default="auto", help="Of the whole step, as in train.py."
)
@click.option("--vocabulary", "V", default=50257, help="Tokens in the vocabulary.")
@click.option("--device", "wanted", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="As in train.py.")
@click.option("--warm-up", default=20.0, help="Seconds of load before anything is timed.")
@click.option("--seconds", default=30.0, help="Seconds that are timed.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures here too.")
@click.option("--png", "png_path", type=click.Path(path_type=Path), help="Draw where each millisecond goes.")
@exit_on_user_error
def main(
    model: str,
    B: int,
    T: int,
    recompute: int,
    gelu_fusion: int,
    gemm_search: str,
    cuda_graph: str,
    V: int,
    wanted: str,
    warm_up: float,
    seconds: float,
    json_path: Path | None,
    png_path: Path | None,
) -> None:
    """Milliseconds of a training step on random tokens, MFU, and every operation beside its floor."""
    backend = device.choose(wanted, print)
    dev, operations = device.load(backend), ops.load(backend)
    replay = dev.replay(cuda_graph, print)
    config = model_from_descriptor(model, V, T)
    run = RunConfig(model=model, B=B, T=T, recompute=recompute, gemm_search=gemm_search)
    if problem := operations.unsupported(B, config.C, config.HS):
        raise UsageError(f"-e {model}: {problem}")
    require_memory(run, config, dev, operations, 1)
    dims = config.dims() | {"B": B, "T": T}
    operations.prepare(dims, gelu_fusion, dev.COMPUTE_DTYPE)
    tuning = tune_together(run, OneRank(), operations, dims, dev.COMPUTE_DTYPE, {}, print)
    recorded = Recorded(operations, dev)
    inp, targets = np.random.default_rng(0).integers(0, V, (2, B, T)).astype(np.int32)
    rates = measure_rates(dev, operations)
    step = make_step(config, inp, targets, dev, recorded, recompute=recompute)

    with watched_gpu(backend) as gpu:
        times = sustained(dev, partial(step, replay), warm_up, seconds)
    recorded.calls = []
    step()
    rows = table(recorded.calls, dev, rates)

    ms = float(np.median(times)) * 1000
    name = machine(backend)
    peak = peak_of(name)
    figures = {
        "command": "python bench/mfu.py " + shlex.join(sys.argv[1:]),
        "date": datetime.now().astimezone().isoformat(" ", "seconds"),
        "machine": name,
        "versions": versions(),
        "gpu": gpu,
        "tuning": tuning,
        "steps": len(times),
        "ms": ms,
        "tokens_per_second": B * T / ms * 1000,
        "mfu": mfu(config, B, T, ms, peak or rates.flops),
        "peak_flops": peak,
        "measured_flops": rates.flops,
        "measured_bytes": rates.nbytes,
        "operations": [row._asdict() for row in rows],
    }
    print(write_up(figures, rows, f"{model} B={B} T={T} -r {recompute} --cuda-graph {cuda_graph}"))
    if json_path:
        json_path.write_text(json.dumps(figures, indent=1) + "\n")
    if png_path and have_matplotlib():
        draw(png_path, rows, ms, f"{model}, B={B}, T={T}: {ms:.1f} ms a step on {name.split(',')[0]}")


def peak_of(name: str) -> float | None:
    """FLOP/s by the data sheet of a GPU of this name; None for one that is not listed, whatever it is called after."""
    found = (peak * 1e12 for part, peak in PEAKS if re.search(rf"\b{part}\b(?! (Ti|SUPER|D|Laptop)\b)", name))
    return next(found, None)


def mfu(config: GPT2Config, B: int, T: int, ms: float, peak: float) -> dict[str, float]:
    """By both formulas, as fractions."""
    formulas = {"6N+6LCT": True, "6N+12LCT": False}
    return {
        formula: config.flops_per_token(T, causal=causal) * B * T / (ms / 1000) / peak
        for formula, causal in formulas.items()
    }


def write_up(figures: dict[str, Any], rows: list[Row], what: str) -> str:
    """The report, as text."""
    gpu, peak = figures["gpu"], figures["peak_flops"]
    of = f"of {peak / 1e12:,.1f} TFLOP/s" if peak else "of the multiply measured here, for want of a data sheet's peak"
    lines = [
        f"$ {figures['command']}",
        f"{figures['date']}, {figures['machine']}",
        figures["versions"],
        f"measured: matrix multiply {figures['measured_flops'] / 1e12:,.2f} TFLOP/s, copy "
        f"{figures['measured_bytes'] / 1e9:,.0f} GB/s",
        "",
        f"{what}: {figures['ms']:.2f} ms a step (median of {figures['steps']}), "
        f"{figures['tokens_per_second']:,.0f} tokens/s",
        "MFU " + ", ".join(f"{share:.1%} by {formula}" for formula, share in figures["mfu"].items()) + f", {of}",
    ]
    if gpu:
        lines.append(f"{gpu['clock_mhz']:,} MHz, {gpu['watts']} W (means), peak of memory {gpu['peak_mib']:,} MiB")
    if tuned := figures["tuning"].get("algorithms"):
        chosen, first = (sum(record[key] for record in tuned.values()) for key in ("us", "first_us"))
        lines.append(
            f"{len(tuned)} kinds of matrix multiply by the algorithms that were timed fastest: once each, they take "
            f"{chosen:,.0f} us, by cublasLt's first proposals {first:,.0f} us"
        )
    total, floor = sum(row.ms for row in rows), sum(row.floor for row in rows)
    lines += ["", f"{'operation':30} calls       ms   step  TFLOP/s    GB/s  floor ms  floor"]
    sums = (sum(column) for column in zip(*(row[4:] for row in rows), strict=True))
    for row in [*rows, Row("all", sum(row.calls for row in rows), total, floor, *sums)]:
        rates = f"{row.flops / row.ms / 1e9:8.2f} {row.nbytes / row.ms / 1e6:7.0f}"
        floor_share = f"{row.floor:9.3f} {row.floor / row.ms:6.1%}"
        lines.append(f"{row.name:30} {row.calls:5} {row.ms:8.3f} {row.ms / total:6.1%} {rates} {floor_share}")
    return "\n".join(lines)


def draw(path: Path, rows: list[Row], ms: float, title: str) -> None:
    """A bar for each operation, and in it its floor."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.ms > ms / 500][::-1]
    figure = Figure(figsize=(10, 0.3 * len(shown) + 1.5), layout="constrained")
    axes = figure.subplots()
    names = [f"{row.name} ({row.calls})" for row in shown]
    axes.barh(names, [row.ms for row in shown], color="#1f77b4", label="measured")
    axes.barh(names, [row.floor for row in shown], color="#ff7f0e", height=0.35, label="floor: multiply or copy alone")
    axes.set_xlabel("ms in a step")
    axes.set_title(title)
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
