# SPDX-License-Identifier: Apache-2.0
"""States of former schemas.

2 knew neither where a vector came from nor what it is worth, 3 no shown defects, 4 not of which variant an image was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .k_center import nearest
from .thresholds import FALSE_ALARM_RATE, f1_threshold

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray


def upgraded(
    arrays: Mapping[str, NDArray[Any]], plain: Mapping[str, Any]
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """What a state of schema 2 to 4 says.

    Args:
        arrays: Its arrays.
        plain: Its plain data.

    Raises:
        KeyError: If something is missing.
        ValueError: If something is too short.
    """
    if plain["schema_version"] == 2:
        arrays, plain = _upgraded_2(arrays, plain)
    if plain["schema_version"] < 4:
        entries = [{**entry, "defects": 0, "shown": 0} for entry in plain["variants"]]
        nothing = np.empty((0, arrays["vectors"].shape[-1]), np.float32)
        arrays = {**arrays, "defects": nothing, "defect_reaches": np.empty(0, np.float32)}
        plain = {**plain, "variants": entries}
    return {**arrays, "image_owners": np.full(arrays["image_hashes"].shape, -1, np.int32)}, dict(plain)


def _upgraded_2(
    arrays: Mapping[str, NDArray[Any]], plain: Mapping[str, Any]
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """What a state of schema 2 says, as one of schema 3.

    Thresholds remain until a variant has learned enough images to judge itself. What is unknown of vectors is -1,
    infinite or NaN.
    """
    variants = plain["variants"]
    images = sum(entry["calibration_images"] for entry in variants)
    shapes = {
        **dict.fromkeys(("calibration_labels", "calibration_scores"), (images,)),
        "calibration_pixels": (len(variants), 3),
        "calibration_margins": (len(variants),),
        "novelties": (sum(entry["novelties"] for entry in variants),),
    }
    for key, shape in shapes.items():
        if arrays[key].shape != shape:
            msg = f"The memory bank is damaged: {key} has the shape {arrays[key].shape} in place of {shape}."
            raise ValueError(msg)
    new = dict(arrays)
    for prefix in ("", *(f"stream_{position}_" for position in range(len(plain["streams"])))):
        count = len(arrays[f"{prefix}radii"])
        new[f"{prefix}origins"] = np.full(count, -1, np.int32)
        new[f"{prefix}stand_ins"] = np.full(count, np.inf, np.float32)
    new["gains"] = np.full(len(arrays["radii"]), np.nan, np.float32)
    new["calibration_origins"] = np.full(images, -1, np.int32)
    new["calibration_factors"] = np.ones((images, 2), np.float32)
    patches = arrays["calibration_patches"].astype(np.float32)
    scores = np.empty(0, np.float32)
    if images:
        flat = patches.reshape(-1, patches.shape[-1])
        scores = nearest(flat, arrays["vectors"])[0].reshape(patches.shape[:2]).max(axis=1).astype(np.float32)
        new["calibration_scores"] = scores
    entries, first, novelty = [], 0, 0
    for position, entry in enumerate(variants):
        part = slice(first, first + entry["calibration_images"])
        last = slice(novelty, novelty + entry["novelties"])
        first, novelty = part.stop, last.stop
        former = _thresholds(
            scores[part],
            arrays["calibration_labels"][part],
            arrays["calibration_scores"][part],
            float(arrays["calibration_pixels"][position][0]),
            float(arrays["calibration_margins"][position]),
            arrays["novelties"][last],
        )
        entries.append({
            **entry,
            "wanted": 0,
            "floor": None,
            "false_alarm_rate": None,
            "by_hand": None,
            "former": former,
        })
    streams = [{**stream, "samples": []} for stream in plain["streams"]]
    return new, {**plain, "false_alarm_rate": FALSE_ALARM_RATE, "variants": entries, "streams": streams}


def _thresholds(
    scores: NDArray[np.float32],
    labels: NDArray[np.bool_],
    before: NDArray[np.float32],
    pixel: float,
    margin: float,
    novelties: NDArray[np.float32],
) -> list[float | None] | None:
    """Image and pixel threshold as that version found them, and the mean score of the calibration.

    Args:
        scores: Of the calibration images, shape `(n,)`.
        labels: Whether they are anomalous.
        before: Their scores when they were taken.
        pixel: Pixel threshold at that time.
        margin: Factor on the thresholds.
        novelties: Scores of the last learned images before they were learned, shape `(m,)`.
    """
    if not len(scores):
        bound = float(novelties[len(novelties) // 2 :].max(initial=0))
        return [bound, bound, 0.0] if bound else None
    factor = float(scores.mean() / max(float(before.mean()), 1e-12))
    pixel *= margin * factor
    return [margin * f1_threshold(scores, labels), None if np.isnan(pixel) else pixel, float(scores.mean())]
