# SPDX-License-Identifier: Apache-2.0
"""A product variant in the memory bank. The rule is ours, around farthest-first traversal.

* A variant keeps its vectors in order of insertion radius, the distance at which farthest-first picked them. A prefix
  of a farthest-first order is the farthest-first order of that size, so making room is cutting tails.
* Seniors, vectors whose radius is at least twice the merge radius, keep their seat in every later selection, and
  whatever is dropped is charged to its nearest senior. A cover radius records the largest distance charged to a vector.
  Chains of charges stay short that way, and their largest value certifies the coverage of all that was ever learned.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from .k_center import nearest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float32]

# The scale of a variant is the mean insertion radius of its first picks, as many as even a small bank keeps.
SCALE_PICKS = 100
SENIORITY = 2.0
# An image belongs to a variant if its mean embedding lies within this share of the variant's spread of the prototype.
# Between what own images and what those of other products reach on real data, see docs/benchmarks.md.
MEMBERSHIP = 0.5


@dataclass(frozen=True)
class Calibration:
    """What remains of the images that set a variant's thresholds.

    Attributes:
        patches: Patches of each image that give its score, shape `(n, CALIBRATION_PATCHES, d)`.
        labels: Whether each image is anomalous, shape `(n,)`.
        scores: Image score of each when it was taken, shape `(n,)`.
        pixel: Pixel threshold, minimum and maximum of the anomaly maps at that time; NaN where unknown.
        margin: Factor on the thresholds, where these images score lower than those that are to be judged.
    """

    patches: Array
    labels: NDArray[np.bool_]
    scores: Array
    pixel: tuple[float, float, float] = (np.nan, np.nan, np.nan)
    margin: float = 1.0


@dataclass(frozen=True)
class Variant:
    """The part of the bank that belongs to one product variant, in order of falling insertion radius.

    Attributes:
        vectors: Patch embeddings, shape `(n, d)`, float32 or float16.
        radii: Insertion radius of each vector, shape `(n,)`; the first is infinite.
        cover_radii: Largest distance from each vector to a learned patch that it stands for, shape `(n,)`.
        scale: Mean insertion radius of the first picks, the unit in which the budget is divided.
        merge_radius: Distance up to which a patch counts as known; 0 until the first vector was dropped.
        images: Number of images learned.
        prototype: Mean patch embedding, shape `(d,)`.
        spread: Mean distance of a patch to the prototype.
        calibration: Images that set the thresholds, if there were any.
        prequential_scores: Score of the last learned images, each taken before it was learned, shape `(n,)`, `n` at
            most PREQUENTIAL_SCORES; the first image has none.
    """

    vectors: Array
    radii: Array
    cover_radii: Array
    scale: float
    merge_radius: float
    images: int
    prototype: Array
    spread: float
    calibration: Calibration | None = None
    prequential_scores: Array = field(default_factory=lambda: np.empty(0, np.float32))

    def normal_score_bound(self) -> float:
        """Score that a normal image may have: the largest of the later half of the prequential scores, 0 without any.

        At first, every image lies far from the few before it, so the earlier half says nothing.
        """
        return float(self.prequential_scores[len(self.prequential_scores) // 2 :].max(initial=0))


def rounded(vectors: Array, dtype: np.dtype) -> tuple[Array, Array]:
    """Vectors as `dtype` holds them, and the distance by which each was moved."""
    held = vectors.astype(dtype)
    return held, np.linalg.norm(held.astype(np.float32) - vectors, axis=1)


def describe(patches: Array) -> tuple[Array, float]:
    """Mean of patches of shape `(n, d)`, and their mean distance to it."""
    mean = patches.mean(axis=0, dtype=np.float64).astype(np.float32)
    return mean, float(np.linalg.norm(patches - mean, axis=1).mean())


def scale_of(radii: Array, known: Variant | None) -> float:
    """Scale of a variant with vectors of these falling radii, of which the first is infinite."""
    picks = radii[1 : SCALE_PICKS + 1]
    if known is not None and known.merge_radius > 0 and len(picks) < SCALE_PICKS:
        return known.scale  # measured before it was cut too short to measure
    return max(float(picks.mean()), 1e-6) if len(picks) else 1.0


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
    """Keep the first `keep` vectors."""
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
        merge_radius=merge_radius,
    )
