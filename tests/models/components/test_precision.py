# SPDX-License-Identifier: Apache-2.0
"""Tests of a trainer's `precision`, from a fit to the bundle: what is kept and decided stays in float32."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from anomalib_ext.models import ContinualPatchCore, RdAkf, SaCfaPatchCore

Make = Callable[..., Any]

# How far scores may be from those in float32, as a share of the largest.
TOLERANCES = {"bf16-true": 0.05, "16-true": 0.005, "64-true": 1e-4}


def make(kind: type) -> Any:  # noqa: ANN401
    """Make a small model, always with the same weights."""
    torch.manual_seed(1)
    pre_processor = kind.configure_pre_processor((64, 64), "test_resnet")
    kwargs: dict[str, Any] = {"backbone": "test_resnet", "layers": ["layer1", "layer2"]}
    if kind is RdAkf:
        kwargs = {"backbone": "resnet18"}
    elif kind is ContinualPatchCore:
        kwargs["memory_size"] = 400
    return kind(**kwargs, pre_trained=False, visualizer=False, pre_processor=pre_processor)


def run(
    kind: type,
    precision: str,
    make_engine: Make,
    data: Any,  # noqa: ANN401
    images: torch.Tensor,
) -> tuple[Any, Any, torch.Tensor]:
    """Fit a model, have it validate and test, and return it, its engine and the raw scores that it gives images."""
    model, engine = make(kind), make_engine(precision=precision, max_epochs=1)
    torch.manual_seed(0)
    engine.fit(model, datamodule=data)
    engine.validate(model, datamodule=data, verbose=False)
    assert engine.test(model, datamodule=data, verbose=False)[0]["image_AUROC"] > (0 if kind is RdAkf else 0.9)
    with torch.no_grad():
        return model, engine, model.eval().model(model.pre_processor(images)).pred_score


def predicted(model: Any, engine: Any, data: Any) -> torch.Tensor:  # noqa: ANN401
    """Scores and maps of all test images, as an engine predicts them."""
    batches = engine.predict(model, datamodule=data)
    return torch.cat([torch.cat([batch.pred_score, batch.anomaly_map.flatten()]) for batch in batches])


@pytest.fixture(scope="module")
def expected() -> dict[type, torch.Tensor]:
    """Return the scores in float32 that are known so far."""
    return {}


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("kind", [ContinualPatchCore, SaCfaPatchCore])
def test_memory_banks(
    kind: type,
    precision: str,
    expected: dict[type, torch.Tensor],
    make_engine: Make,
    make_data: Make,
    product_images: torch.Tensor,
) -> None:
    """Scores are nearly those of float32, and the same from a checkpoint. What they are decided by is in float32."""
    data, images = make_data("stripes"), product_images[:4]
    if kind not in expected:
        expected[kind] = run(kind, "32-true", make_engine, data, images)[2]
    model, engine, scores = run(kind, precision, make_engine, data, images)
    exact = (model.model, getattr(model.model, "embedding", model.post_processor))
    buffers = [buffer for part in exact for buffer in part.buffers(recurse=False)]
    assert {buffer.dtype for buffer in buffers if buffer.is_floating_point()} == {torch.float32}
    torch.testing.assert_close(scores, expected[kind], atol=TOLERANCES[precision] * float(expected[kind].max()), rtol=0)
    values = predicted(model, engine, data)
    loaded = kind.load_from_checkpoint(engine.best_model_path, visualizer=False)
    assert torch.isfinite(values).all()
    assert torch.equal(predicted(loaded, make_engine(precision=precision), data), values)


@pytest.mark.slow
def test_rd_akf(make_engine: Make, make_data: Make, product_images: torch.Tensor) -> None:
    """It learns in bfloat16, and judges the same from a checkpoint."""
    data = make_data("stripes")
    model, engine, _ = run(RdAkf, "bf16-true", make_engine, data, product_images)
    loaded = RdAkf.load_from_checkpoint(engine.best_model_path, visualizer=False)
    values = predicted(model, engine, data)
    assert torch.isfinite(values).all()
    assert torch.equal(predicted(loaded, make_engine(precision="bf16-true"), data), values)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [ContinualPatchCore, SaCfaPatchCore])
def test_export(
    kind: type,
    make_engine: Make,
    make_data: Make,
    product_images: torch.Tensor,
    assert_like_torch: Make,
) -> None:
    """A bundle is in float32, and says what the model says."""
    model, engine, _ = run(kind, "bf16-true", make_engine, make_data("stripes"), product_images)
    path = engine.export(model, "openvino")
    assert_like_torch(path, model, product_images)
