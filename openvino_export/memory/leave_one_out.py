# SPDX-License-Identifier: Apache-2.0
"""What a good image would score if it had not been learned: from this follow thresholds and shares of the budget. Ours.

Each vector knows the image that it came from. An image is scored by the vectors that did not come from it. A vector
that did is not simply left out, for without the image another patch would have taken its place: it counts as farther
away, by the distance to the nearest patch of another image that was seen, its stand-in. If that lies straight behind,
both distances add up; if it lies at a right angle, their squares do. STAND_IN_POWER is between.

A variant is cut by prefix, so the score by its first `m` vectors is what the image would score if the variant had `m`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from openvino_export.anomaly_map import anomaly_maps

from .k_center import farthest_first
from .variant import Calibration, Variant

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Array = NDArray[np.float32]

# Chosen on real products, at 100 to 10,000 vectors each; see docs/benchmarks.md.
STAND_IN_POWER = 4 / 3
# Kept are the patches of an image that are farthest from all vectors, and from such a share of them.
CALIBRATION_SHARES = tuple(0.5**k for k in range(8))
PATCHES_BY_SHARE = 2
CALIBRATION_PATCHES = PATCHES_BY_SHARE * len(CALIBRATION_SHARES)
# They are looked for among those that are farthest from so few vectors. On real products, scores by what is kept are
# up to 2 % lower than by all patches.
FIRST_VECTORS = (128, 1024)
FIRST_PATCHES = 64  # of each
LEARNED_IMAGES = 64  # that are kept of a variant
VALIDATION_IMAGES = 32  # of each label, and so many defective images that were shown
# In place of the number of an image in its variant: of validation, and shown as defective.
NOT_LEARNED, SHOWN = -1, -2
# What the budget is to lower is the sum over variants of this power of one and what good images score too high, by the
# logarithm of their scores. Much more than one spares the variant that suffers most. Chosen on eleven products, see
# docs/benchmarks.md.
SHARE_POWER = 4.0
# That is measured in the geometric mean of how much the logarithms of good scores spread and of how much they do so
# typically: the products whose good scores spread least are the most sensitive, but of few images a spread is a guess.
TYPICAL_SPREAD = 0.12
# Before a variant has told: its scores fall by this multiple of that mean as the number of vectors grows e-fold. It
# weighs as much as a few images.
EXPECTED_FALL = 1.0
EXPECTATION_WEIGHT = 4.0
# A curve is fitted from so many vectors on.
FIRST_MARK = 50
CURVE_POINTS = 32
# A variant has as many vectors as it wants when all that it ever had would lower scores by less than this multiple.
ENOUGH = 1.0


class Sample(NamedTuple):
    """An image that was learned, while the pool of its variant is open.

    Attributes:
        origin: Its number in the variant.
        patches: Patch embeddings, shape `(n, d)`, float16 where it can hold them.
        grid: Number of rows and columns of patches; zeros where unknown.
        map_size: Height and width of the anomaly map; zeros where unknown.
    """

    origin: int
    patches: Array
    grid: tuple[int, int] = (0, 0)
    map_size: tuple[int, int] = (0, 0)


def compact(patches: Array) -> Array:
    """As float16, which is precise enough for scores, if that can hold them."""
    largest = np.abs(patches).max(initial=0)
    return patches.astype(np.float16 if largest <= np.finfo(np.float16).max else np.float32)


def rank(origins: Any) -> Any:  # noqa: ANN401  # a number or an array of them
    """Order in which images are kept: the lowest are spread evenly over all, however many there are.

    Multiples of the golden ratio, without the whole part.
    """
    return origins * ((math.sqrt(5) - 1) / 2) % 1.0


def prefix_distances(patches: Array, origins: NDArray[np.int32], variant: Variant, marks: Sequence[int]) -> Array:
    """Distance of patches to the nearest of the first vectors, those of the same image counting as farther.

    Args:
        patches: Shape `(n, d)`.
        origins: Number of the image that each is of, shape `(n,)`; -1 for an image that was not learned.
        variant: The variant.
        marks: Numbers of vectors, rising.

    Returns:
        Shape `(n, len(marks))`; infinite where there is no vector of another image, nor one that stands in.
    """
    patches = patches.astype(np.float32)
    squares = np.einsum("ij,ij->i", patches, patches)[:, None]
    found = np.empty((len(patches), len(marks)), np.float32)
    nearest, first = np.full(len(patches), np.inf, np.float32), 0
    for column, last in enumerate(marks):
        if last > first:
            vectors = variant.vectors[first:last].astype(np.float32)
            table = patches @ vectors.T
            table *= -2
            table += np.einsum("ij,ij->i", vectors, vectors)
            table += squares
            np.maximum(table, 0, out=table)
            own = (origins[:, None] == variant.origins[first:last]) & (origins >= 0)[:, None]
            rows, columns = np.nonzero(own)
            both = np.sqrt(table[rows, columns]), variant.stand_ins[first:last][columns]
            table[rows, columns] = sum(each**STAND_IN_POWER for each in both) ** (2 / STAND_IN_POWER)
            nearest = np.minimum(nearest, table.min(axis=1))
            first = last
        found[:, column] = nearest
    return np.sqrt(found)


def kept_patches(variant: Variant, sample: Sample) -> tuple[Array, Array]:
    """What is kept of an image.

    Args:
        variant: Its variant, with all vectors that it may ever have.
        sample: The image.

    Returns:
        Patches, shape `(CALIBRATION_PATCHES, d)`, and factors, shape `(2,)`; see :class:`Calibration`.
    """
    size = len(variant.radii)
    if sample.origin >= 0 and not (variant.origins != sample.origin).any() and not np.isfinite(variant.stand_ins).any():
        # The only image so far: nothing tells how far its patches are from others, so those that differ most are kept.
        picks = farthest_first(sample.patches.astype(np.float32), CALIBRATION_PATCHES)[0]
        picks = np.pad(picks, (0, CALIBRATION_PATCHES - len(picks)), mode="edge")
        return compact(sample.patches[picks]), np.ones(2, np.float32)
    origins = np.full(len(sample.patches), sample.origin, np.int32)
    firsts = prefix_distances(sample.patches, origins, variant, [min(mark, size) for mark in FIRST_VECTORS])
    chosen = np.concatenate([_highest(column, FIRST_PATCHES) for column in firsts.T])
    marks = [math.ceil(share * size) for share in reversed(CALIBRATION_SHARES)]
    distances = prefix_distances(sample.patches[chosen], origins[chosen], variant, marks)
    kept = chosen[np.concatenate([_highest(column, PATCHES_BY_SHARE) for column in distances.T])]
    factors = np.ones(2, np.float32)
    last = firsts[:, -1]
    if all(sample.map_size) and np.isfinite(last).all() and last.max() > 0:
        # A map is smoother than its patches; how much, depends on the defect more than on the number of vectors.
        pixels = anomaly_maps(last.reshape(sample.grid), *sample.map_size)
        factors[1] = float(pixels.max()) / float(last.max())
    return compact(sample.patches[kept]), factors


def calibration_of(variant: Variant, known: Calibration | None, samples: Sequence[Sample]) -> Calibration:
    """Calibration of a variant: what was kept before, and what is kept of further images.

    Args:
        variant: The variant, with all vectors that it may ever have.
        known: What was kept before.
        samples: Images that were learned since.
    """
    dimension = variant.vectors.shape[1]
    parts = [known] if known is not None else [no_images(dimension)]
    if samples:
        kept = [kept_patches(variant, sample) for sample in samples]
        parts.append(
            Calibration(
                patches=np.stack([patches for patches, _ in kept]),
                origins=np.array([sample.origin for sample in samples], np.int32),
                labels=np.zeros(len(samples), bool),
                factors=np.stack([factors for _, factors in kept]),
                scores=np.zeros(len(samples), np.float32),
            )
        )
    return scored(variant, joined(parts))


def no_images(dimension: int) -> Calibration:
    """Calibration without images."""
    return Calibration(
        np.empty((0, CALIBRATION_PATCHES, dimension), np.float16),
        np.empty(0, np.int32),
        np.empty(0, bool),
        np.empty((0, 2), np.float32),
        np.empty(0, np.float32),
    )


def joined(parts: Sequence[Calibration]) -> Calibration:
    """Several calibrations as one, with as many images as are kept; scores are to be taken anew."""
    values = {
        key: np.concatenate([getattr(part, key) for part in parts])
        for key in ("patches", "origins", "labels", "factors", "scores")
    }
    origins, labels = values["origins"], values["labels"]
    learned = np.flatnonzero((origins >= 0) & ~labels)
    learned = learned[np.sort(np.unique(origins[learned], return_index=True)[1])]  # each once
    kept = [learned[np.argsort(rank(origins[learned]), kind="stable")[:LEARNED_IMAGES]]]
    for kind, label in ((NOT_LEARNED, False), (NOT_LEARNED, True), (SHOWN, True)):
        others = np.flatnonzero((origins == kind) & (labels == label))
        if len(others) > VALIDATION_IMAGES:
            others = others[np.linspace(0, len(others) - 1, VALIDATION_IMAGES).astype(int)]
        kept.append(others)
    chosen = np.sort(np.concatenate(kept))
    return Calibration(**{key: value[chosen] for key, value in values.items()})


def scored(variant: Variant, calibration: Calibration) -> Calibration:
    """The same images, scored by the vectors that the variant has now."""
    curve = image_curves(variant, calibration, [len(variant.radii)])
    return replace(calibration, scores=curve[:, 0] * calibration.factors[:, 0])


def image_curves(variant: Variant, calibration: Calibration, marks: Sequence[int]) -> Array:
    """Largest patch distance of each image by the first vectors, shape `(n, len(marks))`; see `prefix_distances`."""
    flat = calibration.patches.reshape(-1, calibration.patches.shape[-1])
    origins = np.repeat(calibration.origins, CALIBRATION_PATCHES)
    distances = prefix_distances(flat, origins, variant, marks)
    return distances.reshape(-1, CALIBRATION_PATCHES, len(marks)).max(axis=1)


class Worth(NamedTuple):
    """What the vectors of a variant are worth; the names are those of :class:`Variant`."""

    gains: Array
    wanted: int
    floor: float


def worth(variant: Variant) -> Worth:
    """What each vector of a variant is worth.

    A parabola is fitted to the mean logarithm of the scores of good images, over the logarithm of the number of
    vectors: measured points are uneven, and a share that hangs on one of them would jump.

    Args:
        variant: The variant, as it comes from its pool. Its `floor` and `wanted` are those of before, for a variant
            that was cut has forgotten how low scores can be.
    """
    size = len(variant.radii)
    bend, fall, above, floor = _fit(variant)
    logs = np.log(np.arange(1, size + 1))
    levels = bend * logs**2 + fall * logs
    excess = np.maximum(levels - levels[-1], 0) + above
    steps = np.maximum(-(2 * bend * logs + fall), 1e-3) / np.exp(logs)
    each = SHARE_POWER * (1 + excess) ** (SHARE_POWER - 1) * steps
    each = np.maximum.accumulate(each[::-1])[::-1].astype(np.float32)
    each[0] = np.inf  # not even one vector is left to chance
    enough = np.flatnonzero(excess <= ENOUGH)
    return Worth(each, int(enough[0]) + 1 if len(enough) else max(size, variant.wanted), floor)


def _fit(variant: Variant) -> tuple[float, float, float, float]:
    """What is known of the curve of a variant.

    Returns:
        Coefficients of the square and of the logarithm itself, and how far the end of the curve is above the lowest
        that it ever was, in units of the spread of scores; and that lowest, as a mean logarithm, NaN if unknown.
    """
    size, calibration = len(variant.radii), variant.calibration
    if calibration is None or size < 2 * FIRST_MARK:
        return 0.0, -EXPECTED_FALL, 0.0, variant.floor
    good = ~calibration.labels
    part = Calibration(**{key: value[good] for key, value in vars(calibration).items()})
    marks = np.unique(np.geomspace(FIRST_MARK, size, CURVE_POINTS).astype(int))
    curves = image_curves(variant, part, marks.tolist())
    curves = np.log(np.maximum(curves[np.isfinite(curves).all(axis=1)], 1e-12))
    if len(curves) < 2:  # the spread of one is unknown
        return 0.0, -EXPECTED_FALL, 0.0, variant.floor
    unit = math.sqrt(log_spread(curves[:, -1], TYPICAL_SPREAD) * TYPICAL_SPREAD)
    bend, fall, _ = np.polyfit(np.log(marks), curves.mean(axis=0) / unit, 2)
    weight = len(curves) / (len(curves) + EXPECTATION_WEIGHT)
    end = float(curves[:, -1].mean())
    floor = float(np.fmin(end, variant.floor))
    above = weight * (end - floor) / unit
    return weight * float(bend), weight * float(fall) - (1 - weight) * EXPECTED_FALL, above, floor


def log_spread(logs: NDArray[np.floating], expected: float) -> float:
    """Standard deviation of the logarithms of scores, drawn to an expected one as if by a few more images.

    Scores far below the others, as those of twins of a learned image, say nothing of how high scores go: they count as
    three times the expected one below the middle.
    """
    logs = np.maximum(logs, np.median(logs) - 3 * expected)
    squares = ((logs - logs.mean()) ** 2).sum() + EXPECTATION_WEIGHT * expected**2
    return math.sqrt(squares / (len(logs) - 1 + EXPECTATION_WEIGHT))


def _highest(scores: Array, count: int) -> NDArray[np.int64]:
    """Indices of the highest scores; of fewer than `count`, the lowest is repeated, which changes no maximum."""
    order = np.argsort(-scores, kind="stable")[:count]
    return np.pad(order, (0, count - len(order)), mode="edge")
