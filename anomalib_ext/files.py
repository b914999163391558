# SPDX-License-Identifier: Apache-2.0
"""Files that are written all at once: after a kill, the old file or the new one is there, and whole.

Also names for them, and whether a checkpoint is still as it was written.
"""

import csv
import hashlib
import io
import os
import re
import zipfile
import zlib
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

# Windows takes them for devices, whatever follows a dot.
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))}
_LONGEST_NAME = 100


def safe_name(name: str) -> str:
    """A name of a variant, as file systems and loggers take it, those of Windows and MLflow among them.

    Latin letters, digits, spaces, `_`, `-` and `.` stay; any other character gives `_`. A name that is changed ends
    with a checksum of what it was, so that two variants never share one.
    """
    is_device = name.partition(".")[0].strip().lower() in _DEVICES
    is_plain = re.fullmatch(r"[A-Za-z0-9_-]([A-Za-z0-9_. -]*[A-Za-z0-9_-])?", name) and len(name) <= _LONGEST_NAME
    if is_plain and not is_device:
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9_-]', '_', name[: _LONGEST_NAME // 2])}-{digest[:8]}"


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


def check_checkpoint(path: str | Path) -> None:
    """Refuse a checkpoint that was changed or cut off: torch writes a checksum of each part, but does not look at it.

    Args:
        path: The file; what is no file, or was not written as an archive, is left to torch.

    Raises:
        ValueError: If it is damaged.
    """
    if not Path(path).is_file():
        return
    with Path(path).open("rb") as opened:
        if opened.read(2) != b"PK":
            return
    try:
        with zipfile.ZipFile(path) as file:
            # A part that calls itself a folder would be left unread by torch.
            folders = (part.filename for part in file.infolist() if part.external_attr & 0x10)
            damaged = file.testzip() or next(folders, None)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError) as error:
        damaged = str(error)
    if damaged is not None:
        msg = f"The checkpoint {path} is damaged ({damaged:.200}). Use an undamaged copy of it."
        raise ValueError(msg)


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
