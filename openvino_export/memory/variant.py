# SPDX-License-Identifier: Apache-2.0
"""A product variant in the memory bank. The rule is ours, around farthest-first traversal.

* A variant keeps its vectors in order of insertion radius, the distance at which farthest-first picked them. A prefix
  of a farthest-first order is the farthest-first order of that size, so making room is cutting tails.
* Seniors, vectors whose radius is at least twice the merge radius, keep their seat in every later selection, and
  whatever is dropped is charged to its nearest senior. A cover radius records the largest distance charged to a vector.
  Chains of charges stay short that way, and their largest value certifies the coverage of all that was ever learned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from .k_center import nearest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

SENIORITY = 2.0
# An image belongs to a variant if its mean embedding lies within this share of the variant's spread of the prototype.
# Between what own images and what those of other products reach on real data, see docs/benchmarks.md.
MEMBERSHIP = 0.5


@dataclass(frozen=True)
class Calibration:
    """What remains of the images by which a variant judges itself, see `leave_one_out.py`.

    Attributes:
        patches: Patches of each image that can be its largest, shape `(n, CALIBRATION_PATCHES, d)`.
        origins: Number of each image in the variant, shape `(n,)`; -1 for validation images, which were not learned,
            and -2 for defective images that were shown.
        labels: Whether each image is anomalous, shape `(n,)`.
        factors: By which the largest distance of these patches is multiplied to be the score of the image, and to be
            the largest value of its anomaly map, shape `(n, 2)`.
        scores: Image score of each by the vectors that did not come from it, shape `(n,)`.
    """

    patches: Array
    origins: NDArray[np.int32]
    labels: NDArray[np.bool_]
    factors: Array
    scores: Array


@dataclass(frozen=True)
class Defects:
    """Patches of defects that were shown, see `defects.py`.

    Attributes:
        vectors: Patch embeddings, shape `(n, d)`, float32.
        reaches: Distance from each within which patches are like it, shape `(n,)`; above 0, infinite if no good patch
            is known.
        images: Number of images shown.
    """

    vectors: Array
    reaches: Array
    images: int


@dataclass(frozen=True)
class Variant:
    """The part of the bank that belongs to one product variant, in order of falling insertion radius.

    Attributes:
        vectors: Patch embeddings, shape `(n, d)`, float32 or float16.
        radii: Insertion radius of each vector, shape `(n,)`; the first is infinite.
        cover_radii: Largest distance from each vector to a learned patch that it stands for, shape `(n,)`.
        origins: Number, in the variant, of the image that each vector came from, shape `(n,)`; -1 where unknown.
        stand_ins: Distance from each vector to a patch of another image, about the nearest that was seen, shape `(n,)`.
        gains: By how much each vector lowers what the budget is to lower, see `leave_one_out.py`; never rising, shape
            `(n,)`.
        merge_radius: Distance up to which a patch counts as known; 0 until the first vector was dropped.
        images: Number of images learned.
        prototype: Mean patch embedding, shape `(d,)`.
        spread: Mean distance of a patch to the prototype.
        wanted: Number of vectors beyond which good images would hardly score lower; 0 if unknown.
        floor: Lowest mean logarithm of the scores of good images that the variant ever had; NaN if unknown.
        calibration: Images by which the variant judges itself.
        defects: What was shown of defects.
        false_alarm_rate: Share of good images that may be called anomalous, if it is not that of the bank.
        by_hand: Threshold of the image score and of the anomaly map in place of those that follow from good images.
        former: Both as they were in a file of a former version, and the mean score of its calibration then.
    """

    vectors: Array
    radii: Array
    cover_radii: Array
    origins: NDArray[np.int32]
    stand_ins: Array
    gains: Array
    merge_radius: float
    images: int
    prototype: Array
    spread: float
    wanted: int = 0
    floor: float = math.nan
    calibration: Calibration | None = None
    defects: Defects | None = None
    false_alarm_rate: float | None = None
    by_hand: tuple[float, float] | None = None
    former: tuple[float, float, float] | None = None


def rounded(vectors: Array, dtype: np.dtype) -> tuple[Array, Array]:
    """Vectors as `dtype` holds them, and the distance by which each was moved."""
    held = vectors.astype(dtype)
    return held, np.linalg.norm(held.astype(np.float32) - vectors, axis=1)


def describe(patches: Array) -> tuple[Array, float]:
    """Mean of patches of shape `(n, d)`, and their mean distance to it."""
    mean = patches.mean(axis=0, dtype=np.float64).astype(np.float32)
    return mean, float(np.linalg.norm(patches - mean, axis=1).mean())


def charge(points: Array, cover_radii: Array, dropped: Array, dropped_cover_radii: Array) -> None:
    """Raise `cover_radii` until `points` stand for all that `dropped`, each charged to its nearest point, stood for."""
    if len(dropped):
        distances, index = nearest(dropped, points)
        np.maximum.at(cover_radii, index, distances + dropped_cover_radii)


def cover_radii_after_cut(points: Array, cover_radii: Array, radii: Array, keep: int, merge_radius: float) -> Array:
    """Cover radii of the first `keep` of points in order of radius, once the rest is charged to the seniors of them."""
    seniors = max(1, int((radii[:keep] >= SENIORITY * merge_radius).sum()))
    kept = cover_radii[:keep].copy()
    charge(points[:seniors], kept[:seniors], points[keep:], cover_radii[keep:])
    return kept


def cut(variant: Variant, keep: int) -> Variant:
    """Keep the first `keep` vectors; `calibration` is then to be scored anew."""
    if keep >= len(variant.radii):
        return variant
    merge_radius = max(variant.merge_radius, float(variant.radii[keep]))
    vectors = variant.vectors.astype(np.float32, copy=False)
    # Copies, so that the memory of what was cut is given back.
    return replace(
        variant,
        vectors=variant.vectors[:keep].copy(),
        radii=variant.radii[:keep].copy(),
        cover_radii=cover_radii_after_cut(vectors, variant.cover_radii, variant.radii, keep, merge_radius),
        origins=variant.origins[:keep].copy(),
        stand_ins=variant.stand_ins[:keep].copy(),
        gains=variant.gains[:keep].copy(),
        merge_radius=merge_radius,
    )
