"""Which algorithms matrix multiplies follow: timed once, and kept in a run's table and in a cache on disk.

A table holds what it is good for, as `cublaslt.Library.identity` gives it; under "algorithms" what
`cublaslt.Library.fastest` gives for each operation, by its name; and what else was chosen by the time that multiplies
take, under a key of its own. A table, a GPU and a version of cublasLt fix every bit of the results. What is in no table
takes cublasLt's first proposal.

The cache has a file for each identity, which every process of this user adds to: records as a table's, by the names of
operations and, for choices, by their keys and sizes.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from engine.device import cublaslt, cuda
from engine.device.kernels import cache_dir, locked, write_whole

CONTENDERS = 2  # counts the kinds of things that were ever timed: where that changes, a cache's records are not good


class Choice(NamedTuple):
    """Something else that is chosen by timing multiplies."""

    key: str  # of the table
    of: str  # for what sizes
    choose: Callable[[], dict[str, Any]]  # times, and gives what a table says of it


def tune(
    operations: Sequence[cublaslt.Operation],
    saved: Mapping[str, Any],
    say: Callable[[str], None],
    choice: Choice | None = None,
    *,
    thorough: bool = False,
) -> dict[str, Any]:
    """The table of the fastest algorithms for these, as JSON can hold it: `saved`'s where that table is of this GPU and
    cublasLt, else those in the cache on disk, else timed now, on memory that is given back. The choice is kept in the
    same places; where it is made now, the table is in use from then on. thorough: variants of cublasLt's proposals are
    timed too; of the cache, what was chosen without them is not taken.

    Says what it timed. Only one process at a time may time on a GPU: those that share the cache wait for each other.
    """
    library = cublaslt.library()
    here = library.identity()
    before = {key: saved.get(key) for key in here}
    if saved and before != here:
        there, now = (", ".join(f"{key} {value}" for key, value in table.items()) for table in (before, here))
        say(
            f"matrix multiplies: the checkpoint's algorithms are for {there}; here is {now}: chosen anew, and results "
            "may differ in their last bits"
        )
        saved = {}
    file = cache_dir() / f"multiplies-{hashlib.sha256(repr((CONTENDERS, here)).encode()).hexdigest()[:32]}.table"
    began = time.monotonic()
    with locked(file.with_suffix(".lock")):
        cached = _read(file)
        kept = saved.get("algorithms", {})
        known, timed = {**cached, **kept}, {}
        for operation in operations:
            found = known.get(operation.name)
            too_few = thorough and operation.name not in kept and found is not None and not found.get("thorough")
            if found is None or too_few or not library.accepts(operation, found["algo"]):
                if operation.name in kept:
                    say(f"matrix multiplies: the checkpoint's algorithm for {operation.name} cannot be had here")
                known[operation.name] = timed[operation.name] = library.fastest(operation, thorough)
        if timed:
            cuda.free_unused()
            say(f"timed {len(timed)} kinds of matrix multiply in {time.monotonic() - began:.1f} s")
        table = here | {"algorithms": {operation.name: known[operation.name] for operation in operations}}
        if choice:
            name, record = f"{choice.key} {choice.of}", saved.get(choice.key, {})
            if record.get("of") != choice.of:
                record = cached.get(name)
            if record is None:
                use(table)
                record = timed[name] = {"of": choice.of} | choice.choose()
                cuda.free_unused()
            table[choice.key] = record
        if timed:
            with suppress(OSError):  # without a cache the next run times them again
                _write(file, cached | timed)
    return table


def use(table: Mapping[str, Any]) -> None:
    """Multiplies follow this table, which `tune` gave for this GPU and cublasLt; none, if it is empty."""
    cublaslt.library().use({name: record["algo"] for name, record in table.get("algorithms", {}).items()})


def _read(file: Path) -> dict[str, Any]:
    """The records in a file of the cache; none if it is missing or damaged, which its hash tells."""
    try:
        digest, _, text = file.read_bytes().partition(b"\n")
    except OSError:
        return {}
    return json.loads(text) if digest == _digest(text) else {}


def _write(file: Path, records: Mapping[str, Any]) -> None:
    """What `_read` will give. Raises OSError."""
    text = json.dumps(records, indent=1).encode()
    write_whole(file, _digest(text) + b"\n" + text)


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()
