# SPDX-License-Identifier: Apache-2.0
"""Tests of exported distillation models: the same scores, maps and decisions as in torch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.deploy import ExportType, TorchInferencer
from anomalib.models.components import AnomalibModule

from anomalib_ext.models import HetNet, RdAkf

Make = Callable[..., Any]

SIZE = (64, 64)
COMMON = {"backbone": "resnet18", "pre_trained": False, "visualizer": False}


def rd_akf() -> RdAkf:
    """Return a small RdAkf."""
    return RdAkf(pre_processor=RdAkf.configure_pre_processor(SIZE), **COMMON)


def het_net() -> HetNet:
    """Return a small HetNet, whose transformer was made for another size of images."""
    return HetNet(
        transformer="test_vit",
        transformer_pre_trained=False,
        noise="randn",
        pre_processor=HetNet.configure_pre_processor(SIZE),
        **COMMON,
    )


def prepared(model: AnomalibModule) -> AnomalibModule:
    """Return the model with batch normalisation and thresholds that are not those of the start."""
    with torch.no_grad():
        model.model.train()(torch.rand(4, 3, *SIZE))
        scores = model.eval().model(torch.rand(4, 3, *SIZE)).pred_score
        for kind in ("image", "pixel"):
            getattr(model.post_processor, f"_{kind}_threshold").fill_(float(scores.mean()))
            getattr(model.post_processor, f"{kind}_min").fill_(0.0)
            getattr(model.post_processor, f"{kind}_max").fill_(float(scores.max()) * 2)
    return model


@pytest.mark.parametrize("make", [rd_akf, pytest.param(het_net, marks=pytest.mark.slow)])
def test_openvino(make: Make, make_engine: Make, assert_like_torch: Make, tmp_path: Path) -> None:
    """The folder says the same as torch, for one image and for several, and what it was made from."""
    model = prepared(make())
    path = make_engine().export(model, ExportType.OPENVINO, export_root=tmp_path)
    images = torch.rand(3, 3, *SIZE)
    assert_like_torch(path, model, images, tolerance=1e-4)
    metadata = json.loads((path.parent / "metadata.json").read_text())
    assert (metadata["model"], metadata["backbone"]) == (type(model).__name__, "resnet18")


@pytest.mark.slow
def test_onnx(make_engine: Make, assert_like_torch: Make, tmp_path: Path) -> None:
    """So does Anomalib's own export; the OpenVINO model of the other test was converted from the same graph."""
    model = prepared(rd_akf())
    path = make_engine().export(model, ExportType.ONNX, export_root=tmp_path, input_size=SIZE)
    images = torch.rand(3, 3, *SIZE)
    assert_like_torch(path, model, images, tolerance=1e-4)


@pytest.mark.parametrize("make", [rd_akf, het_net])
def test_torch(make: Make, make_engine: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the file for Anomalib's inferencer."""
    model = prepared(make())
    image = torch.rand(3, *SIZE)
    path = make_engine().export(model, ExportType.TORCH, export_root=tmp_path)
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    result = TorchInferencer(path, device="cpu").predict(image)
    assert result.pred_score.item() == pytest.approx(model(image[None]).pred_score.item(), abs=1e-5)


def test_another_file_name_is_refused(tmp_path: Path) -> None:
    """The edge PC finds the graph by its name."""
    with pytest.raises(ValueError, match="name its folder instead"):
        rd_akf().to_openvino(tmp_path, "other")
