# SPDX-License-Identifier: Apache-2.0
"""Thresholds of each variant, at the false-alarm rate that was asked for. The rule is ours, after conformal prediction.

Of `n` good images that were not learned, and one more, each is as likely as any other to score highest (Vovk et al.,
Algorithmic Learning in a Random World, 2005). So a good image scores above the `k`-th highest of `n` with the
probability `k / (n + 1)`, whatever the scores look like. What a learned image would have scored, `leave_one_out.py`
says.

Below `1 / (n + 1)` the images say nothing by themselves. There the threshold is extrapolated beyond the highest, as if
the rate fell by a constant factor with each step of the logarithm, and farther the fewer images there are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .leave_one_out import log_spread

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .memory_bank import MemoryBank
    from .variant import Variant

    Array = NDArray[np.float32]

FALSE_ALARM_RATE = 0.02
# From so many good images on, a threshold is called sure.
SURE_IMAGES = 8
# The logarithms of good scores spread so much, where no other variant tells.
EXPECTED_SPREAD = 0.15
# The upper tail falls off by a factor of e within this share of the spread, as that of a normal law does between 2 and
# 10 %; more with few images, of which the highest is not known well.
TAIL = 0.4
FEW_IMAGES = 6.0
# Of a single image only its own patches tell. Good scores lie about the mean radius of its first vectors, times the
# exponential of the first, and the tail is that of the second. Chosen on 11 products, see docs/benchmarks.md.
FIRST_RADII = 100
SINGLE_OFFSET = 0.13
SINGLE_TAIL = 0.15


@dataclass(frozen=True)
class Threshold:
    """What an image or a pixel of a variant is decided by.

    Attributes:
        value: Raw score above which it is anomalous; infinite if nothing is known.
        steepness: Exponent of the normalised score, see :func:`normalized`.
    """

    value: float
    steepness: float


@dataclass(frozen=True)
class Thresholds:
    """How a variant decides.

    Attributes:
        image: For the score of an image.
        pixel: For the anomaly map.
        false_alarm_rate: Share of good images that may be called anomalous.
        images: Number of good images that the thresholds rest on.
        by_hand: Whether the image threshold was set by hand.
    """

    image: Threshold
    pixel: Threshold
    false_alarm_rate: float
    images: int
    by_hand: bool

    def smallest_rate(self) -> float:
        """Smallest false-alarm rate that so many images support; what is below is extrapolated."""
        return 1 / (self.images + 1)

    def is_sure(self) -> bool:
        """Whether there are images enough to go by, or someone who has set the threshold."""
        return self.by_hand or self.images >= SURE_IMAGES


def thresholds(bank: MemoryBank, name: str) -> Thresholds:
    """How a variant decides, with the vectors that it has now.

    Args:
        bank: Bank that holds the variant.
        name: Name of the variant.
    """
    variant = bank.variants[name]
    rate = bank.false_alarm_rate if variant.false_alarm_rate is None else variant.false_alarm_rate
    good, defective, factors = _scores(variant)
    expected = EXPECTED_SPREAD if len(good) >= SURE_IMAGES else _expected_spread(bank, name)
    image = _threshold(good, rate, expected, variant)
    pixel = _threshold(good * factors, rate, expected, variant)
    if len(defective) and rate * (len(good) + 1) < 1 and len(good):
        # Where good images do not tell, a known defect does: half-way between it and the highest of them.
        highest = float(good.max())
        limit = min((math.sqrt(highest * float(score)) for score in defective if score > highest), default=math.inf)
        image = Threshold(min(image.value, limit), image.steepness)
    given = variant.by_hand or _former(variant)
    if given is not None:
        pairs = zip(given, (image, pixel), strict=True)
        image, pixel = (own if math.isnan(value) else Threshold(value, own.steepness) for value, own in pairs)
    by_hand = variant.by_hand is not None and not math.isnan(variant.by_hand[0])
    return Thresholds(image, pixel, rate, len(good), by_hand)


def image_thresholds(bank: MemoryBank) -> dict[str, float]:
    """Image threshold of each variant."""
    return {name: thresholds(bank, name).image.value for name in bank.variants}


def good_scores(bank: MemoryBank, name: str) -> Array:
    """Normalised scores of the good images that the thresholds of a variant rest on, shape `(n,)`."""
    image = thresholds(bank, name).image
    return normalized(_scores(bank.variants[name])[0], image.value, image.steepness)


def normalized(raw: Array, threshold: float, steepness: float) -> Array:
    """Score in [0, 1] that means the same for all variants, 0.5 at the threshold.

    Good images score `s` or more at the rate `false_alarm_rate ** -log2(1 - s)`, as far as the tail of good scores is
    as it seems: with 2 %, 0.75 means 0.04 %. Scores below 0.25 tell nothing. In the logarithm of the raw score it is
    the distribution function of Laplace. Ours.

    Args:
        raw: Raw scores, of any shape.
        threshold: Of the variant.
        steepness: Of the variant.
    """
    with np.errstate(divide="ignore"):
        steps = np.log(raw / np.float32(threshold))
    side = 0.5 * np.exp(-np.float32(steepness) * np.abs(steps))
    return np.where(steps > 0, 1 - side, side).astype(np.float32)


def check_rate(rate: float) -> float:
    """Refuse what is no false-alarm rate.

    Raises:
        ValueError: If it is not between 0 and 0.5.
    """
    if not 0 < rate <= 0.5:  # NaN as well
        msg = (
            f"false_alarm_rate must be above 0 and at most 0.5, got {rate}: the share of good images that may be wrong."
        )
        raise ValueError(msg)
    return float(rate)


def f1_threshold(scores: Array, labels: NDArray[np.bool_]) -> float:
    """Score above which an image is called anomalous, best by F1; the highest score if no image is anomalous.

    What Anomalib does with validation images; for comparison.

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


def upper_limit(scores: Array, rate: float, expected_spread: float) -> tuple[float, float]:
    """Score that a further good image exceeds at a rate, and the tail of scores there.

    Args:
        scores: Of good images that were not learned, at least one, shape `(n,)`.
        rate: The rate.
        expected_spread: Standard deviation of the logarithms of scores to be expected.

    Returns:
        The limit, and the step of the logarithm by which the rate falls by a factor of e.
    """
    logs = np.sort(np.log(np.maximum(scores, 1e-12)).astype(np.float64))
    count = len(logs)
    tail = TAIL * (1 + FEW_IMAGES / count) * log_spread(logs, expected_spread)
    rank = (count + 1) * (1 - rate)
    if rank > count:
        limit = logs[-1] + tail * math.log(1 / ((count + 1) * rate))
    else:
        limit = float(np.interp(rank, np.arange(1, count + 1), logs))
    return math.exp(limit), tail


def _threshold(good: Array, rate: float, expected: float, variant: Variant) -> Threshold:
    if len(good):
        value, tail = upper_limit(good, rate, expected)
    else:
        radii = variant.radii[1 : FIRST_RADII + 1]
        scale = float(radii.mean()) if len(radii) else math.inf
        value, tail = scale * math.exp(SINGLE_OFFSET + SINGLE_TAIL * math.log(1 / rate)), SINGLE_TAIL
    return Threshold(value, math.log(2) / (math.log(1 / rate) * tail))


def _former(variant: Variant) -> tuple[float, float] | None:
    """Thresholds of a former version, until the variant has learned enough images to judge itself.

    They move with the scores of the images that had set them.
    """
    calibration = variant.calibration
    learned = 0 if calibration is None else int((calibration.origins >= 0).sum())
    if variant.former is None or learned >= SURE_IMAGES:
        return None
    image, pixel, before = variant.former
    factor = 1.0
    if calibration is not None and before > 0:
        factor = float(calibration.scores[calibration.origins == -1].mean()) / before
    return image * factor, pixel * factor


def _scores(variant: Variant) -> tuple[Array, Array, Array]:
    """Scores of good images and of defective ones, and by what factor the largest value of a good map differs."""
    calibration = variant.calibration
    if calibration is None:
        nothing = np.empty(0, np.float32)
        return nothing, nothing, nothing
    known = np.isfinite(calibration.scores)
    good, defective = known & ~calibration.labels, known & calibration.labels
    factors = calibration.factors[:, 1] / calibration.factors[:, 0]
    told = (factors != 1) & ~calibration.labels  # 1 where it is unknown
    factors = np.where(told, factors, np.median(factors[told]) if told.any() else 1).astype(np.float32)
    return calibration.scores[good], calibration.scores[defective], factors[good]


def _expected_spread(bank: MemoryBank, name: str) -> float:
    """What other variants say about how much good scores spread; the middle of them."""
    spreads = [
        float(np.log(np.maximum(good, 1e-12)).std(ddof=1))
        for other, variant in bank.variants.items()
        if other != name and len(good := _scores(variant)[0]) >= SURE_IMAGES
    ]
    return float(np.median(spreads)) if spreads else EXPECTED_SPREAD
