# SPDX-License-Identifier: Apache-2.0
"""Defects that a user has shown, so that the next one like them is found. The rule is ours.

A variant that was shown defects has a second, small bank of their patches. A patch that is nearer to one of these than
to all good vectors counts as farther from good, by the ratio of both distances. The bank of good vectors, with its
certificate and its shares, stays as it is.

Each of the defective patches has a reach, which ends before the nearest good patch that is kept: the vectors, and the
patches by which the variant judges itself. So no score that a threshold rests on is raised, and thresholds stay as they
are. Of other good images some are raised, see docs/benchmarks.md. A good image that is learned later shortens the
reaches by all its patches: what it looks like is good from then on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from .k_center import farthest_first
from .leave_one_out import SHOWN, Sample, joined, kept_patches, no_images, prefix_distances, scored
from .search import product
from .variant import Calibration, Defects, Variant

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from .memory_bank import MemoryBank

    Array = NDArray[np.float32]

# Of all variants together.
DEFECT_VECTORS = 256
# Of an image those patches are kept that are farther than half of all good images ever get, so many at most and at
# least. Where it is not said where the defect is, it is looked for around the farthest patch, within such a share of
# the side.
MOST_PATCHES, FEWEST_PATCHES = 16, 2
VICINITY = 1 / 16
# A reach is such a part of the distance to the nearest good patch. Chosen on eight products so that four images that
# are shown call less than one more good part in a hundred bad, and tried on three others; see docs/benchmarks.md.
REACH = 0.8
# No distance is raised more. A defect that scores less than half the threshold is as good parts are.
LARGEST_RAISE = 2.0
# A patch of a region, if such a share of it is inside.
INSIDE = 0.3


def raised(patches: Array, distances: Array, defects: Defects | None) -> Array:
    """Distances of patches to good vectors, raised near defects that were shown.

    Args:
        patches: Patch embeddings, shape `(n, d)`.
        distances: Distance of each to its nearest good vector, shape `(n,)`.
        defects: Those of the variant that the image is of.
    """
    if defects is None or not len(defects.reaches):
        return distances
    squares = product(patches, defects.vectors.T.copy())
    squares *= -2
    squares += np.einsum("ij,ij->i", defects.vectors, defects.vectors)
    squares += np.einsum("ij,ij->i", patches, patches)[:, None]
    np.maximum(squares, np.float32(1e-12), out=squares)
    nearest = squares.min(axis=1)
    ratios = distances**2 / nearest
    squares /= defects.reaches**2
    # Zero where a reach is infinite.
    within = np.maximum(squares.min(axis=1), LARGEST_RAISE**-2)
    return np.asarray(distances * np.sqrt(np.maximum(np.minimum(ratios, 1 / within), 1)))


def with_defect(
    variant: Variant,
    embedding: Array,
    region: Array | None = None,
    map_size: tuple[int, int] = (0, 0),
) -> Variant:
    """A variant that was shown a defective image; the same object if it was shown that before.

    Args:
        variant: The variant, as it is in the bank.
        embedding: Patch embeddings of the image, shape `(h, w, d)`.
        region: Which share of each patch is defective, shape `(h, w)`; looked for if not given.
        map_size: Height and width of its anomaly map; zeros where unknown.
    """
    rows, columns, dimension = embedding.shape
    patches = embedding.reshape(-1, dimension).astype(np.float32, copy=False)
    distances = _distances(variant, patches)
    candidates = _candidates(distances.reshape(rows, columns), region)
    order = candidates[np.argsort(-distances[candidates], kind="stable")][:MOST_PATCHES]
    stands_out = distances[order] >= _typical_score(variant)
    stands_out[:FEWEST_PATCHES] = True
    picks = patches[order[stands_out]]
    if variant.defects is not None and (variant.defects.vectors[:, None] == picks).all(axis=2).any(axis=0).all():
        return variant  # shown before
    known = variant.calibration or no_images(dimension)
    grid = (rows, columns) if all(map_size) else (0, 0)
    kept, factors = kept_patches(variant, Sample(SHOWN, patches, grid, map_size))
    shown = Calibration(
        kept[None], np.array([SHOWN], np.int32), np.array([True]), factors[None], np.zeros(1, np.float32)
    )
    defects = Defects(picks, np.full(len(picks), np.inf, np.float32), 1)
    return replace(
        variant,
        calibration=scored(variant, joined([known, shown])),
        defects=together(variant.defects, limited(defects, good_patches(variant))),
    )


def scored_by(bank: MemoryBank, patches: Array) -> tuple[str, float]:
    """Variant that an image is judged by, and its largest patch distance, for patches of shape `(n, d)`."""
    distances, index = bank.search(patches)
    name = list(bank.variants)[int(np.bincount(bank.owners()[index]).argmax())]
    return name, float(raised(patches, distances, bank.variants[name].defects).max())


def limited(defects: Defects | None, good: Array) -> Defects | None:
    """Defects that reach no good patch of shape `(n, d)`; those that hardly reach anything are dropped."""
    if defects is None or not len(good) or not len(defects.reaches):
        return defects
    good = good.astype(np.float32, copy=False)
    squares = defects.vectors @ good.T
    squares *= -2
    squares += np.einsum("ij,ij->i", good, good)
    lengths = np.einsum("ij,ij->i", defects.vectors, defects.vectors)
    distances = np.sqrt(np.maximum(squares.min(axis=1) + lengths, 0))
    reaches = np.minimum(defects.reaches, REACH * distances)
    reaching = reaches > 1e-2 * np.sqrt(lengths)
    return replace(defects, vectors=defects.vectors[reaching], reaches=reaches[reaching])


def together(one: Defects | None, other: Defects | None) -> Defects | None:
    """Defects of the same variant, each vector once."""
    if one is None or other is None:
        return one or other
    vectors, first = np.unique(np.concatenate([one.vectors, other.vectors]), axis=0, return_index=True)
    reaches = np.concatenate([one.reaches, other.reaches])[first]
    return Defects(vectors, reaches, one.images + other.images)


def within_bounds(variants: Mapping[str, Variant]) -> dict[str, Variant]:
    """The variants, with so many defective patches that all have room; those with most of them are thinned."""
    counts = sorted(len(each.defects.reaches) for each in variants.values() if each.defects is not None)
    limit, left = DEFECT_VECTORS, DEFECT_VECTORS
    for position, count in enumerate(counts):
        limit = left // (len(counts) - position)
        if count > limit:
            break
        left -= count
    else:
        return dict(variants)
    return {name: _thinned(variant, limit) for name, variant in variants.items()}


def good_patches(variant: Variant) -> Array:
    """All good patches of a variant that are kept, shape `(n, d)`."""
    known = [variant.vectors.astype(np.float32)]
    if variant.calibration is not None:
        patches = variant.calibration.patches[~variant.calibration.labels]
        known.append(patches.reshape(-1, patches.shape[-1]).astype(np.float32))
    return np.concatenate(known)


def _distances(variant: Variant, patches: Array) -> Array:
    """Distance of patches that were not learned to the nearest vector of a variant, shape `(n,)`."""
    strangers = np.full(len(patches), -1, np.int32)
    return prefix_distances(patches, strangers, variant, [len(variant.radii)])[:, 0]


def _thinned(variant: Variant, size: int) -> Variant:
    """A variant with at most `size` patches of defects, those that differ most."""
    defects = variant.defects
    if defects is None or len(defects.reaches) <= size:
        return variant
    picks = farthest_first(defects.vectors, size)[0]
    return replace(variant, defects=replace(defects, vectors=defects.vectors[picks], reaches=defects.reaches[picks]))


def _candidates(distances: Array, region: Array | None) -> NDArray[np.int64]:
    """Indices of the patches among which the defect is, for distances of shape `(h, w)`."""
    if region is not None:
        return np.flatnonzero(region >= min(INSIDE, float(region.max())))
    rows, columns = distances.shape
    row, column = divmod(int(distances.argmax()), columns)
    near_rows = np.abs(np.arange(rows) - row) <= max(1, round(rows * VICINITY))
    near_columns = np.abs(np.arange(columns) - column) <= max(1, round(columns * VICINITY))
    return np.flatnonzero(near_rows[:, None] & near_columns)


def _typical_score(variant: Variant) -> float:
    """What half of the good images score at most; 0 if unknown."""
    calibration = variant.calibration
    if calibration is None:
        return 0.0
    scores = calibration.scores[~calibration.labels & np.isfinite(calibration.scores)]
    return float(np.median(scores)) if len(scores) else 0.0
