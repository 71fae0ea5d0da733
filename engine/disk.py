"""What is written is on the disk."""

import os
from pathlib import Path


def sync(path: str | Path) -> None:
    """Returns once a file's content, or a folder's names, are on the disk: only then do they outlive a power cut.

    Raises OSError.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
