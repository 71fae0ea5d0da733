"""How fast a training step is, and where each millisecond goes: `python bench/mfu.py`.

The whole step under sustained load: milliseconds, tokens/s, and model FLOPs utilisation by both formulas in use,

    6N + 6LCT     with the causal half of attention, which is what is computed
    6N + 12LCT    with the whole square, as most published figures have it

of the GPU's dense bf16 peak. Then each operation, beside its floor: the time that its FLOPs take at the rate of a large
matrix multiply, or its bytes at the rate of a large copy, whichever is more, both measured in the same run. An input is
read once and an output written once; what is added to is read and written.
"""

import json
import re
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.machine import circumstances, told, told_of_gpu, watched_gpu
from bench.step import (
    Call,
    Rates,
    Recorded,
    flops,
    in_turns,
    label,
    make_step,
    measure_rates,
    nbytes,
    options,
    random_batches,
    release,
    set_up,
)
from engine.config import GPT2Config
from engine.errors import exit_on_user_error
from engine.report import have_matplotlib

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


class Row(NamedTuple):
    """An operation in a step, all its calls of one size together. Times in ms."""

    name: str
    calls: int
    ms: float
    floor: float
    flops: float
    nbytes: float


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


@click.command(context_settings={"show_default": True})
@options
@click.option(
    "--cuda-graph", type=click.Choice(["auto", "on", "off"]), default="auto", help="Of the whole step, as in train.py."
)
@click.option("--warm-up", default=20.0, help="Seconds of load before anything is timed.")
@click.option("--seconds", default=30.0, help="Seconds that are timed.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures here too.")
@click.option("--png", "png_path", type=click.Path(path_type=Path), help="Draw where each millisecond goes.")
@exit_on_user_error
def main(
    cuda_graph: str, warm_up: float, seconds: float, json_path: Path | None, png_path: Path | None, **size: Any
) -> None:
    """Milliseconds of a training step on random tokens, MFU, and every operation beside its floor."""
    backend, dev, operations, config, run, tuning = set_up(**size)
    replay = dev.replay(cuda_graph, print)
    recorded = Recorded(operations, dev)
    rates = measure_rates(dev, operations)
    release(dev)
    step = make_step(config, random_batches(run, config), dev, recorded, recompute=run.recompute)

    with watched_gpu(backend) as gpu:
        (times,) = in_turns(dev, [partial(step, replay)], warm_up, seconds)
    recorded.calls = []
    step()
    rows = table(recorded.calls, dev, rates)

    ms = float(np.median(times)) * 1000
    figures = circumstances("bench/mfu.py", backend)
    name = figures["machine"]
    peak = peak_of(name)
    figures |= {
        "gpu": gpu,
        "tuning": tuning,
        "steps": len(times),
        "ms": ms,
        "tokens_per_second": run.B * run.T / ms * 1000,
        "mfu": mfu(config, run.B, run.T, ms, peak or rates.flops),
        "peak_flops": peak,
        "measured_flops": rates.flops,
        "measured_bytes": rates.nbytes,
        "operations": [row._asdict() for row in rows],
    }
    shape = f"{run.model} B={run.B} T={run.T}"
    print(write_up(figures, rows, f"{shape} -r {run.recompute} --cuda-graph {cuda_graph}"))
    if json_path:
        json_path.write_text(json.dumps(figures, indent=1) + "\n")
    if png_path and have_matplotlib():
        draw(png_path, rows, ms, f"{shape}: {ms:.1f} ms a step on {name.split(',')[0]}")


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
        *told(figures),
        f"measured: matrix multiply {figures['measured_flops'] / 1e12:,.2f} TFLOP/s, copy "
        f"{figures['measured_bytes'] / 1e9:,.0f} GB/s",
        "",
        f"{what}: {figures['ms']:.2f} ms a step (median of {figures['steps']}), "
        f"{figures['tokens_per_second']:,.0f} tokens/s",
        "MFU " + ", ".join(f"{share:.1%} by {formula}" for formula, share in figures["mfu"].items()) + f", {of}",
    ]
    # A GPU at its limit of power is as fast as a step costs little.
    lines += [f"{line}, {gpu['watts'] * figures['ms'] / 1000:,.1f} J a step" for line in told_of_gpu(gpu)]
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
