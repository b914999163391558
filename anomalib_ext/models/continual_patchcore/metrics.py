# SPDX-License-Identifier: Apache-2.0
"""What loggers get of an update."""

import math

from openvino_export.memory.memory_bank import MemoryBank
from openvino_export.memory.report import Report
from openvino_export.memory.thresholds import thresholds


def memory_metrics(report: Report, bank: MemoryBank) -> dict[str, float]:
    """The numbers of a report, and share of the budget and thresholds of each variant.

    Args:
        report: What the update did.
        bank: What it led to.

    Returns:
        Values by name, such as ``memory/vectors`` and ``memory/share/<variant>``, without thresholds that are not
        known.
    """
    values: dict[str, float] = {
        "vectors": report.num_vectors,
        "radius_bound": report.radius_bound,
        "bytes": report.nbytes,
        "seconds": report.seconds,
        "known_images": report.known_images,
        **{f"images/{name}": count for name, count in report.variants.items()},
        **{f"added/{name}": count for name, count in report.added.items()},
        **{f"removed/{name}": count for name, count in report.removed.items()},
    }
    for name, variant in bank.variants.items():
        values[f"share/{name}"] = len(variant.radii) / report.num_vectors
        decided = thresholds(bank, name)
        values[f"image_threshold/{name}"] = decided.image.value
        values[f"pixel_threshold/{name}"] = decided.pixel.value
        values[f"good_images/{name}"] = decided.images
    return {f"memory/{name}": float(value) for name, value in values.items() if math.isfinite(value)}
