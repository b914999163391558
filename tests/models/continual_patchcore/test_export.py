# SPDX-License-Identifier: Apache-2.0
"""Tests of exported models: the same decisions as in torch, for one image and for any batch."""

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


def test_nothing_learned(make_model: Make, make_engine: Make, tmp_path: Path) -> None:
    """There is nothing to export, nor does an empty file remain."""
    for export_type in ("onnx", "openvino"):
        with pytest.raises(RuntimeError, match="memory bank is empty"):
            make_engine().export(make_model(), export_type, export_root=tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
