# SPDX-License-Identifier: Apache-2.0
"""The guard that holds back images that look anomalous, so that no defect is learned as normal (ours)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .defects import raised

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from .memory_bank import MemoryBank
    from .report import Report

# An image that is said to be good is suspicious if it scores so many times the threshold of its variant.
SUSPICION = 1.75


def excess(
    patches: NDArray[np.float32], variant: str | None, bank: MemoryBank, thresholds: Mapping[str, float]
) -> tuple[float, float]:
    """Score of an image as a multiple of its variant's threshold, without and with what defects that were shown add.

    Args:
        patches: Patch embeddings of the image, shape `(n, d)`.
        variant: Name of the variant that it is said to be of; found by the bank if not given.
        bank: What is known.
        thresholds: Image threshold of each variant; infinite where unknown.

    Returns:
        Both multiples; 0 if nothing is known of the variant.
    """
    variant = variant if variant is not None else bank.identify(patches)
    threshold = thresholds.get(variant, 0.0) if variant is not None else 0.0
    if not threshold > 0:  # NaN as well
        return 0.0, 0.0
    distances = bank.search(patches)[0]
    defects = bank.variants[variant].defects if variant in bank.variants else None
    return float(distances.max()) / threshold, float(raised(patches, distances, defects).max()) / threshold


def hold_back(
    report: Report,
    name: str,
    patches: NDArray[np.float32],
    variant: str | None,
    bank: MemoryBank,
    thresholds: Mapping[str, float],
) -> bool:
    """Whether an image is suspicious and so is not to be learned; the report of the update then names it.

    It is if it scores far above the threshold, or above it only because it looks like a defect that was shown.

    Args:
        report: Report of the update that it was meant for.
        name: What the report calls the image.
        patches: As for :func:`excess`, and so are the others.
        variant: Name of the variant.
        bank: What was known before the update.
        thresholds: Image threshold of each variant.
    """
    plain, like_defects = excess(patches, variant, bank, thresholds)
    if plain <= SUSPICION and not plain <= 1 < like_defects:
        return False
    report.held_back[name] = like_defects
    return True
