# SPDX-License-Identifier: Apache-2.0
"""The file in which ``watch`` remembers what it has judged."""

from __future__ import annotations

import errno
import json
import os
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from openvino_export.cli.output import say

if TYPE_CHECKING:
    from pathlib import Path

# A byte far beyond the end is locked, as far as every file system allows: on Windows, nobody else can read one that is.
_LOCKED_BYTE = 2**31 - 2


class Record:
    """A file of JSON lines about images; one process at a time holds it.

    Args:
        path: The file; it is made if need be.

    Attributes:
        path: The file.
        judged: Size and time of change of each image when it was judged, by path.

    Raises:
        BlockingIOError: If another process holds it.
        OSError: If it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.judged: dict[str, tuple[int, int]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._open()

    def _open(self) -> None:
        """Open the file, hold it, and read it; a last line that was not finished is cut off."""
        from openvino_export.bundle.commit import try_lock

        with ExitStack() as if_that_fails:
            self._file = if_that_fails.enter_context(self.path.open("ab", buffering=0))
            self._file.seek(_LOCKED_BYTE)
            if not try_lock(self._file.fileno()):
                msg = f"Another watch holds the record {self.path}. End it, or choose another output folder."
                raise BlockingIOError(msg)
            self._file.truncate(self._read())
            if_that_fails.pop_all()

    def _read(self) -> int:
        """Remember what the file names; return where its last whole line ends."""
        end = foreign = 0
        with self.path.open("rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                content = None
                with suppress(ValueError, RecursionError):
                    content = json.loads(line)
                match content:
                    case {"source": str(source), "state": [int(size), int(changed)]}:
                        self.judged[source] = size, changed
                    case _:
                        foreign += 1
        if foreign:
            say(f"{foreign} lines of the record {self.path} are damaged, or not of watch; they are passed over.")
        return end

    def add(self, line: dict[str, Any]) -> None:
        """Add the line about an image.

        Args:
            line: With the image's path as `source`, and its size and time of change as `state`.

        Raises:
            OSError: If that is not possible now; nothing of the line is in the file then.
        """
        if not self._is_there():
            self._file.close()
            self._open()
        content = json.dumps(line).encode() + b"\n"
        size = os.fstat(self._file.fileno()).st_size
        written = 0
        try:
            written = self._file.write(content)
        finally:
            if written < len(content):
                self._cut_off(size)
        if written < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self.judged[line["source"]] = line["state"]

    def _cut_off(self, size: int) -> None:
        try:
            self._file.truncate(size)
        except OSError:  # opening it again does it
            self._file.close()

    def _is_there(self) -> bool:
        """Whether the open file is still the one of this name: its folder may have been away."""
        try:
            return not self._file.closed and os.path.samestat(self.path.stat(), os.fstat(self._file.fileno()))
        except OSError:
            return False

    def close(self) -> None:
        """Leave it to others."""
        self._file.close()
