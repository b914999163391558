# SPDX-License-Identifier: Apache-2.0
"""Tests of inspection and learning on the edge: the same decisions and the same bank as in torch."""

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
import openvino as ov
import pytest
import torch
from anomalib.engine import Engine
from PIL import Image
from torchvision.transforms.v2 import Resize

from anomalib_ext.models import ContinualPatchCore
from openvino_export import EdgeDetector
from openvino_export.bundle.constants import graph_tables
from openvino_export.bundle.folder import BundleError, read, undo
from openvino_export.bundle.ir import with_new_shapes
from openvino_export.detector import SUSPICION, Prediction
from openvino_export.device import core
from openvino_export.images import load, resize

Make = Callable[..., Any]


def whole(folder: Path, images: list[Path]) -> list[dict[str, np.ndarray]]:
    """Return what plain OpenVINO makes of model.xml for images of its size."""
    model = ov.Core().compile_model(folder / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    pixels = (np.asarray(Image.open(path), np.float32).transpose(2, 0, 1)[None] / 255 for path in images)
    return [{next(iter(key.names)): value[0] for key, value in model(image).items()} for image in pixels]


def assert_same(results: list[Prediction], expected: list[dict[str, np.ndarray]]) -> None:
    """Compare results with those of the whole graph."""
    for result, other in zip(results, expected, strict=True):
        assert result.pred_score == pytest.approx(other["pred_score"].item(), abs=1e-3)
        assert result.pred_label == other["pred_label"].item()
        assert result.anomaly_map.shape == other["anomaly_map"].shape[1:]
        assert np.abs(result.anomaly_map - other["anomaly_map"][0]).max() < 1e-3
        assert result.pred_mask is not None
        assert (result.pred_mask != other["pred_mask"][0]).mean() < 1e-3


def test_equals_the_whole_graph(exported: Path, tested: list[Path]) -> None:
    """One image, a list, a stream, and images in the background all give what model.xml gives."""
    detector = EdgeDetector(exported)
    expected = whole(exported, tested)
    results = detector.predict(tested)
    assert_same(results, expected)
    assert [result.source for result in results] == [str(path) for path in tested]
    assert {result.variant for result in results} == {"stripes"}
    stripes = [path.parent.name == "hole" for path in tested if "stripes" in path.parts]
    assert [result.pred_label for result in results if "stripes" in str(result.source)] == stripes
    assert_same([detector.predict(str(tested[0]))], expected[:1])
    assert_same(list(detector.stream(iter(tested))), expected)
    assert_same([detector.predict_async(path).result() for path in tested[:3]], expected[:3])


def test_arrays(exported: Path, tested: list[Path]) -> None:
    """An array of 8 bits or floats, with or without alpha, is judged as the file is."""
    detector = EdgeDetector(exported)
    expected = detector.predict(tested[0])
    pixels = np.asarray(Image.open(tested[0]))
    opaque = np.concatenate([pixels, np.full_like(pixels[..., :1], 7)], axis=2)
    for array in (pixels, pixels / 255, pixels.astype(np.float32) / 255, opaque, np.asfortranarray(pixels)):
        result = detector.predict(array)
        assert result.pred_score == pytest.approx(expected.pred_score, abs=1e-5)
        assert result.source is None
    gray = detector.predict(pixels[..., 0])
    assert gray.pred_score == pytest.approx(detector.predict(np.repeat(pixels[..., :1], 3, axis=2)).pred_score)
    assert gray.pred_score == pytest.approx(detector.predict(pixels[..., :1]).pred_score)


@pytest.mark.parametrize("size", [(64, 64), (33, 47), (201, 128), (64, 300), (1000, 61)])
def test_resizes_as_torchvision_does(size: tuple[int, int]) -> None:
    """Larger, smaller and distorted."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = load(pixels)
    expected = Resize((64, 64), antialias=True)(torch.from_numpy(image)).numpy()
    assert np.abs(resize(image, (64, 64)) - expected).max() < 1e-5


def test_images_of_any_size_are_judged_as_in_torch(
    exported: Path,
    trained: ContinualPatchCore,
    tested: list[Path],
    tmp_path: Path,
) -> None:
    """A large one is resized with antialiasing, as the trainer does."""
    detector = EdgeDetector(exported)
    large = tmp_path / "large.png"
    Image.open(tested[0]).resize((150, 201)).save(large)
    prepared = trained.pre_processor.transform(torch.from_numpy(load(large))[None])
    with torch.no_grad():
        found = trained.model(prepared)
    expected = trained.post_processor(found).pred_score.item()
    assert detector.predict(large).pred_score == pytest.approx(expected, abs=1e-3)


def bad_images(folder: Path) -> list[tuple[Any, str]]:
    """Return what cannot be judged, and what the message names."""
    (folder / "text.png").write_text("no image")
    Image.fromarray(np.zeros((64, 64), np.uint16)).save(folder / "deep.png")
    Image.fromarray(np.zeros((64, 5), np.uint8)).save(folder / "thin.png")
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:60])
    return [
        (folder / "text.png", "text.png cannot be read as an image"),
        (folder / "cut.png", "cut.png cannot be read as an image"),
        (folder / "deep.png", r"deep.png has pixels of mode 'I.*convert"),
        (folder / "thin.png", "thin.png has 5 x 64 pixels; at least 16"),
        (np.full((64, 64, 3), np.nan), "NaN"),
        (np.full((64, 64, 3), 255.0), r"must lie in \[0, 1\], got 255"),
        (np.zeros((64, 64, 3), np.int64), "8 bits or of floats.*int64"),
        (np.zeros((64, 64, 2), np.uint8), r"\(64, 64, 2\)"),
        (np.zeros((3, 64, 64), np.uint8), r"\(3, 64, 64\)"),
        (np.zeros((4, 64, 3), np.uint8), "64 x 4 pixels"),
    ]


def test_bad_images_are_refused(bundle: Path, good: dict[str, list[Path]], tmp_path: Path) -> None:
    """To judge and to learn, in the foreground and in the background, with the name and the reason; nothing changes."""
    detector = EdgeDetector(bundle)
    before = detector.info()
    for image, message in bad_images(tmp_path):
        with pytest.raises(ValueError, match=message):
            detector.predict(image)
        with pytest.raises(ValueError, match=message):
            detector.predict_async(image).result()
        with pytest.raises(ValueError, match=message):
            detector.learn([good["dots"][0], image], "dots")
    with pytest.raises(FileNotFoundError, match=r"no image .*gone.png"):
        detector.predict(tmp_path / "gone.png")
    with pytest.raises(ValueError, match="no images"):
        detector.learn([])
    assert detector.info() == before


def assert_same_bank(detector: EdgeDetector, model: ContinualPatchCore) -> None:
    """Compare what both have learned, up to rounding."""
    own, other = detector._knowledge.bank, model.model.bank
    assert list(own.variants) == list(other.variants)
    for name, variant in own.variants.items():
        expected = other.variants[name]
        assert (variant.images, len(variant.radii)) == (expected.images, len(expected.radii))
        gaps = np.linalg.norm(variant.vectors[:, None] - expected.vectors[None], axis=2).min(axis=1)
        assert gaps.max() < 1e-3 * np.linalg.norm(expected.vectors, axis=1).mean()
        for kind in ("image", "pixel"):
            assert own.thresholds(name)[kind] == pytest.approx(other.thresholds(name)[kind], rel=1e-3)


@pytest.mark.parametrize("one_shot", [False, True])
def test_learns_as_torch_does(
    one_shot: bool,
    bundle: Path,
    trained: ContinualPatchCore,
    good: dict[str, list[Path]],
    tested: list[Path],
) -> None:
    """The same images give the same bank and the same decisions; saved, model.xml and a new detector give them too."""
    metadata = json.loads((bundle / "metadata.json").read_text())
    (bundle / "metadata.json").write_text(json.dumps({**metadata, "one_shot": one_shot}))
    model = copy.deepcopy(trained)
    model.one_shot = one_shot
    detector = EdgeDetector(bundle)
    for product, images in (("dots", good["dots"][:5]), ("stripes", good["stripes"][:3]), (None, good["checks"][:4])):
        learned = detector.learn(images, product)
        report = model.partial_fit(images, product)
        assert learned.report.variants == report.variants
        assert learned.report.known_images == report.known_images
        assert not learned.held_back
    assert list(detector.info()["variants"]) == ["stripes", "dots", "variant_1"]
    assert_same_bank(detector, model)

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
    assert (bundle / "model.xml").read_bytes() == xml
    assert_same(results, whole(bundle, tested))
    again = EdgeDetector(bundle)
    assert_same(again.predict(tested), whole(bundle, tested))
    assert again.info() == detector.info()


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
    before = detector._knowledge
    assert detector.learn(good["stripes"]).report.known_images == len(good["stripes"])
    assert detector._knowledge is before
    done: list[int] = []
    detector.learn(good["dots"][:3], "dots", progress=done.append)
    assert done == [1, 2, 3]
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
    before = detector._knowledge

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("openvino_export.detector.calibrate_from_views", fail)
    with pytest.raises(MemoryError):
        detector.learn(good["dots"][:2], "dots")
    assert detector._knowledge is before
    assert list(before.bank.variants) == ["stripes"]


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
    assert third.reload()
    assert not third.reload()
    third.learn(good["checks"][:2], "checks")
    third.save()
    assert list(EdgeDetector(bundle).info()["variants"]) == ["stripes", "dots", "checks"]


def test_a_grown_graph_describes_itself_to_model_api(trained: ContinualPatchCore, tmp_path: Path) -> None:
    """As it did before its tables grew, if it was exported for images of one size."""
    path = Path(Engine(logger=False).export(trained, "openvino", tmp_path, input_size=(64, 64)))
    bank = trained.model.bank
    tables = graph_tables(bank, bank.vectors.shape[1], 2 * read(path.parent).metadata["variant_capacity"])
    model = core().read_model(*with_new_shapes(path.read_bytes(), path.with_suffix(".bin").read_bytes(), tables))
    assert model.get_rt_info(["model_info", "model_type"]).astype(str) == "AnomalyDetection"
    assert model.inputs[0].partial_shape.to_string() == "[?,3,64,64]"


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
    assert detector._knowledge is not None
    bank = copy.deepcopy(detector._knowledge.bank)
    for number in range(room - 1):  # faster than by `learn`
        bank.learn(bank.vectors[:9] + 50 + number, f"{number}")
    bank.commit()
    detector._knowledge = detector._know(bank, detector._bundle)
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
    model = ov.Core().read_model(bundle / "model.xml")
    assert model.inputs[0].partial_shape.to_string() == "[?,3,?,?]"
    undo(bundle)
    assert (bundle / "model.xml").read_bytes() == old
    assert_same(EdgeDetector(bundle).predict(tested), whole(bundle, tested))


def test_devices(exported: Path) -> None:
    """A missing one is named with those that are there."""
    with pytest.raises(ValueError, match=r"no device GPU.7 on this PC. It finds .*CPU"):
        EdgeDetector(exported, device="GPU.7")
    assert EdgeDetector(exported).info()["device"] == "CPU"


@pytest.mark.parametrize("options", [{"num_neighbors": 9}, {"precision": "float16"}, {"post_processor": False}])
def test_other_models(
    options: dict[str, Any],
    make_model: Make,
    make_engine: Make,
    good: dict[str, list[Path]],
    tested: list[Path],
    tmp_path: Path,
) -> None:
    """Weighed scores, a bank in half precision and a model without thresholds are judged as model.xml does."""
    model = make_model(backbone="test_resnet", layers=["layer1"], pre_trained=False, **options)
    model.partial_fit(good["stripes"], "stripes")
    folder = make_engine().export(model.eval(), "openvino", tmp_path).parent
    detector = EdgeDetector(folder)
    for _ in range(2):
        for path, result, expected in zip(tested, detector.predict(tested), whole(folder, tested), strict=True):
            assert result.pred_score == pytest.approx(expected["pred_score"].item(), abs=1e-3), path
            assert np.abs(result.anomaly_map - expected["anomaly_map"][0]).max() < 1e-3
            label = expected.get("pred_label")
            assert result.pred_label == (None if label is None else label.item())
        detector.learn(good["dots"][:3], "dots", force=True)
        detector.save()


ASYNCHRONOUS = """
import sys
from openvino_export import EdgeDetector

detector = EdgeDetector(sys.argv[1])
list(detector.stream([sys.argv[2]] * 4))
detector.predict_async(sys.argv[2]).add_done_callback(lambda future: print(future.result().variant))
"""


def test_background_judging_ends_with_the_process(exported: Path, tested: list[Path]) -> None:
    """What was begun is finished, and nothing aborts."""
    for _ in range(3):
        command = [sys.executable, "-c", ASYNCHRONOUS, exported, tested[0]]
        result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)
        assert (result.returncode, result.stdout, result.stderr) == (0, "stripes\n", "")


FIRST_TOGETHER = """
import sys
import threading
from openvino_export.device import core

def convert():
    together.wait()
    core()
    import openvino
    openvino.Type.f32.to_dtype()

sys.setswitchinterval(1e-6)
together = threading.Barrier(8)
for thread in (threads := [threading.Thread(target=convert) for _ in range(8)]):
    thread.start()
for thread in threads:
    thread.join()
"""


def test_threads_that_begin_together_do_not_wait_for_ever() -> None:
    """OpenVINO's first conversion of a type is not safe for several threads."""
    subprocess.run([sys.executable, "-c", FIRST_TOGETHER], check=True, timeout=100)


def test_a_model_without_a_bank(without_bank: Path, good: dict[str, list[Path]], tested: list[Path]) -> None:
    """It is judged by model.xml, in all ways; what it cannot do is said."""
    detector = EdgeDetector(without_bank)
    expected = whole(without_bank, tested)
    results = detector.predict(tested)
    assert_same(results, expected)
    assert 0 < sum(bool(result.pred_label) for result in results) < len(results)
    assert {result.variant for result in results} == {None}
    assert_same(list(detector.stream(tested)), expected)
    assert detector.info()["model"] == "Padim"
    for act in (lambda: detector.learn(good["dots"][:2]), detector.save):
        with pytest.raises(BundleError, match="of Padim has no memory bank, so it cannot learn"):
            act()
    assert_same(detector.predict(tested), expected)
    assert not detector.reload()


def test_another_model_in_its_place(without_bank: Path, bundle: Path, tmp_path: Path) -> None:
    """A reload does not take it for what was learned."""
    folder = Path(shutil.copytree(without_bank, tmp_path / "changing"))
    detectors = [EdgeDetector(folder), EdgeDetector(bundle)]
    for target, source in ((folder, bundle), (bundle, without_bank)):
        other = Path(shutil.copytree(source, tmp_path / "other"))
        shutil.rmtree(target)
        other.rename(target)
    for detector in detectors:
        with pytest.raises(BundleError, match="of another model now"):
            detector.reload()


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
