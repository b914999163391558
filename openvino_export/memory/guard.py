# SPDX-License-Identifier: Apache-2.0
"""The guard that holds back images that look anomalous, so that no defect is learned as normal (ours)."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
) -> float:
    """Score of an image as a multiple of its variant's threshold; suspicious above :data:`SUSPICION`.

    Args:
        patches: Patch embeddings of the image, shape `(n, d)`.
        variant: Name of the variant that it is said to be of; found by the bank if not given.
        bank: What is known.
        thresholds: Image threshold of each variant; infinite where unknown.

    Returns:
        The multiple; 0 if nothing is known of the variant.
    """
    variant = variant if variant is not None else bank.identify(patches)
    threshold = thresholds.get(variant, 0.0) if variant is not None else 0.0
    if not threshold > 0:  # NaN as well
        return 0.0
    return float(bank.search(patches)[0].max()) / threshold


def hold_back(
    report: Report,
    name: str,
    patches: NDArray[np.float32],
    variant: str | None,
    bank: MemoryBank,
    thresholds: Mapping[str, float],
) -> bool:
    """Whether an image is suspicious and so is not to be learned; the report of the update then names it.

    Args:
        report: Report of the update that it was meant for.
        name: What the report calls the image.
        patches: As for :func:`excess`, and so are the others.
        variant: Name of the variant.
        bank: What was known before the update.
        thresholds: Image threshold of each variant.
    """
    multiple = excess(patches, variant, bank, thresholds)
    if multiple <= SUSPICION:
        return False
    report.held_back[name] = multiple
    return True
