# SPDX-License-Identifier: Apache-2.0
"""Tests of an exported Crr: the same scores, maps and decisions as in torch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from anomalib.deploy import ExportType
from anomalib.pre_processing import PreProcessor
from torchvision.transforms.v2 import CenterCrop, Compose, Normalize, Resize

from anomalib_ext.models import Crr
from openvino_export.detector import EdgeDetector

Make = Callable[..., Any]
COMMON = {"encoder": "test_vit", "pre_trained": False, "head_width": 8, "visualizer": False}


@pytest.mark.slow
def test_openvino(make_engine: Make, torch_outputs: Make, assert_exported: Make, tmp_path: Path) -> None:
    """For one image and for several, each time alike; the encoder was made for another size, and the middle is cropped.

    It was converted from the ONNX graph that Anomalib's export gives, too.
    """
    transform = Compose([Resize((96, 80)), CenterCrop((80, 64)), Normalize([0.4] * 3, [0.2] * 3)])
    model = Crr(**COMMON, pre_processor=PreProcessor(transform))
    model.model.steps = [1, 1]
    with torch.no_grad():
        for part in (model.model.decoder, model.model.head):
            for parameter in part.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
        images = torch.rand(3, 3, 96, 80)
        maps = model.eval()(images).anomaly_map
        for name in ("image", "pixel"):
            getattr(model.post_processor, f"_{name}_threshold").fill_(float(maps.mean()))
            getattr(model.post_processor, f"{name}_min").fill_(0.0)
            getattr(model.post_processor, f"{name}_max").fill_(float(maps.max()) * 2)
    expected = torch_outputs(model, images)
    for name in ("anomaly_map", "pred_mask"):  # what is cropped is normal
        assert expected[name].shape == (3, 1, 80, 64)
        expected[name] = np.pad(expected[name], ((0, 0), (0, 0), (8, 8), (8, 8)))
    assert np.ptp(expected["anomaly_map"][..., 8:-8, 8:-8]) > 0.02
    path = make_engine().export(model, ExportType.OPENVINO, export_root=tmp_path)
    assert_exported(path, images, expected, tolerance=1e-4)
    metadata = json.loads((path.parent / "metadata.json").read_text())
    assert (metadata["model"], metadata["backbone"]) == ("Crr", "test_vit")
    prediction = EdgeDetector(path.parent).predict((images[0].permute(1, 2, 0) * 255).byte().numpy())
    assert prediction.anomaly_map.shape == (96, 80)
    assert prediction.pred_score == pytest.approx(float(expected["pred_score"][0]), abs=0.01)


@pytest.mark.slow
def test_onnx_without_head(make_engine: Make, tmp_path: Path) -> None:
    """A model of the first stage alone says the same in ONNX, and the same of an image each time."""
    model = Crr(**COMMON, stage="repair", pre_processor=PreProcessor(Resize((64, 80))))
    for parameter in model.model.decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    images = torch.rand(2, 3, 64, 80)
    path = make_engine().export(model, ExportType.ONNX, export_root=tmp_path, input_size=(64, 80))
    compiled = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    with torch.no_grad():
        expected = model.eval()(images)._asdict()
    assert np.ptp(expected["anomaly_map"].numpy()) > 0.02
    first, second = (list(compiled(images.numpy()).items()) for _ in range(2))
    for (output, value), (_, again) in zip(first, second, strict=True):
        name = next(iter(output.names))
        assert np.abs(value.astype(float) - expected[name].numpy()).max() < 1e-4, name
        assert np.array_equal(value, again), name


@pytest.mark.parametrize("kind", [ExportType.OPENVINO, ExportType.ONNX])
def test_a_sampling_model_is_refused(kind: ExportType, make_engine: Make, tmp_path: Path) -> None:
    """It would not judge the same way each time."""
    pre_processor = Crr.configure_pre_processor((64, 64), encoder="test_vit")
    model = Crr(**COMMON, inference_mask="sample", pre_processor=pre_processor)
    with pytest.raises(ValueError, match="inference_mask='sample' masks at random"):
        make_engine().export(model, kind, export_root=tmp_path, input_size=(64, 64))
