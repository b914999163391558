# SPDX-License-Identifier: Apache-2.0
"""What a bundle is and knows, fit for JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .memory.thresholds import SURE_IMAGES, thresholds

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .memory.memory_bank import MemoryBank


def about(metadata: Mapping[str, Any], bank: MemoryBank | None) -> dict[str, Any]:
    """What a bundle is and knows.

    Args:
        metadata: The bundle's.
        bank: What it knows; None for a model without a memory bank.
    """
    keys = ("model", "backbone", "layers", "compression", "anomalib_ext")
    known = {key: metadata.get(key) for key in keys}
    if bank is None:
        return {**known, "threshold": metadata.get("last_values", {}).get("image", [None])[0]}
    return {
        **known,
        "memory_size": bank.size,
        "false_alarm_rate": bank.false_alarm_rate,
        "sure_images": SURE_IMAGES,
        "vectors": len(bank),
        "radius_bound": bank.radius_bound(),
        "bytes": bank.nbytes(),
        "variants": {name: _about_variant(bank, name) for name in bank.variants},
    }


def _about_variant(bank: MemoryBank, name: str) -> dict[str, Any]:
    """What a bank knows of a variant, and how it decides, fit for JSON."""
    variant, decided = bank.variants[name], thresholds(bank, name)
    return {
        "images": variant.images,
        "vectors": len(variant.radii),
        "wanted_vectors": variant.wanted,
        "threshold": decided.image.value if np.isfinite(decided.image.value) else None,
        "by_hand": decided.by_hand,
        "false_alarm_rate": decided.false_alarm_rate,
        "rests_on_images": decided.images,
        "smallest_rate": decided.smallest_rate(),
        "is_sure": decided.is_sure(),
        "defects_shown": variant.defects.images if variant.defects else 0,
    }
