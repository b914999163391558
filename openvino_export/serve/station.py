# SPDX-License-Identifier: Apache-2.0
"""A station at the line: judges parts, keeps the last ones, tells who listens, and is taught.

It knows nothing of HTTP, MQTT or OPC UA; those are ways to reach it. Judging and teaching have a detector each, on the
same bundle, so that judging never waits for teaching and takes up what was taught when it is saved.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openvino_export.cli.overlay import levels_of
from openvino_export.detector import EdgeDetector
from openvino_export.memory.names import checked_name

from .parts import KeptParts
from .teacher import Teacher

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from openvino_export.decision import Prediction
    from openvino_export.memory.report import Report

    from .teacher import Teaching

# Parts called bad that are judged again to tell what else a correction would let pass.
LOOKED_AT = 50
# Until it is looked again whether another program has changed the bundle.
SECONDS_BETWEEN_LOOKS = 1.0
# The last scores, of which quantiles are told.
LAST_SCORES = 200


class PausedError(ValueError):
    """The station is paused, so a part was not judged."""


class HeldBackError(ValueError):
    """Images look anomalous, so they are learned only if that is confirmed.

    Attributes:
        excess: By how many times each image exceeds its threshold.
        would_pass: Numbers of kept parts, called bad, that would be called good then.
    """

    def __init__(self, excess: dict[str, float], would_pass: list[int]) -> None:
        largest = max(excess.values())
        super().__init__(f"This scores {largest:.1f} times the threshold. Confirm it if it is good all the same.")
        self.excess, self.would_pass = excess, would_pass


class Station:
    """What runs at a line; all methods may be called from several threads at once.

    Args:
        bundle: Folder of the bundle.
        folder: Where parts and teachings are kept; made if need be.
        keep: Number of parts whose images are kept.
        device: Device of OpenVINO.

    Attributes:
        detector: What parts are judged with.
        parts: The last parts.
        teacher: What changes the bundle.
        paused: Whether parts are refused.
        learning_as: Name of the variant as which each part is learned now, if a new product is being shown.
        verdicts: Number of parts by variant and label since the start; labels are good, anomalous and undecided.
        scores: Last scores by variant.

    Raises:
        FileNotFoundError: If there is no such bundle.
        BundleError: If it is damaged or has no memory bank.
        ValueError: If there is no such device, or nothing is to be kept.
    """

    def __init__(self, bundle: str | Path, folder: str | Path, keep: int = 1000, device: str = "CPU") -> None:
        self.detector = EdgeDetector(bundle, device)
        self.teacher = Teacher(Path(bundle), Path(folder), device)
        self.detector.reload()
        self.parts = KeptParts(Path(folder) / "parts", keep)
        self.paused = False
        self.learning_as: str | None = None
        self._shown_by = ""
        self.verdicts: Counter[tuple[str, str]] = Counter()
        self.scores: dict[str, deque[float]] = {}
        self._listeners: list[Callable[[dict[str, Any]], None]] = []
        self._lock = threading.Lock()
        self._drift = self.detector.drift_monitor()
        self._next_look, self._trouble = 0.0, ""
        # One at a time, in order, when parts of a new product come quicker than they are learned.
        self._learning = ThreadPoolExecutor(1, "learn")

    # Judging

    def judge(
        self, image: bytes | NDArray[np.uint8], part: str | None = None, name: str = "The image"
    ) -> dict[str, Any]:
        """Judge a part and keep it.

        Args:
            image: Content of an image file, or RGB pixels of 8 bits, shape `(H, W, 3)`.
            part: What the caller calls the part.
            name: What messages call the image.

        Returns:
            The verdict: `id`, `part`, `time`, `pred_label`, `pred_score`, `variant`, `is_sure`, `milliseconds`; `drift`
            if good parts no longer look as learned, and `learned_as` while a new product is shown.

        Raises:
            PausedError: If the station is paused.
            ValueError: If the image cannot be judged.
        """
        if self.paused:
            msg = "The station is paused. Go on first."
            raise PausedError(msg)
        self._look_at_bundle()
        number, path = self.parts.begin(image if isinstance(image, bytes) else _encoded(image))
        start = time.perf_counter()
        try:
            result = self.detector.predict(path)
        except (OSError, ValueError) as error:
            self.parts.drop(number)
            with self._lock:
                self.verdicts["", "undecided"] += 1
            msg = str(error).replace(str(path), name)
            self._tell("undecided", {"part": part, "time": _now(), "error": msg})
            raise ValueError(msg) from error
        verdict = {
            "id": number,
            "part": part,
            "time": _now(),
            **_said(result),
            "milliseconds": round(1e3 * (time.perf_counter() - start), 2),
        }
        variant = str(result.variant)
        with self._lock:
            label = {True: "anomalous", False: "good", None: "undecided"}[result.pred_label]
            self.verdicts[variant, label] += 1
            self.scores.setdefault(variant, deque(maxlen=LAST_SCORES)).append(result.pred_score)
            if self._drift is not None and self._drift.add(result):
                verdict["drift"] = True
        learning_as = self.learning_as
        if learning_as is not None:
            verdict["learned_as"] = learning_as
        self.parts.say(number, verdict, levels_of(result))
        self._tell("verdict", verdict)
        if learning_as is not None:
            self._learning.submit(self._learn_shown, number, learning_as, self._shown_by)
        return verdict

    def judge_again(self, number: int) -> dict[str, Any]:
        """How a part that was kept is judged now; it is neither kept nor counted again.

        Args:
            number: Number of the part.

        Returns:
            `pred_label`, `pred_score`, `variant` and `is_sure`.

        Raises:
            NotThereError: If the part is no longer kept.
        """
        self.parts.verdict(number)
        return _said(self.detector.predict(self.parts.path(number)))

    # Teaching

    def feedback(
        self,
        number: int,
        verdict: str,
        who: str,
        *,
        confirm: bool = False,
        **arguments: Any,  # noqa: ANN401
    ) -> tuple[Teaching | None, Report]:
        """Teach that a part that was kept is good, or defective.

        Args:
            number: Number of the part.
            verdict: `good` or `defective`.
            who: Who says so.
            confirm: Whether it is learned as good even if it scores far above the threshold.
            arguments: `variant`, and `regions` of a defect, see :meth:`EdgeDetector.learn`.

        Returns:
            As :meth:`learn`.

        Raises:
            NotThereError: If the part is no longer kept.
            HeldBackError: If that must be confirmed.
            ValueError: If the verdict is another, or an argument cannot be used.
        """
        if verdict not in {"good", "defective"}:
            msg = f"A part is good or defective, got {verdict!r}."
            raise ValueError(msg)
        arguments.setdefault("variant", self.parts.verdict(number)["variant"])
        if verdict == "defective":
            return self.learn([self.parts.path(number)], who, defective=True, **arguments)
        return self.learn([self.parts.path(number)], who, force=confirm, **arguments)

    def learn(self, images: Sequence[Path], who: str, **arguments: Any) -> tuple[Teaching | None, Report]:  # noqa: ANN401
        """Teach images.

        Arguments, results and errors are those of :meth:`Teacher.learn`, and one error more.

        Raises:
            HeldBackError: If nothing was learned since the images look anomalous, so that `force` is needed.
        """
        teaching, report = self.teacher.learn(images, who, **arguments)
        self._take_up(teaching)
        if report.held_back and teaching is None:
            bad = {self.parts.path(each["id"]): each["id"] for each in self.parts.latest(LOOKED_AT, anomalous=True)}
            others = [path for path in bad if path not in images]
            passing = self.teacher.would_pass(images, others, variant=arguments.get("variant"))
            raise HeldBackError(report.held_back, [bad[path] for path in passing])
        return teaching, report

    def change(self, kind: str, who: str, **arguments: Any) -> Teaching:  # noqa: ANN401
        """Rename, merge or delete a variant, or decide otherwise; see :meth:`Teacher.change`."""
        teaching = self.teacher.change(kind, who, **arguments)
        self._take_up(teaching)
        return teaching

    def undo(self, who: str, number: int | None = None) -> Teaching:
        """Take a teaching back; see :meth:`Teacher.undo`."""
        teaching = self.teacher.undo(who, number)
        self._take_up(teaching, "undone")
        return teaching

    def show_new_product(self, variant: str | None, who: str = "") -> None:
        """Learn each part that comes from now on as a variant; with None, judge as before.

        Args:
            variant: Name of the variant.
            who: Who shows it.

        Raises:
            ValueError: If it can be no name of a variant.
        """
        name = None if variant is None else checked_name(variant)
        self._shown_by, self.learning_as = who, name
        self._tell("mode", self.mode())

    def pause(self, *, paused: bool) -> None:
        """Refuse parts from now on, or take them again."""
        self.paused = paused
        self._tell("mode", self.mode())

    def mode(self) -> dict[str, Any]:
        """Whether parts are judged, and learned."""
        return {"paused": self.paused, "learning_as": self.learning_as}

    # Listening

    def listen(self, tell: Callable[[dict[str, Any]], None]) -> Callable[[], None]:
        """Have a function called with each event, on the thread where it happens; it must be quick.

        Returns:
            A function that ends it.
        """
        self._listeners.append(tell)
        return lambda: self._listeners.remove(tell)

    def _tell(self, kind: str, content: dict[str, Any]) -> None:
        for tell in list(self._listeners):
            tell({"event": kind, **content})

    def _take_up(self, teaching: Teaching | None, kind: str = "taught") -> None:
        """Judge from now on by what was taught."""
        self.detector.reload()
        with self._lock:
            self._drift = self.detector.drift_monitor()
        if teaching is not None:
            self._tell(kind, {**vars(teaching), "variants": self.detector.info()["variants"]})

    def _look_at_bundle(self) -> None:
        """Take up what another program has saved; if that fails, tell it once, and judge by what was known before."""
        with self._lock:
            if time.monotonic() < self._next_look:
                return
            self._next_look = time.monotonic() + SECONDS_BETWEEN_LOOKS
        try:
            if self.detector.reload():
                self._drift = self.detector.drift_monitor()
            trouble = ""
        except (OSError, ValueError) as error:
            trouble = str(error)
        if trouble and trouble != self._trouble:
            self._tell("failed", {"error": trouble})
        self._trouble = trouble

    def _learn_shown(self, number: int, variant: str, who: str) -> None:
        """Learn a part of a new product; what fails is told."""
        try:
            self.learn([self.parts.path(number)], who, variant=variant, force=True)
        except (OSError, ValueError) as error:
            self._tell("failed", {"id": number, "error": str(error)})

    def close(self) -> None:
        """End when what is being learned is saved."""
        self._learning.shutdown()


def _said(result: Prediction) -> dict[str, Any]:
    """What was said of a part, fit for JSON."""
    return {
        "pred_label": result.pred_label,
        "pred_score": round(result.pred_score, 6),
        "variant": result.variant,
        "is_sure": result.is_sure,
    }


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def _encoded(pixels: NDArray[np.uint8]) -> bytes:
    """A frame as the content of an image file without loss."""
    from PIL import Image

    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
