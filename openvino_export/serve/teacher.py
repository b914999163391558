# SPDX-License-Identifier: Apache-2.0
"""Teaching at the line: each one is saved in the bundle, written down, and can be taken back for itself.

The log `teachings.jsonl` names every teaching: who, when, what, and the images, which are kept beside it. Learning is
repeatable, so the bank is what the file of its base holds and what was taught since. To take one teaching back, the
others are taught again from there. A bundle that another program has changed is a new base: what was taught before
stays learned, but can no longer be taken back one by one. So do the oldest teachings, when there are many.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from openvino_export.bundle.folder import current_version
from openvino_export.detector import EdgeDetector
from openvino_export.memory import state

from .parts import NotThereError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from openvino_export.memory.memory_bank import MemoryBank
    from openvino_export.memory.report import Report

LEARN = "learn"
# Teachings that can be taken back after a start.
KEPT_TEACHINGS = 500
# What can be taught, as methods of EdgeDetector.
KINDS = (LEARN, "set_decision", "rename_variant", "merge_variants", "delete_variant")


@dataclass
class Teaching:
    """One thing that was taught.

    Attributes:
        number: Its number in the log.
        time: When, ISO 8601, UTC.
        who: Who taught.
        kind: One of KINDS.
        arguments: Of the method of EdgeDetector, without images.
        images: Names of the images that were taught, below the folder of the log.
    """

    number: int
    time: str
    who: str
    kind: str
    arguments: dict[str, Any] = field(default_factory=dict)
    images: list[str] = field(default_factory=list)


class Teacher:
    """Changes what a bundle knows, one teaching at a time, while others go on judging with it.

    Args:
        bundle: Folder of the bundle.
        folder: Where the log and the images are kept; made if need be.
        device: Device of OpenVINO.

    Attributes:
        teachings: Those that can be taken back, the oldest first.

    Raises:
        BundleError: If the bundle is damaged, or has no memory bank.
    """

    def __init__(self, bundle: Path, folder: Path, device: str = "CPU") -> None:
        self._detector = EdgeDetector(bundle, device)
        self._bundle, self._folder = bundle, folder
        self._lock = threading.Lock()
        self._log, self._base = folder / "teachings.jsonl", 0
        self.teachings: list[Teaching] = []
        self._number = 0
        self._before_last: MemoryBank | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self._read()

    # Teaching

    def learn(self, images: Sequence[Path], who: str, **arguments: Any) -> tuple[Teaching | None, Report]:  # noqa: ANN401
        """Teach images.

        Args:
            images: Files of the images, which are copied.
            who: Who teaches.
            arguments: Those of :meth:`EdgeDetector.learn`.

        Returns:
            The teaching, None if nothing was learned of the images; and what changed in the bank.

        Raises:
            ValueError: If an image or an argument cannot be used. Nothing was learned then.
        """
        with self._lock:
            self._catch_up()
            before = self._detector.bank
            report = self._detector.learn(list(images), **arguments).report
            if self._detector.bank is before:
                return None, report
            return self._write(who, LEARN, arguments, images, before), report

    def change(self, kind: str, who: str, **arguments: Any) -> Teaching:  # noqa: ANN401
        """Rename, merge or delete a variant, or decide otherwise.

        Args:
            kind: Name of the method of EdgeDetector.
            who: Who teaches.
            arguments: Those of the method.

        Raises:
            ValueError: If it cannot be done. Nothing was changed then.
        """
        with self._lock:
            self._catch_up()
            before = self._detector.bank
            getattr(self._detector, kind)(**arguments)
            return self._write(who, kind, arguments, (), before)

    def would_pass(self, images: Sequence[Path], others: Sequence[Path], **arguments: Any) -> list[Path]:  # noqa: ANN401
        """Which other images would be called good if these were learned; nothing is learned.

        Args:
            images: Images to learn.
            others: Images that are called anomalous now.
            arguments: Those of :meth:`EdgeDetector.learn`.
        """
        with self._lock:
            self._catch_up()
            before = self._detector.bank
            try:
                self._detector.learn(list(images), **{**arguments, "force": True})
                return [path for path in others if path.exists() and not self._detector.predict(path).pred_label]
            finally:
                self._detector.edit_bank(lambda _: before)

    def undo(self, who: str, number: int | None = None) -> Teaching:
        """Take a teaching back; what was taught after it stays.

        Args:
            who: Who takes it back.
            number: Number of the teaching; the last one by default.

        Raises:
            NotThereError: If there is no such teaching, or it can no longer be taken back.
            ValueError: If a later teaching rests on it. Nothing was changed then.
        """
        with self._lock:
            self._catch_up()
            found = [each for each in self.teachings if number in {None, each.number}]
            if not found:
                what = "There is nothing to take back" if number is None else f"Teaching {number} cannot be taken back"
                msg = f"{what}. What was taught before another program changed the bundle stays learned."
                raise NotThereError(msg)
            taken, now = found[-1], self._detector.bank
            if taken is self.teachings[-1] and self._before_last is not None:
                before = self._before_last
                self._detector.edit_bank(lambda _: before)
            else:
                self._teach_again([each for each in self.teachings if each is not taken], now)
            try:
                self._detector.save()
            except BaseException:
                self._detector.edit_bank(lambda _: now)
                raise
            self._append({"kind": "undo", "number": self._next_number(), "who": who, "undone": taken.number})
            self.teachings.remove(taken)
            self._before_last = None
            return taken

    def _teach_again(self, teachings: Sequence[Teaching], now: MemoryBank) -> None:
        """Bring the base and some teachings into the bank, or leave it as it is."""
        base = state.from_bytes(self._base_file(self._base).read_bytes())
        self._detector.edit_bank(lambda _: base)
        number = 0
        try:
            for teaching in teachings:
                number = teaching.number
                if teaching.kind == LEARN:
                    self._detector.learn([self._folder / name for name in teaching.images], **teaching.arguments)
                else:
                    getattr(self._detector, teaching.kind)(**teaching.arguments)
        except BaseException as error:
            self._detector.edit_bank(lambda _: now)  # or the next teaching would save a part of what is known
            if not isinstance(error, (OSError, ValueError)):
                raise
            msg = f"Teaching {number} rests on it and would fail ({error}). Take that back first."
            raise ValueError(msg) from error

    def image(self, number: int) -> Path:
        """The first image of a teaching.

        Raises:
            NotThereError: If there is no such teaching, it can no longer be taken back, or it had no image.
        """
        for teaching in list(self.teachings):
            if teaching.number == number and teaching.images:
                return self._folder / teaching.images[0]
        msg = f"There is no image of a teaching {number} that can be taken back."
        raise NotThereError(msg)

    # Log

    def history(self, count: int) -> list[dict[str, Any]]:
        """The last lines of the log, the newest first."""
        return self._lines()[::-1][:count]

    def _write(
        self, who: str, kind: str, arguments: dict[str, Any], images: Sequence[Path], before: MemoryBank
    ) -> Teaching:
        """Save the bank in the bundle, and write down what led to it."""
        number = self._next_number()
        names = [f"taught/{number:06}/{position:04}{path.suffix}" for position, path in enumerate(images)]
        try:
            for path, name in zip(images, names, strict=True):
                (self._folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, self._folder / name)
            self._detector.save()
        except BaseException:
            self._detector.edit_bank(lambda _: before)
            raise
        teaching = Teaching(number, _now(), who, kind, arguments, names)
        self._append(vars(teaching))
        self.teachings.append(teaching)
        self._before_last = before
        return teaching

    def _catch_up(self) -> None:
        """Take up what another program has saved; that is a new base."""
        if self._detector.reload(discard=True):
            self._new_base(self._detector.bank, self._number)

    def _new_base(self, bank: MemoryBank, up_to: int) -> None:
        """What was taught up to a number can no longer be taken back one by one: a bank holds it."""
        number = self._next_number()
        with self._base_file(number).open("wb") as file:
            file.write(state.to_bytes(bank))
            file.flush()
            os.fsync(file.fileno())
        self._append({"kind": "base", "number": number, "who": "", "up_to": up_to})
        for path in self._folder.glob("base-*.safetensors"):
            if path != self._base_file(number):
                path.unlink()
        for path in (self._folder / "taught").glob("*"):
            if int(path.name) <= up_to:
                shutil.rmtree(path)
        self._base, self._before_last = number, None
        self.teachings = [each for each in self.teachings if each.number > up_to]

    def _base_file(self, number: int) -> Path:
        return self._folder / f"base-{number:06}.safetensors"

    def _fold(self) -> None:
        """Have the base hold the oldest teachings, if there are many."""
        oldest, now = self.teachings[:-KEPT_TEACHINGS], self._detector.bank
        if not oldest:
            return
        try:
            self._teach_again(oldest, now)
        except ValueError:  # an image is gone, for example; all that is known is the base then
            self._new_base(now, self._number)
            return
        base = self._detector.bank
        self._detector.edit_bank(lambda _: now)
        self._new_base(base, oldest[-1].number)

    def _read(self) -> None:
        """Go on where the log ends, if the bundle is as it was then."""
        lines = self._lines()
        self._number = max((line["number"] for line in lines), default=0)
        base = next((line for line in reversed(lines) if line["kind"] == "base"), None)
        is_as_it_was = base is not None and lines[-1]["version"] == current_version(self._bundle)
        if base is None or not is_as_it_was or not self._base_file(base["number"]).is_file():
            self._new_base(self._detector.bank, self._number)
            return
        self._base = base["number"]
        undone = {line["undone"] for line in lines if line["kind"] == "undo"}
        for line in lines:
            if line["kind"] in KINDS and line["number"] > base["up_to"] and line["number"] not in undone:
                self.teachings.append(Teaching(**{key: line[key] for key in Teaching.__dataclass_fields__}))
        self._fold()

    def _lines(self) -> list[dict[str, Any]]:
        """The log, without a line that a power failure has cut."""
        if not self._log.exists():
            return []
        lines = []
        for text in self._log.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                lines.append(json.loads(text))
        return lines

    def _append(self, line: dict[str, Any]) -> None:
        with self._log.open("a+", encoding="utf-8") as file:
            file.seek(0)
            if file.read()[-1:] not in {"", "\n"}:  # cut by a power failure
                file.write("\n")
            file.write(json.dumps({"time": _now(), **line, "version": current_version(self._bundle)}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _next_number(self) -> int:
        self._number += 1
        return self._number


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
