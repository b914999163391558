# SPDX-License-Identifier: Apache-2.0
"""Tests of an exported ContinualPatchCore: the same decisions as in torch, for one image and for any batch."""

import copy
import json
import os
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from anomalib.deploy import CompressionType, ExportType, OpenVINOInferencer, TorchInferencer
from PIL import Image

from anomalib_ext.models import ContinualPatchCore
from openvino_export.bundle import folder as bundle
from openvino_export.bundle import ir
from openvino_export.bundle.constants import graph_tables
from openvino_export.memory import state
from openvino_export.memory.thresholds import thresholds

Make = Callable[..., Any]

# The default of processors with bfloat16 changes the scores in the second digit.
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}


@pytest.fixture(scope="module")
def two(make_two: Make) -> ContinualPatchCore:
    """Return a model of two products with depthwise convolutions, as the default backbone has them, and two layers."""
    return make_two(backbone="test_efficientnet", layers=["blocks.2", "blocks.4"], pre_trained=False)


@pytest.mark.usefixtures("one_conversion")
def test_openvino(
    two: ContinualPatchCore,
    product_images: torch.Tensor,
    torch_outputs: Make,
    assert_exported: Make,
    products: Path,
    make_engine: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The thresholds of each product are part of the file; Anomalib's inferencer takes it."""
    expected = torch_outputs(two, product_images)
    assert expected["pred_label"].tolist() == [False, False, True, True] * 2
    assert not torch.equal(two.post_processor.image_values[0], two.post_processor.image_values[1])
    path = make_engine().export(two, ExportType.OPENVINO, export_root=tmp_path)
    assert_exported(path, product_images, expected)

    monkeypatch.chdir(tmp_path)  # the inferencer caches in the working folder
    inferencer = OpenVINOInferencer(path, "CPU", EXACT)
    for i, kind in ((4, "good"), (6, "hole")):
        file = products / "dots" / "test" / kind / "000.png"
        for image in (file, np.asarray(Image.open(file))):
            result = inferencer.predict(image)
            assert result.pred_label.item() == expected["pred_label"][i]
            assert result.pred_score.item() == pytest.approx(expected["pred_score"][i], abs=1e-3)
            assert result.anomaly_map.squeeze() == pytest.approx(expected["anomaly_map"][i, 0], abs=1e-3)


def test_onnx(
    small_two: ContinualPatchCore,
    product_images: torch.Tensor,
    assert_like_torch: Make,
    make_engine: Make,
    tmp_path: Path,
) -> None:
    """It takes one image and any batch as well."""
    path = make_engine().export(small_two, ExportType.ONNX, export_root=tmp_path)
    assert_like_torch(path, small_two, product_images)


def test_torch(
    small_two: ContinualPatchCore,
    product_images: torch.Tensor,
    torch_outputs: Make,
    make_engine: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Anomalib's inferencer loads the file, if told to trust it."""
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    expected = torch_outputs(small_two, product_images[5:6])
    path = make_engine().export(small_two, ExportType.TORCH, export_root=tmp_path)
    result = TorchInferencer(path, "cpu").predict(product_images[5])
    assert result.pred_score.numpy() == pytest.approx(expected["pred_score"])
    assert np.array_equal(result.pred_mask.numpy(), expected["pred_mask"][0])


def test_half_precision_and_several_neighbors(
    product_images: torch.Tensor,
    torch_outputs: Make,
    assert_exported: Make,
    make_two: Make,
    make_engine: Make,
    tmp_path: Path,
) -> None:
    """They are exported as well, and so is a model without a post-processor, which gives raw scores."""
    model = make_two(
        backbone="test_resnet",
        layers=["layer1"],
        pre_trained=False,
        num_neighbors=9,
        precision="float16",
        post_processor=False,
    )
    expected = torch_outputs(model, product_images)
    assert set(expected) == {"pred_score", "anomaly_map"}
    path = make_engine().export(model, ExportType.OPENVINO, export_root=tmp_path)
    assert_exported(path, product_images, expected)


def embed(path: Path, images: torch.Tensor) -> np.ndarray:
    """Return what the features beside an exported file give."""
    return ov.Core().compile_model(path.with_name("features.xml"), "CPU", EXACT)(images.numpy())["embedding"]


def constants_of(path: Path) -> tuple[bytes, dict[str, ir.Constant]]:
    """Return the weights of an exported file, and where the bank lies in them."""
    return path.with_suffix(".bin").read_bytes(), ir.find_constants(path.read_bytes())


@pytest.mark.usefixtures("one_conversion")
def test_learning_changes_bytes_of_one_file(
    product_images: torch.Tensor,
    small_two: ContinualPatchCore,
    torch_outputs: Make,
    assert_exported: Make,
    products: Path,
    tmp_path: Path,
) -> None:
    """With other values of its constants in `model.bin`, the file says what the model says that has learned more."""
    model = copy.deepcopy(small_two)
    before = torch_outputs(model, product_images)
    path = small_two.to_openvino(tmp_path)
    model.partial_fit(sorted((products / "checks" / "train" / "good").iterdir())[:8], "checks")
    model.partial_fit(products / "dots" / "test" / "hole" / "000.png", "dots")
    after = torch_outputs(model, product_images)
    assert np.abs(after["pred_score"] - before["pred_score"]).max() > 0.1

    weights, places = constants_of(path)
    tables = graph_tables(model.model.bank, model.model.memory_bank.shape[1], capacity=64)
    assert set(tables) == set(places) == set(ir.CONSTANTS)
    path.with_suffix(".bin").write_bytes(ir.with_new_values(weights, places, tables))
    assert_exported(path, product_images, after)
    # A variant's table may grow up to its capacity, and thresholds count as well as vectors.
    tables["bank.image_values"][:, 0] += 1000
    path.with_suffix(".bin").write_bytes(ir.with_new_values(weights, places, tables))
    assert not ov.Core().compile_model(path, "CPU", EXACT)(product_images.numpy())["pred_label"].any()


@pytest.mark.usefixtures("one_conversion")
def test_bundle(two: ContinualPatchCore, product_images: torch.Tensor, make_engine: Make, tmp_path: Path) -> None:
    """It holds the features, the bank, and a description with the checksum of every file."""
    path = make_engine().export(two, ExportType.OPENVINO, export_root=tmp_path)
    found = bundle.read(path.parent, ["bank.safetensors"])
    assert set(found.metadata["files"]) == {
        "model.xml",
        "model.bin",
        "features.xml",
        "features.bin",
        "bank.safetensors",
    }
    bank = state.from_bytes((path.parent / "bank.safetensors").read_bytes())
    assert np.array_equal(bank.vectors(), two.model.bank.vectors())
    assert thresholds(bank, "dots") == thresholds(two.model.bank, "dots")

    features = embed(path, product_images)
    with torch.no_grad():
        expected = two.model.embed(two.pre_processor(product_images)).numpy()
    assert features == pytest.approx(expected, abs=1e-3)

    by_run = {"files", "anomalib_ext", "checksum"}
    metadata = {name: value for name, value in found.metadata.items() if name not in by_run}
    assert metadata == {
        "schema_version": 2,
        "model": "ContinualPatchCore",
        "backbone": "test_efficientnet",
        "layers": ["blocks.2", "blocks.4"],
        "input_size": [64, 64],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "num_neighbors": 1,
        "score": "rate",
        "precision_hint": "f32",
        "compression": "FP32",
        "last_values": {"image": [None] * 3, "pixel": [None] * 3},
        "normalization": True,
        "thresholding": True,
        "image_sensitivity": 0.5,
        "pixel_sensitivity": 0.5,
        "variants": ["stripes", "dots"],
        "variant_capacity": 64,
        "shown_defects": True,
        "variant_thresholds": True,
    }


def operations(path: Path) -> Counter[str]:
    """Return how often each operation occurs in an exported file."""
    return Counter(node.get_type_name() for node in ov.Core().read_model(path).get_ops())


@pytest.mark.usefixtures("one_conversion")
def test_quantisation_of_the_backbone(two: ContinualPatchCore, make_data: Make, tmp_path: Path) -> None:
    """Whole graph and features are quantised alike; bank and thresholds are not."""
    kwargs = {"datamodule": make_data("stripes"), "max_drop": 1.0}  # random weights bear it badly
    path = two.to_openvino(tmp_path, compression_type=CompressionType.INT8_PTQ, **kwargs)
    whole, features = operations(path), operations(path.with_name("features.xml"))
    convolutions = [part for part in two.model.feature_extractor.modules() if isinstance(part, torch.nn.Conv2d)]
    depthwise = sum(part.groups > 1 for part in convolutions)
    assert whole["Convolution"] == features["Convolution"] == len(convolutions) - depthwise
    assert whole["GroupConvolution"] == features["GroupConvolution"] == depthwise > 0
    assert whole["FakeQuantize"] == features["FakeQuantize"] > 10
    kinds = {
        (node.get_type_name(), node.input_value(0).get_node().get_type_name() == "FakeQuantize")
        for node in ov.Core().read_model(path.with_name("features.xml")).get_ordered_ops()
        if node.get_type_name().endswith("Convolution")
    }
    # The first layer and the depthwise ones stay in float.
    assert kinds == {("Convolution", False), ("Convolution", True), ("GroupConvolution", False)}
    weights, places = constants_of(path)
    tables = graph_tables(two.model.bank, two.model.memory_bank.shape[1], capacity=64)
    assert ir.with_new_values(weights, places, tables) == weights


@pytest.mark.slow
def test_quantisation_of_the_default_backbone(
    make_two: Make,
    make_data: Make,
    make_engine: Make,
    product_images: torch.Tensor,
    tmp_path: Path,
) -> None:
    """It loses nothing that counts, and what it loses is known."""
    model = make_two()
    path = make_engine().export(
        model,
        ExportType.OPENVINO,
        export_root=tmp_path,
        compression_type=CompressionType.INT8_PTQ,
        datamodule=make_data("stripes"),
    )
    assert operations(path)["GroupConvolution"] > 5
    metadata = bundle.read(path.parent).metadata
    assert metadata["compression"] == "INT8"
    one_decision = 1 / 12
    for name, values in metadata["accuracy"].items():
        assert values["INT8"] >= values["FP32"] - (one_decision if name == "image_F1Score" else 0.01)
    assert set(metadata["accuracy"]) == {"image_AUROC", "image_F1Score"}
    # Not the same, or it would not be quantised.
    embedding = embed(path, product_images)
    with torch.no_grad():
        difference = np.abs(embedding - model.model.embed(model.pre_processor(product_images)).numpy()).mean()
    assert 1e-3 < difference < 0.1 * np.abs(embedding).mean()


MODEL_API = os.environ.get("MODEL_API_PYTHON", "")


@pytest.mark.usefixtures("one_conversion")
@pytest.mark.skipif(not MODEL_API, reason="MODEL_API_PYTHON names no Python that has openvino-model-api")
def test_model_api(
    two: ContinualPatchCore,
    product_images: torch.Tensor,
    torch_outputs: Make,
    products: Path,
    make_engine: Make,
    tmp_path: Path,
) -> None:
    """Intel's ModelAPI, in its own environment since it wants another OpenCV, decides alike."""
    path = make_engine().export(two, ExportType.OPENVINO, export_root=tmp_path, input_size=(64, 64))
    script = """
import json, sys
import cv2, numpy as np
from model_api.models import AnomalyDetection

model = AnomalyDetection.create_model(sys.argv[1], device="CPU")
results = []
for file in sys.argv[2:]:
    image = cv2.imread(file)
    for each in (image, cv2.resize(image, None, fx=3, fy=3, interpolation=cv2.INTER_NEAREST)):
        result = model(each)
        shapes = [result.anomaly_map.shape, result.pred_mask.shape, each.shape[:2]]
        assert len(set(shapes)) == 1, shapes
        results.append((result.pred_score, result.pred_label, float(result.anomaly_map.mean()) / 255))
print(json.dumps(results))
"""
    files = [str(products / "dots" / "test" / kind / "000.png") for kind in ("good", "hole")]
    command = [MODEL_API, "-c", script, str(path), *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    expected = torch_outputs(two, product_images)
    for index, result in zip((4, 4, 6, 6), results, strict=True):
        # As computed by default, which is in bfloat16 where the processor can.
        assert result[0] == pytest.approx(expected["pred_score"][index], abs=0.05)
        assert result[1] == str(bool(expected["pred_label"][index]))
        assert result[2] == pytest.approx(expected["anomaly_map"][index].mean(), abs=0.02)


def test_nothing_learned(make_model: Make, make_engine: Make, tmp_path: Path) -> None:
    """There is nothing to export, nor does an empty file remain."""
    model = make_model(backbone="test_resnet", layers=["layer1"], pre_trained=False)
    for export_type in ("onnx", "openvino"):
        with pytest.raises(RuntimeError, match="memory bank is empty"):
            make_engine().export(model, export_type, export_root=tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
