# SPDX-License-Identifier: Apache-2.0
"""Tests of several categories as one data set: splits, metrics, bad input, and Anomalib's command line."""

import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib import LearningType
from anomalib.cli.cli import main
from anomalib.data import AnomalibDataModule, Folder, ImageBatch, MVTecAD
from anomalib.metrics import AUPR, AUROC, Evaluator
from anomalib.models import AnomalibModule
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn

from anomalib_ext.data import MultiCategory

LOGGED = ("my_AUROC", "image_AUPR", "pixel_AUROC")


class Darkness(AnomalibModule):
    """Finds dark pixels and uneven images anomalous and learns nothing; with an evaluator of its user's."""

    def __init__(self) -> None:
        fields = ["pred_score", "gt_label"]
        metrics = [
            AUROC(fields, prefix="my_"),
            AUPR(fields, prefix="image_"),
            AUROC(["anomaly_map", "gt_mask"], prefix="pixel_", strict=False),
        ]
        evaluator = Evaluator(val_metrics=AUROC(fields, prefix="val_"), test_metrics=metrics)
        super().__init__(pre_processor=False, post_processor=False, evaluator=evaluator, visualizer=False)
        self.model = nn.Linear(1, 1)
        self.weights = -torch.tensor([0.2, 0.3, 0.5])

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        """Return a loss that leads nowhere."""
        del args, kwargs
        return 0 * self.model.weight.sum()

    def validation_step(self, batch: ImageBatch, *args, **kwargs) -> ImageBatch:
        """Judge a batch."""
        del args, kwargs
        assert batch.image is not None
        anomaly_map = self.weights @ batch.image.flatten(2)
        anomaly_map = anomaly_map.reshape(-1, *batch.image.shape[-2:])
        return batch.update(anomaly_map=anomaly_map, pred_score=anomaly_map.std(dim=(1, 2)))

    def test_step(self, batch: ImageBatch, *args, **kwargs) -> ImageBatch:
        """Judge a batch."""
        return self.validation_step(batch, *args, **kwargs)

    def configure_optimizers(self) -> None:
        """Nothing is optimised."""

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """As they are."""
        return {}

    @property
    def learning_type(self) -> LearningType:
        """Learns nothing."""
        return LearningType.ONE_CLASS


def multi(root: Path, **kwargs: Any) -> MultiCategory:  # noqa: ANN401
    """Return data whose batches mix categories, for 12 test images each are no multiple of 5."""
    return MultiCategory(root=root, **{"eval_batch_size": 5, "num_workers": 0, **kwargs})


def copied(products: Path, target: Path, *names: str) -> Path:
    """Copy products, for a test that changes them."""
    for name in names:
        shutil.copytree(products / name, target / name)
    return target


def test_categories_are_joined_and_split_each_by_itself(products: Path) -> None:
    """All images are there with their category's name, and every category has its part of the validation set."""
    data = multi(products, train_batch_size=60, val_split_mode="from_test", val_split_ratio=0.5, seed=1)
    assert list(data.datamodules) == ["checks", "dots", "stripes"]  # whatever is found
    data.setup()
    assert [len(subset) for subset in (data.train_data, data.val_data, data.test_data)] == [60, 18, 18]
    for subset in (data.val_data, data.test_data):
        assert set(subset.samples.groupby(["category", "label_index"]).size()) == {3}
    assert not set(data.val_data.samples.image_path) & set(data.test_data.samples.image_path)
    (batch,) = data.train_dataloader()
    categories = data.categories_of(batch.image_path)
    assert [Path(path).relative_to(products).parts[0] for path in batch.image_path] == categories
    assert categories != sorted(categories)  # shuffled
    assert data.task == "segmentation"
    for sample in data.test_data:
        assert bool(sample.gt_label) == bool(sample.gt_mask.any())


def test_metrics_of_each_category_are_those_of_it_alone(products: Path, make_engine: Callable[..., Any]) -> None:
    """The user's own metrics, of each category, their mean, and of all images as Anomalib has them."""
    model = Darkness()
    data = multi(products, categories=["stripes", "checks"])
    (values,) = make_engine().test(model, datamodule=data)
    assert len(values) == len(LOGGED) * 4
    expected = {
        name: make_engine().test(model, datamodule=MVTecAD(products, name, num_workers=0))[0]
        for name in ("stripes", "checks")
    }
    for metric in LOGGED:
        alone = [expected[name][metric] for name in ("stripes", "checks")]
        assert [values[f"stripes/{metric}"], values[f"checks/{metric}"]] == pytest.approx(alone, abs=1e-6)
        assert values[f"mean/{metric}"] == pytest.approx(sum(alone) / 2, abs=1e-6)
    # Images of different products are compared there.
    assert values["my_AUROC"] != pytest.approx(values["mean/my_AUROC"], abs=1e-2)


def test_validation_metrics_can_be_monitored(products: Path, make_engine: Callable[..., Any]) -> None:
    """A mean that does not rise stops the training, and a trainer that goes on with other data is left alone."""
    stop = EarlyStopping("mean/val_AUROC", mode="max", patience=1)
    engine = make_engine(callbacks=[stop], max_epochs=10)
    model = Darkness()
    data = multi(products, categories=["stripes", "checks"])
    engine.fit(model, datamodule=data)
    assert engine.trainer.current_epoch == 2
    logged = set(engine.trainer.callback_metrics)
    assert {"val_AUROC", "stripes/val_AUROC", "checks/val_AUROC", "mean/val_AUROC"} <= logged
    assert len(engine.test(model, datamodule=data)[0]) == len(LOGGED) * 4
    assert set(engine.test(model, datamodule=MVTecAD(products, "dots", num_workers=0))[0]) == set(LOGGED)


def test_category_without_defects_is_left_out_of_the_mean(
    products: Path,
    tmp_path: Path,
    make_engine: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its metrics are NaN, a warning says so, and the table shows them."""
    root = copied(products, tmp_path / "data", "stripes", "checks", "dots")
    shutil.rmtree(root / "dots/test/hole")
    shutil.rmtree(root / "dots/ground_truth")
    with caplog.at_level(logging.WARNING):
        (values,) = make_engine().test(Darkness(), datamodule=multi(root))
    assert "dots has 6 normal and 0 anomalous images to evaluate" in caplog.text
    for metric in LOGGED:
        assert torch.tensor(values[f"dots/{metric}"]).isnan()
        expected = (values[f"stripes/{metric}"] + values[f"checks/{metric}"]) / 2
        assert values[f"mean/{metric}"] == pytest.approx(expected, abs=1e-6)
    rows = {line.split("│")[1].strip(): line for line in capsys.readouterr().out.splitlines() if line.startswith("│")}
    assert rows["dots"].count("nan") == len(LOGGED)
    assert f"{values['mean/my_AUROC']:.3f}" in rows["mean"]
    assert f"{values['my_AUROC']:.3f}" in rows["all images"]


def test_any_datamodules_can_be_joined(
    products: Path,
    make_engine: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where one has no masks, no pixels are evaluated; the name is that of the folder above all."""
    folder = {"root": products / "dots", "normal_dir": "train/good", "abnormal_dir": "test/hole", "num_workers": 0}
    stripes = MVTecAD(products, "stripes", num_workers=0)
    masked = Folder("dots", **folder, mask_dir="ground_truth/hole", seed=0)  # type: ignore[arg-type]
    data = MultiCategory([stripes, masked], eval_batch_size=5, num_workers=0)
    assert (data.name, list(data.datamodules)) == (products.name, ["stripes", "dots"])
    (values,) = make_engine().test(Darkness(), datamodule=data)
    assert values["dots/pixel_AUROC"] > 0.5
    unmasked = Folder("dots", **folder, seed=0)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        (values,) = make_engine().test(Darkness(), datamodule=MultiCategory([unmasked, stripes], num_workers=0))
    assert "these categories have no masks: dots" in caplog.text
    assert set(values) == {
        f"{category}{metric}" for metric in LOGGED[:2] for category in ("", "dots/", "stripes/", "mean/")
    }


def test_synthetic_validation_sets(products: Path, make_engine: Callable[..., Any]) -> None:
    """Their images lie elsewhere, and still have their category."""
    engine = make_engine(max_epochs=1)
    engine.fit(Darkness(), datamodule=multi(products, val_split_mode="synthetic"))
    logged = engine.trainer.callback_metrics
    assert not any(torch.isnan(logged[f"{name}/val_AUROC"]) for name in ("checks", "dots", "stripes", "mean"))


def test_a_category_without_images_is_named(products: Path, tmp_path: Path) -> None:
    """Whether a folder is empty altogether or in one subset."""
    root = copied(products, tmp_path / "data", "stripes", "checks")
    without = MVTecAD(root, "stripes", val_split_mode="none")
    with pytest.raises(ValueError, match="no images for val_data: stripes"):
        MultiCategory([without, MVTecAD(root, "checks")]).setup()
    for path in (root / "checks").rglob("*.png"):
        path.unlink()
    with pytest.raises(ValueError, match="The category 'checks' cannot be read: Found 0 images"):
        multi(root, categories=["stripes", "checks"]).setup()
    for path in (root / "stripes/train/good").glob("*.png"):
        path.unlink()
    with pytest.raises(ValueError, match="no images for train_data: stripes"):
        multi(root, categories=["stripes"]).setup()


def test_categories_that_do_not_fit_are_refused(products: Path, tmp_path: Path) -> None:
    """Unknown, repeated or no names, and data given twice or not at all."""
    stripes = MVTecAD(products, "stripes")
    with pytest.raises(ValueError, match=r"Unknown categories bottle, pill. Those in .* are checks, dots, stripes."):
        multi(products, categories=["bottle", "dots", "pill"])
    with pytest.raises(ValueError, match=r"different names.*got \['dots', 'dots'\]"):
        multi(products, categories=["dots", "dots"])
    with pytest.raises(ValueError, match=r"different names.*got \['stripes', 'stripes'\]"):
        MultiCategory([stripes, Folder("stripes", "train/good", products / "stripes")])
    with pytest.raises(ValueError, match="none of them 'mean'"):
        MultiCategory([Folder("mean", "train/good", products / "stripes")])
    for nothing in ({"datamodules": []}, {"root": products, "categories": []}):
        with pytest.raises(ValueError, match=r"got \[\]"):
            MultiCategory(**nothing)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no category in .*: no folder with train/good"):
        multi(tmp_path)
    for arguments in (
        {},
        {"datamodules": [stripes], "root": products},
        {"datamodules": [stripes], "categories": ["a"]},
    ):
        with pytest.raises(ValueError, match="either datamodules, or root"):
            MultiCategory(**arguments)  # type: ignore[arg-type]
    twice = Folder("again", "train/good", products / "stripes", "test/hole", seed=0)
    with pytest.raises(ValueError, match="is in several categories: stripes, again"):
        MultiCategory([stripes, twice]).setup()


def test_configuration(products: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The shipped file is read, with the folders that it names."""
    root = tmp_path / "datasets/MVTecAD"
    for product, name in (("stripes", "bottle"), ("dots", "pill")):
        shutil.copytree(products / product, root / name)
    config = tmp_path / "data.yaml"
    shipped = Path(__file__).parents[2] / "configs/data/multi_category.yaml"
    config.write_text(shipped.read_text().partition("data:\n")[2].replace("\n  ", "\n")[2:])
    monkeypatch.chdir(tmp_path)
    data = AnomalibDataModule.from_config(config)
    assert isinstance(data, MultiCategory)
    assert (data.name, list(data.datamodules)) == ("MVTecAD", ["bottle", "pill"])


@pytest.mark.slow
def test_command_line_of_anomalib(
    products: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A stock model, with a table, and a picture of each image of each category."""
    arguments = ["train", "--model", "Padim", "--model.backbone", "resnet18", "--model.pre_trained", "false"]
    arguments += ["--model.layers", "[layer3]", "--model.n_features", "10"]  # quick
    arguments += ["--data", "anomalib_ext.data.MultiCategory", "--data.root", str(products), "--data.num_workers", "0"]
    arguments += ["--data.categories", "[stripes, dots]", "--trainer.accelerator", "cpu"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["anomalib", *arguments])
    main()
    printed = capsys.readouterr().out
    for row in ("stripes", "dots", "mean", "all images"):
        assert f"│ {row} " in printed
    assert "mean/image_AUROC" in printed
    images = tmp_path / "results/Padim" / products.name / "latest/images"
    for product in ("stripes", "dots"):
        assert len(list((images / product).rglob("*.png"))) == 12
