# SPDX-License-Identifier: Apache-2.0
"""Tests of the guard: what looks anomalous is held back on both sides alike, where it is asked for."""

import copy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalib_ext.models import ContinualPatchCore
from openvino_export import EdgeDetector
from openvino_export.memory.guard import SUSPICION, excess, hold_back
from openvino_export.memory.memory_bank import MemoryBank
from openvino_export.memory.report import Report
from openvino_export.memory.thresholds import image_thresholds, thresholds
from openvino_export.memory.update import Update

from .banks import distances_between, draw, filled


@pytest.mark.parametrize("variant", ["a", None])
def test_excess_is_the_score_in_thresholds(variant: str | None) -> None:
    """Of the variant that an image is said to be of, or is found to be of."""
    bank = filled()
    image = draw("lobes", "a", 9, 40)
    limits = {"a": 0.5, "b": 8.0}
    score = distances_between(image, bank.vectors()).max()
    assert excess(image, variant, bank, limits) == pytest.approx((score / 0.5, score / 0.5), rel=1e-4)
    assert excess(image, "b", bank, limits) == pytest.approx((score / 8, score / 8), rel=1e-4)


def test_nothing_exceeds_what_is_unknown() -> None:
    """A variant that was never learned or found, or without a threshold."""
    bank, image = filled(), draw("lobes", "a", 9, 40)
    stranger = 1000 + image
    limits = {"a": 0.5, "b": np.nan}
    assert excess(image, "c", bank, limits) == (0, 0)
    assert excess(stranger, None, bank, limits) == (0, 0)
    assert excess(stranger, "b", bank, limits) == (0, 0)
    assert excess(stranger, "a", bank, {"a": 0.0}) == (0, 0)
    assert excess(image, None, MemoryBank(9), {}) == (0, 0)


def test_what_looks_like_a_shown_defect_is_held_back() -> None:
    """Though it is below the threshold by itself; else it would take back unseen what was shown."""
    image = draw("lobes", "a", 9, 40)
    update = Update(filled())
    update.show_defect(image.reshape(5, 8, 4), "a")
    plain, like_defects = excess(image, "a", update.bank, {"a": 1.0})
    assert like_defects > 1.5 * plain
    for threshold, expected in ((1.2 * plain, True), (0.9 * plain, False), (1.1 * like_defects, False)):
        report = Report()
        assert hold_back(report, "part", image, "a", update.bank, {"a": threshold}) == expected
        assert list(report.held_back) == (["part"] if expected else [])


@pytest.mark.parametrize("variant", ["stripes", None])
def test_both_sides_hold_back_the_same(
    variant: str | None,
    bundle: Path,
    trained: ContinualPatchCore,
    good: dict[str, list[Path]],
    products: Path,
    tmp_path: Path,
) -> None:
    """By the same factors; without the guard, as by default on a training PC, all are learned."""
    normal = sorted((products / "stripes" / "test" / "good").iterdir())[:3]
    bad = sorted((products / "stripes" / "test" / "hole").iterdir())[:2]
    scratched = tmp_path / "scratched.png"
    pixels = np.array(Image.open(normal[0]))
    pixels[20:26, 30:36] = [255, 0, 255]  # so little that the image still is found to be of its variant
    Image.fromarray(pixels).save(scratched)
    images = [*normal, scratched, *bad, good["dots"][0]]
    # What is not found to be of a variant has nothing that it could be compared with.
    suspicious = images[len(normal) :] if variant else [scratched]

    edge, guarded, unguarded = EdgeDetector(bundle), copy.deepcopy(trained), copy.deepcopy(trained)
    report, learned = guarded.partial_fit(images, variant, hold_back=True), edge.learn(images, variant)
    assert [*report.held_back] == [*learned.held_back] == [str(path) for path in suspicious]
    for name, factor in report.held_back.items():
        assert factor > SUSPICION
        assert factor == pytest.approx(learned.held_back[name], rel=1e-3)
    assert report.variants == learned.report.variants
    assert report.variants.total() == len(images) - len(suspicious)
    report = unguarded.partial_fit(images, variant)
    assert (report.variants.total(), report.held_back) == (len(images), {})
    assert edge.learn(images, variant, force=True).report.variants.total() == len(suspicious)


def test_what_it_goes_by() -> None:
    """The thresholds of a bank: of good images, of a single one, set by hand; NaN where nothing is known."""
    update = Update(filled(validated=True))
    update.add(draw("lobes", "c", 0, 40), "c")
    update.add(draw("lobes", "d", 0, 1), "d")  # nothing tells how far apart its patches are
    update.commit()
    bank = update.bank.with_decision("b", threshold=2.5)
    limits = image_thresholds(bank)
    assert [*limits] == [*"abcd"]
    assert limits["a"] == thresholds(bank, "a").image.value > 0
    assert (limits["b"], limits["c"] > 0) == (2.5, True)
    assert np.isinf(limits["d"])
