# SPDX-License-Identifier: Apache-2.0
"""Tests of exported models: the same decisions as in torch, for one image and for any batch."""

import copy
import errno
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
from anomalib.data import Folder
from anomalib.deploy import CompressionType, ExportType, OpenVINOInferencer, TorchInferencer
from anomalib.pre_processing import PreProcessor
from openvino_telemetry.backend.backend_ga4 import GA4Backend
from PIL import Image
from safetensors import safe_open
from torchvision.transforms.v2 import Resize
from torchvision.transforms.v2.functional import resize

from anomalib_ext import export
from anomalib_ext.models import ContinualPatchCore
from openvino_export.bundle import folder as bundle
from openvino_export.bundle import ir
from openvino_export.bundle.constants import graph_tables
from openvino_export.memory.memory_bank import MemoryBank

Make = Callable[..., Any]

# The default of processors with bfloat16 changes the scores in the second digit.
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}


@pytest.fixture(scope="module")
def images(products: Path) -> torch.Tensor:
    """Return good and bad images of two products."""
    paths = [
        products / product / "test" / kind / f"00{i}.png"
        for product in ("stripes", "dots")
        for kind in ("good", "hole")
        for i in range(2)
    ]
    arrays = [np.asarray(Image.open(path), np.float32) for path in paths]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 255


@pytest.fixture(scope="module")
def make_two(make_model: Make, products: Path) -> Make:
    """Return a function that makes a model of two products."""

    def make(**kwargs: Any) -> ContinualPatchCore:  # noqa: ANN401
        model = make_model(**kwargs)
        for product in ("stripes", "dots"):
            model.partial_fit(sorted((products / product / "train" / "good").iterdir()), product)
        return model.eval()

    return make


@pytest.fixture(scope="module")
def two(make_two: Make) -> ContinualPatchCore:
    """Return such a model, as it is by default."""
    return make_two()


@pytest.fixture(scope="module")
def small(make_two: Make) -> ContinualPatchCore:
    """Return such a model with the smallest backbone."""
    return make_two(backbone="test_resnet", layers=["layer1"], pre_trained=False)


def judged(model: ContinualPatchCore, images: torch.Tensor) -> dict[str, np.ndarray]:
    """Return what the model says in torch."""
    with torch.no_grad():
        return {name: value.numpy() for name, value in model(images)._asdict().items() if value is not None}


def run(path: Path, images: torch.Tensor, config: dict[str, str]) -> dict[str, np.ndarray]:
    """Return what an exported file says in OpenVINO's runtime."""
    compiled = ov.Core().compile_model(path, "CPU", config)
    return {next(iter(output.names)): value for output, value in compiled(images.numpy()).items()}


def assert_same(result: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float = 1e-3) -> None:
    """Compare scores, maps, labels and masks."""
    assert set(result) == set(expected)
    for name, value in expected.items():
        assert result[name].shape == value.shape
        if value.dtype == bool:
            assert (result[name] != value).mean() < 1e-3, name  # of many pixels, some may lie at the threshold
        else:
            assert np.abs(result[name] - value).max() < tolerance, name


def assert_takes_any_batch(path: Path, images: torch.Tensor, expected: dict[str, np.ndarray]) -> None:
    """Run one image and all of them."""
    assert ov.Core().read_model(path).inputs[0].partial_shape[0].is_dynamic
    assert_same(run(path, images, EXACT), expected)
    for i in (0, 3, 6):
        alone = {name: value[i : i + 1] for name, value in expected.items()}
        assert_same(run(path, images[i : i + 1], EXACT), alone)


def test_openvino(
    two: ContinualPatchCore,
    images: torch.Tensor,
    products: Path,
    make_engine: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The thresholds of each product are part of the file; Anomalib's inferencer takes it."""
    expected = judged(two, images)
    assert expected["pred_label"].tolist() == [False, False, True, True] * 2
    assert not torch.equal(two.post_processor.image_values[0], two.post_processor.image_values[1])
    path = make_engine().export(two, ExportType.OPENVINO, export_root=tmp_path)
    assert_takes_any_batch(path, images, expected)

    monkeypatch.chdir(tmp_path)  # the inferencer caches in the working folder
    inferencer = OpenVINOInferencer(path, "CPU", EXACT)
    for i, kind in ((4, "good"), (6, "hole")):
        file = products / "dots" / "test" / kind / "000.png"
        for image in (file, np.asarray(Image.open(file))):
            result = inferencer.predict(image)
            assert result.pred_label.item() == expected["pred_label"][i]
            assert result.pred_score.item() == pytest.approx(expected["pred_score"][i], abs=1e-3)
            assert result.anomaly_map.squeeze() == pytest.approx(expected["anomaly_map"][i, 0], abs=1e-3)


def test_onnx(small: ContinualPatchCore, images: torch.Tensor, make_engine: Make, tmp_path: Path) -> None:
    """It takes one image and any batch as well."""
    path = make_engine().export(small, ExportType.ONNX, export_root=tmp_path)
    assert_takes_any_batch(path, images, judged(small, images))


def test_torch(
    two: ContinualPatchCore,
    images: torch.Tensor,
    make_engine: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Anomalib's inferencer loads the file, if told to trust it."""
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    expected = judged(two, images[5:6])
    path = make_engine().export(two, ExportType.TORCH, export_root=tmp_path)
    result = TorchInferencer(path, "cpu").predict(images[5])
    assert result.pred_score.numpy() == pytest.approx(expected["pred_score"])
    assert np.array_equal(result.pred_mask.numpy(), expected["pred_mask"][0])


def test_compression_to_half_precision(
    small: ContinualPatchCore,
    images: torch.Tensor,
    make_engine: Make,
    tmp_path: Path,
) -> None:
    """It keeps the decisions; the size of the images may be fixed."""
    path = make_engine().export(
        small,
        ExportType.OPENVINO,
        export_root=tmp_path,
        input_size=(64, 64),
        compression_type=CompressionType.FP16,
    )
    assert 'element_type="f16"' in path.read_text()
    assert_same(run(path, images, EXACT), judged(small, images), tolerance=0.02)


def test_half_precision_and_several_neighbors(
    images: torch.Tensor,
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
    expected = judged(model, images)
    assert set(expected) == {"pred_score", "anomaly_map"}
    path = make_engine().export(model, ExportType.OPENVINO, export_root=tmp_path)
    assert_takes_any_batch(path, images, expected)


def constants_of(path: Path) -> tuple[bytes, dict[str, ir.Constant]]:
    """Return the weights of an exported file, and where the bank lies in them."""
    return path.with_suffix(".bin").read_bytes(), ir.constants(path.read_bytes())


def test_learning_changes_bytes_of_one_file(
    images: torch.Tensor,
    make_two: Make,
    make_engine: Make,
    products: Path,
    tmp_path: Path,
) -> None:
    """With other values of its constants in `model.bin`, the file says what the model says that has learned more."""
    model = make_two(backbone="test_resnet", layers=["layer1"], pre_trained=False)
    before = judged(model, images)
    path = make_engine().export(model, ExportType.OPENVINO, export_root=tmp_path)
    model.partial_fit(sorted((products / "checks" / "train" / "good").iterdir())[:8], "checks")
    model.partial_fit(products / "dots" / "test" / "hole" / "000.png", "dots")
    after = judged(model, images)
    assert np.abs(after["pred_score"] - before["pred_score"]).max() > 0.1

    weights, places = constants_of(path)
    tables = graph_tables(model.model.bank, model.model.memory_bank.shape[1], capacity=64)
    assert set(tables) == set(places) == set(ir.CONSTANTS)
    path.with_suffix(".bin").write_bytes(ir.replaced(weights, places, tables))
    assert_same(run(path, images, EXACT), after)
    # A variant's table may grow up to its capacity, and thresholds count as well as vectors.
    tables["bank.image_values"][:, 0] += 1000
    path.with_suffix(".bin").write_bytes(ir.replaced(weights, places, tables))
    assert not run(path, images, EXACT)["pred_label"].any()


def test_bundle(two: ContinualPatchCore, images: torch.Tensor, make_engine: Make, tmp_path: Path) -> None:
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
    with safe_open(path.parent / "bank.safetensors", "numpy") as file:
        plain = json.loads(file.metadata()["plain"])
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dictionary
    bank = MemoryBank.from_arrays(arrays, plain)
    assert np.array_equal(bank.vectors, two.model.bank.vectors)
    assert bank.thresholds("dots") == two.model.bank.thresholds("dots")

    features = run(path.with_name("features.xml"), images, EXACT)["embedding"]
    with torch.no_grad():
        expected = two.model.embed(two.pre_processor(images)).numpy()
    assert features == pytest.approx(expected, abs=1e-3)

    metadata = {name: value for name, value in found.metadata.items() if name not in {"files", "anomalib_ext"}}
    assert metadata == {
        "schema_version": 1,
        "model": "ContinualPatchCore",
        "backbone": "tf_efficientnet_lite0",
        "layers": ["blocks.2", "blocks.4"],
        "input_size": [64, 64],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "num_neighbors": 1,
        "one_shot": False,
        "precision_hint": "f32",
        "compression": "FP32",
        "last_values": {"image": [None] * 3, "pixel": [None] * 3},
        "normalization": True,
        "thresholding": True,
        "image_sensitivity": 0.5,
        "pixel_sensitivity": 0.5,
        "variants": ["stripes", "dots"],
        "variant_capacity": 64,
        "variant_thresholds": True,
    }


def test_a_fixed_batch(small: ContinualPatchCore, images: torch.Tensor, make_engine: Make, tmp_path: Path) -> None:
    """Processors that need one get it by Anomalib's own argument."""
    engine = make_engine()
    path = engine.export(small, "openvino", export_root=tmp_path, ov_kwargs={"input": [1, 3, 64, 64]})
    model = ov.Core().read_model(path)
    assert not model.is_dynamic()
    assert not ov.Core().read_model(path.with_name("features.xml")).is_dynamic()
    alone = {name: value[:1] for name, value in judged(small, images).items()}
    assert_same(run(path, images[:1], EXACT), alone)


def test_other_sizes(small: ContinualPatchCore, images: torch.Tensor, make_engine: Make, tmp_path: Path) -> None:
    """Images of another size are resized inside; without any, the size must be given."""
    larger = torch.nn.functional.interpolate(images, size=(96, 80))
    path = make_engine().export(small, "openvino", export_root=tmp_path, input_size=(96, 80))
    assert ov.Core().read_model(path).inputs[0].partial_shape.to_string() == "[?,3,96,80]"
    assert_same(run(path, larger, EXACT), judged(small, larger))

    for pre_processor in (False, PreProcessor(Resize(64))):
        small_too = copy.deepcopy(small)
        small_too.pre_processor = pre_processor or None
        with pytest.raises(ValueError, match="give input_size"):
            small_too.to_openvino(tmp_path / "none")
    assert not (tmp_path / "none" / "weights" / "openvino").exists()


def test_images_of_any_size(small: ContinualPatchCore, images: torch.Tensor, make_engine: Make, tmp_path: Path) -> None:
    """Without a given size, an image of any is resized as the pre-processor does when it learns."""
    path = make_engine().export(small, "openvino", export_root=tmp_path)
    larger = torch.nn.functional.interpolate(images, size=(200, 150)) * torch.rand(200, 150)
    seen = resize(larger, [64, 64], antialias=True)
    assert_same(run(path, larger, EXACT), judged(small, seen))


def test_nothing_is_reported(
    small: ContinualPatchCore, make_engine: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO's converter would send to Intel that it was used, if the user has not said no."""
    sent: list[Any] = []
    monkeypatch.setattr(GA4Backend, "send", lambda _, message: sent.append(message))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CI", raising=False)
    make_engine().export(small, ExportType.OPENVINO, tmp_path)
    assert not sent


def test_a_failed_export_leaves_the_old_bundle(
    small: ContinualPatchCore,
    make_engine: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever fails, and whenever; a later export replaces it."""
    folder = make_engine().export(small, "openvino", export_root=tmp_path).parent

    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    before = files()
    assert not {".staging", ".next"} & {path.name for path in folder.iterdir()}
    for kwargs, message in (
        ({"model_file_name": "other"}, "holds its graph in model.xml"),
        ({"compression_type": CompressionType.INT8_PTQ}, "needs a datamodule"),
        ({"onnx_kwargs": {"input_names": ["x"]}}, "may not hold input_names"),
    ):
        with pytest.raises(ValueError, match=message):
            small.to_openvino(tmp_path, **kwargs)
    with monkeypatch.context() as patch:

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "no space")

        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space"):
            small.to_openvino(tmp_path)
    assert files() == before
    assert not {".staging", ".next"} & {path.name for path in folder.iterdir()}

    changed = copy.deepcopy(small)
    changed.partial_fit(torch.rand(1, 3, 64, 64), "noise")
    changed.to_openvino(tmp_path)
    assert bundle.read(folder).metadata["variants"] == ["stripes", "dots", "noise"]


def operations(path: Path) -> Counter[str]:
    """Return how often each operation occurs in an exported file."""
    return Counter(node.get_type_name() for node in ov.Core().read_model(path).get_ops())


def test_quantisation_of_the_backbone(
    two: ContinualPatchCore,
    make_data: Make,
    make_engine: Make,
    images: torch.Tensor,
    tmp_path: Path,
) -> None:
    """Whole graph and features are quantised alike; bank and thresholds are not; what is lost is known."""
    data = make_data("stripes")
    path = make_engine().export(
        two,
        ExportType.OPENVINO,
        export_root=tmp_path,
        compression_type=CompressionType.INT8_PTQ,
        datamodule=data,
    )
    whole, features = operations(path), operations(path.with_name("features.xml"))
    assert whole["Convolution"] == features["Convolution"]
    assert whole["GroupConvolution"] == features["GroupConvolution"] > 5
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
    assert ir.replaced(weights, places, tables) == weights
    metadata = bundle.read(path.parent).metadata
    assert metadata["compression"] == "INT8"
    for values in metadata["accuracy"].values():
        assert values["INT8"] >= values["FP32"] - 0.01
    assert set(metadata["accuracy"]) == {"image_AUROC", "image_F1Score"}
    # Not the same, or it would not be quantised.
    embedding = run(path.with_name("features.xml"), images, EXACT)["embedding"]
    with torch.no_grad():
        difference = np.abs(embedding - two.model.embed(two.pre_processor(images)).numpy()).mean()
    assert 1e-3 < difference < 0.1 * np.abs(embedding).mean()


@pytest.mark.parametrize("compression", ["FP16", "INT8", "INT8_PTQ"])
def test_compression_that_loses_too_much_is_refused(
    compression: str,
    small: ContinualPatchCore,
    make_data: Make,
    make_engine: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both figures are named, and the old bundle remains."""
    kwargs = {"export_root": tmp_path, "compression_type": CompressionType[compression]}
    path = make_engine().export(small, "openvino", export_root=tmp_path)
    before = path.with_suffix(".bin").read_bytes()
    data = make_data("stripes")
    compress = export._compressed

    def damaged(*args: Any) -> ov.Model:  # noqa: ANN401
        model = compress(*args).clone()
        first = next(node for node in model.get_ordered_ops() if node.get_type_name() == "Convolution")
        readers = first.output(0).get_target_inputs()
        nothing = ov.opset13.multiply(first.output(0), np.float32(0))
        for reader in readers:
            reader.replace_source_output(nothing.output(0))
        return model

    with monkeypatch.context() as patch:
        patch.setattr(export, "_compressed", damaged)
        name = compression.partition("_")[0]
        with pytest.raises(
            ValueError, match=rf"{name} loses more than max_drop=0.01 .*AUROC \d\.\d+ \(FP32: 1\.0000\)"
        ):
            small.to_openvino(datamodule=data, **kwargs)
    assert path.with_suffix(".bin").read_bytes() == before
    small.to_openvino(datamodule=data, **kwargs)
    assert path.with_suffix(".bin").read_bytes() != before


def test_compression_checked_without_anomalous_images(
    small: ContinualPatchCore,
    products: Path,
    tmp_path: Path,
) -> None:
    """Where there is no AUROC, the decisions on normal images are compared."""
    folder = products / "stripes"
    data = Folder("stripes", root=folder, normal_dir="train/good", normal_test_dir="test/good", num_workers=0)
    path = small.to_openvino(tmp_path, compression_type=CompressionType.INT8_PTQ, datamodule=data)
    assert bundle.read(path.parent).metadata["accuracy"].keys() == {"equal decisions"}


MODEL_API = os.environ.get("MODEL_API_PYTHON", "")


@pytest.mark.skipif(not MODEL_API, reason="MODEL_API_PYTHON names no Python that has openvino-model-api")
def test_model_api(
    two: ContinualPatchCore,
    images: torch.Tensor,
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
    expected = judged(two, images)
    for index, result in zip((4, 4, 6, 6), results, strict=True):
        # As computed by default, which is in bfloat16 where the processor can.
        assert result[0] == pytest.approx(expected["pred_score"][index], abs=0.05)
        assert result[1] == str(bool(expected["pred_label"][index]))
        assert result[2] == pytest.approx(expected["anomaly_map"][index].mean(), abs=0.02)


def test_nothing_learned(make_model: Make, make_engine: Make, tmp_path: Path) -> None:
    """There is nothing to export, nor does an empty file remain."""
    for export_type in ("onnx", "openvino"):
        with pytest.raises(RuntimeError, match="memory bank is empty"):
            make_engine().export(make_model(), export_type, export_root=tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
