"""How fast single operations are, beside what does the same: `python bench/operations.py`.

Each operation of a training step is repeated alone, with its epilogue, as the step calls it, in turns with its peers in
the same process, so that a clock that drifts is the same for all:

    attention                cuDNN and FlashAttention-2, by PyTorch's scaled_dot_product_attention
    linear                   the bare products by torch.mm: one forward, two backward
    all other operations     a large copy, for they are bound by memory

after so much load, on random data. What is done in place goes on with its own results. PyTorch is no dependency:
without it there is the copy alone. Launches are made one by one, ours and theirs: at small sizes it is those that take
the time. On a CPU the command can be tried, but PyTorch's threads and ours get into each other's way.
"""

import importlib.util
import json
import sys
from collections.abc import Callable
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
    Recorded,
    Setting,
    flops,
    in_turns,
    label,
    large_copy,
    make_step,
    nbytes,
    options,
    random_batches,
    seconds_of,
    set_up,
)
from engine.device import cublaslt
from engine.errors import exit_on_user_error

TURN = 0.02  # seconds, at least: long enough for the host to get ahead of the GPU
SETTLING = 0.2  # seconds of load before each operation's first turn
NOISE = 1 << 20  # numbers, before they repeat
REPEATS = 3  # calls whose bits are compared
SCALARS = ("guard.decide", "scalars.total", "classifier.add_mean")  # neither products nor memory to speak of


class Contender(NamedTuple):
    """Something to be timed. work: FLOPs or bytes, as everything that it is compared with."""

    name: str
    function: Callable[[], Any]
    work: float


class Time(NamedTuple):
    """ms of a call; rate: its work, a second."""

    name: str
    ms: float
    rate: float


class Row(NamedTuple):
    """An operation and its peers. missing: {peer: why it can't be had}."""

    operation: str
    is_product: bool
    ours: Time
    peers: list[Time]
    missing: dict[str, str]


def find_torch_peers() -> ModuleType | None:
    """PyTorch's operations, if it is installed."""
    if not importlib.util.find_spec("torch"):
        return None
    # They live with the tests: nothing that is shipped imports PyTorch.
    from tests import torch_operations

    return torch_operations


def distinct(calls: list[Call]) -> list[Call]:
    """One call of each operation and size, in the order of the step; of a flat buffer's, that of the largest."""
    found: dict[str, Call] = {}
    for call in calls:
        name = label(call)
        if call.name not in SCALARS and (name not in found or nbytes(call) > nbytes(found[name])):
            found[name] = call
    return list(found.values())


def randomize(call: Call, dev: ModuleType) -> None:
    """Normal numbers in all matrices of the call."""
    for seed, array in enumerate(call.arrays.values()):
        if array.ndim > 1 and array.dtype == dev.COMPUTE_DTYPE:
            numbers = np.random.default_rng(seed).standard_normal(NOISE, np.float32).astype(array.dtype)
            noise, target = dev.to_device(numbers.view(np.uint8)), array.reshape(-1).view(np.uint8)
            for start in range(0, target.size, noise.size):
                target[start : start + noise.size] = noise[: target.size - start]


def measure(contenders: list[Contender], dev: ModuleType, warm_up: float, seconds: float) -> list[Time]:
    """Medians over turns, each of many calls."""
    counts = [max(1, round(TURN / seconds_of(dev, contender.function, 1))) for contender in contenders]

    def turn(function: Callable[[], Any], count: int) -> None:
        for _ in range(count):
            function()

    turns = [partial(turn, contender.function, count) for contender, count in zip(contenders, counts, strict=True)]
    found = []
    for contender, count, times in zip(contenders, counts, in_turns(dev, turns, warm_up, seconds), strict=True):
        each = float(np.median(times)) / count
        found.append(Time(contender.name, each * 1000, contender.work / each))
    return found


def compare(call: Call, dev: ModuleType, torch_peers: ModuleType | None, warm_up: float, seconds: float) -> Row:
    """The operation beside its peers, on random data."""
    randomize(call, dev)
    work = flops(call)
    peers, missing = [], {}
    if work and torch_peers:
        functions, missing = torch_peers.peers(call)
        peers = [Contender(name, function, work) for name, function in functions.items()]
    elif not work:
        peers = [Contender("copy", *large_copy(dev))]
    ours, *others = measure([Contender("ours", call.again, work or nbytes(call)), *peers], dev, warm_up, seconds)
    return Row(label(call), bool(work), ours, others, missing)


@click.command(context_settings={"show_default": True})
@options
@click.option("--determinism", is_flag=True, help="Say what determinism costs, too.")
@click.option("--warm-up", default=20.0, help="Seconds of load before anything is timed.")
@click.option("--seconds", default=40.0, help="Seconds that are timed, of all operations together.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures here too.")
@exit_on_user_error
def main(determinism: bool, warm_up: float, seconds: float, json_path: Path | None, **size: Any) -> None:
    """Each operation of a training step alone, beside cuDNN, FlashAttention-2, torch.mm or a copy.

    Any other shape by its size: -e l12h6c768 has heads of 128 channels.
    """
    setting = set_up(layers=1, **size)  # every layer's operations are the same
    dev, config, run = setting.dev, setting.config, setting.run
    torch_peers = find_torch_peers()
    recorded = Recorded(setting.operations, dev)
    step = make_step(config, random_batches(run, config), dev, recorded, recompute=run.recompute)
    recorded.calls = []
    step()
    calls = distinct(recorded.calls)
    recorded.calls = None

    with watched_gpu(setting.backend) as gpu:
        heaviest = max(calls, key=flops)
        randomize(heaviest, dev)
        in_turns(dev, [heaviest.again], warm_up, 0)
        rows = [compare(call, dev, torch_peers, min(SETTLING, warm_up), seconds / len(calls)) for call in calls]

    figures = circumstances("bench/operations.py", setting.backend)
    figures |= {"gpu": gpu, "tuning": setting.tuning, "operations": [row_as_json(row) for row in rows]}
    print("\n".join([*told(figures), *told_of_gpu(gpu), "", *write_up(rows, with_torch=torch_peers is not None)]))
    if determinism:
        (call,) = (call for call in calls if call.name == "attention.backward")
        (row,) = (row for row in rows if row.operation == call.name)
        same, sums = same_bits(call, dev, torch_peers), cost_of_fp32_sums(setting)
        figures |= {"same_bits": same, "fp32_sums": sums}
        print("\n".join(["", *write_up_determinism(row, same, sums)]))
    if json_path:
        json_path.write_text(json.dumps(figures, indent=1) + "\n")


def row_as_json(row: Row) -> dict[str, Any]:
    return {
        "operation": row.operation,
        "unit": "FLOP/s" if row.is_product else "bytes/s",
        "ours": {"ms": row.ours.ms, "rate": row.ours.rate},
        "peers": {time.name: {"ms": time.ms, "rate": time.rate} for time in row.peers},
        "missing": row.missing,
    }


def write_up(rows: list[Row], with_torch: bool) -> list[str]:
    """The tables, as lines."""
    lines = [] if with_torch else ["PyTorch is not installed: multiplies and attention without their peers"]
    lines += ["ratio: of our rate to the peer's; above 1, ours is faster", ""]
    for is_product, unit, scale in ((True, "TFLOP/s", 1e12), (False, "GB/s", 1e9)):
        lines.append(f"{'operation':28} {'ours ms':>9} {unit:>8}   {'peer':26} {'ms':>8} {unit:>8}   ratio")
        for row in rows:
            if row.is_product == is_product:
                start = f"{row.operation:28} {row.ours.ms:9.3f} {row.ours.rate / scale:8.2f}"
                for time in row.peers:
                    peer = f"{time.name:26} {time.ms:8.3f} {time.rate / scale:8.2f}"
                    lines.append(f"{start:47}   {peer} {row.ours.rate / time.rate:7.3f}")
                    start = ""
                lines += [] if row.peers else [start]
        lines.append("")
    missing = dict(item for row in rows for item in row.missing.items())
    return lines[:-1] + [f"without {name}: {reason}" for name, reason in missing.items()]


def same_bits(call: Call, dev: ModuleType, torch_peers: ModuleType | None) -> dict[str, bool]:
    """Of an attention.backward and its peers: do REPEATS calls give the same bits?"""

    def ours() -> bytes:
        call.again()
        return dev.to_host(call.arrays[0]).tobytes()

    randomize(call, dev)
    contenders: dict[str, Callable[[], bytes]] = {"ours": ours}
    if torch_peers:
        contenders |= {name: partial(torch_peers.bits, peer) for name, peer in torch_peers.peers(call)[0].items()}
    found = {}
    for name, result in contenders.items():
        first = result()
        found[name] = all(result() == first for _ in range(REPEATS - 1))
    return found


def cost_of_fp32_sums(setting: Setting) -> dict[str, dict[str, float]]:
    """Microseconds of each kind of multiply on a GPU: by the fastest algorithm that adds up a split product's parts in
    fp32, as all that are taken do, and by the fastest of all, those too that do it in the type of the output.
    """
    if setting.backend != "cuda":
        return {}
    dims = setting.config.dims() | {"B": setting.run.B, "T": setting.run.T}
    linear, found = setting.operations.linear, {}
    for operation in linear.multiplies(dims, setting.dev.COMPUTE_DTYPE, linear.gelu_fusion, accumulates=False):
        fp32, any_type = cublaslt.library().fastest_by_reduction(operation)
        found[operation.name] = {"fp32_us": fp32, "any_us": any_type}
    return found


def write_up_determinism(row: Row, same: dict[str, bool], sums: dict[str, dict[str, float]]) -> list[str]:
    """What can be seen of its cost, as lines: ours is always deterministic, so by what peers gain that are not. row:
    of attention.backward.
    """
    lines = ["what determinism costs"]
    for time in (row.ours, *row.peers):
        bits = f"{'the same' if same[time.name] else 'other'} bits in {REPEATS} calls"
        lines.append(f"{row.operation}  {time.name:26} {time.ms:8.3f} ms, {time.ms / row.ours.ms:6.1%} of ours, {bits}")
    if sums:
        fp32, any_type = (sum(record[key] for record in sums.values()) for key in ("fp32_us", "any_us"))
        lines.append(
            "multiplies: nothing, for cublasLt gives the same bits again by any algorithm. That all sums are in fp32 "
            f"costs {fp32 / any_type - 1:.1%} (below 1 % it is noise): {len(sums)} kinds, once each, take "
            f"{fp32:,.0f} us by the fastest algorithms that keep to it, {any_type:,.0f} us by the fastest of all"
        )
    return lines


if __name__ == "__main__":
    main()
