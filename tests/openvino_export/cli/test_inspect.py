# SPDX-License-Identifier: Apache-2.0
"""The command predict."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from openvino_export.decision import Prediction

Run = Callable[..., tuple[int, list[dict[str, Any]], str]]
COMMAND = [sys.executable, "-c", "import sys; from openvino_export.cli import main; sys.exit(main())"]


def test_predict(run: Run, exported: Path, products: Path, tmp_path: Path) -> None:
    """One image or a folder, a line each; the exit code tells good from bad."""
    folder = products / "stripes" / "test"
    code, lines, _ = run("predict", exported, folder / "good" / "000.png")
    assert (code, len(lines), lines[0]["pred_label"]) == (0, 1, False)
    code, lines, _ = run("predict", exported, folder, "--output", tmp_path / "maps")
    assert code == 3
    assert [line["pred_label"] for line in lines] == ["hole" in line["source"] for line in lines]
    assert len({line["overlay"] for line in lines}) == len(lines) == 12
    for line in lines:
        overlay, image = (np.asarray(Image.open(line[key]).convert("RGB"), int) for key in ("overlay", "source"))
        assert overlay.shape == image.shape
        assert (np.abs(overlay - image).max() > 50) or not line["pred_label"]


def test_predict_goes_on_after_a_broken_image(run: Run, bundle: Path, products: Path, tmp_path: Path) -> None:
    """The rest of the folder is judged; "could not be judged" counts above anomalous; alone, it is an error."""
    folder = tmp_path / "images"
    shutil.copytree(products / "stripes" / "test" / "hole", folder)
    count = len(list(folder.iterdir()))
    broken = folder / "000_broken.png"
    broken.write_bytes(b"no image")
    (folder / "._hidden.png").write_bytes(b"as some file systems leave it")
    code, lines, _ = run("predict", bundle, folder)
    assert code == 4
    assert [line["source"] for line in lines if "error" in line] == [str(broken)]
    assert sum("pred_label" in line for line in lines) == count
    code, _, errors = run("predict", bundle, broken)
    assert (code, str(broken) in errors) == (1, True)


def test_predict_images_of_any_name(exported: Path, products: Path, tmp_path: Path) -> None:
    """Lines say where images and heat maps are, in a process whose output knows ASCII alone."""
    folder = tmp_path / "images"
    folder.mkdir()
    starts = ["a", "A", "with space", "two\nlines", "prüfung", "部品", "byte\udcff", "n" * 251]
    names = {f"{start}.png" for start in starts} | {"a.jpg.png", "a.png.png", "m" * 251 + ".jpg"}
    image = products / "stripes" / "test" / "good" / "000.png"
    for name in names:
        shutil.copy(image, folder / name)
    Image.open(image).save(folder / "a.jpg")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    arguments = ["predict", exported, folder, "--output", tmp_path / "maps"]
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=False, env=environment)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["source"] for line in lines} == {str(folder / name) for name in (*names, "a.jpg")}, done.stderr
    assert {line["overlay"] for line in lines} == set(map(str, (tmp_path / "maps").iterdir()))
    assert len({line["overlay"] for line in lines}) == len(lines) == len(names) + 1
    code = subprocess.run([*COMMAND, "predict", exported, folder / "byte\udcff.png"], capture_output=True, check=False)
    assert code.returncode == 0, code.stderr


def test_no_decision_is_not_good(run: Run, without_bank: Path, products: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that could not be decided has an exit code of its own."""
    from openvino_export.detector import EdgeDetector

    undecided = Prediction(0.5, None, np.zeros((4, 4), np.float32), None, None)
    monkeypatch.setattr(EdgeDetector, "predict", lambda *_: undecided)
    assert run("predict", without_bank, products / "stripes" / "test" / "good" / "000.png")[0] == 4
