"""A real training run beside the same run in PyTorch.

    python bench/real_run.py --text FILE.parquet ... --model d12 -B 64 -T 1024 --steps 1000 --out runs/real

    prepare   the text -> token shards in OUT/data, unless they are there
    ours      train.py, into OUT/ours
    peer      tests/torch_gpt2.py, into OUT/peer: the same initial values, batches, schedule and validation samples
    report    OUT/real-run.txt and OUT/real-run.png: both beside each other, and the verdict

--only runs some of these phases. Each leaves in OUT/PHASE.json what the report says of it, so that the report can be
made later, and elsewhere. Exit code 1: the losses differ by more than the criteria allow.
"""

import argparse
import json
import math
import shlex
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.machine import machine, nvidia_smi, versions, watched_gpu
from engine.errors import DataError, UsageError, exit_on_user_error
from engine.log import duration, printable, read_jsonl
from engine.report import have_matplotlib

ROOT = Path(__file__).resolve().parent.parent
NAMES = {"ours": "Backhand", "peer": "PyTorch"}

# The criteria: how far the losses may lie apart in the first steps, each of them, and in the last validation.
FIRST_STEPS, FIRST_BOUND, FINAL_BOUND = 10, 0.01, 0.02
WARM_UP = 20  # steps that the speed leaves out: compilation, first allocations, clocks
SHORT_SAMPLE = 300  # characters of every sample but the last
# No tokenizer needs fewer tokens than one for so many bytes of ordinary text.
BYTES_PER_TOKEN = {"gpt2": 5, "bytes": 1}


class Side(NamedTuple):
    """What a log.jsonl says: losses by step (NaN where they were not finite), times, and samples by step."""

    train: dict[int, float]
    val: dict[int, float]
    ms: list[float]
    tokens: int
    samples: dict[int, str]

    @property
    def steady_ms(self) -> float:
        """The median step once the run is warm; of a run shorter than that, of its second half."""
        return float(np.median(self.ms[min(WARM_UP, len(self.ms) // 2) :]))

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.steady_ms * 1000


# The phases


def prepare(args: argparse.Namespace) -> None:
    if args.data.exists():
        print(f"{args.data} is there already")
        return
    if not args.text:
        raise UsageError(f"--text is missing: it names the files to make {args.data} from")
    if missing := [str(path) for path in args.text if not path.is_file()]:
        raise UsageError(f"--text {missing[0]}: no such file")
    # Parquet is compressed, so there is at least as much text as there are bytes: this is 5 % of it or less.
    most = sum(path.stat().st_size for path in args.text) // BYTES_PER_TOKEN[args.tokenizer] // 20
    val_tokens = str(min(args.val_tokens, most))
    options = ["--out", shown(args.data), "--tokenizer", args.tokenizer, "--val-tokens", val_tokens]
    run(args, "prepare", ["-m", "prep.text", *map(shown, args.text), *options], text=[path.name for path in args.text])


def train_ours(args: argparse.Namespace) -> None:
    samples = ["-s", str(args.sample_every), "-g", "256"]
    rest = ["-r", "0", "-o", shown(args.out / "ours"), "-n", str(args.steps), "--device", args.device]
    run(args, "ours", ["train.py", *common_options(args), *samples, *rest])


def train_peer(args: argparse.Namespace) -> None:
    rest = ["-o", shown(args.out / "peer"), "--device", args.device] + ["--no-compile"] * args.no_compile
    run(args, "peer", ["-m", "tests.torch_gpt2", *common_options(args), *rest])


def common_options(args: argparse.Namespace) -> list[str]:
    """What both runs are told."""
    options = {
        "-i": f"{shown(args.data)}/*_train_*.bin",
        "-j": f"{shown(args.data)}/*_val_*.bin",
        "-e": args.model,
        "-b": args.B,
        "-t": args.T,
        "-x": args.steps,
        "-l": args.lr,
        "-u": args.steps // 10 if args.warmup is None else args.warmup,
        "-q": 0.0,
        "-c": 0.1,
        "-v": args.val_every,
        "-m": args.val_batches,
        "--seed": 42,
    }
    return [str(word) for option in options.items() for word in option]


def run(args: argparse.Namespace, phase: str, command: list[str], **facts: Any) -> None:
    """`python COMMAND` from the repository's root; then OUT/PHASE.json."""
    line = "python " + shlex.join(command)
    print(f"$ {line}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    began, date = time.monotonic(), datetime.now().astimezone().isoformat(" ", "seconds")
    with watched_gpu(args.device) as gpu:
        code = subprocess.run([sys.executable, *command], cwd=ROOT).returncode
    if code:
        sys.exit(code)
    facts |= {"command": line, "date": date, "seconds": round(time.monotonic() - began, 1)}
    facts |= {"machine": machine(args.device), "versions": versions(), "gpu": gpu}
    (args.out / f"{phase}.json").write_text(json.dumps(facts, indent=1) + "\n")


def shown(path: Path) -> str:
    """path as it reads from the repository's root."""
    path = path.resolve()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


# The report


def report(args: argparse.Namespace) -> int:
    """Writes the two files. Returns the exit code."""
    sides = {phase: read_side(args.out / phase) for phase in NAMES}
    title = describe(args.out)
    text, passed = write_up(args.out, title, sides)
    (args.out / "real-run.txt").write_text(text, encoding="utf-8")
    print(text)
    draw(args.out / "real-run.png", title, sides)
    return 0 if passed else 1


def read_side(folder: Path) -> Side:
    log = folder / "log.jsonl"
    records = read_jsonl(log) if log.is_file() else []
    train = [record for record in records if record["kind"] == "train"]
    if not train:
        raise DataError(f"{log}: no such log, or no step in it: the phase {folder.name} makes it")
    losses: dict[str, dict[int, float]] = {"train": {}, "val": {}}
    for record in records:
        if record["kind"] in losses:
            losses[record["kind"]][record["step"]] = math.nan if record["loss"] is None else record["loss"]
    samples = {record["step"]: record["text"] for record in records if record["kind"] == "sample"}
    return Side(**losses, ms=[r["ms"] for r in train], tokens=train[0]["tokens"], samples=samples)


def read_facts(out: Path, phase: str) -> dict[str, Any]:
    path = out / f"{phase}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def describe(out: Path) -> str:
    """Model and data in a line."""
    config = json.loads((out / "ours" / "config.json").read_text())
    options, tokens = config["options"], sum(tokens for _, tokens, _ in config["data"])
    text = ", ".join(read_facts(out, "prepare").get("text", [])) or "text"
    return (
        f"GPT-2 {options['model']}, {options['B']} x {options['T']:,} tokens a step, "
        f"on {text} ({tokens / 1e6:,.1f} M tokens, {config['tokenizer']})"
    )


def write_up(out: Path, title: str, sides: dict[str, Side]) -> tuple[str, bool]:
    """(the report, whether the criteria are met). A loss that is missing or not finite meets none."""
    ours, peer = sides["ours"], sides["peer"]
    lines = [title, ""]
    for phase in ("prepare", *NAMES):
        lines += [*about(phase, read_facts(out, phase)), ""]

    first = range(min(FIRST_STEPS, len(ours.train)))
    lines += [f"training loss  {heading()}", *rows(ours.train, peer.train, first), ""]
    lines += [f"validation     {heading()}", *rows(ours.val, peer.val, sorted(ours.val)), ""]

    differences = [abs(difference(ours.train, peer.train, step)) for step in first]
    last = len(ours.train)
    verdicts = [
        (f"the first {len(first)} steps: largest difference", float(np.max(differences)), FIRST_BOUND),
        (
            f"the final validation, after {last:,} steps: difference",
            abs(difference(ours.val, peer.val, last)),
            FINAL_BOUND,
        ),
    ]
    passed = [value <= bound for _, value, bound in verdicts]  # NaN is not, and np.max hands it on
    for (what, value, bound), fine in zip(verdicts, passed, strict=True):
        lines.append(f"{what} {value:.5f}, allowed {bound}: {'passed' if fine else 'FAILED'}")

    lines += ["", f"speed (median of the steps after the first {WARM_UP}, if there are twice as many)"]
    for phase, side in sides.items():
        lines.append(f"  {NAMES[phase]:9} {side.steady_ms:9.2f} ms a step, {side.tokens_per_second:11,.0f} tokens/s")
    lines.append(f"  {NAMES['ours']} runs at {ours.tokens_per_second / peer.tokens_per_second:.2f} of PyTorch's speed")

    for step, sample in ours.samples.items():
        newest = step == max(ours.samples)
        cut = "" if newest or len(sample) <= SHORT_SAMPLE else " ..."
        lines += ["", f"{NAMES['ours']} after {step:,} steps writes:"]
        lines.append(
            textwrap.indent(printable(sample if newest else sample[:SHORT_SAMPLE]) + cut, "  | ", lambda _: True)
        )
    return "\n".join(lines) + "\n", all(passed)


def about(phase: str, facts: dict[str, Any]) -> list[str]:
    """What a phase was, from its OUT/PHASE.json."""
    if not facts:
        return [f"{phase}: made elsewhere"]
    lines = [
        f"{phase}: {facts['date']}, {duration(facts['seconds'])} in all",
        f"  {facts['command']}",
        f"  {facts['machine']}; {facts['versions']}",
    ]
    if gpu := facts["gpu"]:
        lines.append(
            f"  while busy: {gpu['clock_mhz']:,} MHz, {gpu['watts']} W (means of {gpu['samples']} samples); "
            f"peak of memory {gpu['peak_mib']:,} MiB"
        )
    return lines


def heading() -> str:
    return f"{NAMES['ours']:>12}{NAMES['peer']:>12}{'difference':>12}"


def rows(ours: dict[int, float], peer: dict[int, float], steps: Iterable[int]) -> list[str]:
    lines = []
    for step in steps:
        losses = "".join(f"{side.get(step, math.nan):12.5f}" for side in (ours, peer))
        lines.append(f"  step {step:7,} {losses}{difference(ours, peer, step):+12.5f}")
    return lines


def difference(ours: dict[int, float], peer: dict[int, float], step: int) -> float:
    """Ours minus the peer's; NaN where one of them has none."""
    return ours.get(step, math.nan) - peer.get(step, math.nan)


def draw(path: Path, title: str, sides: dict[str, Side]) -> None:
    """Both loss curves in one picture, and their difference beneath."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (curves, apart) = plt.subplots(
        2, 1, sharex=True, figsize=(10, 8), dpi=120, height_ratios=(3, 1.3), layout="constrained"
    )
    # One solid and one dashed, one dot and one ring: told apart where they cover each other, and without colours too.
    looks = {"ours": ("tab:blue", "-", "o", "tab:blue"), "peer": ("tab:orange", "--", "o", "none")}
    for (phase, side), size in zip(sides.items(), (4, 8), strict=True):
        colour, line, marker, fill = looks[phase]
        steps, losses = arrays(side.train)
        curves.plot(steps + 1, losses, color=colour, alpha=0.25, linewidth=0.7)
        curves.plot(*smoothed(steps + 1, losses), line, color=colour, label=f"{NAMES[phase]}, training")
        curves.plot(
            *arrays(side.val),
            marker,
            color=colour,
            markersize=size,
            markerfacecolor=fill,
            label=f"{NAMES[phase]}, validation",
        )
    curves.set_ylabel("cross-entropy (nats per token)")
    curves.set_title("\n".join(textwrap.wrap(title, 100)), fontsize=11)

    ours, peer = sides["ours"], sides["peer"]
    both = {step: difference(ours.train, peer.train, step) for step in ours.train}
    steps, differences = arrays(both)
    apart.plot(steps + 1, differences, color="tab:green", alpha=0.3, linewidth=0.7)
    apart.plot(*smoothed(steps + 1, differences), color="tab:green", label="training")
    both = {step: difference(ours.val, peer.val, step) for step in ours.val}
    apart.plot(*arrays(both), "o", color="black", markersize=4, label="validation")
    apart.axhline(0, color="grey", linewidth=0.8)
    apart.set_ylabel(f"{NAMES['ours']} - {NAMES['peer']} (nats)")
    apart.set_xlabel("step")
    for axes in (curves, apart):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path)
    plt.close(figure)


def arrays(losses: dict[int, float]) -> tuple[np.ndarray, np.ndarray]:
    """(steps, losses)."""
    return np.array(list(losses)), np.array(list(losses.values()), np.float64)


def smoothed(steps: np.ndarray, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Moving means over a hundredth of the run."""
    size = max(1, len(losses) // 100)
    window = np.full(size, 1 / size)
    return np.convolve(steps, window, "valid"), np.convolve(losses, window, "valid")


PHASES = {"prepare": prepare, "ours": train_ours, "peer": train_peer, "report": report}


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", nargs="+", type=Path, default=[], metavar="FILE", help="text to train on, as prep.text takes it")
    add("--out", type=Path, required=True, metavar="OUT", help="folder of the run")
    add("--only", nargs="+", choices=PHASES, default=list(PHASES), help="phases to run; all of them otherwise")
    add("--tokenizer", choices=BYTES_PER_TOKEN, default="gpt2")
    add("--val-tokens", type=int, default=1_000_000, help="tokens to validate on, and at most 5 %% of the text")
    add("--model", default="d12", help="size, as train.py's -e")
    add("-B", type=int, default=64, help="sequences in a step")
    add("-T", type=int, default=1024, help="tokens in a sequence")
    add("--steps", type=int, default=1000)
    add("--lr", type=float, default=6e-4, help="peak learning rate; it falls to 0 by a cosine")
    add("--warmup", type=int, help="steps of warm-up; a tenth of all steps otherwise")
    add("--val-every", type=int, default=100, help="steps from one validation to the next")
    add("--val-batches", type=int, default=15, help="batches of B in a validation, as far as there are so many")
    add("--sample-every", type=int, default=250, help="steps from one of Backhand's samples to the next")
    add("--device", choices=("cpu", "cuda"), help="cuda where nvidia-smi finds a GPU otherwise, else cpu")
    add("--no-compile", action="store_true", help="the peer without torch.compile")
    return parser


@exit_on_user_error
def main() -> int:
    args = options().parse_args()
    args.out = args.out.resolve()
    args.data = args.out / "data"
    args.device = args.device or ("cuda" if nvidia_smi("name") else "cpu")
    if "report" in args.only and not have_matplotlib():
        raise DataError("the report needs matplotlib: pip install matplotlib, or leave it for later with --only")
    code = 0
    for name, phase in PHASES.items():
        if name in args.only:
            code = phase(args) or 0
    return code


if __name__ == "__main__":
    main()
