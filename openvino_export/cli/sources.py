# SPDX-License-Identifier: Apache-2.0
"""Where images come from: a file, a folder, a video or a camera."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from openvino_export.images import SUFFIXES, files_in

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray


def image_paths(source: Path) -> list[Path]:
    """Image files of a folder, sorted, or the file itself.

    Raises:
        ValueError: If the folder holds none.
    """
    if not source.is_dir():
        return [source]
    paths = files_in(source)
    if not paths:
        msg = f"The folder {source} holds no images."
        raise ValueError(msg)
    return paths


def named_images(source: str, frames: int | None) -> tuple[Iterable[tuple[str, Path | NDArray[np.uint8]]], int | None]:
    """Names and images of a source.

    Args:
        source: Image, folder, video file, or the number of a camera.
        frames: Number of frames of a video or camera after which to stop.

    Returns:
        Pairs of a name and an image, which is a path or a frame `(H, W, 3)`, RGB; and their number, if it is known.

    Raises:
        FileNotFoundError: If there is no such source.
        ValueError: If it holds no images, also while frames are taken.
    """
    path = Path(source)
    if path.is_dir() or path.suffix.lower() in SUFFIXES:
        paths = image_paths(path)
        names = [str(one.relative_to(path)) if path.is_dir() else one.name for one in paths]
        return zip(names, paths, strict=True), len(paths)
    if not source.isdigit() and not path.exists():
        msg = f"There is no image, folder or video {source}."
        raise FileNotFoundError(msg)
    return _named_frames(source, frames), frames


def _named_frames(source: str, frames: int | None) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Names and frames of a video file or a camera."""
    if frames is not None and frames < 1:
        msg = f"frames must be at least 1, got {frames}."
        raise ValueError(msg)
    os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")  # the message below says it

    try:
        import cv2
    except ImportError as error:
        msg = "Videos and cameras are read with OpenCV: pip install opencv-python-headless"
        raise ValueError(msg) from error
    capture = cv2.VideoCapture(int(source) if source.isdigit() else source)
    number = 0
    try:
        while frames is None or number < frames:
            found, frame = capture.read()
            if not found:
                break
            yield f"{Path(source).stem}_{number:06}", np.asarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), np.uint8)
            number += 1
    finally:
        capture.release()
    if not number:
        if source.isdigit():
            msg = f"There is no camera {source}, or it gives no picture; see whether another program uses it."
        else:
            msg = f"No frame can be read from {source}: it is no video, or of a kind that OpenCV cannot decode."
        raise ValueError(msg)
