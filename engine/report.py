"""The picture of a run: `python -m engine.report RUN_DIR` draws RUN_DIR/loss.png from its log.jsonl."""

from importlib.util import find_spec
from pathlib import Path

import click

from engine.errors import DataError, exit_on_user_error
from engine.log import read_jsonl

SMOOTHED_POINTS = 200  # the training loss is averaged over windows, about this many of them


def have_matplotlib() -> bool:
    """Whether the picture can be drawn: matplotlib is an extra (42 MB)."""
    return find_spec("matplotlib") is not None


def draw_loss(run_dir: Path) -> Path:
    """Draws run_dir/loss.png: training loss (raw and smoothed) and validation loss by step. Returns its path."""
    log = run_dir / "log.jsonl"
    if not log.is_file():
        raise DataError(f"{log}: no such file; a run writes it with -o {run_dir}")
    if not have_matplotlib():
        raise DataError(f"the loss curve of {run_dir} needs matplotlib: pip install matplotlib, and run this again")
    records = read_jsonl(log)
    train = [(r["step"] + 1, r["loss"]) for r in records if r["kind"] == "train" and r["loss"] is not None]
    val = [(r["step"], r["loss"]) for r in records if r["kind"] == "val" and r["loss"] is not None]
    if not train and not val:
        raise DataError(f"{log}: holds no losses yet")

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5), dpi=120)
    if train:
        axes.plot(*zip(*train, strict=True), color="tab:blue", alpha=0.25, linewidth=0.7)
        axes.plot(*zip(*_smoothed(train), strict=True), color="tab:blue", label="training loss")
    if val:
        axes.plot(*zip(*val, strict=True), "o-", color="tab:orange", markersize=4, label="validation loss")
        axes.annotate(f"{val[-1][1]:.3f}", val[-1], textcoords="offset points", xytext=(0, 8), ha="center")
    axes.set_xlabel("step")
    axes.set_ylabel("cross-entropy (nats per token)")
    axes.set_title(run_dir.name)
    axes.grid(alpha=0.3)
    axes.legend()
    path = run_dir / "loss.png"
    temporary = run_dir / ".loss.tmp.png"
    figure.savefig(temporary, bbox_inches="tight")
    plt.close(figure)
    temporary.replace(path)
    return path


def _smoothed(points: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """Means of windows of neighbouring points."""
    size = max(1, len(points) // SMOOTHED_POINTS)
    windows = [points[i : i + size] for i in range(0, len(points), size)]
    return [tuple(sum(column) / len(window) for column in zip(*window, strict=True)) for window in windows]


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@exit_on_user_error
def main(run_dir: Path) -> None:
    """Draw the loss curve of RUN_DIR into RUN_DIR/loss.png."""
    print(draw_loss(run_dir))


if __name__ == "__main__":
    main()
