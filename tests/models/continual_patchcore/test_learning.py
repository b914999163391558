# SPDX-License-Identifier: Apache-2.0
"""Tests of learning one product after another, through Anomalib's engine."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import Folder, ImageBatch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, IterableDataset

from anomalib_ext.data import MultiCategory
from anomalib_ext.models import ContinualPatchCore
from openvino_export.memory.thresholds import thresholds

Make = Callable[..., Any]
Trained = tuple[ContinualPatchCore, Path]


def loader_of(images: Any, batch_size: int) -> DataLoader:  # noqa: ANN401  # images of a dataset or a list
    """Return a loader that knows nothing but images."""
    return DataLoader(images, batch_size, collate_fn=lambda batch: ImageBatch(image=torch.stack(batch)))


def test_a_further_fit_with_the_same_engine_adds(trained_default: Trained, f1_of: Make, state_of: Make) -> None:
    """It trains, keeps what is known, decides both products right, and writes a checkpoint of both."""
    model, path = trained_default
    assert {name: variant.images for name, variant in model.model.bank.variants.items()} == {"stripes": 20, "dots": 20}
    assert [f1_of(model, product) for product in ("stripes", "dots")] == [1, 1]
    loaded = ContinualPatchCore.load_from_checkpoint(path)
    assert list(loaded.model.bank.variants) == ["stripes", "dots"]
    assert state_of(loaded) == state_of(model)


def test_a_further_fit_with_a_new_engine_adds(
    model: ContinualPatchCore,
    f1_of: Make,
    make_data: Make,
    make_engine: Make,
) -> None:
    """So does a third product with another engine."""
    engine = make_engine()
    engine.fit(model, datamodule=make_data("checks"))
    assert list(model.model.bank.variants) == ["stripes", "dots", "checks"]
    assert [f1_of(model.eval(), product) for product in model.model.bank.variants] == [1, 1, 1]
    assert len(model.model.bank) <= 400
    state = torch.load(engine.best_model_path, weights_only=True)["state_dict"]
    assert len(state["model._extra_state"]["plain"]["variants"]) == 3


def test_training_from_a_checkpoint_adds_and_tests_the_new_state(
    trained: Trained,
    make_tiny: Make,
    make_data: Make,
    make_engine: Make,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """``Engine.train`` tests with the checkpoint that it started from, which knows nothing of the new product."""
    model, engine = make_tiny(), make_engine()
    with caplog.at_level(logging.WARNING):
        results = engine.train(model, datamodule=make_data("checks"), ckpt_path=trained[1])
    assert "Testing what was learned on top of" in caplog.text
    assert results[0]["image_AUROC"] == 1
    assert list(model.model.bank.variants) == ["stripes", "dots", "checks"]
    assert engine.best_model_path != str(trained[1])
    assert list(ContinualPatchCore.load_from_checkpoint(engine.best_model_path).model.bank.variants)[-1] == "checks"
    assert trained[1].is_file(), "the old checkpoint must remain"
    # Asked for by another engine, the old checkpoint is what is tested.
    make_engine().test(model, datamodule=make_data("stripes"), ckpt_path=trained[1])
    assert list(model.model.bank.variants) == ["stripes", "dots"]


def test_the_same_images_change_nothing(model: ContinualPatchCore, make_data: Make, make_engine: Make) -> None:
    """A repeated fit learns none of them again, and a checkpoint is written nevertheless."""
    before = model.model.bank.vectors()
    engine = make_engine()
    engine.fit(model, datamodule=make_data("stripes"))
    assert model.last_report.known_images == 20
    assert not model.last_report.variants
    assert np.array_equal(model.model.bank.vectors(), before)
    assert Path(engine.best_model_path).is_file()


def test_learns_from_plain_loaders(tensors: Make, f1_of: Make, make_tiny: Make, make_engine: Make) -> None:
    """Without a datamodule, labels and length, the variants are found from the images, each with thresholds."""

    class Endless(IterableDataset):
        def __iter__(self):  # noqa: ANN204
            for product in ("stripes", "dots"):
                yield from tensors(product)

    model, engine = make_tiny(), make_engine()
    engine.fit(model, train_dataloaders=loader_of(Endless(), 6))
    assert {name: variant.images for name, variant in model.model.bank.variants.items()} == {
        "variant_1": 20,
        "variant_2": 20,
    }
    model.eval()
    assert [f1_of(model, product) for product in ("stripes", "dots")] == [1, 1]
    assert Path(engine.best_model_path).is_file()


def test_mixed_categories_are_variants(
    products: Path,
    files: Make,
    make_tiny: Make,
    make_engine: Make,
    make_data: Make,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each category of a joint set is learned, validated and judged as a variant; of few images a warning tells."""
    for path in files("checks")[:3]:
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
    model = make_tiny()
    with caplog.at_level(logging.WARNING):
        make_engine().fit(model, datamodule=data)
    assert model.last_report.variants == {"stripes": 20, "dots": 20, "few": 3}
    calibrations = {name: variant.calibration for name, variant in model.model.bank.variants.items()}
    assert {name: one.labels.sum() for name, one in calibrations.items()} == {"stripes": 6, "dots": 6, "few": 6}
    assert {name: (one.origins >= 0).sum() for name, one in calibrations.items()} == {
        "stripes": 20,
        "dots": 20,
        "few": 3,
    }
    values = make_engine().test(model, datamodule=data, verbose=False)[0]
    assert values["mean/image_AUROC"] > 0.95


def test_reports_each_update(
    model: ContinualPatchCore,
    make_data: Make,
    make_engine: Make,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The numbers reach the trainer's metrics, a logger, the progress bar and the log."""
    shown: dict[str, Any] = {}

    class Bar(Callback):
        def on_train_end(self, trainer: Any, _: Any) -> None:  # noqa: ANN401, PLR6301
            shown.update(trainer.progress_bar_metrics)

    engine = make_engine(logger=CSVLogger(tmp_path, "csv"), callbacks=[Bar()])
    with caplog.at_level(logging.INFO, logger="anomalib_ext"):
        engine.fit(model, datamodule=make_data("checks"))
    report, bank = model.last_report, model.model.bank
    limits = thresholds(bank, "dots")
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
        "memory/share/dots": len(bank.variants["dots"].radii) / 400,
        "memory/image_threshold/dots": limits.image.value,
        "memory/pixel_threshold/dots": limits.pixel.value,
    }
    assert {"stripes", "dots"} == set(report.removed)
    for metrics in (engine.trainer.callback_metrics, engine.trainer.logged_metrics):
        assert {name: float(metrics[name]) for name in expected} == pytest.approx(expected)
    assert {"memory/vectors", "memory/radius_bound"} <= set(shown)
    table = next((tmp_path / "csv").rglob("metrics.csv")).read_text()
    assert set(expected) <= set(table.splitlines()[0].split(","))
    added = f"vectors added {report.added['checks']} of checks, removed"
    assert f"learned checks: 20 images (0 known already); {added}" in caplog.text
