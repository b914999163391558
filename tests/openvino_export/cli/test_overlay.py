# SPDX-License-Identifier: Apache-2.0
"""Heat maps over images."""

import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from openvino_export.cli.overlay import write_overlay
from openvino_export.detector import Prediction


@pytest.mark.parametrize("thresholds", [True, False])
def test_overlay(tmp_path: Path, thresholds: bool) -> None:
    """What is anomalous turns red and is framed in white if there are thresholds; the rest stays as it is."""
    anomaly_map = np.full((8, 8), 0.1, np.float32)
    anomaly_map[4:, 4:] = 0.9
    mask = anomaly_map > 0.5 if thresholds else None
    result = Prediction(0.9, thresholds or None, anomaly_map, mask, None)
    image = np.full((80, 80, 3), 100, np.uint8)
    write_overlay(result, image, tmp_path / "deep" / "map.png")
    pixels = np.asarray(Image.open(tmp_path / "deep" / "map.png")).astype(int)
    assert pixels.shape == image.shape
    assert (pixels[:30, :30] == 100).all()
    red, green, blue = pixels[70, 70]
    assert red > 150 > max(green, blue)
    assert (pixels == 255).all(axis=2).any() == thresholds


def test_overlay_of_a_large_image_is_quick(tmp_path: Path) -> None:
    """Blending is all that is done at the size of the image: less than twice as long as writing it."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (1500, 1500, 3), dtype=np.uint8)
    mask = np.zeros((256, 256), bool)
    mask[100:140, 100:140] = True
    anomaly_map = rng.random((256, 256), dtype=np.float32)
    result = Prediction(pred_score=0.9, pred_label=True, anomaly_map=anomaly_map, pred_mask=mask, variant=None)
    seconds = {}
    for name, write in (
        ("image", lambda: Image.fromarray(image).save(tmp_path / "image.png")),
        ("overlay", lambda: write_overlay(result, image, tmp_path / "overlay.png")),
    ):
        times = []
        for _ in range(3):
            start = time.perf_counter()
            write()
            times.append(time.perf_counter() - start)
        seconds[name] = min(times)
    assert seconds["overlay"] < 2 * seconds["image"]
