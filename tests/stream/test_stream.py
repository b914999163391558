# SPDX-License-Identifier: Apache-2.0
"""The command ``anomalib-ext stream``, and what a stream writes."""

import csv
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from anomalib.data import Folder, ImageBatch
from anomalib.metrics import AUROC, Evaluator, F1Score
from anomalib.models import ContinualPatchCore, SaCfaPatchCore
from PIL import Image

from anomalib_ext import stream
from anomalib_ext.data import MultiCategory
from anomalib_ext.files import safe_name
from anomalib_ext.report import report
from anomalib_ext.stream import WORST, JudgedImages, learn_stream
from openvino_export.memory.thresholds import thresholds

Make = Callable[..., Any]


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def last_model(finished: Any) -> ContinualPatchCore:  # noqa: ANN401
    """Return the model after the last step."""
    checkpoints = [path for path in finished.folder.rglob("model.ckpt") if finished.names[-1] in path.parts]
    (path,) = [path for path in checkpoints if "latest" not in path.parts]
    return ContinualPatchCore.load_from_checkpoint(path)


def test_stream_learns_evaluates_and_draws(finished: Any) -> None:  # noqa: ANN401
    """Every known variant is tested after each step, and the last step leaves pictures and a checkpoint."""
    first, second = finished.names
    assert "image_AUROC of each variant after each step" in finished.printed
    rows = read(finished.folder / "results.csv")
    assert [(row["step"], row["variant"]) for row in rows] == [("1", first), ("2", first), ("2", second)]
    assert all(float(row["image_AUROC"]) > 0.6 for row in rows)
    for variant in finished.names:
        assert len(list((finished.folder / "images" / safe_name(variant)).rglob("*.png"))) == 12
    assert list(last_model(finished).model.bank.variants) == [first, second]


def test_tables_agree_with_the_model_and_with_each_other(finished: Any) -> None:  # noqa: ANN401
    """Scores give the metrics, decisions follow from scores, and the memory's state is that of the bank."""
    results, scores, metrics = (read(finished.folder / f"{name}.csv") for name in ("results", "scores", "metrics"))

    for result in results:
        images = [row for row in scores if (row["step"], row["variant"]) == (result["step"], result["variant"])]
        assert len(images) == 12
        normal, anomalous = (
            np.array([float(row["pred_score"]) for row in images if row["gt_label"] == label]) for label in "01"
        )
        pairs = np.sign(anomalous[:, None] - normal) / 2 + 0.5
        assert pairs.mean() == pytest.approx(float(result["image_AUROC"]), abs=1e-5)
        for row in images:
            assert (float(row["pred_score"]) > float(row["threshold"])) == (row["pred_label"] == "1")
            assert Path(row["image_path"]).is_file()
            assert ("/good/" in row["image_path"]) == (row["gt_label"] == "0")

    assert len({(row["step"], row["name"]) for row in metrics}) == len(metrics)  # each is there once
    last = {row["name"]: float(row["value"]) for row in metrics if row["step"] == "2"}
    bank = last_model(finished).model.bank
    assert last["memory/vectors"] == len(bank) == 400
    assert last["memory/radius_bound"] == pytest.approx(bank.radius_bound())
    for name, variant in bank.variants.items():
        assert last[f"memory/share/{safe_name(name)}"] == pytest.approx(len(variant.radii) / 400)
        assert last[f"memory/image_threshold/{safe_name(name)}"] == pytest.approx(thresholds(bank, name).image.value)
        assert last[f"memory/pixel_threshold/{safe_name(name)}"] == pytest.approx(thresholds(bank, name).pixel.value)
        assert last[f"{safe_name(name)}/image_AUROC"] == next(
            float(row["image_AUROC"]) for row in results if (row["step"], row["variant"]) == ("2", name)
        )
    first, second = map(safe_name, finished.names)
    assert last["mean/image_AUROC"] == pytest.approx((last[f"{first}/image_AUROC"] + last[f"{second}/image_AUROC"]) / 2)
    assert last["update_seconds"] > last["memory/seconds"] > 0


def test_a_model_without_a_bank_of_variants(make_data: Make, tmp_path: Path) -> None:
    """It gives what there is; what was measured on the validation set is no result of the stream."""
    fields = ("pred_score", "gt_label")
    auroc, f1 = AUROC(fields, prefix="image_"), F1Score(("pred_label", "gt_label"), prefix="image_")
    model = SaCfaPatchCore(
        evaluator=Evaluator(val_metrics=[auroc], test_metrics=[auroc.clone(), f1]),
        backbone="tf_efficientnet_lite0",
        layers=["blocks.1", "blocks.2"],
        coreset_sampling_ratio=0.02,
        pre_processor=SaCfaPatchCore.configure_pre_processor((64, 64), "tf_efficientnet_lite0"),
    )
    learn_stream(model, MultiCategory([make_data("stripes")]), tmp_path)
    names = {row["name"] for row in read(tmp_path / "metrics.csv")}
    metrics = ("image_AUROC", "image_F1Score")
    assert names == {"update_seconds", *(f"{name}/{metric}" for name in ("stripes", "mean") for metric in metrics)}
    assert len(read(tmp_path / "scores.csv")) == 12


def test_a_run_that_finishes_no_step_leaves_the_one_before(
    make_data: Make, make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing in its folder is of another run than the rest."""
    (tmp_path / "hparams.json").write_text("before")

    monkeypatch.setattr(stream.Engine, "fit", Mock(side_effect=RuntimeError("as asked")))
    with pytest.raises(RuntimeError, match="as asked"):
        learn_stream(make_model(), MultiCategory([make_data("stripes")]), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["hparams.json"]
    assert (tmp_path / "hparams.json").read_text() == "before"


def test_a_variant_without_masks(products: Path, make_data: Make, make_model: Make, tmp_path: Path) -> None:
    """It has no metrics of pixels, and the mean is that of the others."""
    folders = {"normal_dir": "train/good", "abnormal_dir": "test/hole", "normal_test_dir": "test/good"}
    plain = Folder("plain", root=products / "dots", num_workers=0, **folders)
    results = learn_stream(make_model(), MultiCategory([make_data("stripes"), plain]), tmp_path)
    values = {row["name"]: float(row["value"]) for row in read(tmp_path / "metrics.csv") if row["step"] == "2"}
    assert "plain/image_AUROC" in values
    assert "plain/pixel_AUROC" not in values
    assert values["mean/pixel_AUROC"] == values["stripes/pixel_AUROC"]
    assert [np.isnan(row["pixel_AUROC"]) for row in results] == [False, False, True]
    cells = [list(column.cells) for column in stream._table(results, ["stripes", "plain"], "pixel_AUROC").columns]
    assert (cells[2], cells[3]) == (["", ""], cells[1])  # of the other variant, and the mean
    np.testing.assert_array_equal(
        np.isnan(stream._matrix(results, ["stripes", "plain"], "pixel_AUROC")), [[False, True], [False, True]]
    )
    report(tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"\bnan\b", re.sub(r'src="[^"]*"', "", page))


@pytest.fixture
def judged_batch(tmp_path: Path) -> ImageBatch:
    """Return six good images and six anomalous ones, of which the model takes half for the other."""
    paths = [str(tmp_path / f"{index}.png") for index in range(12)]
    for path in paths:
        Image.new("RGB", (32, 32), "gray").save(path)
    good = [0.1, 0.51, 0.9, 0.2, 0.7, 0.8]  # mistakes are 1, 2, 4, 5
    anomalous = [0.9, 0.4, 0.05, 0.8, 0.3, 0.5]  # mistakes are 7, 8, 10, 11
    scores = torch.tensor(good + anomalous)
    return ImageBatch(
        image=torch.zeros(12, 3, 32, 32),
        gt_label=torch.arange(12) >= 6,
        gt_mask=torch.zeros(12, 32, 32, dtype=torch.bool),
        pred_score=scores,
        pred_label=scores > 0.5,
        anomaly_map=scores[:, None, None].expand(12, 32, 32),
        image_path=paths,
    )


@pytest.mark.parametrize("size", [1, 5, 12])
def test_the_worst_mistakes_are_kept(judged_batch: ImageBatch, size: int, tmp_path: Path) -> None:
    """Worst first, whichever batches they come in; right decisions never."""
    judged = JudgedImages()
    fields = ("image", "gt_label", "gt_mask", "pred_score", "pred_label", "anomaly_map", "image_path")
    for start in range(0, 12, size):
        part = ImageBatch(**{name: getattr(judged_batch, name)[start : start + size] for name in fields})
        judged.on_test_batch_end(None, SimpleNamespace(post_processor=None), part, part, 0)
    judged.save_worst(tmp_path, "worst/1/cell")
    pictures = {row["picture"]: int(Path(row["image_path"]).stem) for row in judged.rows if row["picture"]}
    folder = "worst/1/cell"
    assert pictures == {
        **{f"{folder}/false_positives_{rank}.png": image for rank, image in enumerate((2, 5, 4), start=1)},
        **{f"{folder}/false_negatives_{rank}.png": image for rank, image in enumerate((8, 10, 7), start=1)},
    }
    assert len(judged.rows) == 12
    with Image.open(tmp_path / folder / "false_positives_1.png") as image:
        assert image.size == (512, 256)
    sheets = judged.sheets()
    assert {kind: sheet.shape for kind, sheet in sheets.items()} == dict.fromkeys(
        ("false_positives", "false_negatives"), (WORST * 256, 512, 3)
    )


def test_without_anomalib_the_error_names_the_extra() -> None:
    """On an edge PC the command says what it needs."""
    code = "import sys; sys.modules['anomalib'] = None; from anomalib_ext.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "stream"], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "anomalib-ext[train]" in done.stderr
