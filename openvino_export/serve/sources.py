# SPDX-License-Identifier: Apache-2.0
"""What a station judges by itself: the images of a folder, the frames of a video or a camera."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openvino_export.cli.sources import named_images
from openvino_export.images import SUFFIXES, files_in

from .station import PausedError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray

    from .station import Station

BASLER = "basler"
# Seconds until a source that fails is tried again.
_PAUSE = 2.0


class Feeder:
    """Has a station judge what a source gives, on a thread of its own, until it is closed.

    Images that are in a folder when it begins are left alone. A source that fails is tried again, but a video that has
    ended is not.

    Args:
        station: What judges.
        source: A folder, a video file, the number of a camera, or `basler` for the first camera that pylon finds.
        interval: Seconds between two looks at a folder.

    Raises:
        FileNotFoundError: If there is no such source.
        ValueError: If it is a single image.
    """

    def __init__(self, station: Station, source: str, interval: float = 0.2) -> None:
        if source != BASLER and not source.isdigit() and not Path(source).exists():
            msg = f"There is no folder, video or camera {source}."
            raise FileNotFoundError(msg)
        if Path(source).is_file() and Path(source).suffix.lower() in SUFFIXES:
            msg = f"{source} is a single image; give the folder into which images come."
            raise ValueError(msg)
        self._station, self._source, self._interval = station, source, interval
        self._end = threading.Event()
        self._is_folder = Path(source).is_dir()
        self._seen = self._states() if self._is_folder else {}
        self._thread = threading.Thread(target=self._run, name="source", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End when the part that is being judged is done."""
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        told = ""
        while not self._end.is_set():
            try:
                (self._look if self._is_folder else self._take_frames)()
            except (OSError, ValueError, RuntimeError) as error:  # noqa: PERF203
                if str(error) != told:
                    told = str(error)
                    print(f"The source {self._source} fails; it is tried again: {error}", file=sys.stderr, flush=True)
                self._end.wait(_PAUSE)
            else:
                told = ""
                if not self._is_folder and Path(self._source).is_file():
                    return

    def _states(self) -> dict[Path, tuple[int, int]]:
        """Size and time of change of each image of the folder.

        Raises:
            FileNotFoundError: If the folder is gone.
        """
        states = {}
        folder = Path(self._source)
        paths = files_in(folder)
        folder.stat()  # after it: a folder that goes meanwhile seems to be empty
        for path in paths:
            try:
                status = path.stat()
            except FileNotFoundError:  # taken away again
                continue
            states[path] = (status.st_size, status.st_mtime_ns)
        return states

    def _look(self) -> None:
        """Judge the images that are new or changed, and as they were at the last look.

        Raises:
            OSError: If one could not be read; it stays new, and the others were judged.
        """
        now = self._states()
        fresh = [path for path, state in now.items() if self._seen.get(path) != state]
        self._end.wait(self._interval)
        failed = None
        for path in fresh:
            try:
                status = path.stat()
                if (status.st_size, status.st_mtime_ns) == now[path]:
                    self._judge(path.read_bytes(), str(path.relative_to(self._source)))
                    self._seen[path] = now[path]
            except FileNotFoundError:  # noqa: PERF203
                continue
            except OSError as error:
                failed = error
        self._seen = {path: state for path, state in self._seen.items() if path in now}
        if failed is not None:
            raise failed

    def _take_frames(self) -> None:
        frames = _basler_frames() if self._source == BASLER else named_images(self._source, None)[0]
        for name, frame in frames:
            if self._end.is_set():
                return
            self._judge(frame, name)

    def _judge(self, image: Any, name: str) -> None:  # noqa: ANN401
        """Judge an image when the station is not paused; one that cannot be judged is told."""
        while not self._end.is_set():
            try:
                self._station.judge(image, name, name)
            except PausedError:
                self._end.wait(self._interval)
                continue
            except ValueError as error:
                print(str(error), file=sys.stderr, flush=True)
            return


def _basler_frames() -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Frames of the first camera that pylon finds, the newest each time.

    Raises:
        ValueError: If pypylon is missing, or the camera fails or is not there.
    """
    try:
        from pypylon import genicam, pylon
    except ImportError as error:
        msg = "Cameras by Basler are read with pypylon: pip install 'anomalib-ext[basler]'"
        raise ValueError(msg) from error
    try:
        yield from _grabbed(pylon)
    except genicam.GenericException as error:
        msg = f"The camera fails: {error}"
        raise ValueError(msg) from error


def _grabbed(pylon: Any) -> Iterator[tuple[str, NDArray[np.uint8]]]:  # noqa: ANN401
    converter = pylon.ImageFormatConverter()
    converter.OutputPixelFormat = pylon.PixelType_RGB8packed
    with pylon.InstantCamera(pylon.TlFactory.GetInstance().CreateFirstDevice()) as camera:
        camera.StartGrabbing(pylon.GrabStrategy_LatestImageOnly)
        number = 0
        while camera.IsGrabbing():
            with camera.RetrieveResult(5000, pylon.TimeoutHandling_ThrowException) as result:
                if result.GrabSucceeded():
                    yield f"frame_{number:06}", converter.Convert(result).GetArray()
                    number += 1
