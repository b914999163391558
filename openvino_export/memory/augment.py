# SPDX-License-Identifier: Apache-2.0
"""Augmented views that few images of a variant are stretched to. Without torch.

The choice of changes and their strength is ours; arXiv 2512.13497 names augmentation only.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Array = NDArray[np.float32]

NUM_VIEWS = 16


def augmented_views(image: Array, count: int, seed: int, strength: float = 1.0) -> Array:
    """Slightly rotated, shifted, scaled, lit and blurred views of one image; the same for the same seed.

    Args:
        image: Normalised image, shape `(3, H, W)`.
        count: Number of views.
        seed: Any integer of at most 64 bits.
        strength: Factor on all changes.

    Returns:
        Views of shape `(count, 3, H, W)`, float32.
    """
    generator = np.random.default_rng(seed % 2**64)
    margin = max(1, min(image.shape[1:]) // 4)  # enough for the corners, up to a strength of 3
    padded = np.pad(image.astype(np.float32), ((0, 0), (margin, margin), (margin, margin)), mode="reflect")
    channels = [Image.fromarray(channel) for channel in padded]
    # Each change spread evenly over its range (a Latin hypercube), so that few views hardly depend on the seed.
    levels = generator.permuted(np.tile(np.arange(count), (7, 1)), axis=1) + generator.random((7, count))
    return np.stack([_view(channels, margin, changes, strength) for changes in (2 * levels / count - 1).T])


def _view(channels: Sequence[Image.Image], margin: int, changes: NDArray[np.float64], strength: float) -> Array:
    """One view of an image, given by its channels, that are larger than it by `margin` on each side.

    Args:
        channels: Three images of floats.
        margin: Pixels that are cut off.
        changes: Rotation, shifts, scale, contrast, brightness and blur, each in [-1, 1].
        strength: Factor on all of them.
    """
    width, height = (side - 2 * margin for side in channels[0].size)
    angle, shift_x, shift_y, zoom, contrast, brightness, blur = (float(change) * strength for change in changes)
    angle, zoom = math.radians(5 * angle), 1 + 0.03 * zoom
    contrast, brightness = 1 + 0.1 * contrast, 1 + 0.1 * brightness
    # Pillow asks where in the padded image a pixel of the view comes from.
    cosine, sine = math.cos(angle) / zoom, math.sin(angle) / zoom
    x, y = width * (0.5 + 0.025 * shift_x), height * (0.5 + 0.025 * shift_y)
    origin_x = margin + width / 2 - cosine * x - sine * y
    origin_y = margin + height / 2 + sine * x - cosine * y
    backwards = (cosine, sine, origin_x, -sine, cosine, origin_y)
    view = np.stack([
        np.asarray(
            channel.transform((width, height), Image.Transform.AFFINE, backwards, Image.Resampling.BILINEAR),
        )
        for channel in channels
    ])
    if blur > 0:  # half of the views
        view = _blurred(view, 0.1 + 0.7 * blur)
    mean = view.mean()
    return ((view - mean) * contrast + mean * brightness).astype(np.float32)


def _blurred(image: Array, sigma: float) -> Array:
    """Gaussian blur with three taps each way, mirrored at the borders."""
    side = math.exp(-0.5 / sigma**2)
    side, middle = side / (1 + 2 * side), 1 / (1 + 2 * side)
    for axis in (1, 2):
        border = [(0, 0)] * 3
        border[axis] = (1, 1)
        padded = np.pad(image, border, mode="reflect")
        size = image.shape[axis]
        before, after = (padded.take(range(start, start + size), axis) for start in (0, 2))
        image = middle * image + side * (before + after)
    return image
