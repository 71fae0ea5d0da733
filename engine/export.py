"""A checkpoint as llm.c's model file: `python -m engine.export RUN_DIR MODEL.bin`."""

from pathlib import Path

import click
import numpy as np

from engine import checkpoint, llmc_model
from engine.config import GPT2Config
from engine.errors import CheckpointError, exit_on_user_error
from engine.models import gpt2


@click.command(context_settings={"show_default": True})
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(list(llmc_model.STORED)), default="float32", help="Of the file's tensors.")
@exit_on_user_error
def main(run_dir: Path, target: Path, dtype: str) -> None:
    """Write the model of RUN_DIR's newest checkpoint to TARGET, in llm.c's format."""
    saved = checkpoint.load_latest(run_dir, report=print)
    if not saved:
        raise CheckpointError(f"{run_dir} holds no checkpoint; a run keeps them with -n")
    config = GPT2Config(**saved.state["model"])
    dims = {"max_seq_len": config.maxT, **{name: config.dims()[name] for name in ("V", "Vp", "L", "NH", "C")}}
    params = saved.tensors(gpt2.MODEL_FILE)
    stacked = {
        name: params[name] if name in params else np.stack([params[f"h.{layer}.{name}"] for layer in range(config.L)])
        for name in llmc_model.shapes(dims)
    }
    llmc_model.write(target, dims, stacked, dtype)
    print(f"{target}: step {saved.step:,}, {llmc_model.file_bytes(dims, dtype):,} bytes")


if __name__ == "__main__":
    main()
