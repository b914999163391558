# SPDX-License-Identifier: Apache-2.0
"""What plain OpenVINO makes of a bundle's model.xml, to compare a detector with."""

from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from PIL import Image

from openvino_export.decision import Prediction


def whole(folder: Path, images: list[Path]) -> list[dict[str, np.ndarray]]:
    """Return what plain OpenVINO makes of model.xml for images of its size."""
    model = ov.Core().compile_model(folder / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    pixels = (np.asarray(Image.open(path), np.float32).transpose(2, 0, 1)[None] / 255 for path in images)
    return [{next(iter(key.names)): value[0] for key, value in model(image).items()} for image in pixels]


def assert_same(results: list[Prediction], expected: list[dict[str, np.ndarray]]) -> None:
    """Compare results with those of the whole graph."""
    for result, other in zip(results, expected, strict=True):
        assert result.pred_score == pytest.approx(other["pred_score"].item(), abs=1e-3)
        assert result.pred_label == other["pred_label"].item()
        assert result.anomaly_map.shape == other["anomaly_map"].shape[1:]
        assert np.abs(result.anomaly_map - other["anomaly_map"][0]).max() < 1e-3
        assert result.pred_mask is not None
        assert (result.pred_mask != other["pred_mask"][0]).mean() < 1e-3
