# SPDX-License-Identifier: Apache-2.0
"""Tests of inspection on the edge: the same decisions as those of model.xml and of torch."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from anomalib_ext.models import ContinualPatchCore
from openvino_export import EdgeDetector
from openvino_export.bundle.folder import BundleError
from openvino_export.images import load

from .whole_graph import assert_same, whole


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
    """An array of 8 bits or floats is judged as the file is."""
    detector = EdgeDetector(exported)
    expected = detector.predict(tested[0])
    pixels = np.asarray(Image.open(tested[0]))
    for array in (pixels, pixels / 255):
        result = detector.predict(array)
        assert result.pred_score == pytest.approx(expected.pred_score, abs=1e-5)
        assert result.source is None


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


def test_bad_images_are_refused(bundle: Path, good: dict[str, list[Path]], tmp_path: Path) -> None:
    """To judge and to learn, in the foreground and in the background, with the name and the reason; nothing changes."""
    detector = EdgeDetector(bundle)
    before = detector.info()
    Image.fromarray(np.zeros((64, 64), np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "text.png").write_text("no image")
    for image, name, message in (
        (tmp_path / "text.png", "{}", "text.png cannot be read as an image"),
        (tmp_path / "deep.png", "{}", r"deep.png has pixels of mode 'I.*convert"),
        (np.full((64, 64, 3), np.nan), "image 2", "{} holds NaN or infinite values"),
        (np.zeros((4, 64, 3), np.uint8), "image 2", "{} has 64 x 4 pixels; at least 16"),
    ):
        with pytest.raises(ValueError, match=message.format("The image")):
            detector.predict(image)
        with pytest.raises(ValueError, match=message.format("The image")):
            detector.predict_async(image).result()
        with pytest.raises(ValueError, match=message.format(name)):
            detector.learn([good["dots"][0], image], "dots")
    with pytest.raises(FileNotFoundError, match=r"no image .*gone.png"):
        detector.predict(tmp_path / "gone.png")
    with pytest.raises(ValueError, match="no images"):
        detector.learn([])
    assert detector.info() == before


def test_devices(exported: Path) -> None:
    """A missing one is named with those that are there."""
    with pytest.raises(ValueError, match=r"no device GPU.7 on this PC. It finds .*CPU"):
        EdgeDetector(exported, device="GPU.7")
    assert EdgeDetector(exported).info()["device"] == "CPU"


ASYNCHRONOUS = """
import sys
from openvino_export import EdgeDetector

detector = EdgeDetector(sys.argv[1])
list(detector.stream([sys.argv[2]] * 4))
detector.predict_async(sys.argv[2]).add_done_callback(lambda future: print(future.result().variant))
"""


def test_background_judging_ends_with_the_process(exported: Path, tested: list[Path]) -> None:
    """What was begun is finished, and nothing aborts."""
    for _ in range(2):
        command = [sys.executable, "-c", ASYNCHRONOUS, exported, tested[0]]
        result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100)
        assert (result.returncode, result.stdout, result.stderr) == (0, "stripes\n", "")


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
