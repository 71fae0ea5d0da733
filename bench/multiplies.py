"""Which algorithm of a multiply is the fastest under load: `python bench/multiplies.py -e d12 -b 8`.

train.py races algorithms by turns, each with a cold cache, at one clock for all. In a step a GPU is at its limit of
power, which sets the clock: there the algorithm that takes the fewest joules may be the fastest. So for each multiply
of a step, the fastest of a race again, each by itself, as long as the GPU takes to settle.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.machine import circumstances, told
from bench.step import options, set_up
from engine import device
from engine.device import cublaslt
from engine.errors import UsageError, exit_on_user_error
from engine.memory import gradient_dtype

BATCH = 0.02  # seconds of calls that the host is ahead


def sustained(dev: ModuleType, contender: cublaslt.Contender, seconds: float) -> float:
    """Seconds of a call, among so many seconds of nothing else, after as many."""
    calls = max(1, round(BATCH / max(contender.seconds, 1e-6)))
    for _ in range(2):
        began, until = dev.mark(), time.monotonic() + seconds
        marks: list[Any] = []
        while not marks or time.monotonic() < until:
            for _ in range(calls):
                contender.again()
            marks.append(dev.mark())
            dev.seconds_between(began, marks[max(0, len(marks) - 2)])  # waits for the batch before
        took = dev.seconds_between(began, marks[-1])
    return float(took / (calls * len(marks)))


def compare(
    operation: cublaslt.Operation, times: int, dev: ModuleType, *, thorough: bool, most: int, seconds: float
) -> dict[str, Any]:
    """The algorithms of a multiply, the one that train.py uses first; times: how often a step makes it."""
    algorithms = []
    for contender in cublaslt.library().contenders(operation, thorough, most):
        took = sustained(dev, contender, seconds)
        algorithms.append(contender.settings | {"us_raced": contender.seconds * 1e6, "us": took * 1e6})
    return {"name": operation.name, "times": times, "algorithms": algorithms}


def a_step(multiplies: Sequence[dict[str, Any]], choose: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> float:
    """Milliseconds of a step's multiplies under load, by those algorithms."""
    return sum(each["times"] * choose(each["algorithms"])["us"] for each in multiplies) / 1000


def lines(multiply: dict[str, Any]) -> list[str]:
    """A table of its algorithms."""
    table = [f"{multiply['name']}, {multiply['times']} times a step"]
    for each in multiply["algorithms"]:
        settings = ("id", "tile_id", "stages_id", "splitk_num", "cluster_shape_id")
        told = " ".join(f"{each[name]:>4}" for name in settings) if "id" in each else f"{'our own':24}"
        table.append(f"  {told} {each['us_raced']:>12.1f} {each['us']:>14.1f}")
    return table


@click.command(context_settings={"show_default": True})
@options
@click.option("--most", default=5, help="Algorithms of each multiply.")
@click.option("--seconds", default=0.4, help="Each algorithm by itself, before it is timed and while it is.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures here too.")
@exit_on_user_error
def main(most: int, seconds: float, json_path: Path | None, **size: Any) -> None:
    """The algorithms of a step's multiplies: microseconds in a race and under load."""
    if device.choose(size["device"], lambda line: None) != "cuda":
        raise UsageError("on a CPU there are no algorithms to choose from: --device cuda, where there is a GPU")
    setting = set_up(**size)
    run, config, dev = setting.run, setting.config, setting.dev
    linear = setting.operations.linear
    dims = config.dims() | {"B": run.B, "T": run.T}
    operations = linear.multiplies(dims, gradient_dtype(run, dev), linear.gelu_fusion, False)
    figures: dict[str, Any] = circumstances("bench/multiplies.py", setting.backend) | {"multiplies": []}
    print("\n".join(told(figures)))
    print("\n    id tile stages split cluster  us in a race  us under load; the first is in use")
    for operation in operations:
        times = 1 if config.Vp in (operation.M, operation.N, operation.K) else config.L
        found = compare(operation, times, dev, thorough=run.gemm_search == "full", most=most, seconds=seconds)
        figures["multiplies"].append(found)
        print("\n".join(lines(found)), flush=True)
    used = a_step(figures["multiplies"], lambda algorithms: algorithms[0])
    best = a_step(figures["multiplies"], lambda algorithms: min(algorithms, key=lambda each: each["us"]))
    figures["ms"] = {"in use": used, "fastest under load": best}
    print(f"\nmultiplies of a step under load: {used:.2f} ms by those in use, {best:.2f} by the fastest under load")
    if json_path:
        json_path.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
