# SPDX-License-Identifier: Apache-2.0
"""Files that are written all at once: after a kill, the old file or the new one is there, and whole."""

import csv
import io
import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def atomic_write(path: Path) -> Generator[BinaryIO]:
    """Give a file to write beside ``path``, then sync it and rename it over; if writing fails, the old file stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")  # always the same, so that the next save removes a killed one's
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a directory cannot be synced
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)


def write_table(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a CSV file all at once.

    Args:
        rows: At least one; the keys of the first are the header.
        path: The file.
    """
    with atomic_write(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        writer = csv.DictWriter(text, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
        text.detach()
