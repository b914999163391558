# SPDX-License-Identifier: Apache-2.0
"""The last parts that were judged, on disk, so that what a person says of one still finds its image."""

from __future__ import annotations

import json
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_SUFFIXES = (".json", ".map.npy", ".image")  # of the files of a part; the verdict goes first and comes last


class NotThereError(LookupError):
    """What was asked for is not kept, or no longer."""


class KeptParts:
    """A bounded number of parts: the image as it came, what was said of it, and its anomaly map.

    Args:
        folder: Where they are kept; made if need be. Parts that are there are taken over.
        keep: Number of parts; the oldest go first.

    Raises:
        ValueError: If `keep` is not positive.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        if keep < 1:
            msg = f"At least one part must be kept, got {keep}."
            raise ValueError(msg)
        self.folder, self.keep = folder, keep
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._verdicts: dict[int, dict[str, Any]] = {}
        for path in folder.glob("*.json"):
            with suppress(ValueError):  # cut by a power failure
                verdict = json.loads(path.read_text(encoding="utf-8"))
                self._verdicts[int(path.stem)] = verdict
        self._verdicts = dict(sorted(self._verdicts.items()))
        names = {int(path.name.partition(".")[0]) for path in folder.iterdir() if path.name[:1].isdigit()}
        self._next = max(names, default=0) + 1
        for number in names - {*self._verdicts}:
            self._delete(number)
        self._shrink()

    def begin(self, image: bytes) -> tuple[int, Path]:
        """Write an image, which becomes a part once something is said of it.

        Returns:
            The number of the part, and the file.
        """
        with self._lock:
            number, self._next = self._next, self._next + 1
        path = self.path(number)
        path.write_bytes(image)
        return number, path

    def drop(self, number: int) -> None:
        """Forget an image of which nothing can be said."""
        self._delete(number)

    def say(self, number: int, verdict: dict[str, Any], levels: NDArray[np.uint8]) -> None:
        """Keep what was said of a part.

        Args:
            number: Number of the part.
            verdict: What was said, fit for JSON.
            levels: Its anomaly map in 256 levels, shape `(H, W)`.
        """
        np.save(self.folder / f"{number:010}.map.npy", levels)
        (self.folder / f"{number:010}.json").write_text(json.dumps(verdict), encoding="utf-8")
        with self._lock:
            self._verdicts[number] = verdict
            self._shrink()

    def path(self, number: int) -> Path:
        """File of the image of a part."""
        return self.folder / f"{number:010}.image"

    def verdict(self, number: int) -> dict[str, Any]:
        """What was said of a part.

        Raises:
            NotThereError: If it is not kept.
        """
        with self._lock:
            if number not in self._verdicts:
                msg = f"There is no part {number}; the last {self.keep} are kept."
                raise NotThereError(msg)
            return self._verdicts[number]

    def levels(self, number: int) -> NDArray[np.uint8]:
        """Anomaly map of a part in 256 levels, shape `(H, W)`.

        Raises:
            NotThereError: If it is not kept.
        """
        self.verdict(number)
        return np.load(self.folder / f"{number:010}.map.npy", allow_pickle=False)

    def latest(self, count: int, *, anomalous: bool = False) -> list[dict[str, Any]]:
        """What was said of the last parts, the newest first.

        Args:
            count: Largest number of them.
            anomalous: Whether only those that were called anomalous are wanted.
        """
        with self._lock:
            verdicts = list(self._verdicts.values())
        return [each for each in reversed(verdicts) if each["pred_label"] or not anomalous][:count]

    def _shrink(self) -> None:
        while len(self._verdicts) > self.keep:
            number = min(self._verdicts)  # parts that are judged at the same time end in any order
            del self._verdicts[number]
            self._delete(number)

    def _delete(self, number: int) -> None:
        for suffix in _SUFFIXES:
            (self.folder / f"{number:010}{suffix}").unlink(missing_ok=True)
