# SPDX-License-Identifier: Apache-2.0
"""Tests of the false-alarm rate and thresholds by hand at the edge: in the bundle, in model.xml, and back again."""

import json
import shutil
from pathlib import Path

import pytest

from openvino_export import EdgeDetector
from openvino_export.bundle.folder import BundleError, undo

from .whole_graph import assert_same, whole


def threshold(detector: EdgeDetector, variant: str = "stripes") -> float:
    """Return the image threshold of a variant."""
    return float(detector.info()["variants"][variant]["threshold"])


def test_a_lower_rate_raises_the_threshold(bundle: Path, tested: list[Path]) -> None:
    """After `save` in model.xml too; an undo brings back what was before."""
    detector = EdgeDetector(bundle)
    before, judged = threshold(detector), whole(bundle, tested)
    detector.set_decision(false_alarm_rate=0.001)
    known = detector.info()["variants"]["stripes"]
    assert (known["false_alarm_rate"], known["by_hand"]) == (0.001, False)
    assert known["smallest_rate"] == pytest.approx(1 / (known["rests_on_images"] + 1))
    assert known["threshold"] > before
    assert not detector.info()["saved"]
    detector.save()
    assert_same(detector.predict(tested), whole(bundle, tested))
    assert EdgeDetector(bundle).info() == detector.info()
    undo(bundle)
    assert threshold(EdgeDetector(bundle)) == before
    for now, then in zip(whole(bundle, tested), judged, strict=True):
        assert now["pred_score"] == then["pred_score"]


def test_a_rate_of_one_variant(bundle: Path, good: dict[str, list[Path]]) -> None:
    """The others keep that of the bundle, also those that are learned later; a rate for all is for all."""
    detector = EdgeDetector(bundle)
    detector.learn(good["dots"][:9], "dots")
    before = {name: threshold(detector, name) for name in ("stripes", "dots")}
    detector.set_decision("dots", false_alarm_rate=0.3)
    assert threshold(detector, "stripes") == before["stripes"]
    assert threshold(detector, "dots") < before["dots"]
    detector.learn(good["dots"][9:12], "dots")
    detector.learn(good["checks"][:3], "checks")
    rates = {name: each["false_alarm_rate"] for name, each in detector.info()["variants"].items()}
    assert rates == {"stripes": 0.02, "dots": 0.3, "checks": 0.02}
    detector.set_decision(false_alarm_rate=0.1)
    assert {each["false_alarm_rate"] for each in detector.info()["variants"].values()} == {0.1}


def test_a_threshold_by_hand(bundle: Path, tested: list[Path], good: dict[str, list[Path]]) -> None:
    """It stays while more is learned, decides in model.xml, and ends when thresholds are automatic again."""
    detector = EdgeDetector(bundle)
    before = threshold(detector)
    detector.set_decision("stripes", threshold=100 * before)
    detector.learn(good["dots"][:2], "dots")
    detector.save()
    known = detector.info()["variants"]["stripes"]
    assert (known["threshold"], known["by_hand"], known["is_sure"]) == (pytest.approx(100 * before), True, True)
    results = [one for one in detector.predict(tested) if one.variant == "stripes"]
    assert results
    assert not any(one.pred_label for one in results)
    assert_same(detector.predict(tested), whole(bundle, tested))
    detector.set_decision("stripes", false_alarm_rate=0.3)
    detector.set_decision("stripes", threshold=100 * before)
    known = detector.info()["variants"]["stripes"]
    assert (known["false_alarm_rate"], known["by_hand"]) == (0.3, True), "the rate, and with it the map's, remains"
    detector.set_decision("stripes")
    assert threshold(detector) == pytest.approx(before, rel=0.1)
    assert not detector.info()["variants"]["stripes"]["by_hand"]


def test_few_images_are_not_sure(bundle: Path, good: dict[str, list[Path]]) -> None:
    """Each verdict says so, until there are enough."""
    detector = EdgeDetector(bundle)
    report = detector.learn(good["dots"][:1], "dots").report
    assert any("dots rests on 1 good images and is a guess; 7 more" in sentence for sentence in report.advice)
    first = detector.predict(good["dots"][10])
    assert (first.variant, first.is_sure) == ("dots", False)
    assert not first.pred_label, "other good parts are not bad"
    assert detector.predict(good["stripes"][10]).is_sure
    report = detector.learn(good["dots"][1:8], "dots").report
    assert not any("is a guess" in sentence for sentence in report.advice)
    assert detector.predict(good["dots"][10]).is_sure


@pytest.mark.parametrize(
    ("variant", "values", "message"),
    [
        ("lid", {"false_alarm_rate": 0.1}, "There is no variant 'lid'; known are stripes"),
        (None, {"false_alarm_rate": 0.0}, "must be above 0 and at most 0.5, got 0.0"),
        (None, {"false_alarm_rate": float("nan")}, "must be above 0 and at most 0.5, got nan"),
        (None, {"threshold": -1.0}, "A threshold must be above 0 and finite, got -1.0"),
        (None, {"threshold": float("inf")}, "A threshold must be above 0 and finite, got inf"),
    ],
)
def test_what_is_out_of_range(bundle: Path, variant: str | None, values: dict[str, float], message: str) -> None:
    """It is refused, and nothing changes."""
    detector = EdgeDetector(bundle)
    before = detector.info()
    with pytest.raises(ValueError, match=message):
        detector.set_decision(variant, **values)
    assert detector.info() == before


def test_without_a_memory_bank(without_bank: Path, tmp_path: Path) -> None:
    """There is nothing to set."""
    detector = EdgeDetector(shutil.copytree(without_bank, tmp_path / "copy"))
    with pytest.raises(BundleError, match="has no memory bank"):
        detector.set_decision(false_alarm_rate=0.1)


def test_scores_of_a_former_version_are_not_watched(bundle: Path, without_bank: Path) -> None:
    """They are no rates, so a monitor would take every part for a drifted one."""
    assert EdgeDetector(bundle).drift_monitor() is not None
    assert EdgeDetector(without_bank).drift_monitor() is None
    metadata = json.loads((bundle / "metadata.json").read_text())
    former = {key: metadata[key] for key in metadata if key not in {"score", "checksum"}}
    (bundle / "metadata.json").write_text(json.dumps({**former, "schema_version": 1}))
    with pytest.warns(UserWarning, match="a former version"):
        assert EdgeDetector(bundle).drift_monitor() is None
