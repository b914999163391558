# SPDX-License-Identifier: Apache-2.0
"""The command ``watch``: it judges what a camera puts into a folder, and ends only when it is told to."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openvino_export.cli.output import GOOD, UNDECIDED, exit_code, prediction_line, print_line, say
from openvino_export.cli.record import Record

if TYPE_CHECKING:
    from collections.abc import Generator

# Seconds until a bundle that is not whole is read again; it may be large.
_PAUSE = 2.0


def watch(
    bundle: str,
    folder: str,
    output: str | None = None,
    device: str = "CPU",
    interval: float = 0.2,
    idle: float | None = None,
) -> int:
    """Judge each new image of a folder once, as a camera fills it; what others learn meanwhile is taken up.

    Writes one JSON line for each image, an unreadable one too, and goes on until it is interrupted or terminated. A
    line with "drift": true is the first that shows that good parts no longer look as learned. The lines are first
    added to predictions.jsonl in the output folder, or in the watched one without it; images that are named there are
    not judged again when it is started anew, unless they have changed. What goes wrong is said once, and tried again.

    Args:
        bundle: Folder that the export to openvino has written.
        folder: Folder to watch.
        output: Folder for heat maps over the images; none are written without it.
        device: Device of OpenVINO.
        interval: Seconds between two looks at the folder.
        idle: Seconds without a new image after which to stop.
    """
    from openvino_export.cli.overlay import refuse_output_among_images

    if not Path(folder).is_dir():
        msg = f"There is no folder {folder} to watch."
        raise FileNotFoundError(msg)
    refuse_output_among_images(output, folder)
    with _terminated_as_interrupted(), closing(_Watch(bundle, folder, output, device, interval)) as watching:
        return watching.run(idle)


class _Watch:
    """One who watches a folder; the arguments are those of :func:`watch`."""

    def __init__(self, bundle: str, folder: str, output: str | None, device: str, interval: float) -> None:
        from openvino_export.detector import EdgeDetector

        self._bundle, self._folder, self._output = bundle, Path(folder).resolve(), output
        self._interval = interval
        self._detector = EdgeDetector(bundle, device)
        self._monitor = self._detector.drift_monitor()
        self._next_reload = 0.0
        self._record = Record(Path(output or self._folder) / "predictions.jsonl")
        self._seen: dict[Path, tuple[int, int]] = {}  # what is to be judged, and its state at the last look
        self._troubles = _Troubles()
        self._code = GOOD

    def close(self) -> None:
        """Leave the record to others."""
        self._record.close()

    def run(self, idle: float | None) -> int:
        """Judge what comes; return the exit code after so many seconds without a new image."""
        last_change = time.monotonic()
        while idle is None or time.monotonic() - last_change < idle:
            self._take_up()
            if self._look():
                last_change = time.monotonic()
            time.sleep(self._interval)
        return self._code

    def _take_up(self) -> None:
        """Take up what was learned, or another model; from a bundle that is not whole nothing is."""
        if time.monotonic() < self._next_reload:
            return
        self._next_reload = time.monotonic() + _PAUSE
        with self._troubles.borne(
            f"The bundle {self._bundle} cannot be taken up now; what was known before goes on judging",
            f"The bundle {self._bundle} is whole again.",
        ):
            if self._reload():
                self._monitor = self._detector.drift_monitor()
            self._next_reload = 0.0

    def _reload(self) -> bool:
        """Whether there was something new.

        Raises:
            BundleError: If the bundle is not whole.
        """
        from openvino_export.bundle.folder import BundleError, current_version
        from openvino_export.detector import EdgeDetector, OtherModelError

        try:
            if self._detector.reload():
                return True
        except OtherModelError:
            self._detector = EdgeDetector(self._bundle, self._detector.device)
            say(f"The bundle {self._bundle} is of another model now, which judges from here on.")
            return True
        if not current_version(self._bundle):
            msg = "its metadata cannot be read."
            raise BundleError(msg)
        return False

    def _look(self) -> bool:
        """Judge the images that are as they were at the last look; another may be in the middle of being written.

        Returns:
            Whether an image was judged, or is new.
        """
        states: dict[Path, tuple[int, int]] | None = None
        with self._troubles.borne(
            f"The folder {self._folder} cannot be read; it is tried again",
            f"The folder {self._folder} can be read again.",
        ):
            states = self._to_judge()
        if states is None:
            return False
        ready = [path for path, state in states.items() if self._seen.get(path) == state]
        is_busy = len(ready) < len(states)
        self._seen = states
        gone, unread = [], None
        for path in ready:
            try:
                line, result = self._judge(path)
            except FileNotFoundError:  # noqa: PERF203
                gone.append(path)
            except OSError as error:
                unread = error
            else:
                self._tell({**line, "state": states[path]}, path, result)
                is_busy = True
        if gone:
            more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
            say(f"Taken away before being judged: {gone[0]}{more}.")
        with self._troubles.borne("Not all images can be read; they are tried again", "All images can be read again."):
            if unread is not None:
                raise unread
        return is_busy

    def _to_judge(self) -> dict[Path, tuple[int, int]]:
        """Size and time of change of each image that was not judged like that.

        Raises:
            OSError: If there is no such folder now.
        """
        from openvino_export.images import files_in

        next(self._folder.iterdir(), None)  # raises where a search for files would find none
        states = {}
        for path in files_in(self._folder):
            try:
                status = path.stat()
            except FileNotFoundError:  # taken away again
                continue
            state = (status.st_size, status.st_mtime_ns)
            if self._record.judged.get(str(path)) != state:
                states[path] = state
        return states

    def _judge(self, path: Path) -> tuple[dict[str, Any], Any]:
        """The line about an image, and the verdict unless the image is to blame that there is none.

        Raises:
            OSError: If it is gone, or cannot be read for a reason that is not its own.
        """
        try:
            result = self._detector.predict(path)
        except (MemoryError, ValueError) as error:
            _read_through(path)
            self._code = UNDECIDED
            return {"source": str(path), "error": str(error)}, None
        self._code = max(self._code, exit_code(result))
        line = prediction_line(result, str(path.relative_to(self._folder)), self._output)
        if self._monitor is not None and self._monitor.add(result):
            line["drift"] = True
        return line, result

    def _tell(self, line: dict[str, Any], path: Path, result: Any) -> None:  # noqa: ANN401  # a Prediction
        """Record a line, before anything else is done with it; then write the heat map and print the line."""
        from openvino_export.cli.overlay import write_overlay

        self._add(line)
        del line["state"]
        if result is not None and "drift" in line:
            text = f"Good parts of {result.variant} no longer look as learned."
            say(f"{text} See whether light, lens or supplier changed; if they are right, learn some of them.")
        if result is not None and "overlay" in line:
            trouble = f"The heat map {line['overlay']} was not written"
            with self._troubles.borne(trouble, "Heat maps are written again."):
                write_overlay(result, path, Path(line["overlay"]))
        with self._troubles.borne("Lines cannot be printed", "Lines can be printed again."):
            print_line(line)

    def _add(self, line: dict[str, Any]) -> None:
        """Add a line to the record, however long that takes."""
        path = self._record.path
        while True:
            with self._troubles.borne(
                f"The record {path} cannot be written; until it can, no more is judged",
                f"The record {path} is written again.",
            ):
                self._record.add(line)
                return
            time.sleep(self._interval)


class _Troubles:
    """Says what goes wrong when it begins and when it ends, and has `watch` go on."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    @contextmanager
    def borne(self, trouble: str, over: str) -> Generator[None, None, None]:
        """Bear an error of the system or of a file.

        Args:
            trouble: What to say of it, before its own message.
            over: What to say when it is over; troubles that end alike are one.
        """
        try:
            yield
        except BrokenPipeError:  # the reader of the lines has ended
            raise
        except (OSError, ValueError) as error:
            if over not in self._told:
                self._told.add(over)
                say(f"{trouble}: {error}")
        else:
            if over in self._told:
                self._told.remove(over)
                say(over)


def _read_through(path: Path) -> None:
    """Read a file that could not be judged, to see whether it is to blame.

    Raises:
        OSError: If it is gone or the folder is away, so that it should be tried again.
    """
    with suppress(PermissionError), path.open("rb") as file:  # rights do not come back by themselves
        while file.read(2**20):
            pass


@contextmanager
def _terminated_as_interrupted() -> Generator[None, None, None]:
    """Have the signal to terminate do what Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():  # others cannot set it
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
