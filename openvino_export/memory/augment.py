# SPDX-License-Identifier: Apache-2.0
"""What few images of a variant are stretched to: augmented views to learn, and to set thresholds by. Without torch.

Images are NumPy arrays of shape `(3, H, W)`, float32 and normalised as the backbone wants them. The choice of changes
and their strength is ours; arXiv 2512.13497 names augmentation only.
"""

from __future__ import annotations

import math
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from openvino_export.anomaly_map import anomaly_maps

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from .memory_bank import MemoryBank

    Array = NDArray[np.float32]

NUM_VIEWS = 16
# Up to this many images of a variant, each is learned with augmented views; with 16, they hardly changed the mean
# (docs/benchmarks.md).
FEW_IMAGES = 4
# So many of the last images, or views of fewer, set thresholds if there is no validation set.
RECENT_IMAGES = 16
# Views as slight as those that were learned score far lower than another image of the product does. Of a single image
# there is nothing else to go by; this factor was chosen on `brick`, and suits some products only (docs/benchmarks.md).
CALIBRATION_STRENGTH = 2.5


def image_hash(image: Array) -> int:
    """Hash of 64 bits of a normalised image of shape `(3, H, W)`, rounded finer than the steps of 8 bits."""
    with np.errstate(invalid="ignore"):  # NaN is refused elsewhere, with a better message
        levels = np.rint(np.asarray(image, np.float32) * np.float32(256)).astype(np.int32)
    return int.from_bytes(blake2b(levels.tobytes(), digest_size=8).digest(), "big", signed=True)


def are_few(bank: MemoryBank, variant: str | None, images: int = 0) -> bool:
    """Whether `images` and those that the bank has learned of the variant are few."""
    return images + bank.images(variant or "") <= FEW_IMAGES


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


def calibrate_from_views(
    bank: MemoryBank,
    variant: str,
    images: Sequence[Array],
    embed: Callable[[Array], Array],
    search: Callable[[Array], tuple[Array, NDArray[np.int64]]],
    one_shot: bool = True,
) -> None:
    """Set a variant's thresholds without a validation set.

    Views that were not learned show how normal images score. Another image of the product can score higher than views
    do, so the thresholds are raised to what the last images scored before they were learned (ours).

    Thresholds that anomalous images have set stay as they are; normal images that have set them count on.

    Args:
        bank: Bank that holds the variant, with nothing left in its stream.
        variant: Name of the variant.
        images: The variant's images that were learned last, at most RECENT_IMAGES of shape `(3, H, W)`.
        embed: Gives patch embeddings `(B, h, w, d)`, float32, for normalised images `(B, 3, H, W)`.
        search: Gives the distance of each patch, of shape `(n, d)`, to its nearest vector of the bank, and its index.
        one_shot: Whether few images were learned with views of them.
    """
    known = bank.variants[variant].calibration
    if known is not None and known.labels.any():
        return  # scores of real anomalies stay the better guide
    reach = bank.variants[variant].reach
    strength = CALIBRATION_STRENGTH if one_shot and are_few(bank, variant) and not reach else 1.0
    kept = []
    lowest, highest = np.inf, -np.inf
    for i, image in enumerate(images):
        for view in augmented_views(image, max(1, RECENT_IMAGES // len(images)), NUM_VIEWS + i, strength):
            embedding = embed(view[None])[0]
            patches = embedding.reshape(-1, embedding.shape[-1])
            scores = search(patches)[0]
            pixels = anomaly_maps(scores.reshape(embedding.shape[:2]), *image.shape[1:])
            lowest, highest = min(lowest, float(pixels.min())), max(highest, float(pixels.max()))
            kept.append(bank.calibration_patches(variant, patches, scores))
    calibration = np.stack(kept)
    if known is not None:  # images learned earlier count as well
        calibration = np.concatenate([known.patches, calibration])
        _, known_lowest, known_highest = bank.thresholds(variant)["pixel"]
        lowest = float(np.fmin(lowest, known_lowest))
        highest = float(np.fmax(highest, known_highest / known.margin))
    # As Anomalib does when no image is anomalous: the highest normal score is the threshold.
    normal = np.zeros(len(calibration), dtype=bool)
    bank.calibrate(variant, calibration, normal, (highest, lowest, highest), reach)
