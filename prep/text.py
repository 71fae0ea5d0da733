"""`python -m prep.text`: text files of your own -> token shards."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from engine.errors import exit_on_user_error
from engine.shards import MAX_TOKENS
from engine.tokenizer import GPT2, Bytes
from prep import documents
from prep.dataset import SHARD_TOKENS, write_dataset

VAL_TOKENS = 100_000


@click.command(context_settings={"show_default": True})
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to create, as data/NAME.")
@click.option(
    "--tokenizer", type=click.Choice([Bytes.name, GPT2.name]), default=GPT2.name, help="What the model reads."
)
@click.option("--field", default="text", help="JSON field or Parquet column that holds the text.")
@click.option("--separator", help="A line that ends a document in a text file.  [default: one per file]")
@click.option("--val-tokens", type=click.IntRange(0), default=VAL_TOKENS, help="How many first tokens to validate on.")
@click.option("--shard-tokens", type=click.IntRange(1, MAX_TOKENS), default=SHARD_TOKENS, help="Tokens in a file.")
@click.option("--workers", type=click.IntRange(1), help="Processes that tokenize.  [default: one per core]")
@click.option("--overwrite", is_flag=True, help="Replace the folder, if it holds nothing but shards.")
@exit_on_user_error
def main(
    files: tuple[Path, ...],
    out: Path,
    tokenizer: str,
    field: str,
    separator: str | None,
    val_tokens: int,
    shard_tokens: int,
    workers: int | None,
    overwrite: bool,
) -> None:
    """Tokenize text files into shards for train.py, in the folder --out.

    .jsonl (.gz) and .parquet files hold one document per line or row; any other file is UTF-8 text and is one
    document, or several with a line of --separator between them. Each document starts with an end-of-text
    token. The folder appears when it is complete.

    \b
    Examples:
      python -m prep.text book.txt --out data/book --tokenizer bytes
      python -m prep.text stories.txt --separator '<|endoftext|>' --out data/stories
      python -m prep.text fineweb/*.parquet --out data/fineweb --val-tokens 10000000
      python -m prep.text posts.jsonl.gz --field body --out data/posts --overwrite
    """
    with _progress(documents.check(files)) as progress:
        pieces = documents.read(files, field=field, separator=separator, progress=progress)
        summary = write_dataset(
            pieces,
            out,
            out.resolve().name,
            tokenizer,
            val_tokens=val_tokens,
            shard_tokens=shard_tokens,
            workers=workers or _num_cores(),
            overwrite=overwrite,
        )
    click.echo(summary)


def _num_cores() -> int:
    # Those this process may use: a container or a batch system often grants fewer than there are.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _progress(num_bytes: int) -> Iterator[Callable[[int], object]]:
    """A bar over the bytes of input on a terminal, a line at each tenth elsewhere; both on stderr."""
    if sys.stderr.isatty():
        with click.progressbar(length=num_bytes, label="tokenizing", file=sys.stderr) as bar:
            yield bar.update
    else:
        yield _TenthsPrinter(num_bytes)


class _TenthsPrinter:
    def __init__(self, num_bytes: int):
        self._num_bytes, self._done, self._tenth = num_bytes, 0, 0

    def __call__(self, num_bytes: int) -> None:
        self._done += num_bytes
        tenth = 10 * self._done // max(self._num_bytes, 1)
        if tenth > self._tenth:
            self._tenth = tenth
            click.echo(f"tokenizing: {10 * tenth:3d} % of {self._num_bytes / 1e6:,.1f} MB", err=True)


if __name__ == "__main__":
    main()
