# SPDX-License-Identifier: Apache-2.0
"""Tests of thresholds and decisions, through Anomalib's engine where a user goes through it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import Folder, ImageBatch, PredictDataset
from anomalib.post_processing import PostProcessor
from PIL import Image
from torch.utils.data import DataLoader

from anomalib_ext.models import ContinualPatchCore

Make = Callable[..., Any]


def test_unlabelled_validation_sets_the_thresholds_of_each_variant(
    tensors: Make,
    make_tiny: Make,
    make_engine: Make,
) -> None:
    """Validation images are told apart as well."""

    def batches(kind: str, bad: bool) -> list[ImageBatch]:
        return [
            ImageBatch(image=tensors(product, kind), gt_label=torch.tensor([bad]).expand(6))
            for product in ("stripes", "dots")
        ]

    train = [ImageBatch(image=tensors(product)) for product in ("stripes", "dots")]
    model = make_tiny()
    val = batches("test/good", bad=False) + batches("test/hole", bad=True)
    plain = {"batch_size": None, "collate_fn": lambda batch: batch}
    make_engine().fit(model, DataLoader(train, **plain), DataLoader(val, **plain))
    for variant in model.model.bank.variants.values():
        validated = variant.calibration.labels[variant.calibration.origins < 0]
        assert sorted(validated.tolist()) == [False] * 6 + [True] * 6


def test_without_a_validation_set(products: Path, f1_of: Make, make_tiny: Make, make_engine: Make) -> None:
    """Thresholds from good images alone part good from bad, and there is a checkpoint."""
    folder = products / "stripes"
    data = Folder("stripes", "train/good", folder, "test/hole", val_split_mode="none", num_workers=0)
    model, engine = make_tiny(), make_engine()
    engine.fit(model, datamodule=data)
    assert Path(engine.best_model_path).is_file()
    assert torch.isfinite(model.post_processor.pixel_values).all()
    assert not model.model.bank.variants["stripes"].calibration.labels.any()
    assert f1_of(model.eval(), "stripes") >= 0.9


def test_a_folder_of_normal_images_is_enough(products: Path, make_tiny: Make, make_engine: Make) -> None:
    """Anomalib's synthetic anomalies set the thresholds."""
    folder = products / "stripes"
    modes = {"test_split_mode": "synthetic", "val_split_mode": "synthetic"}
    data = Folder("stripes", "train/good", folder, train_batch_size=4, num_workers=0, **modes)
    model, engine = make_tiny(), make_engine()
    engine.fit(model, datamodule=data)
    assert set(model.model.bank.variants["stripes"].calibration.labels) == {False, True}
    assert torch.isfinite(model.post_processor.pixel_values).all()
    assert engine.test(model, datamodule=data)[0]["image_AUROC"] > 0.7


@pytest.mark.parametrize("which", ["model", "interrupted"])
def test_a_validation_alone_sets_thresholds(
    which: str,
    request: pytest.FixtureRequest,
    make_data: Make,
    make_engine: Make,
) -> None:
    """Without learning anything; those of an update that was interrupted are not lost when it goes on."""
    model = request.getfixturevalue(which)
    image_values = model.post_processor.image_values.clone()
    before = model.model.bank
    data = make_data("dots", eval_batch_size=3)
    make_engine(limit_val_batches=3).validate(model, datamodule=data)
    calibration = model.model.bank.variants["dots"].calibration
    assert (calibration.origins < 0).sum() == 9
    assert (calibration.origins >= 0).sum() == 20, "learned images count on"
    assert model.model.bank.variants["dots"].vectors is before.variants["dots"].vectors
    assert model.model.bank.variants["stripes"] is before.variants["stripes"]
    assert (before.variants["dots"].calibration.origins < 0).sum() == 12, "replaced"
    assert torch.equal(model.post_processor.image_values[0], image_values[0])
    if which == "interrupted":
        model.partial_fit(torch.rand(1, 3, 64, 64), "noise")
        assert len(model.model.bank.variants) == 4
        assert np.array_equal(model.model.bank.variants["dots"].calibration.patches, calibration.patches)


def test_both_ways_of_judging_agree(model: ContinualPatchCore, make_data: Make, make_engine: Make) -> None:
    """What the trainer's steps give, with Anomalib's fields, is what the model gives that is exported."""
    batches = make_engine().predict(model, datamodule=make_data("dots"))
    assert sum(len(batch.image_path) for batch in batches) == 12
    for batch in batches:
        images = [torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255 for path in batch.image_path]
        with torch.no_grad():
            expected = model(torch.stack(images))
        for name in ("pred_score", "pred_label", "anomaly_map", "pred_mask"):
            value, other = getattr(batch, name), getattr(expected, name)
            assert value.dtype == other.dtype
            difference = (value.float() - other.float().reshape(value.shape)).abs()
            assert difference.mean() < 1e-4, name  # of the many pixels, some may lie at the threshold


def test_thresholds_are_those_of_the_variant(model: ContinualPatchCore, tensors: Make) -> None:
    """A score at the threshold of its variant is 0.5; Studio's attribute is there."""
    processor = model.post_processor
    assert processor.image_values.shape == processor.pixel_values.shape == (2, 2)
    assert not torch.equal(processor.image_values[0], processor.image_values[1])
    for position, product in enumerate(("stripes", "dots")):
        raw = model.model(model.pre_processor(tensors(product, "test/good")))
        assert raw.variant.tolist() == [position] * 6
        threshold = processor.image_values[position, 0]
        at = processor(raw._replace(pred_score=threshold.expand(6), anomaly_map=processor.pixel_values[position, 0]))
        assert torch.allclose(at.pred_score, torch.tensor(0.5))
        assert torch.allclose(at.anomaly_map, torch.tensor(0.5))
    assert processor.normalized_pixel_threshold == pytest.approx(0.5)


def test_sensitivity(model: ContinualPatchCore, tensors: Make) -> None:
    """The most sensitive calls everything anomalous, the least sensitive nothing; scores stay."""
    images = tensors("stripes", "test/hole")
    scores = model(images).pred_score
    for sensitivity, expected in ((1.0, True), (0.0, False)):
        model.post_processor.image_sensitivity = model.post_processor.pixel_sensitivity = sensitivity
        result = model(images)
        assert (result.pred_label == expected).all()
        assert torch.equal(result.pred_score, scores)
    assert not result.pred_mask.any()


def test_without_normalization(model: ContinualPatchCore, tensors: Make, make_data: Make, make_engine: Make) -> None:
    """Scores stay raw, and the decisions are the same."""
    images = torch.cat([tensors("stripes", f"test/{kind}") for kind in ("good", "hole")])
    expected = model(images)
    model.post_processor.enable_normalization = False
    result = model(images)
    assert torch.equal(result.pred_score, model.model(model.pre_processor(images)).pred_score)
    assert torch.equal(result.pred_label, expected.pred_label)
    assert torch.equal(result.pred_mask, expected.pred_mask)
    assert make_engine().test(model, datamodule=make_data("stripes"))[0]["image_F1Score"] == 1


@pytest.mark.parametrize("post_processor", ["plain", False])
def test_other_post_processors(
    post_processor: str | bool,
    tensors: Make,
    make_tiny: Make,
    make_data: Make,
    make_engine: Make,
) -> None:
    """Anomalib's own does what it does for other models, and there may be none."""
    plain = post_processor == "plain"
    model = make_tiny(post_processor=PostProcessor() if plain else False, evaluator=plain)
    engine = make_engine()
    engine.fit(model, datamodule=make_data("stripes"))
    thresholds = [name for name in engine.trainer.callback_metrics if "_threshold" in name]
    assert thresholds == ["memory/image_threshold/stripes", "memory/pixel_threshold/stripes"]
    result = model.eval()(tensors("stripes", "test/hole"))
    if plain:
        assert engine.test(model, datamodule=make_data("stripes"))[0]["image_F1Score"] > 0.9
        assert result.pred_label.sum() >= 5
    else:
        assert result.pred_label is None
        images = model.pre_processor(tensors("stripes", "test/hole"))
        assert torch.equal(result.pred_score, model.model(images).pred_score)
        assert result.pred_score.min() > model(tensors("stripes", "test/good")).pred_score.max()
    assert (ContinualPatchCore.load_from_checkpoint(engine.best_model_path).post_processor is None) is not plain


def test_prediction_of_files(model: ContinualPatchCore, products: Path, make_engine: Make) -> None:
    """``Engine.predict`` takes a folder, a file and a dataset."""
    folder = products / "dots" / "test" / "hole"
    for kwargs, count in (
        ({"data_path": folder}, 6),
        ({"data_path": folder / "000.png"}, 1),
        ({"dataset": PredictDataset(folder)}, 6),
    ):
        labels = [batch.pred_label for batch in make_engine().predict(model, **kwargs)]
        assert torch.cat(labels).tolist() == [True] * count


def test_learned_images_do_not_validate(model: ContinualPatchCore, tensors: Make, make_engine: Make) -> None:
    """They score nearly nothing, so a validation passes them over."""
    images = torch.cat([tensors("dots")[:4], tensors("dots", "test/good")])
    batch = ImageBatch(image=images, gt_label=torch.zeros(10, dtype=torch.bool))
    model.variant = "dots"
    make_engine().validate(model, DataLoader([batch], batch_size=None, collate_fn=lambda one: one))
    assert (model.model.bank.variants["dots"].calibration.origins < 0).sum() == 6
