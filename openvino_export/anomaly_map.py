# SPDX-License-Identifier: Apache-2.0
"""Anomaly maps as two small matrix products, with NumPy alone.

Anomalib's `AnomalyMapGenerator` (sigma 4) repeats the nearest patch score for each pixel, then blurs with 33 x 33 taps
over mirrored borders. Both steps are linear and treat rows and columns alike but apart, so that the map of scores `S`
is exactly `map_matrix(h, H) @ S @ map_matrix(w, W).T`, for a hundredth of the work. The factoring is ours.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

# Those of Anomalib's PatchCore.
SIGMA = 4.0
RADIUS = 16  # the kernel ends at four sigma


@lru_cache(maxsize=32)
def map_matrix(patches: int, pixels: int) -> Array:
    """Weights with which the patches along one side of an image make up its pixels.

    Args:
        patches: Number of patches along the side.
        pixels: Number of pixels along it. Below 17, where a border cannot be mirrored once, it is mirrored again.

    Returns:
        Shape `(pixels, patches)`; each row sums to 1. The array is shared between calls.
    """
    # In float32, as torch finds the nearest patch: a rounding error more or less would take its neighbor.
    scale = np.float32(patches) / np.float32(pixels)
    patch = np.minimum((np.arange(pixels, dtype=np.float32) * scale).astype(np.int64), patches - 1)
    kernel = np.exp(-0.5 * (np.arange(-RADIUS, RADIUS + 1) / SIGMA) ** 2)
    kernel /= kernel.sum()
    mirrored = np.pad(patch, RADIUS, mode="reflect")
    matrix = np.zeros((pixels, patches))
    rows = np.arange(pixels)
    for tap, weight in enumerate(kernel):
        # one patch a row for each tap, so no pair of indices repeats
        matrix[rows, mirrored[tap : tap + pixels]] += weight
    return matrix.astype(np.float32)


def anomaly_maps(scores: Array, height: int, width: int) -> Array:
    """Anomaly maps of shape `(..., height, width)` from patch scores of shape `(..., h, w)`."""
    h, w = scores.shape[-2:]
    return np.asarray(map_matrix(h, height) @ scores @ map_matrix(w, width).T)
