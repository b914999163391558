# SPDX-License-Identifier: Apache-2.0
"""Thresholds of each variant, which follow the bank as it changes. The rules are ours.

Validation images set them, or, without such, the last learned images and views of them (`augment.py`). What is kept of
these images is scored again whenever the bank changes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from openvino_export.anomaly_map import anomaly_maps

from .augment import NUM_VIEWS, augmented_views
from .k_center import nearest
from .variant import Calibration

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from .memory_bank import MemoryBank

    Array = NDArray[np.float32]

# Calibration keeps the patches of an image that score highest, now and once only a share of the vectors is left.
CALIBRATION_SHARES = (0.5, 0.25, 0.125)
PATCHES_BY_SHARE = 4
CALIBRATION_PATCHES = PATCHES_BY_SHARE * (1 + len(CALIBRATION_SHARES))
CALIBRATION_IMAGES = 32  # of each label
# So many of the last images, or views of fewer, set thresholds if there is no validation set.
RECENT_IMAGES = 16
# Views as slight as those that were learned score far lower than another image of the product does. Of a single image
# there is nothing else to go by; this factor was chosen on `brick`, and suits some products only (docs/benchmarks.md).
CALIBRATION_STRENGTH = 2.5


def calibration_patches(bank: MemoryBank, variant: str, patches: Array, scores: Array) -> Array:
    """Patches by which the score of an image can be renewed when vectors are cut.

    The last vectors of a variant are cut first, so it is known which ones will be left. Kept are the patches that
    score highest by all vectors, by the first half of the variant's, by a quarter and by an eighth.

    Args:
        bank: Bank that holds the variant.
        variant: Name of the variant.
        patches: Patch embeddings of one image, shape `(n, d)`.
        scores: Distance of each to the nearest vector of the bank, shape `(n,)`.

    Returns:
        Shape `(CALIBRATION_PATCHES, d)`.
    """
    vectors = bank.variants[variant].vectors
    chosen = [_highest(scores, PATCHES_BY_SHARE)]
    distances, first = np.full(len(patches), np.inf, np.float32), 0
    for share in reversed(CALIBRATION_SHARES):
        last = math.ceil(share * len(vectors))
        if last > first:
            distances = np.minimum(distances, nearest(patches, vectors[first:last])[0])
        chosen.append(_highest(distances, PATCHES_BY_SHARE))
        first = last
    return patches[np.concatenate(chosen)]


def calibrated(
    bank: MemoryBank,
    variant: str,
    patches: Array,
    labels: NDArray[np.bool_],
    pixel: tuple[float, float, float] = (np.nan, np.nan, np.nan),
    bound: float = 0.0,
) -> MemoryBank:
    """A bank that keeps what renews a variant's thresholds, in place of what was kept before.

    Args:
        bank: Bank that holds the variant.
        variant: Name of the variant.
        patches: What :func:`calibration_patches` gave for each image, shape `(n, CALIBRATION_PATCHES, d)`.
        labels: Whether each image is anomalous, shape `(n,)`.
        pixel: Pixel threshold, minimum and maximum of the anomaly maps of these images.
        bound: Score that normal images are known to have; thresholds are raised to it.

    Raises:
        ValueError: If `patches` are not finite or not of the shape above.
    """
    shape = (len(labels), CALIBRATION_PATCHES, bank.variants[variant].vectors.shape[1])
    if patches.shape != shape or not np.isfinite(patches).all():
        msg = f"Calibration patches must be finite and of shape {shape}, got {patches.shape}."
        raise ValueError(msg)
    chosen = np.sort(np.concatenate([_spread(np.flatnonzero(labels == label)) for label in (False, True)]))
    patches = patches[chosen].astype(np.float32)
    if np.abs(patches).max(initial=0) <= np.finfo(np.float16).max:
        patches = patches.astype(np.float16)  # precise enough for scores
    scores = _scores(bank, patches)
    margin = max(1.0, bound / max(float(scores.max(initial=0)), 1e-12)) if bound else 1.0
    calibration = Calibration(patches, labels[chosen].astype(bool), scores, pixel, margin)
    return bank.with_calibration(variant, calibration)


def calibrated_from_views(
    bank: MemoryBank,
    variant: str,
    images: Sequence[Array],
    embed: Callable[[Array], Array],
    wide: bool,
) -> MemoryBank:
    """A bank with thresholds of a variant that has no validation set.

    Views that were not learned show how normal images score. Another image of the product can score higher than views
    do, so the thresholds are raised to what the last images scored before they were learned.

    Thresholds that anomalous images have set stay as they are; normal images that have set them count on.

    Args:
        bank: Bank that holds the variant.
        variant: Name of the variant.
        images: The variant's images that were learned last, at most RECENT_IMAGES of shape `(3, H, W)`.
        embed: Gives patch embeddings `(B, h, w, d)`, float32, for normalised images `(B, 3, H, W)`.
        wide: Whether the views differ more than those that few images are learned with; only as long as nothing else
            says how normal images score.
    """
    known = bank.variants[variant].calibration
    if known is not None and known.labels.any():
        return bank  # scores of real anomalies stay the better guide
    bound = bank.variants[variant].normal_score_bound()
    strength = CALIBRATION_STRENGTH if wide and not bound else 1.0
    kept = []
    lowest, highest = np.inf, -np.inf
    for i, image in enumerate(images):
        for view in augmented_views(image, max(1, RECENT_IMAGES // len(images)), NUM_VIEWS + i, strength):
            embedding = embed(view[None])[0]
            patches = embedding.reshape(-1, embedding.shape[-1])
            scores = bank.search(patches)[0]
            pixels = anomaly_maps(scores.reshape(embedding.shape[:2]), *image.shape[1:])
            lowest, highest = min(lowest, float(pixels.min())), max(highest, float(pixels.max()))
            kept.append(calibration_patches(bank, variant, patches, scores))
    calibration = np.stack(kept)
    if known is not None:  # images learned earlier count as well
        calibration = np.concatenate([known.patches, calibration])
        _, known_lowest, known_highest = thresholds(bank, variant)["pixel"]
        lowest = float(np.fmin(lowest, known_lowest))
        highest = float(np.fmax(highest, known_highest / known.margin))
    # As Anomalib does when no image is anomalous: the highest normal score is the threshold.
    normal = np.zeros(len(calibration), dtype=bool)
    return calibrated(bank, variant, calibration, normal, (highest, lowest, highest), bound)


def thresholds(bank: MemoryBank, variant: str) -> dict[str, tuple[float, float, float]]:
    """Threshold, minimum and maximum of the raw scores of a variant, for the bank as it is.

    The image values come from the calibration images scored again. The anomaly maps are gone; their values move by the
    same factor as the calibration scores. Without calibration, images are judged by the bound of the variant's normal
    scores, as after an update that was interrupted.

    Args:
        bank: Bank that holds the variant.
        variant: Name of the variant.

    Returns:
        Under `"image"` and `"pixel"` each threshold, minimum and maximum; NaN where nothing is known.
    """
    calibration = bank.variants[variant].calibration
    if calibration is None or not len(calibration.labels):
        bound = bank.variants[variant].normal_score_bound() or np.nan
        return dict.fromkeys(("image", "pixel"), (bound, 0.0 * bound, bound))
    scores = _scores(bank, calibration.patches)
    factor = float(scores.mean() / max(float(calibration.scores.mean()), 1e-12))
    threshold, lowest, highest = calibration.pixel
    margin = calibration.margin
    return {
        "image": (
            margin * f1_threshold(scores, calibration.labels),
            float(scores.min()),
            margin * float(scores.max()),
        ),
        "pixel": (margin * threshold * factor, lowest * factor, margin * highest * factor),
    }


def image_thresholds(bank: MemoryBank, last: float = math.nan) -> dict[str, float]:
    """Image threshold of each variant; where the bank knows none, the last one that was set for all."""
    own = {name: thresholds(bank, name)["image"][0] for name in bank.variants}
    return {name: last if math.isnan(threshold) else threshold for name, threshold in own.items()}


def f1_threshold(scores: Array, labels: NDArray[np.bool_]) -> float:
    """Score above which an image is called anomalous, best by F1; the highest score if no image is anomalous.

    Args:
        scores: Shape `(n,)`.
        labels: Shape `(n,)`, True where anomalous.
    """
    if not labels.any():
        return float(scores.max())
    order = np.argsort(-scores, kind="stable")
    ranked, hits = scores[order], np.cumsum(labels[order])
    f1 = 2 * hits / (np.arange(1, len(scores) + 1) + labels.sum())
    f1[:-1][ranked[:-1] == ranked[1:]] = 0  # equal scores are decided together
    best = int(f1.argmax())
    lowest = float(ranked[best])
    below = float(ranked[best + 1]) if best + 1 < len(ranked) else lowest - 1e-6 * max(abs(lowest), 1e-6)
    middle = float(np.float32((lowest + below) / 2))
    return middle if middle < lowest else below  # neighbors in float32 have no middle


def _scores(bank: MemoryBank, patches: Array) -> Array:
    """Image scores, shape `(n,)`, of calibration patches `(n, CALIBRATION_PATCHES, d)`."""
    if not len(patches):
        return np.empty(0, np.float32)
    flat = patches.reshape(-1, patches.shape[-1]).astype(np.float32)
    return bank.search(flat)[0].reshape(patches.shape[:2]).max(axis=1).astype(np.float32)


def _spread(indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """At most CALIBRATION_IMAGES of the indices, evenly spread over them."""
    if len(indices) <= CALIBRATION_IMAGES:
        return indices
    return indices[np.linspace(0, len(indices) - 1, CALIBRATION_IMAGES).astype(int)]


def _highest(scores: Array, count: int) -> NDArray[np.int64]:
    """Indices of the highest scores; of fewer than `count`, the lowest is repeated, which changes no maximum."""
    order = np.argsort(-scores, kind="stable")[:count]
    return np.pad(order, (0, count - len(order)), mode="edge")
