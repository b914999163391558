# SPDX-License-Identifier: Apache-2.0
"""Commands that judge images."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from openvino_export.cli import main
from openvino_export.decision import Prediction

COMMAND = [sys.executable, "-c", "import sys; from openvino_export.cli import main; sys.exit(main(sys.argv[1:]))"]
Run = Callable[..., tuple[int, list[dict[str, Any]], str]]
SetClock = Callable[..., Any]


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


def test_watch(run: Run, set_clock: SetClock, bundle: Path, products: Path, tmp_path: Path) -> None:
    """Each new image is judged once, when it is complete; a broken one is reported; learning is taken up."""
    folder = tmp_path / "camera"
    folder.mkdir()
    shutil.copy(products / "stripes" / "test" / "good" / "000.png", folder / "a.png")
    (folder / "broken.png").write_text("no image")
    image = (products / "dots" / "test" / "good" / "000.png").read_bytes()

    def learn() -> None:
        main(["learn", str(bundle), str(products / "dots" / "train" / "good"), "--variant", "dots"])

    def write(part: bytes) -> None:
        with (folder / "b.png").open("ab") as file:
            file.write(part)

    step = len(image) // 8 + 1
    parts = [image[first : first + step] for first in range(0, len(image), step)]
    clock = set_clock(None, None, learn, *(partial(write, part) for part in parts))
    code, lines, _ = run("watch", bundle, folder, "--idle", "0.95", "--interval", "0.1")
    assert code == 4  # for the broken one
    assert not clock.events
    assert clock.now == pytest.approx(0.1 * (3 + len(parts) + 1 + 10))  # ten looks after the one that judges b.png
    lines = [line for line in lines if "source" in line]
    assert [Path(line["source"]).name for line in lines] == ["a.png", "broken.png", "b.png"]
    assert "cannot be read" in lines[1]["error"]
    assert [line.get("variant") for line in lines] == ["stripes", None, "dots"]


def test_watch_is_interrupted(run: Run, set_clock: SetClock, exported: Path, tmp_path: Path) -> None:
    """Without a time to be idle, it goes on until the user interrupts it, with no traceback."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    set_clock(*[None] * 20, interrupt)
    assert run("watch", exported, tmp_path) == (130, [], "")


def test_watch_goes_on_after_a_kill(
    run: Run, set_clock: SetClock, exported: Path, products: Path, tmp_path: Path
) -> None:
    """Images that were judged are not judged again; those that came meanwhile, or have changed, are."""
    folder, images = tmp_path / "camera", sorted((products / "stripes" / "test").glob("*/*.png"))
    (folder / "deep").mkdir(parents=True)
    shutil.copy(images[0], folder / "a.png")
    arguments = ["watch", exported, folder, "--output", tmp_path / "maps", "--interval", "0.1"]
    record = tmp_path / "maps" / "predictions.jsonl"

    worker = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert worker.stdout is not None
        first = [json.loads(worker.stdout.readline())]
        shutil.copy(images[1], folder / "deep" / "a.png")
        first.append(json.loads(worker.stdout.readline()))
        deadline = time.monotonic() + 10
        while record.read_text().count("\n") < 2 and time.monotonic() < deadline:
            time.sleep(0.01)  # the line is printed before it is written down
    finally:
        worker.kill()
        worker.wait()
    with record.open("a") as file:
        file.write('{"source": "cut')  # as by a power failure
    shutil.copy(images[2], folder / "c.png")
    shutil.copy(images[-1], folder / "a.png")
    set_clock()
    code, second, _ = run(*arguments, "--idle", "1")
    names = [[str(Path(line["source"]).relative_to(folder)) for line in lines] for lines in (first, second)]
    assert names == [["a.png", "deep/a.png"], ["a.png", "c.png"]]
    assert second[0]["pred_label"] is True
    assert code == 3
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.glob("maps/**/*.png")} == {
        "maps/a.png",
        "maps/deep/a.png",
        "maps/c.png",
    }
    assert run(*arguments, "--idle", "0.5")[:2] == (0, [])


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


def test_watch_keeps_a_verdict_whose_heat_map_fails(
    run: Run, set_clock: SetClock, bundle: Path, products: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image is taken away just then: the verdict is recorded and printed, and it goes on."""
    from openvino_export.detector import EdgeDetector

    folder, maps = tmp_path / "camera", tmp_path / "maps"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        shutil.copy(products / "stripes" / "test" / "good" / "000.png", folder / name)
    judge = EdgeDetector.predict

    def take_away(self: EdgeDetector, image: Path) -> Any:  # noqa: ANN401
        result = judge(self, image)
        if image.name == "a.png":
            image.unlink()
        return result

    monkeypatch.setattr(EdgeDetector, "predict", take_away)
    set_clock()
    code, lines, errors = run("watch", bundle, folder, "--output", maps, "--idle", "0.5", "--interval", "0.1")
    assert code == 0
    assert [Path(line["source"]).name for line in lines] == ["a.png", "b.png"]
    recorded = [json.loads(line) for line in (maps / "predictions.jsonl").read_text().splitlines()]
    assert [line["pred_label"] for line in recorded] == [False, False]
    assert "a.png was not written" in errors
    assert (maps / "b.png").is_file()
    assert not (maps / "a.png").exists()
