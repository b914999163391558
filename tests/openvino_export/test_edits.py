# SPDX-License-Identifier: Apache-2.0
"""Tests of renaming, merging and deleting variants at the edge."""

from pathlib import Path

import pytest

from openvino_export import EdgeDetector
from openvino_export.bundle.folder import undo

from .whole_graph import assert_same, whole


@pytest.fixture
def detector(bundle: Path, good: dict[str, list[Path]]) -> EdgeDetector:
    """Return a detector that knows two variants."""
    detector = EdgeDetector(bundle)
    detector.learn(good["dots"][:12], "dits")
    detector.save()
    return detector


def test_a_mistyped_name(detector: EdgeDetector, bundle: Path, good: dict[str, list[Path]]) -> None:
    """Learning under the right one says where the images are; after renaming, everything is as it should have been."""
    report = detector.learn(good["dots"][:12], "dots").report
    assert dict(report.known_as) == {("dits", "dots"): 12}
    assert list(detector.info()["variants"]) == ["stripes", "dits"]
    before = detector.predict(good["dots"][12])
    detector.rename_variant("dits", " dots ")
    now = detector.predict(good["dots"][12])
    assert (now.variant, now.pred_score, before.variant) == ("dots", before.pred_score, "dits")
    detector.save()
    again = EdgeDetector(bundle)
    assert again.predict(good["dots"][12]).variant == "dots"
    assert not again.learn(good["dots"][:12], "dots").report.known_as
    undo(bundle)
    assert list(EdgeDetector(bundle).info()["variants"]) == ["stripes", "dits"]


def test_merged(detector: EdgeDetector, bundle: Path, good: dict[str, list[Path]], tested: list[Path]) -> None:
    """As one variant it knows the images of both, in model.xml too."""
    detector.learn(good["dots"][12:], "dots")
    detector.merge_variants("dits", "dots")
    detector.save()
    assert {name: each["images"] for name, each in detector.info()["variants"].items()} == {"stripes": 20, "dots": 20}
    assert detector.learn(good["dots"], "dots").report.known_images == 20
    assert_same(detector.predict(tested), whole(bundle, tested))


def test_deleted(detector: EdgeDetector, bundle: Path, good: dict[str, list[Path]], tested: list[Path]) -> None:
    """It is judged by the rest, and its images can be learned again."""
    detector.delete_variant("dits")
    detector.save()
    assert {result.variant for result in detector.predict(good["dots"][:3])} == {"stripes"}
    assert_same(detector.predict(tested), whole(bundle, tested))
    assert dict(detector.learn(good["dots"][:3], "dots", force=True).report.variants) == {"dots": 3}


def test_mistakes_change_nothing(detector: EdgeDetector, good: dict[str, list[Path]]) -> None:
    """Each is named."""
    before = detector.info()
    for call, message in (
        (lambda: detector.rename_variant("lid", "dots"), "no variant 'lid'; known are stripes, dits"),
        (lambda: detector.rename_variant("dits", "stripes"), "a variant 'stripes' already.*merge 'dits' into it"),
        (lambda: detector.rename_variant("dits", "Stripes"), "by case or blanks alone"),
        (lambda: detector.rename_variant("dits", " "), "must not be blank"),
        (lambda: detector.merge_variants("dits", "lid"), "no variant 'lid'"),
        (lambda: detector.merge_variants("dits", "dits"), "cannot be merged into itself"),
        (lambda: detector.delete_variant("lid"), "no variant 'lid'"),
        (lambda: detector.learn(good["dots"][12:], "Dits"), "'Dits' differs from the variant 'dits'"),
        (lambda: detector.learn(good["dots"][12:], " "), "must not be blank"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
        assert detector.info() == before
    detector.delete_variant("stripes")
    with pytest.raises(ValueError, match="the only variant"):
        detector.delete_variant("dits")


def test_forced(detector: EdgeDetector, good: dict[str, list[Path]]) -> None:
    """Two products may have names that differ by case alone; a variant may change the case of its own."""
    detector.learn(good["checks"][:3], "DITS", force=True)
    assert list(detector.info()["variants"]) == ["stripes", "dits", "DITS"]
    detector.rename_variant("stripes", "Stripes")
    detector.rename_variant("Stripes", "Dits", force=True)
    assert list(detector.info()["variants"]) == ["Dits", "dits", "DITS"]
