# SPDX-License-Identifier: Apache-2.0
"""Tests of learning, thresholds, checkpoints and reports, through Anomalib's engine where a user goes through it."""

import copy
import errno
import functools
import io
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import Folder, ImageBatch, PredictDataset
from anomalib.engine.plugins import AnomalibCheckpointIO
from anomalib.models import Patchcore
from anomalib.post_processing import PostProcessor
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from anomalib_ext.data import MultiCategory, PhotoVariants
from anomalib_ext.models import ContinualPatchCore
from anomalib_ext.models.components.training import AtomicCheckpointIO
from anomalib_ext.models.continual_patchcore import lightning_model
from openvino_export.memory import memory_bank

Make = Callable[..., Any]


def images_of(products: Path, product: str, kind: str = "train/good") -> list[Path]:
    """Return the files of a product."""
    return sorted((products / product / kind).glob("*.png"))


def tensors_of(products: Path, product: str, kind: str = "train/good") -> torch.Tensor:
    """Return the images of a product, in [0, 1]."""
    arrays = [np.asarray(Image.open(path)) for path in images_of(products, product, kind)]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


def state_of(model: ContinualPatchCore) -> bytes:
    """Return all that a checkpoint holds of a model, and its thresholds, as bytes."""
    buffer = io.BytesIO()
    processor = model.post_processor
    tables = [processor.image_values, processor.pixel_values]
    state = model.state_dict()
    extra = state.pop("model._extra_state")
    torch.save([list(state.values()), list(extra["tensors"].values()), extra["plain"], tables], buffer)
    return buffer.getvalue()


def f1_of(model: ContinualPatchCore, products: Path, product: str) -> float:
    """Return the F1 of the decisions on the test images of a product."""
    good, bad = (model(tensors_of(products, product, f"test/{kind}")).pred_label for kind in ("good", "hole"))
    hits = float(bad.sum())
    return 2 * hits / (hits + float(good.sum()) + len(bad))


@pytest.fixture(scope="module")
def two(make_model: Make, make_data: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[ContinualPatchCore, Path]:
    """Return a model that learned two products with the same engine, and its checkpoint."""
    from anomalib.engine import Engine

    model = make_model().eval()
    root = tmp_path_factory.mktemp("two")
    engine = Engine(default_root_dir=root, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    for product in ("stripes", "dots"):
        engine.fit(model, datamodule=make_data(product))
    return model.eval(), Path(engine.best_model_path)


@pytest.fixture
def model(two: tuple[ContinualPatchCore, Path]) -> ContinualPatchCore:
    """Return a copy of the model that knows stripes and dots."""
    return copy.deepcopy(two[0])


# Learning one product after another


def test_a_further_fit_with_the_same_engine_adds(two: tuple[ContinualPatchCore, Path], products: Path) -> None:
    """It trains, keeps what is known, decides both products right, and writes a checkpoint of both."""
    model, path = two
    assert {name: variant.images for name, variant in model.model.bank.variants.items()} == {"stripes": 20, "dots": 20}
    assert [f1_of(model, products, product) for product in ("stripes", "dots")] == [1, 1]
    loaded = ContinualPatchCore.load_from_checkpoint(path)
    assert list(loaded.model.bank.variants) == ["stripes", "dots"]
    assert state_of(loaded) == state_of(model)


def test_a_further_fit_with_a_new_engine_adds(
    model: ContinualPatchCore,
    products: Path,
    make_data: Make,
    make_engine: Make,
) -> None:
    """So does a third product with another engine."""
    engine = make_engine()
    engine.fit(model, datamodule=make_data("checks"))
    assert list(model.model.bank.variants) == ["stripes", "dots", "checks"]
    assert [f1_of(model.eval(), products, product) for product in model.model.bank.variants] == [1, 1, 1]
    assert len(model.model.bank) <= 400
    state = torch.load(engine.best_model_path, weights_only=True)["state_dict"]
    assert len(state["model._extra_state"]["plain"]["variants"]) == 3


def test_training_from_a_checkpoint_adds_and_tests_the_new_state(
    two: tuple[ContinualPatchCore, Path],
    make_model: Make,
    make_data: Make,
    make_engine: Make,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """``Engine.train`` tests with the checkpoint that it started from, which knows nothing of the new product."""
    model, engine = make_model(), make_engine()
    with caplog.at_level(logging.WARNING):
        results = engine.train(model, datamodule=make_data("checks"), ckpt_path=two[1])
    assert "Testing what was learned on top of" in caplog.text
    assert results[0]["image_AUROC"] == 1
    assert list(model.model.bank.variants) == ["stripes", "dots", "checks"]
    assert engine.best_model_path != str(two[1])
    assert list(ContinualPatchCore.load_from_checkpoint(engine.best_model_path).model.bank.variants)[-1] == "checks"
    assert two[1].is_file(), "the old checkpoint must remain"
    # Asked for by another engine, the old checkpoint is what is tested.
    make_engine().test(model, datamodule=make_data("stripes"), ckpt_path=two[1])
    assert list(model.model.bank.variants) == ["stripes", "dots"]


def test_the_same_images_change_nothing(model: ContinualPatchCore, make_data: Make, make_engine: Make) -> None:
    """A repeated fit learns none of them again, and a checkpoint is written nevertheless."""
    before = model.model.bank.vectors
    engine = make_engine()
    engine.fit(model, datamodule=make_data("stripes"))
    assert model.last_report.known_images == 20
    assert not model.last_report.variants
    assert np.array_equal(model.model.bank.vectors, before)
    assert Path(engine.best_model_path).is_file()


@pytest.mark.parametrize("batch_size", [2, 3, 4])
@pytest.mark.parametrize(("count", "augmented"), [(4, True), (5, False)])
def test_few_images_are_learned_with_views(
    count: int,
    augmented: bool,
    batch_size: int,
    products: Path,
    make_model: Make,
    make_engine: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It depends on the number of images only, not on the size of the batches, the last of which is smaller."""
    asked = []
    model = make_model(one_shot=True)
    learn = model.model.learn

    def watched(images: torch.Tensor, variant: str | None, augment: bool) -> list[str | None]:
        asked.extend([augment] * len(images))
        return learn(images, variant, augment=False)

    monkeypatch.setattr(model.model, "learn", watched)
    images = list(tensors_of(products, "stripes")[:count])
    loader = DataLoader(images, batch_size=batch_size, collate_fn=lambda batch: ImageBatch(image=torch.stack(batch)))
    make_engine().fit(model, train_dataloaders=loader)
    assert asked == [augmented] * count


def test_learns_from_plain_loaders(products: Path, make_model: Make, make_engine: Make) -> None:
    """Without a datamodule, labels and length, the variants are found from the images, each with thresholds."""

    class Endless(IterableDataset):
        def __iter__(self):  # noqa: ANN204
            for product in ("stripes", "dots"):
                yield from tensors_of(products, product)

    model, engine = make_model(), make_engine()
    loader = DataLoader(Endless(), batch_size=6, collate_fn=lambda batch: ImageBatch(image=torch.stack(batch)))
    engine.fit(model, train_dataloaders=loader)
    assert {name: variant.images for name, variant in model.model.bank.variants.items()} == {
        "variant_1": 20,
        "variant_2": 20,
    }
    model.eval()
    assert [f1_of(model, products, product) for product in ("stripes", "dots")] == [1, 1]
    assert Path(engine.best_model_path).is_file()


def test_mixed_categories_are_variants(
    products: Path,
    make_model: Make,
    make_engine: Make,
    make_data: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each category of a joint set is learned, calibrated and judged as a variant; the one of few images with views."""
    for path in sorted((products / "checks" / "train" / "good").iterdir())[:3]:
        shutil.copy(path, tmp_path)
    tests = products / "checks" / "test"
    few = Folder(
        "few",
        normal_dir=tmp_path,
        abnormal_dir=tests / "hole",
        normal_test_dir=tests / "good",
        val_split_mode="same_as_test",
        num_workers=0,
    )
    data = MultiCategory([make_data("stripes"), make_data("dots"), few], num_workers=0, train_batch_size=8)
    model, learned, learn = make_model(one_shot=True), Counter(), memory_bank.MemoryBank.learn

    def counted(bank: Any, patches: Any, variant: str, image_hash: int, views: Any) -> Any:  # noqa: ANN401
        learned[variant, views is not None] += 1
        return learn(bank, patches, variant, image_hash, views)

    monkeypatch.setattr(memory_bank.MemoryBank, "learn", counted)
    make_engine().fit(model, datamodule=data)
    assert learned == {("stripes", False): 20, ("dots", False): 20, ("few", True): 3}
    calibrations = {name: variant.calibration for name, variant in model.model.bank.variants.items()}
    assert {name: one.labels.sum() for name, one in calibrations.items()} == {"stripes": 6, "dots": 6, "few": 6}
    values = make_engine().test(model, datamodule=data, verbose=False)[0]
    assert values["mean/image_AUROC"] > 0.95


def test_unlabelled_validation_sets_the_thresholds_of_each_variant(
    products: Path,
    make_model: Make,
    make_engine: Make,
) -> None:
    """Validation images are told apart as well."""

    def loader(kind: str, bad: bool) -> list[ImageBatch]:
        return [
            ImageBatch(image=tensors_of(products, product, kind), gt_label=torch.tensor([bad]).expand(count))
            for product, count in (("stripes", 6), ("dots", 6))
        ]

    train = [ImageBatch(image=tensors_of(products, product)) for product in ("stripes", "dots")]
    model = make_model()
    val = loader("test/good", bad=False) + loader("test/hole", bad=True)
    plain = {"batch_size": None, "collate_fn": lambda batch: batch}
    make_engine().fit(model, DataLoader(train, **plain), DataLoader(val, **plain))
    counts = [variant.calibration.labels.tolist() for variant in model.model.bank.variants.values()]
    assert counts == [[False] * 6 + [True] * 6] * 2


def test_without_a_validation_set(products: Path, make_model: Make, make_engine: Make) -> None:
    """Thresholds from views of the images part good from bad, and there is a checkpoint."""
    folder = products / "stripes"
    data = Folder("stripes", "train/good", folder, "test/hole", val_split_mode="none", num_workers=0)
    model, engine = make_model(), make_engine()
    engine.fit(model, datamodule=data)
    assert Path(engine.best_model_path).is_file()
    assert torch.isfinite(model.post_processor.pixel_values).all()
    assert f1_of(model.eval(), products, "stripes") >= 0.9


def test_a_folder_of_normal_images_is_enough(products: Path, make_model: Make, make_engine: Make) -> None:
    """Anomalib's synthetic anomalies set the thresholds."""
    folder = products / "stripes"
    modes = {"test_split_mode": "synthetic", "val_split_mode": "synthetic"}
    data = Folder("stripes", "train/good", folder, train_batch_size=4, num_workers=0, **modes)
    model, engine = make_model(), make_engine()
    engine.fit(model, datamodule=data)
    assert set(model.model.bank.variants["stripes"].calibration.labels) == {False, True}
    assert torch.isfinite(model.post_processor.pixel_values).all()
    assert engine.test(model, datamodule=data)[0]["image_AUROC"] > 0.7


def test_reports_each_update(
    model: ContinualPatchCore,
    make_data: Make,
    make_engine: Make,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The numbers reach the trainer's metrics, a logger, the progress bar and the log."""
    shown: dict[str, Any] = {}

    class Bar(lightning_model.Callback):
        def on_train_end(self, trainer: Any, _: Any) -> None:  # noqa: ANN401, PLR6301
            shown.update(trainer.progress_bar_metrics)

    engine = make_engine(logger=CSVLogger(tmp_path, "csv"), callbacks=[Bar()])
    with caplog.at_level(logging.INFO, logger="anomalib_ext"):
        engine.fit(model, datamodule=make_data("checks"))
    report = model.last_report
    expected = {
        "memory/vectors": 400,
        "memory/radius_bound": report.radius_bound,
        "memory/bytes": report.nbytes,
        "memory/seconds": report.seconds,
        "memory/known_images": 0,
        "memory/images/checks": 20,
        "memory/added/checks": report.added["checks"],
        "memory/removed/stripes": report.removed["stripes"],
        "memory/removed/dots": report.removed["dots"],
    }
    assert {"stripes", "dots"} == set(report.removed)
    for metrics in (engine.trainer.callback_metrics, engine.trainer.logged_metrics):
        assert {name: float(metrics[name]) for name in expected} == pytest.approx(expected)
    assert {"memory/vectors", "memory/radius_bound"} <= set(shown)
    table = next((tmp_path / "csv").rglob("metrics.csv")).read_text()
    assert set(expected) <= set(table.splitlines()[0].split(","))
    added = f"vectors added {report.added['checks']} of checks, removed"
    assert f"learned checks: 20 images (0 known already); {added}" in caplog.text


def test_training_mode_learns_what_evaluation_sees(make_model: Make, products: Path) -> None:
    """Batch norm and dropout of the backbone are those of evaluation also while the trainer trains."""
    for backbone, layers in (("resnet18", ["layer1", "layer2"]), ("test_vit", ["blocks.1"])):
        model = make_model(backbone=backbone, layers=layers, pre_trained=False).model
        images = torch.nn.functional.interpolate(tensors_of(products, "stripes")[:2], 160)
        expected = model.eval().embed(images)
        before = copy.deepcopy(model.feature_extractor.state_dict())
        assert torch.equal(model.train().embed(images), expected)
        after = model.feature_extractor.state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)


# partial_fit


def test_partial_fit_without_a_trainer(make_model: Make, products: Path) -> None:
    """It learns paths and tensors, names variants itself, and reports."""
    model = make_model()
    report = model.partial_fit(images_of(products, "stripes"))
    assert report.variants == {"variant_1": 20}
    assert report.num_vectors == sum(report.added.values()) == 400
    assert model.last_report is report
    report = model.partial_fit(tensors_of(products, "dots"))
    assert report.variants == {"variant_2": 20}
    assert report.removed["variant_1"] > 0
    report = model.partial_fit(str(images_of(products, "checks")[0]), variant="mine")
    assert report.variants == {"mine": 1}
    assert [f1_of(model, products, product) for product in ("stripes", "dots")] == [1, 1]


def test_partial_fit_of_two_products_at_once(make_model: Make, products: Path) -> None:
    """Each image calibrates its own variant only."""
    together, apart = make_model(memory_size=5000), make_model(memory_size=5000)
    together.partial_fit(torch.cat([tensors_of(products, product) for product in ("stripes", "dots")]))
    for product in ("stripes", "dots"):
        apart.partial_fit(tensors_of(products, product))
    together_values, apart_values = together.post_processor.image_values, apart.post_processor.image_values
    assert torch.allclose(together_values, apart_values, rtol=0.02)


def test_known_images_change_nothing(model: ContinualPatchCore, products: Path) -> None:
    """Neither from a file, nor as a tensor, nor after ``Engine.fit``, of which these are the images."""
    before = state_of(model)
    for images in (images_of(products, "stripes"), tensors_of(products, "dots"), images_of(products, "dots")[0]):
        report = model.partial_fit(images)
        assert not report.variants
        assert report.known_images == (1 if isinstance(images, Path) else 20)
        assert state_of(model) == before


def test_known_images_change_nothing_when_resized(make_data: Make, make_engine: Make, products: Path) -> None:
    """Images that the trainer resized are recognised as well."""
    from anomalib_ext.models import ContinualPatchCore

    model = ContinualPatchCore(pre_processor=ContinualPatchCore.configure_pre_processor((48, 48)), visualizer=False)
    make_engine().fit(model, datamodule=make_data("stripes"))
    assert model.partial_fit(images_of(products, "stripes")).known_images == 20


def test_a_slightly_changed_image_is_new(make_model: Make, products: Path) -> None:
    """One step of 8 bits in 5 x 5 pixels makes another image."""
    model = make_model()
    images = tensors_of(products, "stripes")[:1]
    model.partial_fit(images)
    images[..., 20:25, 20:25] = (images[..., 20:25, 20:25] - 1 / 255).abs()
    assert model.partial_fit(images).known_images == 0


def test_partial_fit_and_fit_mix(model: ContinualPatchCore, make_data: Make, make_engine: Make, products: Path) -> None:
    """A product can be learned partly by the one, partly by the other."""
    model.partial_fit(images_of(products, "checks")[:3], variant="checks")
    make_engine().fit(model, datamodule=make_data("checks"))
    assert model.last_report.known_images == 3
    assert model.model.bank.variants["checks"].images == 20


def test_one_image_at_a_time(make_model: Make, products: Path) -> None:
    """Thresholds rest on all of them, not on the last one only."""
    model = make_model(memory_size=5000)
    for path in images_of(products, "stripes")[:6]:
        model.partial_fit(path)
    assert list(model.model.bank.variants) == ["variant_1"]
    assert len(model.model.bank.variants["variant_1"].calibration.labels) == 32
    assert f1_of(model, products, "stripes") >= 0.8


def test_one_shot_thresholds(tmp_path: Path) -> None:
    """Without any validation, most new images of a product of which one image was learned are called good."""
    data = PhotoVariants(tmp_path, "brick")
    data.prepare_data()
    model = ContinualPatchCore().eval()
    model.partial_fit(images_of(tmp_path, "brick")[0])
    good, bad = (
        [bool(model(tensor_from(path)[None]).pred_label) for path in images_of(tmp_path, "brick", f"test/{kind}")]
        for kind in ("good", "crack")
    )
    assert sum(good) <= 3
    assert sum(bad) >= 2


def test_partial_fit_keeps_the_mode(model: ContinualPatchCore, products: Path) -> None:
    """A model that is trained goes on to be trained."""
    model.train().partial_fit(images_of(products, "checks")[:1])
    assert model.training
    model.eval().partial_fit(images_of(products, "checks")[1:2])
    assert not model.training


def test_a_failed_partial_fit_changes_nothing(
    model: ContinualPatchCore,
    products: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever fails, and however far it got: even when images of two new products came before."""
    model.model.learn(tensors_of(products, "stripes", "test/good"), "stripes")  # an open stream
    before = state_of(model)
    good = [*images_of(products, "checks"), *images_of(products, "stripes", "test/hole")]
    with pytest.raises(ValueError, match=r"nowhere.png cannot be read"):
        model.partial_fit([*good, "nowhere.png"])
    assert state_of(model) == before
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "_calibrate_from_views", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            model.partial_fit(good)
    assert state_of(model) == before
    assert model.partial_fit(good).known_images == 0


def test_a_failed_fit_changes_nothing(
    model: ContinualPatchCore,
    products: Path,
    make_engine: Make,
    make_data: Make,
) -> None:
    """Nor does a fit of which the last batch cannot be learned; the next one works."""
    before = state_of(model)
    images = [*tensors_of(products, "checks"), torch.full((3, 64, 64), torch.nan)]
    loader = DataLoader(images, batch_size=7, collate_fn=lambda batch: ImageBatch(image=torch.stack(batch)))
    engine = make_engine()
    with pytest.raises(ValueError, match="NaN"):
        engine.fit(model, train_dataloaders=loader)
    assert state_of(model) == before
    engine.fit(model, datamodule=make_data("checks"))
    assert model.last_report.variants == {"checks": 20}


def test_a_fit_that_fails_before_it_begins_changes_nothing(
    model: ContinualPatchCore,
    products: Path,
    make_engine: Make,
    make_data: Make,
) -> None:
    """Nor what came into the bank by another way before."""
    model.model.learn(tensors_of(products, "checks"), "checks")
    model.model.bank.commit()
    with pytest.raises(FileNotFoundError):
        make_engine().fit(model, datamodule=make_data("checks"), ckpt_path="absent.ckpt")
    assert "checks" in model.model.bank.variants


# Thresholds


def test_both_ways_of_judging_agree(model: ContinualPatchCore, make_data: Make, make_engine: Make) -> None:
    """What the trainer's steps give, with Anomalib's fields, is what the model gives that is exported."""
    data = make_data("dots")
    for batch in make_engine().predict(model, datamodule=data):
        with torch.no_grad():
            expected = model(torch.stack([tensor_from(path) for path in batch.image_path]))
        for name in ("pred_score", "pred_label", "anomaly_map", "pred_mask"):
            value, other = getattr(batch, name), getattr(expected, name)
            assert value.dtype == other.dtype
            difference = (value.float() - other.float().reshape(value.shape)).abs()
            assert difference.mean() < 1e-4, name  # of the many pixels, some may lie at the threshold


def tensor_from(path: str) -> torch.Tensor:
    """Return an image file as a tensor in [0, 1]."""
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255


def test_thresholds_are_those_of_the_variant(model: ContinualPatchCore, products: Path) -> None:
    """A score at the threshold of its variant is 0.5; Studio's attribute is there."""
    processor = model.post_processor
    assert processor.image_values.shape == processor.pixel_values.shape == (2, 3)
    assert not torch.equal(processor.image_values[0], processor.image_values[1])
    for position, product in enumerate(("stripes", "dots")):
        raw = model.model(model.pre_processor(tensors_of(products, product, "test/good")))
        assert raw.variant.tolist() == [position] * 6
        threshold = processor.image_values[position, 0]
        at = processor(raw._replace(pred_score=threshold.expand(6), anomaly_map=processor.pixel_values[position, 0]))
        assert torch.allclose(at.pred_score, torch.tensor(0.5))
        assert torch.allclose(at.anomaly_map, torch.tensor(0.5))
    assert processor.normalized_pixel_threshold == pytest.approx(0.5)


def test_sensitivity(model: ContinualPatchCore, products: Path) -> None:
    """The most sensitive calls everything anomalous, the least sensitive nothing; scores stay."""
    images = tensors_of(products, "stripes", "test/hole")
    scores = model(images).pred_score
    for sensitivity, expected in ((1.0, True), (0.0, False)):
        model.post_processor.image_sensitivity = model.post_processor.pixel_sensitivity = sensitivity
        result = model(images)
        assert (result.pred_label == expected).all()
        assert torch.equal(result.pred_score, scores)
    assert not result.pred_mask.any()


def test_without_normalization(model: ContinualPatchCore, products: Path, make_data: Make, make_engine: Make) -> None:
    """Scores stay raw, and the decisions are the same."""
    images = torch.cat([tensors_of(products, "stripes", f"test/{kind}") for kind in ("good", "hole")])
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
    products: Path,
    make_model: Make,
    make_data: Make,
    make_engine: Make,
) -> None:
    """Anomalib's own does what it does for other models, and there may be none."""
    plain = post_processor == "plain"
    model = make_model(post_processor=PostProcessor() if plain else False, evaluator=plain)
    engine = make_engine()
    engine.fit(model, datamodule=make_data("stripes"))
    result = model.eval()(tensors_of(products, "stripes", "test/hole"))
    if plain:
        assert engine.test(model, datamodule=make_data("stripes"))[0]["image_F1Score"] > 0.9
        assert result.pred_label.sum() >= 5
    else:
        assert result.pred_label is None
        assert (result.pred_score > 1).all()
    assert (ContinualPatchCore.load_from_checkpoint(engine.best_model_path).post_processor is None) is not plain


# Checkpoints


def test_loads_into_a_model_of_default_arguments(
    two: tuple[ContinualPatchCore, Path],
    products: Path,
) -> None:
    """By ``torch.load`` without code, though the memory has another size; learning goes on from there."""
    model = ContinualPatchCore()
    model.load_state_dict(torch.load(two[1], weights_only=True)["state_dict"])
    assert model.model.bank.size == 400
    assert state_of(model) == state_of(two[0])
    loaded = ContinualPatchCore.load_from_checkpoint(two[1]).eval()
    images = tensors_of(products, "dots", "test/hole")
    assert torch.equal(loaded(images).pred_score, two[0](images).pred_score)
    assert loaded.partial_fit(images_of(products, "checks")).variants == {"variant_1": 20}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"backbone": "resnet18", "layers": ["layer1"]},
            r"backbone 'tf_efficientnet_lite0', this model has 'resnet18'",
        ),
        ({"layers": ["blocks.2"]}, r"layers \['blocks.2', 'blocks.4'\], this model has \['blocks.2'\]"),
    ],
)
def test_a_checkpoint_of_another_backbone_is_refused(
    kwargs: dict[str, Any],
    message: str,
    two: tuple[ContinualPatchCore, Path],
    products: Path,
    make_model: Make,
    make_data: Make,
    make_engine: Make,
) -> None:
    """The message says what differs, and nothing is taken over."""
    pre_processor = ContinualPatchCore.configure_pre_processor((32, 32))
    model = make_model(**kwargs, pre_trained=False, pre_processor=pre_processor)
    model.partial_fit(images_of(products, "stripes")[:2])
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        make_engine().fit(model, datamodule=make_data("dots"), ckpt_path=two[1])
    with pytest.raises(ValueError, match=message):
        model.load_state_dict(torch.load(two[1], weights_only=True)["state_dict"])
    assert state_of(model) == before
    assert model.pre_processor.transform.transforms[0].size == [32, 32]


def test_a_checkpoint_of_another_model_is_refused(model: ContinualPatchCore) -> None:
    """Both when it is loaded as a checkpoint and as a state."""
    other = Patchcore("resnet18", ["layer1"], pre_trained=False)
    before = state_of(model)
    for load in (lambda state: model.on_load_checkpoint({"state_dict": state}), model.load_state_dict):
        with pytest.raises(ValueError, match=r"not of ContinualPatchCore.* has \d+ tensors, such as \['_is_fitted"):
            load(other.state_dict())
    assert state_of(model) == before


def test_a_damaged_file_changes_nothing(
    model: ContinualPatchCore,
    two: tuple[ContinualPatchCore, Path],
    tmp_path: Path,
    make_data: Make,
    make_engine: Make,
) -> None:
    """Whether it is cut off, or empty."""
    before = state_of(model)
    content = two[1].read_bytes()
    for part in (content[: len(content) // 2], b""):
        path = tmp_path / "damaged.ckpt"
        path.write_bytes(part)
        with pytest.raises((RuntimeError, EOFError)):
            make_engine().fit(model, datamodule=make_data("checks"), ckpt_path=path)
        assert state_of(model) == before


@pytest.mark.parametrize("fault", ["missing", "shape", "nan", "count", "schema"])
def test_a_state_that_does_not_fit_changes_nothing(
    fault: str,
    model: ContinualPatchCore,
    products: Path,
) -> None:
    """Bank and weights of two states are never mixed."""
    state = copy.deepcopy(model.state_dict())
    model.partial_fit(images_of(products, "checks")[:2])
    for parameter in model.parameters():
        parameter.data.mul_(1.01)
    before = state_of(model)
    weights = [name for name in state if name.endswith("weight")]
    if fault == "missing":
        del state[weights[-1]]
    elif fault == "shape":
        state[weights[-1]] = state[weights[-1]][1:]
    elif fault == "nan":
        state["model._extra_state"]["tensors"]["vectors"][3, 5] = torch.nan
    elif fault == "count":
        state["model._extra_state"]["tensors"]["radii"] = torch.ones(3)
    else:
        state["model._extra_state"]["plain"]["schema_version"] = 99
    with pytest.raises((RuntimeError, ValueError)):
        model.load_state_dict(state)
    assert state_of(model) == before


def test_a_checkpoint_in_the_middle_of_a_stream(model: ContinualPatchCore, products: Path, make_model: Make) -> None:
    """What is judged by it has all images so far; what goes on from it ends as if there had been no checkpoint."""
    prepared = model.pre_processor(tensors_of(products, "checks"))
    model.model.learn(prepared[:12], "checks")
    other = make_model()
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert list(other.model.bank.variants) == ["stripes", "dots", "checks"]
    assert not other(tensors_of(products, "checks", "test/good")).pred_label.all(), "there is a threshold already"
    assert list(model.model.bank.variants) == ["stripes", "dots"], "saving changes nothing"
    again = make_model()
    again.load_state_dict(copy.deepcopy(other.state_dict()))  # nor does loading, or judging
    for each in (model, again):
        each.partial_fit(images_of(products, "checks")[12:], "checks")
    assert state_of(again) == state_of(model)


@pytest.mark.parametrize("val_split_mode", ["same_as_test", "none"])
def test_a_fit_that_was_killed_ends_as_one_that_was_not(
    val_split_mode: str,
    make_model: Make,
    make_data: Make,
    make_engine: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the same seed, from a checkpoint that was written in the middle of the epoch."""
    monkeypatch.setattr(memory_bank, "SMALLEST_POOL", 500)
    model = make_model(memory_size=200)
    make_engine().fit(model, datamodule=make_data("dots"))
    uninterrupted, killed, later = model, copy.deepcopy(model), make_model(memory_size=200)
    saving = ModelCheckpoint(every_n_train_steps=1, save_top_k=-1)
    make_stripes = functools.partial(make_data, "stripes", train_batch_size=4, val_split_mode=val_split_mode)
    seed_everything(1)
    make_engine().fit(uninterrupted, datamodule=make_stripes())
    seed_everything(1)
    with pytest.raises(RuntimeError, match="killed"):
        make_engine(callbacks=[saving, _Kill()]).fit(killed, datamodule=make_stripes())
    seed_everything(1)
    make_engine().fit(later, datamodule=make_stripes(), ckpt_path=saving.best_model_path)
    assert (later.last_report.variants, later.last_report.known_images) == ({"stripes": 20}, 12)
    assert state_of(later) == state_of(uninterrupted)


class _Kill(Callback):
    """Stops a fit after three batches."""

    def on_train_batch_start(  # noqa: PLR6301
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Stop."""
        del trainer, pl_module, batch
        if batch_idx == 3:
            msg = "killed"
            raise RuntimeError(msg)


def test_copies(model: ContinualPatchCore, products: Path) -> None:
    """Copied or pickled, with an open stream too, a model is the same, and independent."""
    model.model.learn(tensors_of(products, "checks"), "checks")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), torch.load(buffer, weights_only=False)]
    before = state_of(model)
    for other in copies:
        assert state_of(other) == before
        report = other.partial_fit(images_of(products, "dots", "test/good"), variant="dots")
        assert report.variants == {"checks": 20, "dots": 6}
        assert len(other.model.bank.variants) == 3
    assert state_of(model) == before


def test_half_precision(make_model: Make, make_data: Make, make_engine: Make, products: Path) -> None:
    """A bank of float16 takes half the bytes, scores the same up to rounding, and comes back as it was."""
    models = {}
    for precision in ("float32", "float16"):
        models[precision] = make_model(precision=precision)
        engine = make_engine()
        torch.manual_seed(0)  # the loader shuffles
        engine.fit(models[precision], datamodule=make_data("stripes"))
        models[precision].eval()
    half, single = models["float16"], models["float32"]
    assert half.model.memory_bank.dtype == torch.float16
    assert half.model.memory_bank.nbytes * 2 == single.model.memory_bank.nbytes
    vectors = [model.model.bank.to_arrays()[0]["vectors"].nbytes for model in (half, single)]
    assert vectors[0] * 2 == vectors[1]
    images = torch.cat([tensors_of(products, "stripes", f"test/{kind}") for kind in ("good", "hole")])
    scores = [model.model(model.pre_processor(images)).pred_score for model in (half, single)]
    assert torch.allclose(*scores, rtol=5e-3)
    loaded = ContinualPatchCore.load_from_checkpoint(engine.best_model_path).eval()
    assert state_of(loaded) == state_of(half)
    assert torch.equal(loaded(images).pred_score, half(images).pred_score)


def test_mixed_precision(make_model: Make, make_data: Make, make_engine: Make) -> None:
    """The backbone may run in bfloat16, the search does not."""
    model, engine = make_model(), make_engine(precision="bf16-mixed")
    engine.fit(model, datamodule=make_data("stripes"))
    assert model.model.memory_bank.dtype == torch.float32
    assert engine.test(model, datamodule=make_data("stripes"))[0]["image_F1Score"] > 0.9


# Saving


def test_a_full_disk_leaves_the_old_file(
    model: ContinualPatchCore,
    make_data: Make,
    make_engine: Make,
    products: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what was learned stays in memory."""
    engine = make_engine()
    engine.fit(model, datamodule=make_data("checks"))
    assert type(engine.trainer.strategy.checkpoint_io) is AtomicCheckpointIO
    path = Path(engine.best_model_path)
    before = path.read_bytes()
    model.partial_fit(images_of(products, "checks", "test/good"), variant="checks")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            engine.trainer.save_checkpoint(path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    engine.trainer.save_checkpoint(path)
    assert path.read_bytes() != before
    assert ContinualPatchCore.load_from_checkpoint(path).model.bank.variants["checks"].images == 26


KILLED = """
import sys
import torch
from anomalib_ext.models.components.training import AtomicCheckpointIO

for i in range(100_000):
    AtomicCheckpointIO().save_checkpoint({"tensor": torch.full((500_000,), float(i))}, sys.argv[1])
    print(i, flush=True)
"""


def test_a_kill_while_saving_leaves_a_whole_file(tmp_path: Path) -> None:
    """It is the last or the one after, and the next save removes what the killed one left."""
    path = tmp_path / "model.ckpt"
    with subprocess.Popen([sys.executable, "-c", KILLED, path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        last = [int(process.stdout.readline()) for _ in range(20)][-1]
        # It is killed while a file is half written, and read again whenever that was too late.
        while not (tmp_path / ".model.ckpt.tmp").exists():
            last = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
    value = torch.load(path, weights_only=True)["tensor"]
    assert (value == value[0]).all()
    assert value[0] >= last
    AtomicCheckpointIO().save_checkpoint({"tensor": torch.zeros(1)}, path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_other_checkpoint_plugins_are_left_alone(model: ContinualPatchCore, make_data: Make, make_engine: Make) -> None:
    """A user's own way of saving is not replaced."""

    class Mine(AnomalibCheckpointIO):
        pass

    engine = make_engine(plugins=[Mine()])
    engine.fit(model, datamodule=make_data("checks"))
    assert type(engine.trainer.strategy.checkpoint_io) is Mine


# Bad input


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"layers": ["layer9"]}, r"Unknown layers \['layer9'\]"),
        ({"backbone": "resnet81"}, "Unknown backbone 'resnet81'"),
        ({"memory_size": 0}, "memory_size must be at least 1, got 0"),
        ({"memory_size": -5}, "memory_size must be at least 1, got -5"),
        ({"num_neighbors": 0}, "num_neighbors must be at least 1, got 0"),
        ({"precision": "int8"}, "precision must be 'float32' or 'float16', got 'int8'"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    """They are refused with a message that names them."""
    with pytest.raises(ValueError, match=message):
        ContinualPatchCore(**{"pre_trained": False, **kwargs})


def test_judging_before_learning(products: Path, make_model: Make, make_engine: Make, tmp_path: Path) -> None:
    """In whatever way it is tried."""
    model = make_model().eval()
    with pytest.raises(RuntimeError, match=r"memory bank is empty.* Learn normal images first"):
        model(tensors_of(products, "stripes")[:1])
    with pytest.raises(RuntimeError, match="memory bank is empty"):
        make_engine().predict(model, data_path=products / "stripes" / "test")
    with pytest.raises(RuntimeError, match="memory bank is empty"):
        make_engine().export(model, "onnx", export_root=tmp_path)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full((1, 3, 64, 64), torch.nan), "NaN or infinite"),
        (torch.full((1, 3, 64, 64), torch.inf), "NaN or infinite"),
        (torch.rand(1, 1, 64, 64), r"shape \(B, 3, H, W\), got torch.float32 of \(1, 1, 64, 64\)"),
        (torch.rand(3, 64, 64), r"got torch.float32 of \(3, 64, 64\)"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "got torch.uint8"),
        (torch.rand(1, 3, 64, 64) * 255, r"must lie in \[0, 1\], got .* to 25\d"),
        (torch.rand(1, 3, 64, 64) - 1, r"must lie in \[0, 1\], got -"),
        (torch.rand(1, 3, 1, 1), r"at least 16 pixels each way, got \(1, 1\)"),
        (torch.rand(1, 3, 64, 15), r"at least 16 pixels each way, got \(64, 15\)"),
        (torch.rand(0, 3, 64, 64), "no images to learn"),
        ([], "no images to learn"),
        ("absent.png", "absent.png cannot be read as an image: .*No such file"),
        ([torch.rand(3, 64, 64)], r"one tensor of shape \(B, 3, H, W\); got a list with Tensor in it"),
        (np.zeros((1, 3, 64, 64), np.float32), "got a list with ndarray in it"),
    ],
)
def test_bad_images(images: Any, message: str, model: ContinualPatchCore) -> None:  # noqa: ANN401
    """Nothing of them is learned."""
    before = state_of(model)
    with pytest.raises((ValueError, TypeError), match=message):
        model.partial_fit(images)
    assert state_of(model) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_floats(dtype: torch.dtype, model: ContinualPatchCore, products: Path) -> None:
    """Images of any float type are learned."""
    images = tensors_of(products, "checks")[:1].to(dtype)
    assert model.partial_fit(images, "checks").variants == {"checks": 1}


def write_bad_files(folder: Path) -> dict[str, str]:
    """Write images that cannot be learned; return the reason for each."""
    folder.mkdir(exist_ok=True)
    good = io.BytesIO()
    Image.new("RGB", (64, 64)).save(good, "png")
    (folder / "text.png").write_text("no image")
    (folder / "empty.png").touch()
    (folder / "cut.png").write_bytes(good.getvalue()[:-30])
    Image.new("RGB", (1, 1)).save(folder / "pixel.png")
    Image.fromarray(np.full((64, 64), 40_000, np.uint16)).save(folder / "deep.png")
    return {
        "text.png": "text.png cannot be read as an image: cannot identify",
        "empty.png": "empty.png cannot be read as an image: cannot identify",
        "cut.png": "cut.png cannot be read as an image",
        "pixel.png": "pixel.png has 1 x 1 pixels; at least 16",
        "deep.png": r"deep.png has pixels of mode 'I;16' \(more than 8 bits\)",
    }


def test_bad_files(model: ContinualPatchCore, products: Path, tmp_path: Path) -> None:
    """Each is named with what is wrong with it, and nothing of the call is learned."""
    before = state_of(model)
    for name, message in write_bad_files(tmp_path).items():
        with pytest.raises(ValueError, match=message):
            model.partial_fit([images_of(products, "checks")[0], tmp_path / name])
        assert state_of(model) == before


@pytest.mark.parametrize("name", ["pixel.png", "deep.png", "empty.png", "text.png", "cut.png"])
def test_bad_files_in_an_engine(
    name: str,
    model: ContinualPatchCore,
    make_engine: Make,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Training and prediction refuse them too; where the error itself does not name the file, the log does."""
    write_bad_files(tmp_path)
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / name).rename(folder / name)
    before = state_of(model)
    data = Folder("bad", "folder", tmp_path, test_split_mode="none", val_split_mode="none", num_workers=0)
    for run in (
        lambda: make_engine().fit(model, datamodule=data),
        lambda: make_engine().predict(model, data_path=folder / name),
    ):
        caplog.clear()
        with pytest.raises((ValueError, OSError)) as raised:
            run()
        assert name in f"{raised.value}{caplog.text}"
    assert state_of(model) == before


def test_an_empty_folder(model: ContinualPatchCore, make_engine: Make, tmp_path: Path) -> None:
    """Anomalib says that it holds no images."""
    (tmp_path / "normal").mkdir()
    before = state_of(model)
    with pytest.raises(RuntimeError, match=r"Found 0 DirType.NORMAL images in"):
        make_engine().fit(model, datamodule=Folder("none", "normal", tmp_path, num_workers=0))
    assert state_of(model) == before


def test_nan_is_not_judged(model: ContinualPatchCore, products: Path) -> None:
    """The image is named by its place in the batch."""
    images = tensors_of(products, "stripes")[:3].clone()
    images[1, 0, 5, 5] = torch.nan
    with pytest.raises(ValueError, match=r"Images \[1\] of the batch give scores that are not finite"):
        model(images)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_other_modes_are_read_as_rgb(mode: str, model: ContinualPatchCore, products: Path, tmp_path: Path) -> None:
    """Grey images, and those with a palette or transparency, are learned."""
    path = tmp_path / "image.png"
    Image.open(images_of(products, "checks")[0]).convert(mode).save(path)
    assert model.partial_fit(path, variant="other").variants == {"other": 1}
    assert model.partial_fit(Image_tensor(path), variant="other").known_images == 1


def Image_tensor(path: Path) -> torch.Tensor:  # noqa: N802
    """Return an image file as RGB, as a batch of one."""
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None] / 255


def test_prediction_of_files(model: ContinualPatchCore, products: Path, make_engine: Make) -> None:
    """``Engine.predict`` takes a folder, a file and a dataset."""
    folder = products / "dots" / "test" / "hole"
    for kwargs in (
        {"data_path": folder},
        {"data_path": folder / "000.png"},
        {"dataset": PredictDataset(folder)},
    ):
        for batch in make_engine().predict(model, **kwargs):
            assert batch.pred_label.all()


# Resources

MEMORY = """
import sys
from anomalib_ext.models import ContinualPatchCore
assert not {"faiss", "openvino"} & set(sys.modules)
import psutil
import torch
from anomalib.data import ImageBatch
from anomalib.engine import Engine
from lightning.pytorch import Callback
from torch.utils.data import DataLoader, Dataset

class Noise(Dataset):
    def __init__(self, count, seed):
        self.count, self.seed = count, seed

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(self.seed + index)
        return torch.rand(3, 64, 64, generator=generator)

class Peak(Callback):
    bytes = 0

    def on_train_batch_end(self, *args, **kwargs):
        self.bytes = max(self.bytes, psutil.Process().memory_info().rss)

def fit(count, seed):
    peak = Peak()
    pre_processor = ContinualPatchCore.configure_pre_processor((64, 64))
    model = ContinualPatchCore(
        "test_resnet", ["layer1"], pre_trained=False, memory_size=200, variant="noise", pre_processor=pre_processor
    )
    loader = DataLoader(Noise(count, seed), 8, collate_fn=lambda images: ImageBatch(image=torch.stack(images)))
    engine = Engine(default_root_dir=sys.argv[1], accelerator="cpu", enable_progress_bar=False, callbacks=[peak])
    engine.fit(model, loader)
    return peak.bytes

fit(80, 0)
print("RSS", fit(80, 10_000), fit(800, 20_000))
"""


def test_ten_times_the_images_take_no_more_memory(tmp_path: Path) -> None:
    """The pool is full with a tenth of them already. Nor does the class load faiss or openvino."""
    run = subprocess.run([sys.executable, "-c", MEMORY, tmp_path], capture_output=True, text=True, check=False)
    numbers = re.search(r"RSS (\d+) (\d+)", run.stdout)
    assert numbers, run.stderr
    few, many = map(int, numbers.groups())
    assert many < 1.05 * few


LAZY = """
import sys
import anomalib_ext, openvino_export, openvino_export.memory.memory_bank
loaded = {"torch", "anomalib", "faiss", "openvino", "lightning", "timm"} & set(sys.modules)
assert not loaded, loaded
"""


def test_imports_are_lazy() -> None:
    """The bank needs no torch."""
    run = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
