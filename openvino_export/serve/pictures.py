# SPDX-License-Identifier: Apache-2.0
"""Pictures of parts for people."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING

from openvino_export.cli.overlay import heat_map, lay_over, reduced
from openvino_export.images import load_picture

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray


def jpeg_of(path: Path, side: int) -> tuple[bytes, tuple[int, int]]:
    """An image as JPEG.

    Args:
        path: File of the image.
        side: Its longer side has at most so many pixels.

    Returns:
        The JPEG, and width and height of the image itself.
    """
    buffer = BytesIO()
    picture = load_picture(path).convert("RGB")
    size = picture.size
    picture.thumbnail((side, side))
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue(), size


def overlay_of(path: Path, levels: NDArray[np.uint8]) -> bytes:
    """An image with its anomaly map in 256 levels laid over, as PNG; a large one is reduced."""
    buffer = BytesIO()
    picture = reduced(load_picture(path))
    lay_over(picture, levels)
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def heat_map_of(levels: NDArray[np.uint8]) -> bytes:
    """An anomaly map in 256 levels as PNG, transparent where nothing is wrong."""
    buffer = BytesIO()
    heat_map(levels).save(buffer, "PNG")
    return buffer.getvalue()
