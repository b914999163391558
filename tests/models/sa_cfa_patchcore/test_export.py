# SPDX-License-Identifier: Apache-2.0
"""Tests of exported models: the same scores, maps and decisions as in torch, for one image and for any batch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from anomalib.deploy import CompressionType, ExportType, OpenVINOInferencer, TorchInferencer

from anomalib_ext.models import SaCfaPatchCore
from openvino_export import EdgeDetector
from openvino_export.bundle.folder import BundleError

Make = Callable[..., Any]
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}


@pytest.fixture(scope="module")
def model(fitted: tuple[SaCfaPatchCore, Path, float]) -> SaCfaPatchCore:
    """Return a model of stripes with thresholds."""
    return fitted[0]


@pytest.fixture(scope="module")
def images(make_data: Make) -> torch.Tensor:
    """Return good and bad images."""
    data = make_data("stripes")
    data.setup()
    items = list(data.test_data)
    return torch.stack([item.image for item in [*items[:3], *items[-3:]]])


@pytest.fixture(scope="module")
def expected(model: SaCfaPatchCore, images: torch.Tensor, torch_outputs: Make) -> dict[str, np.ndarray]:
    """Return what torch says."""
    result = torch_outputs(model, images)
    assert set(result["pred_label"].flatten().tolist()) == {False, True}
    return result


def test_onnx(
    model: SaCfaPatchCore,
    images: torch.Tensor,
    expected: dict[str, np.ndarray],
    assert_exported: Make,
    make_engine: Make,
    tmp_path: Path,
) -> None:
    """The file gives the same."""
    assert_exported(make_engine().export(model, ExportType.ONNX, export_root=tmp_path), images, expected)


@pytest.mark.usefixtures("one_conversion")
def test_openvino(
    model: SaCfaPatchCore,
    images: torch.Tensor,
    expected: dict[str, np.ndarray],
    assert_exported: Make,
    products: Path,
    make_engine: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So does the folder, which says what it is; Anomalib's inferencer and the edge runtime judge by it."""
    path = make_engine().export(model, ExportType.OPENVINO, export_root=tmp_path)
    assert_exported(path, images, expected)
    nodes = [node for node in ov.Core().read_model(path).get_ops() if node.get_type_name() == "TopK"]
    searches = [node for node in nodes if node.get_input_partial_shape(0)[-1] == len(model.model.memory_bank)]
    assert [node.get_attributes()["stable"] for node in searches].count(False) == 2  # of patches, and of neighbors
    metadata = json.loads((path.parent / "metadata.json").read_text())
    assert metadata["model"] == "SaCfaPatchCore"
    assert metadata["layers"] == ["layer1", "layer2"]
    assert {file.name for file in path.parent.iterdir()} >= {"model.xml", "model.bin", "metadata.json"}
    assert not (path.parent / "bank.safetensors").exists()
    monkeypatch.chdir(tmp_path)  # the inferencer caches in the working folder
    result = OpenVINOInferencer(path, "CPU", EXACT).predict(products / "stripes/test/hole/000.png")
    assert result.pred_label.item()
    detector = EdgeDetector(path.parent)
    judged = detector.predict(products / "stripes/test/hole/000.png")
    assert judged.pred_score == pytest.approx(result.pred_score.item(), abs=1e-3)
    assert np.abs(judged.anomaly_map - result.anomaly_map.squeeze()).max() < 1e-3
    with pytest.raises(BundleError, match="SaCfaPatchCore has no memory bank, so it cannot learn here"):
        detector.learn([products / "stripes/test/good/000.png"], variant="stripes")


@pytest.mark.usefixtures("one_conversion")
def test_half_precision(
    model: SaCfaPatchCore,
    images: torch.Tensor,
    expected: dict[str, np.ndarray],
    make_engine: Make,
    tmp_path: Path,
) -> None:
    """It keeps the decisions."""
    path = make_engine().export(
        model,
        ExportType.OPENVINO,
        export_root=tmp_path,
        compression_type=CompressionType.FP16,
    )
    compiled = ov.Core().compile_model(path, "CPU", EXACT)
    clear = np.abs(expected["pred_score"] - 0.5) > 0.01
    assert clear.any()
    assert np.array_equal(compiled(images.numpy())["pred_label"][clear], expected["pred_label"][clear])


def test_torch(
    model: SaCfaPatchCore,
    images: torch.Tensor,
    expected: dict[str, np.ndarray],
    make_engine: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Anomalib's inferencer loads the file, if told to trust it."""
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    path = make_engine().export(model, ExportType.TORCH, export_root=tmp_path)
    result = TorchInferencer(path, "cpu").predict(images[-1])
    assert result.pred_score.numpy() == pytest.approx(expected["pred_score"][-1:], abs=1e-5)


def test_a_folder_needs_something_learned(make_engine: Make, tmp_path: Path) -> None:
    """An empty model is not exported, nor under another name."""
    empty = SaCfaPatchCore("test_resnet", ["layer1", "layer2"], pre_trained=False)
    with pytest.raises(RuntimeError, match="The memory bank is empty"):
        make_engine().export(empty, ExportType.OPENVINO, export_root=tmp_path)
    with pytest.raises(ValueError, match=r"holds its graph in model\.xml, not in other\.xml"):
        empty.to_openvino(tmp_path, model_file_name="other")
    assert not list(tmp_path.rglob("model.xml"))
