# SPDX-License-Identifier: Apache-2.0
"""Heat maps over images."""

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
