# SPDX-License-Identifier: Apache-2.0
"""What loggers get of an update."""

import math

from anomalib_ext.files import safe_name
from openvino_export.memory.memory_bank import MemoryBank
from openvino_export.memory.report import Report
from openvino_export.memory.thresholds import thresholds


def memory_metrics(report: Report, bank: MemoryBank) -> dict[str, float]:
    """The numbers of a report, and share of the budget and thresholds of each variant.

    Args:
        report: What the update did.
        bank: What it led to.

    Returns:
        Values by name, such as ``memory/vectors`` and ``memory/share/<variant>``, with variants by their
        :func:`safe_name`; without thresholds that are not known.
    """
    values: dict[str, float] = {
        "vectors": report.num_vectors,
        "radius_bound": report.radius_bound,
        "bytes": report.nbytes,
        "seconds": report.seconds,
        "known_images": report.known_images,
        **{f"images/{safe_name(name)}": count for name, count in report.variants.items()},
        **{f"added/{safe_name(name)}": count for name, count in report.added.items()},
        **{f"removed/{safe_name(name)}": count for name, count in report.removed.items()},
    }
    for name, variant in bank.variants.items():
        decided, safe = thresholds(bank, name), safe_name(name)
        values[f"share/{safe}"] = len(variant.radii) / report.num_vectors
        values[f"image_threshold/{safe}"] = decided.image.value
        values[f"pixel_threshold/{safe}"] = decided.pixel.value
        values[f"good_images/{safe}"] = decided.images
    return {f"memory/{name}": float(value) for name, value in values.items() if math.isfinite(value)}
