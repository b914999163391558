# SPDX-License-Identifier: Apache-2.0
"""Tests of learning without a trainer."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from anomalib_ext.data import PhotoVariants
from anomalib_ext.models import ContinualPatchCore
from anomalib_ext.models.continual_patchcore.metrics import memory_metrics
from openvino_export.memory.guard import SUSPICION

Make = Callable[..., Any]


def read(path: Path) -> torch.Tensor:
    """Return an image file as RGB in [0, 1], as a batch of one."""
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None] / 255


def test_partial_fit_without_a_trainer(make_tiny: Make, files: Make, tensors: Make, f1_of: Make) -> None:
    """It learns paths and tensors, names variants itself, and reports."""
    model = make_tiny()
    report = model.partial_fit(files("stripes"))
    assert report.variants == {"variant_1": 20}
    assert report.num_vectors == sum(report.added.values()) == 400
    assert model.last_report is report
    report = model.partial_fit(tensors("dots"))
    assert report.variants == {"variant_2": 20}
    assert report.removed["variant_1"] > 0
    report = model.partial_fit(str(files("checks")[0]), variant="mine")
    assert report.variants == {"mine": 1}
    assert [f1_of(model, product) for product in ("stripes", "dots")] == [1, 1]


def test_partial_fit_of_two_products_at_once(make_tiny: Make, tensors: Make) -> None:
    """Each image calibrates its own variant only."""
    together, apart = make_tiny(memory_size=5000), make_tiny(memory_size=5000)
    together.partial_fit(torch.cat([tensors(product) for product in ("stripes", "dots")]))
    for product in ("stripes", "dots"):
        apart.partial_fit(tensors(product))
    metrics = memory_metrics(together.last_report, together.model.bank)
    shares = [value for name, value in metrics.items() if name.startswith("memory/share/")]
    assert len(together.model.bank) < 5000
    assert sum(shares) == pytest.approx(1)
    together_values, apart_values = together.post_processor.image_values, apart.post_processor.image_values
    assert together_values.shape == (2, 2)
    assert torch.allclose(together_values, apart_values, rtol=0.02)


def test_the_variant_of_the_model_is_the_default(make_tiny: Make, tensors: Make) -> None:
    """A name that is given with the images goes before it."""
    model = make_tiny(variant="lid")
    model.partial_fit(tensors("stripes")[:2])
    model.partial_fit(tensors("dots")[:2], variant="cup")
    assert {name: variant.images for name, variant in model.model.bank.variants.items()} == {"lid": 2, "cup": 2}


def test_known_images_change_nothing(model: ContinualPatchCore, files: Make, tensors: Make, state_of: Make) -> None:
    """Neither from a file, nor as a tensor, nor after ``Engine.fit``, of which these are the images."""
    before = state_of(model)
    for images in (files("stripes"), tensors("dots"), files("dots")[0]):
        report = model.partial_fit(images)
        assert not report.variants
        assert report.known_images == (1 if isinstance(images, Path) else 20)
        assert state_of(model) == before


def test_known_images_change_nothing_when_resized(make_data: Make, make_engine: Make, files: Make) -> None:
    """Images that the trainer resized are recognised as well."""
    model = ContinualPatchCore(pre_processor=ContinualPatchCore.configure_pre_processor((48, 48)), visualizer=False)
    make_engine().fit(model, datamodule=make_data("stripes"))
    assert model.partial_fit(files("stripes")).known_images == 20


def test_a_slightly_changed_image_is_new(make_tiny: Make, tensors: Make) -> None:
    """One step of 8 bits in 5 x 5 pixels makes another image."""
    model = make_tiny()
    images = tensors("stripes")[:1].clone()
    model.partial_fit(images)
    images[..., 20:25, 20:25] = (images[..., 20:25, 20:25] - 1 / 255).abs()
    assert model.partial_fit(images).known_images == 0


def test_partial_fit_and_fit_mix(model: ContinualPatchCore, make_data: Make, make_engine: Make, files: Make) -> None:
    """A product can be learned partly by the one, partly by the other."""
    model.partial_fit(files("checks")[:3], variant="checks")
    make_engine().fit(model, datamodule=make_data("checks"))
    assert model.last_report.known_images == 3
    assert model.model.bank.variants["checks"].images == 20


def test_one_image_at_a_time(make_tiny: Make, files: Make, f1_of: Make) -> None:
    """Thresholds rest on all of them, not on the last one only."""
    model = make_tiny(memory_size=5000)
    for path in files("stripes")[:6]:
        model.partial_fit(path)
    assert list(model.model.bank.variants) == ["variant_1"]
    assert model.model.bank.variants["variant_1"].calibration.origins.tolist() == [0, 1, 2, 3, 4, 5]
    assert f1_of(model, "stripes") >= 0.8


@pytest.mark.slow
def test_thresholds_of_a_single_image(tmp_path: Path) -> None:
    """Good images are called good, defects score higher, and it is said that the threshold is a guess."""
    data = PhotoVariants(tmp_path, "brick")
    data.prepare_data()
    model = ContinualPatchCore().eval()
    report = model.partial_fit(sorted((tmp_path / "brick" / "train" / "good").iterdir())[0])
    assert "rests on 1 good images and is a guess; 7 more make it sure" in report.advice[0]
    good, bad = (
        [model(read(path)) for path in sorted((tmp_path / "brick" / "test" / kind).iterdir())]
        for kind in ("good", "crack")
    )
    assert (len(good), len(bad)) == (8, 4)
    assert not any(one.pred_label for one in good)
    scores = [np.median([float(one.pred_score) for one in each]) for each in (good, bad)]
    assert 0 < scores[0] < scores[1] < 1


def test_partial_fit_keeps_the_mode(model: ContinualPatchCore, files: Make) -> None:
    """A model that is trained goes on to be trained."""
    model.train().partial_fit(files("checks")[:1])
    assert model.training
    model.eval().partial_fit(files("checks")[1:2])
    assert not model.training


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_floats(dtype: torch.dtype, model: ContinualPatchCore, tensors: Make) -> None:
    """Images of any float type are learned."""
    images = tensors("checks")[:1].to(dtype)
    assert model.partial_fit(images, "checks").variants == {"checks": 1}


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_other_modes_are_read_as_rgb(mode: str, model: ContinualPatchCore, files: Make, tmp_path: Path) -> None:
    """Grey images, and those with a palette or transparency, are learned."""
    path = tmp_path / "image.png"
    Image.open(files("checks")[0]).convert(mode).save(path)
    assert model.partial_fit(path, variant="other").variants == {"other": 1}
    assert model.partial_fit(read(path), variant="other").known_images == 1


# Suspicious images


@pytest.mark.parametrize("as_files", [True, False])
@pytest.mark.parametrize("variant", ["dots", None])
def test_suspicious_images_are_held_back(
    variant: str | None,
    as_files: bool,
    model: ContinualPatchCore,
    files: Make,
    state_of: Make,
    tmp_path: Path,
) -> None:
    """They are named, and leave no trace; the rest is learned as ever."""
    expected = copy.deepcopy(model)
    good, bad = files("dots", "test/good"), [tmp_path / f"{number}.png" for number in range(3)]
    for source, path in zip(good[:3], bad, strict=True):
        image = Image.open(source)
        image.paste((0, 0, 0), (24, 20, 36, 32))  # small enough for the image to be found to be of dots
        image.save(path)
    images, names = [*bad, *good], [str(path) for path in bad]
    if not as_files:
        images, names = torch.cat([read(path) for path in images]), ["image 1", "image 2", "image 3"]
    expected.partial_fit(images[3:], variant)
    report = model.partial_fit(images, variant, hold_back=True)
    assert list(report.held_back) == names
    assert min(report.held_back.values()) > SUSPICION
    assert report.variants == {"dots": 6}
    assert state_of(model) == state_of(expected)


def test_the_limit_is_the_threshold_that_is_judged_by(model: ContinualPatchCore, files: Make, tensors: Make) -> None:
    """The factor is that of the raw score; with thresholds that are far higher, nothing is held back."""
    image = tensors("dots", "test/hole")[:1]
    score = float(model.model(model.pre_processor(image)).pred_score)
    threshold = float(model.post_processor.image_values[1, 0])
    other = copy.deepcopy(model)
    assert model.partial_fit(image, "dots", hold_back=True).held_back == {
        "image 1": pytest.approx(score / threshold, rel=1e-4)
    }
    other.set_decision("dots", threshold=100 * threshold)
    report = other.partial_fit(files("dots", "test/hole"), "dots", hold_back=True)
    assert (report.held_back, report.variants) == ({}, {"dots": 6})


def test_without_thresholds_by_variant_the_bank_knows_them(make_tiny: Make, files: Make, tensors: Make) -> None:
    """So a model without a post-processor holds back too."""
    model = make_tiny(post_processor=False, evaluator=False)
    model.partial_fit(tensors("stripes"), "stripes", hold_back=True)
    report = model.partial_fit([*files("stripes", "test/hole")], "stripes", hold_back=True)
    assert list(report.held_back) == [str(path) for path in files("stripes", "test/hole")]


def test_nothing_is_suspicious_unless_asked_or_known(model: ContinualPatchCore, tensors: Make, make_tiny: Make) -> None:
    """A new product, an empty memory and a call without the argument learn everything."""
    holes = tensors("checks", "test/hole")
    assert model.partial_fit(holes, "checks", hold_back=True).variants == {"checks": 6}
    assert make_tiny().partial_fit(holes, hold_back=True).variants == {"variant_1": 6}
    assert model.partial_fit(tensors("stripes", "test/hole"), "stripes").variants == {"stripes": 6}


def test_a_mistyped_name(
    model: ContinualPatchCore, tensors: Make, files: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """Images known under another name are said to be; the variant can be renamed, and merged with what is right."""
    model.partial_fit(tensors("checks")[:5], "chex")
    with caplog.at_level(logging.WARNING):
        report = model.partial_fit(tensors("checks"), " checks ")
    assert report.variants == {"checks": 15}
    assert "5 images are known as 'chex', so they were not learned as 'checks'" in caplog.text
    model.merge_variants("chex", "checks")
    assert model.model.bank.variants["checks"].images == 20
    assert model(tensors("checks", "test/good")).pred_label.sum() <= 1
    with pytest.raises(ValueError, match="'Checks' differs from the variant 'checks'"):
        model.partial_fit(files("checks"), "Checks")
    model.delete_variant("checks")
    assert list(model.model.bank.variants) == ["stripes", "dots"]
    assert len(model.post_processor.image_values) == 2


@pytest.mark.parametrize(("name", "message"), [("Stripes", "by case or blanks alone"), (" ", "must not be blank")])
def test_a_fit_under_a_mistyped_name(
    name: str, message: str, model: ContinualPatchCore, make_data: Make, make_engine: Make, state_of: Make
) -> None:
    """It ends before anything was learned."""
    model.variant, before = name, state_of(model)
    with pytest.raises(ValueError, match=message):
        make_engine().fit(model, datamodule=make_data("stripes"))
    assert state_of(model) == before
