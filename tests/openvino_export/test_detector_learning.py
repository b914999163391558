# SPDX-License-Identifier: Apache-2.0
"""Tests of learning on the edge: the same bank as in torch, or none of it; judging goes on meanwhile."""

import copy
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.engine import Engine

from anomalib_ext.models import ContinualPatchCore
from openvino_export import EdgeDetector
from openvino_export.bundle.folder import BANK, BundleError, read, undo
from openvino_export.decision import Decider, Prediction
from openvino_export.device import core
from openvino_export.images import load
from openvino_export.memory import state
from openvino_export.memory.guard import SUSPICION
from openvino_export.memory.memory_bank import MemoryBank
from openvino_export.memory.thresholds import thresholds
from openvino_export.memory.update import Update

from .whole_graph import assert_same, whole

Make = Callable[..., Any]


def assert_same_bank(own: MemoryBank, other: MemoryBank) -> None:
    """Compare what two banks have learned, up to rounding."""
    assert list(own.variants) == list(other.variants)
    for name, variant in own.variants.items():
        expected = other.variants[name]
        assert (variant.images, len(variant.radii)) == (expected.images, len(expected.radii))
        gaps = np.linalg.norm(variant.vectors[:, None] - expected.vectors[None], axis=2).min(axis=1)
        assert gaps.max() < 1e-3 * np.linalg.norm(expected.vectors, axis=1).mean()
        decided, expected_decision = thresholds(own, name), thresholds(other, name)
        assert decided.images == expected_decision.images
        for kind in ("image", "pixel"):
            assert getattr(decided, kind).value == pytest.approx(getattr(expected_decision, kind).value, rel=2e-2)


def add_variants(detector: EdgeDetector, count: int) -> None:
    """Have a detector learn further variants, faster than by images of them."""
    known = detector._known().bank
    update = Update(known)
    for number in range(count):
        update.add(known.vectors()[:9] + 50 + number, f"{number}")
    update.commit()
    detector._decider = Decider(update.bank, detector._bundle.metadata)


def test_learns_as_torch_does(
    bundle: Path,
    trained: ContinualPatchCore,
    good: dict[str, list[Path]],
    tested: list[Path],
) -> None:
    """The same images give the same bank and the same decisions; saved, model.xml and a new detector give them too."""
    model = copy.deepcopy(trained)
    detector = EdgeDetector(bundle)
    for product, images in (("dots", good["dots"][:5]), ("stripes", good["stripes"][:3]), (None, good["checks"][:4])):
        learned = detector.learn(images, product)
        report = model.partial_fit(images, product)
        assert learned.report.variants == report.variants
        assert learned.report.known_images == report.known_images
        assert not learned.held_back
    assert list(detector.info()["variants"]) == ["stripes", "dots", "variant_1"]

    results = detector.predict(tested)
    images = torch.stack([torch.from_numpy(load(path)) for path in tested])
    with torch.no_grad():
        expected = model(images)
    for result, label, score in zip(results, expected.pred_label, expected.pred_score, strict=True):
        assert result.pred_score == pytest.approx(score.item(), abs=5e-3)
        assert result.pred_label == label.item()
    assert {result.variant for result in results} == {"stripes", "dots", "variant_1"}

    xml = (bundle / "model.xml").read_bytes()
    assert not detector.info()["saved"]
    detector.save()
    assert detector.info()["saved"]
    assert_same_bank(state.from_bytes((bundle / BANK).read_bytes()), model.model.bank)
    assert (bundle / "model.xml").read_bytes() == xml
    assert_same(results, whole(bundle, tested))
    again = EdgeDetector(bundle)
    assert_same(again.predict(tested), whole(bundle, tested))
    assert again.info() == detector.info()


def test_shows_defects_as_torch_does(
    bundle: Path,
    trained: ContinualPatchCore,
    good: dict[str, list[Path]],
    tested: list[Path],
    products: Path,
) -> None:
    """With a box, a mask and neither: the same scores on both sides, in model.xml, and once saved."""
    model, detector = copy.deepcopy(trained), EdgeDetector(bundle)
    detector.learn(good["dots"][:5], "dots")
    model.partial_fit(good["dots"][:5], "dots")
    before = detector.predict(tested)
    bad = sorted((products / "stripes" / "test" / "hole").iterdir())
    mask = products / "stripes" / "ground_truth" / "hole" / f"{bad[1].stem}_mask.png"
    for images, variant, regions in (
        (bad[0], "stripes", (10, 10, 40, 40)),
        (bad[1], None, mask),
        (bad[2:4], "stripes", None),
        (next(path for path in tested if "dots" in path.parts), "dots", (0, 0, 30, 30)),
    ):
        learned = detector.learn(images, variant, defective=True, regions=regions)
        report = model.partial_fit(images, variant, defective=True, regions=regions)
        assert learned.report.shown == report.shown
        assert learned.report.still_good == report.still_good
    assert {name: each["defects_shown"] for name, each in detector.info()["variants"].items()} == {
        "stripes": 4,
        "dots": 1,
    }
    results = detector.predict(tested)
    with torch.no_grad():
        expected = model(torch.stack([torch.from_numpy(load(path)) for path in tested]))
    for result, score in zip(results, expected.pred_score, strict=True):
        assert result.pred_score == pytest.approx(score.item(), abs=5e-3)
    assert any(now.pred_score > then.pred_score + 0.01 for now, then in zip(results, before, strict=True))
    detector.save()
    assert_same(results, whole(bundle, tested))
    assert_same(EdgeDetector(bundle).predict(tested), whole(bundle, tested))


def test_suspicious_images_are_held_back(bundle: Path, good: dict[str, list[Path]], products: Path) -> None:
    """A defective image among good ones is named and not learned, unless it is forced; so is another product."""
    detector = EdgeDetector(bundle)
    bad = sorted((products / "stripes" / "test" / "hole").iterdir())[0]
    before = detector.predict(bad)
    assert before.pred_label
    learned = detector.learn([*good["stripes"][:2], bad, good["dots"][0]], "stripes")
    assert list(learned.held_back) == [str(bad), str(good["dots"][0])]
    assert min(learned.held_back.values()) > SUSPICION
    assert detector.predict(bad).pred_score == pytest.approx(before.pred_score)
    forced = detector.learn(bad, "stripes", force=True)
    assert not forced.held_back
    assert forced.report.variants["stripes"] == 1
    assert not detector.predict(bad).pred_label


def test_images_of_an_unseen_product_are_not_suspicious(bundle: Path, good: dict[str, list[Path]]) -> None:
    """There is nothing that they could be compared with."""
    detector = EdgeDetector(bundle)
    assert detector.learn(good["dots"][:2]).report.variants == {"variant_1": 2}
    assert detector.learn(good["checks"][:2], "checks").report.variants == {"checks": 2}


def test_known_images_change_nothing(bundle: Path, good: dict[str, list[Path]]) -> None:
    """Learned in torch or here, an image of the model's size is learned once."""
    detector = EdgeDetector(bundle)
    before = detector.info()
    assert detector.learn(good["stripes"]).report.known_images == len(good["stripes"])
    assert detector.info() == before
    assert before["saved"]
    done: list[int] = []
    detector.learn(good["dots"][:3], "dots", progress=done.append)
    assert done == [1, 2, 3]
    assert not detector.info()["saved"]
    assert detector.learn(good["dots"][:3], "dots").report.known_images == 3


def test_predictions_go_on_while_learning(bundle: Path, good: dict[str, list[Path]], tested: list[Path]) -> None:
    """From other threads; each result is of the old knowledge or of the new one, as a whole."""
    detector = EdgeDetector(bundle)
    image = next(path for path in tested if "dots" in path.parts)
    before = detector.predict(image)
    stop = threading.Event()
    results: list[Prediction] = []
    errors: list[BaseException] = []

    def judge() -> None:
        try:
            while not stop.is_set():
                results.append(detector.predict(image))
        except BaseException as error:  # noqa: BLE001  # shown below
            errors.append(error)

    threads = [threading.Thread(target=judge) for _ in range(2)]
    for thread in threads:
        thread.start()
    during = len(results)
    detector.learn(good["dots"][:8], "dots")
    during = len(results) - during
    after = detector.predict(image)
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors
    assert during > 2
    assert (before.variant, after.variant) == ("stripes", "dots")
    for result in results:
        expected = before if result.variant == "stripes" else after
        assert result.pred_score == pytest.approx(expected.pred_score, abs=1e-5)


def test_a_failed_learning_changes_nothing(
    bundle: Path,
    good: dict[str, list[Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not even after images were taken in."""
    detector = EdgeDetector(bundle)
    before = detector.info()

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("openvino_export.memory.update.calibration_of", fail)
    with pytest.raises(MemoryError):
        detector.learn(good["dots"][:2], "dots")
    assert detector.info() == before
    assert before["saved"]
    monkeypatch.undo()
    learned = detector.learn(good["dots"][:2], "dots")
    assert (learned.report.variants, learned.report.known_images) == ({"dots": 2}, 0)


def test_two_processes(bundle: Path, good: dict[str, list[Path]]) -> None:
    """The second to save is refused instead of losing what the first has learned; after a reload it can go on."""
    first, second, third = (EdgeDetector(bundle) for _ in range(3))
    first.learn(good["dots"][:2], "dots")
    second.learn(good["checks"][:2], "checks")
    first.save()
    with pytest.raises(BundleError, match="changed by another process"):
        second.save()
    with pytest.raises(BundleError, match="changed by another process"):
        second.reload()
    assert second.reload(discard=True)
    assert list(second.info()["variants"]) == ["stripes", "dots"]
    assert third.reload()
    assert not third.reload()
    third.learn(good["checks"][:2], "checks")
    third.save()
    assert list(EdgeDetector(bundle).info()["variants"]) == ["stripes", "dots", "checks"]


def test_another_memory_size(bundle: Path, good: dict[str, list[Path]], tested: list[Path]) -> None:
    """A larger memory is filled by what is learned, a smaller one cut at once; model.xml follows, undo brings back."""
    before = EdgeDetector(bundle)
    size, vectors = before.info()["memory_size"], before.info()["vectors"]
    assert vectors > size / 2
    detector = EdgeDetector(bundle)
    detector.set_memory_size(2 * size)
    detector.save()
    assert_same(detector.predict(tested), whole(bundle, tested))
    assert detector.info()["vectors"] == vectors
    detector.learn(good["dots"], "dots")
    detector.save()
    assert size < detector.info()["vectors"] <= 2 * size
    assert_same(detector.predict(tested), whole(bundle, tested))
    undo(bundle)
    detector = EdgeDetector(bundle)
    detector.set_memory_size(vectors // 2)
    detector.save()
    assert detector.info()["vectors"] == vectors // 2
    assert_same(detector.predict(tested), whole(bundle, tested))
    with pytest.raises(ValueError, match="memory_size must be at least 1, one vector for each variant, got 0"):
        detector.set_memory_size(0)
    detector._bundle.metadata["num_neighbors"] = 9
    with pytest.raises(ValueError, match="memory_size must be at least 9, the num_neighbors of the model, got 8"):
        detector.set_memory_size(8)
    detector._bundle.metadata["num_neighbors"] = 10 * vectors  # more than were learned are no reason to refuse room
    detector.set_memory_size(10 * vectors)


def test_more_variants_than_the_graph_has_room_for(
    bundle: Path,
    good: dict[str, list[Path]],
    tested: list[Path],
) -> None:
    """Its tables grow; `model.xml` judges as before, by the thresholds of all; undo brings back the smaller one."""
    before, names = EdgeDetector(bundle), [path.name for path in sorted(bundle.iterdir())]
    old = (bundle / "model.xml").read_bytes()
    room = read(bundle).metadata["variant_capacity"]
    detector = EdgeDetector(bundle)
    add_variants(detector, room - 1)
    detector.save()
    assert (bundle / "model.xml").read_bytes() == old
    detector.learn(good["dots"], "dots")
    detector.save()
    assert before.reload()
    metadata = read(bundle).metadata
    assert (len(metadata["variants"]), metadata["variant_capacity"]) == (room + 1, 2 * room)
    assert {path.name for path in bundle.iterdir()} == {*names, ".previous"}
    results = before.predict(tested)
    assert {result.variant for result in results if "dots" in str(result.source)} == {"dots"}
    assert_same(results, whole(bundle, tested))
    model = core().read_model(bundle / "model.xml")
    assert model.inputs[0].partial_shape.to_string() == "[?,3,?,?]"
    undo(bundle)
    assert (bundle / "model.xml").read_bytes() == old
    assert_same(EdgeDetector(bundle).predict(tested), whole(bundle, tested))


@pytest.fixture(scope="module")
def others(make_model: Make, good: dict[str, list[Path]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return bundles of other models: one weighs neighbors, one has no thresholds; they are not to be changed."""
    folders = {}
    for kind, options, size in (
        ("weighed, in half precision, of one size", {"num_neighbors": 9, "precision": "float16"}, (64, 64)),
        ("without thresholds", {"post_processor": False}, None),
    ):
        model = make_model(backbone="test_resnet", layers=["layer1"], pre_trained=False, **options)
        model.partial_fit(good["stripes"], "stripes")
        path = Engine(logger=False).export(model.eval(), "openvino", tmp_path_factory.mktemp("other"), input_size=size)
        folders[kind] = Path(path).parent
    return folders


@pytest.mark.parametrize("kind", ["weighed, in half precision, of one size", "without thresholds"])
def test_other_models(
    kind: str, others: dict[str, Path], good: dict[str, list[Path]], tested: list[Path], tmp_path: Path
) -> None:
    """They are judged as model.xml does, before and after they have learned."""
    folder = Path(shutil.copytree(others[kind], tmp_path / "bundle"))
    detector = EdgeDetector(folder)
    for _ in range(2):
        for path, result, expected in zip(tested, detector.predict(tested), whole(folder, tested), strict=True):
            assert result.pred_score == pytest.approx(expected["pred_score"].item(), abs=1e-3), path
            assert np.abs(result.anomaly_map - expected["anomaly_map"][0]).max() < 1e-3
            label = expected.get("pred_label")
            assert result.pred_label == (None if label is None else label.item())
            assert (result.pred_label is None) == (kind == "without thresholds")
        detector.learn(good["dots"][:3], "dots", force=True)
        detector.save()


def test_a_grown_graph_describes_itself_to_model_api(
    others: dict[str, Path], tested: list[Path], tmp_path: Path
) -> None:
    """As it did before its tables grew, if it was exported for images of one size."""
    folder = Path(shutil.copytree(others["weighed, in half precision, of one size"], tmp_path / "bundle"))
    detector = EdgeDetector(folder)
    old = (folder / "model.xml").read_bytes()
    add_variants(detector, read(folder).metadata["variant_capacity"])
    detector.save()
    assert (folder / "model.xml").read_bytes() != old
    model = core().read_model(folder / "model.xml")
    assert model.get_rt_info(["model_info", "model_type"]).astype(str) == "AnomalyDetection"
    assert model.inputs[0].partial_shape.to_string() == "[?,3,64,64]"
    assert_same(detector.predict(tested[:3]), whole(folder, tested[:3]))


WITHOUT_TORCH = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "torchvision", "anomalib", "lightning", "timm"}:
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
import json
from openvino_export import EdgeDetector

bundle, image, *learned = sys.argv[1:]
detector = EdgeDetector(bundle)
before = detector.predict(image)
detector.learn(learned, "dots")
detector.save()
after = EdgeDetector(bundle).predict(image)
print(json.dumps([before.variant, after.variant, after.pred_label]))
"""


def test_without_torch(bundle: Path, good: dict[str, list[Path]], tested: list[Path]) -> None:
    """Judging, learning and saving work where torch and anomalib cannot be imported."""
    image = next(path for path in tested if "dots" in path.parts and "good" in path.parts)
    command = [sys.executable, "-c", WITHOUT_TORCH, bundle, image, *good["dots"][:3]]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert json.loads(result.stdout.splitlines()[-1]) == ["stripes", "dots", False]
