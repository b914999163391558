# SPDX-License-Identifier: Apache-2.0
"""Commands about what a bundle knows."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from openvino_export.cli import main

Run = Callable[..., tuple[int, list[dict[str, Any]], str]]


def test_learn_and_undo(run: Run, bundle: Path, products: Path, tmp_path: Path) -> None:
    """A new product is learned from a folder and known from then on; a defective image is held back and named."""
    images = tmp_path / "images"
    shutil.copytree(products / "dots" / "train" / "good", images)
    code, lines, _ = run("learn", bundle, images, "--variant", "dots")
    assert code == 0
    assert lines[0]["learned"] == {"dots": 20}
    code, lines, _ = run("predict", bundle, products / "dots" / "test" / "good")
    assert code == 0
    assert {line["variant"] for line in lines} == {"dots"}
    bad = products / "stripes" / "test" / "hole" / "000.png"
    code, lines, errors = run("learn", bundle, bad, "--variant", "stripes")
    assert code == 3
    assert list(lines[0]["held_back"]) == [str(bad)]
    assert f"{bad} was not learned" in errors
    assert run("undo", bundle)[:2] == (0, [{"variants": ["stripes"]}])


def test_info(exported: Path, without_bank: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is JSON."""
    assert main(["info", str(exported)]) == 0
    known = json.loads(capsys.readouterr().out)
    assert known["model"] == "ContinualPatchCore"
    assert known["variants"]["stripes"]["images"] == 20
    assert main(["info", str(without_bank)]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "Padim"


def test_set(run: Run, bundle: Path) -> None:
    """A rate, a threshold by hand, and back; what images do not support is said; an undo brings back."""
    code, lines, errors = run("set", bundle, "--false_alarm_rate", 0.005)
    assert code == 0
    assert (lines[0]["variant"], lines[0]["false_alarm_rate"], lines[0]["by_hand"]) == ("stripes", 0.005, False)
    assert "the threshold is extrapolated" in errors
    automatic = lines[0]["threshold"]
    code, lines, errors = run("set", bundle, "--variant", "stripes", "--threshold", 9.5)
    assert (code, lines[0]["threshold"], lines[0]["by_hand"], errors) == (0, 9.5, True, "")
    assert run("undo", bundle)[0] == 0
    code, lines, _ = run("set", bundle, "--automatic", "true")
    assert (code, lines[0]["threshold"]) == (0, automatic)
    code, lines, _ = run("set", bundle, "--memory_size", 777)
    assert (code, lines[0]["memory_size"]) == (0, 777)


@pytest.mark.parametrize(
    "options",
    [[], ["--false_alarm_rate", "0.1", "--threshold", "3"], ["--memory_size", "99", "--variant", "stripes"]],
)
def test_set_wants_one_thing(options: list[str], bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing, or two things, are refused."""
    assert main(["set", str(bundle), *options]) == 1
    assert "Give one of --false_alarm_rate, --threshold, --automatic true and --memory_size" in capsys.readouterr().err


def test_learn_a_defect(run: Run, bundle: Path, products: Path, tmp_path: Path) -> None:
    """It is shown with a mask, a folder of masks, a box or nothing; what says nothing of it is named; undo forgets."""
    good = sorted((products / "stripes" / "test" / "good").iterdir())
    image, mask = tmp_path / "part.png", tmp_path / "masks" / "part_mask.png"
    mask.parent.mkdir()
    with Image.open(good[0]) as picture:
        pixels = np.asarray(picture.convert("RGB")).copy()
    pixels[20:28, 20:28] = np.clip(pixels[20:28, 20:28].astype(int) + 9, 0, 255)
    marked = np.zeros(pixels.shape[:2], np.uint8)
    marked[20:28, 20:28] = 255
    Image.fromarray(pixels).save(image)
    Image.fromarray(marked).save(mask)
    before = run("predict", bundle, image)[1][0]["pred_score"]
    for options in (["--mask", mask], ["--mask", mask.parent], ["--box", "[20,20,28,28]"]):
        code, lines, _ = run("learn", bundle, image, "--defective", "true", *options)
        assert lines[0]["shown_defects"] == {"stripes": 1}
        assert run("predict", bundle, image)[1][0]["pred_score"] > before
        run("undo", bundle)
    assert run("set", bundle, "--threshold", 1e6)[0] == 0
    code, lines, errors = run("learn", bundle, image, "--variant", "stripes", "--defective", "true")
    assert (code, lines[0]["shown_defects"], lines[0]["still_good"]) == (3, {"stripes": 1}, [str(image)])
    assert f"{image} was shown as defective and is still called good" in errors
    code, lines, errors = run("learn", bundle, good[0], "--defective", "true", "--mask", mask.parent)
    assert (code, "has no mask of 000" in errors) == (1, True)
    options = ["--defective", "true", "--mask", mask, "--box", "[20,20,28,28]"]
    code, lines, errors = run("learn", bundle, image, *options)
    assert (code, "Give a mask or a box, not both" in errors) == (1, True)
    code, lines, errors = run("learn", bundle, good[0], "--mask", mask)
    assert (code, "give it with --defective true" in errors) == (1, True)


def test_masks_of_a_tree(run: Run, bundle: Path, products: Path) -> None:
    """Folders of defects and of masks in MVTec AD's layout, where each kind numbers its images anew."""
    from openvino_export.cli.learning import _masks
    from openvino_export.cli.sources import image_paths

    images, masks = products / "stripes" / "test", products / "stripes" / "ground_truth"
    paths = [path for path in image_paths(images) if path.parent.name != "good"]
    found = _masks(masks, paths, images)
    assert [(each.parent.name, each.stem) for each in found] == [(p.parent.name, f"{p.stem}_mask") for p in paths]
    code, lines, _ = run("learn", bundle, images / "hole", "--defective", "true", "--mask", masks / "hole")
    assert (code, lines[0]["shown_defects"]) == (0, {"stripes": len(paths)})
