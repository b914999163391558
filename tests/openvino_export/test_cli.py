# SPDX-License-Identifier: Apache-2.0
"""Tests of the command that people at the line use."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from openvino_export import EdgeDetector
from openvino_export.cli import main

COMMAND = [sys.executable, "-c", "import sys; from openvino_export.cli import main; sys.exit(main(sys.argv[1:]))"]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:  # noqa: ANN401  # a function
    """Return a function that runs the command and returns its exit code, its lines, and what it says beside."""

    def call(*args: object) -> tuple[int, list[dict[str, Any]], str]:
        code = main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return code, [json.loads(line) for line in captured.out.splitlines() if line.startswith("{")], captured.err

    return call


def test_predict(run: Any, exported: Path, products: Path, tmp_path: Path) -> None:  # noqa: ANN401
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


def test_video(exported: Path, products: Path, tmp_path: Path) -> None:
    """Its frames are judged in order, as the same pictures are, by the command in a process of its own."""
    cv2 = pytest.importorskip("cv2")
    images = sorted((products / "stripes" / "test").glob("*/00[01].png"))
    video = tmp_path / "line.avi"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter_fourcc(*"FFV1"), 10, (64, 64))  # without loss
    for path in images:
        writer.write(cv2.imread(str(path)))
    writer.release()
    for options, count in ((["--output", tmp_path / "maps"], 4), (["--frames", "2"], 2)):
        done = subprocess.run(
            [*COMMAND, "predict", exported, video, *options], capture_output=True, text=True, check=False
        )
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        expected = EdgeDetector(exported).predict(images[:count])
        assert [line["pred_label"] for line in lines] == [result.pred_label for result in expected]
        assert [line["source"] for line in lines] == [f"line_{number:06}" for number in range(count)]
        for line, result in zip(lines, expected, strict=True):
            assert line["pred_score"] == pytest.approx(result.pred_score, abs=1e-3)
        assert done.returncode == (3 if any(line["pred_label"] for line in lines) else 0), done.stderr
    overlays = sorted((tmp_path / "maps").iterdir())
    assert [path.name for path in overlays] == [f"line_{number:06}.png" for number in range(4)]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["predict", "BUNDLE", "gone.png"], "no image gone.png"),
        (["predict", "BUNDLE", "gone"], "no image, folder or video gone"),
        (["predict", "gone", "image.png"], "no bundle folder gone"),
        (["predict", "BUNDLE", "BUNDLE"], "holds no images"),
        (["predict", "BUNDLE", "BUNDLE/model.bin"], "OpenCV|No frame"),
        (["predict", "BUNDLE", "image.png", "--device", "TPU"], "no device TPU"),
        (["undo", "BUNDLE"], "no previous state"),
        (["predict", "BUNDLE", "99"], "no camera 99"),
        (["predict", "BUNDLE", "BUNDLE/model.bin", "--frames", "0"], "frames must be at least 1"),
        (["predict", "BUNDLE", "image.png", "--precision", "int3"], "in int3: .*Supported values: bf16"),
        (["predict", "BUNDLE", "BUNDLE", "--output", "BUNDLE/maps"], "would mix with the images"),
        (["predict", "BUNDLE", "BUNDLE/a.png", "--output", "BUNDLE"], "would mix with the images"),
        (["watch", "BUNDLE", "BUNDLE", "--output", "BUNDLE/maps"], "would mix with the images"),
        (["watch", "BUNDLE", "gone"], "no folder gone"),
        (["parity", "BUNDLE", "BUNDLE", "--reference", "gone.onnx"], "no model gone.onnx"),
    ],
)
def test_errors(run: Any, args: list[str], message: str, bundle: Path) -> None:  # noqa: ANN401
    """They are one line, without a traceback."""
    code, lines, errors = run(*(arg.replace("BUNDLE", str(bundle)) for arg in args))
    assert (code, lines) == (1, [])
    assert re.search(message, errors)
    assert "Traceback" not in errors


def test_learn_and_undo(run: Any, bundle: Path, products: Path, tmp_path: Path) -> None:  # noqa: ANN401
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


def test_parity(run: Any, exported: Path, bundle: Path, products: Path) -> None:  # noqa: ANN401
    """The runtime gives what model.xml gives; a bundle that has learned more does not."""
    code, lines, _ = run("parity", exported, products / "dots" / "test")
    assert (code, lines[0]["same"], lines[0]["images"], lines[0]["different_labels"]) == (0, True, 12, 0)
    assert lines[0]["largest_difference_of_pred_score"] < 1e-3
    run("learn", bundle, products / "dots" / "train" / "good", "--variant", "dots")
    code, lines, _ = run("parity", bundle, products / "dots" / "test")
    assert code == 0
    code, lines, _ = run("parity", bundle, products / "dots" / "test", "--reference", exported / "model.xml")
    assert (code, lines[0]["same"]) == (3, False)
    assert lines[0]["different_labels"] > 0


def test_parity_with_a_checkpoint(
    run: Any,  # noqa: ANN401
    make_model: Any,  # noqa: ANN401
    make_data: Any,  # noqa: ANN401
    make_engine: Any,  # noqa: ANN401
    products: Path,
    tmp_path: Path,
) -> None:
    """Torch gives the same, where it is installed."""
    engine, model = make_engine(), make_model()
    engine.fit(model, datamodule=make_data())
    engine.trainer.save_checkpoint(tmp_path / "model.ckpt")
    folder = engine.export(model, "openvino", tmp_path).parent
    code, lines, _ = run("parity", folder, products / "dots" / "test", "--reference", tmp_path / "model.ckpt")
    assert (code, lines[0]["same"]) == (0, True)


def test_benchmark(run: Any, exported: Path, products: Path) -> None:  # noqa: ANN401
    """A line for each device, precision and hint."""
    options = ["--devices", "CPU", "--precisions", "[f32, bf16]", "--seconds", "0.3"]
    for source in ([], ["--source", products / "dots" / "test"]):
        code, lines, _ = run("benchmark", exported, *source, *options)
        assert code == 0
        assert [(line["device"], line["precision"], line["hint"]) for line in lines] == [
            ("CPU", precision, hint) for precision in ("f32", "bf16") for hint in ("LATENCY", "THROUGHPUT")
        ]
        assert all(0 < line["latency_p50_ms"] <= line["latency_p99_ms"] and line["images_per_s"] > 0 for line in lines)


def test_watch(run: Any, bundle: Path, products: Path, tmp_path: Path) -> None:  # noqa: ANN401
    """Each new image is judged once, when it is complete; a broken one is reported; learning is taken up."""
    folder = tmp_path / "camera"
    folder.mkdir()
    shutil.copy(products / "stripes" / "test" / "good" / "000.png", folder / "a.png")
    (folder / "broken.png").write_text("no image")
    image = (products / "dots" / "test" / "good" / "000.png").read_bytes()

    def fill() -> None:
        time.sleep(1.0)
        main(["learn", str(bundle), str(products / "dots" / "train" / "good"), "--variant", "dots"])
        with (folder / "b.png").open("wb", buffering=0) as file:
            for first in range(0, len(image), len(image) // 8 + 1):
                file.write(image[first : first + len(image) // 8 + 1])
                time.sleep(0.05)

    camera = threading.Thread(target=fill)
    camera.start()
    code, lines, _ = run("watch", bundle, folder, "--idle", "6", "--interval", "0.1")
    camera.join()
    assert code == 0
    lines = [line for line in lines if "source" in line]
    assert [Path(line["source"]).name for line in lines] == ["a.png", "broken.png", "b.png"]
    assert "cannot be read" in lines[1]["error"]
    assert [line.get("variant") for line in lines] == ["stripes", None, "dots"]


def test_watch_goes_on_after_a_kill(exported: Path, products: Path, tmp_path: Path) -> None:
    """Images that were judged are not judged again; those that came meanwhile, or have changed, are."""
    folder, images = tmp_path / "camera", sorted((products / "stripes" / "test").glob("*/*.png"))
    (folder / "deep").mkdir(parents=True)
    shutil.copy(images[0], folder / "a.png")
    command = [*COMMAND, "watch", exported, folder, "--output", tmp_path / "maps", "--interval", "0.1"]

    worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert worker.stdout is not None
        first = [json.loads(worker.stdout.readline())]
        shutil.copy(images[1], folder / "deep" / "a.png")
        first.append(json.loads(worker.stdout.readline()))
        time.sleep(0.2)  # the line is printed before it is written down
    finally:
        worker.kill()
        worker.wait()
    record = tmp_path / "maps" / "predictions.jsonl"
    with record.open("a") as file:
        file.write('{"source": "cut')  # as by a power failure
    shutil.copy(images[2], folder / "c.png")
    shutil.copy(images[-1], folder / "a.png")
    done = subprocess.run([*command, "--idle", "1"], capture_output=True, text=True, check=False)
    second = [json.loads(line) for line in done.stdout.splitlines()]
    names = [[str(Path(line["source"]).relative_to(folder)) for line in lines] for lines in (first, second)]
    assert names == [["a.png", "deep/a.png"], ["a.png", "c.png"]]
    assert second[0]["pred_label"] is True
    assert done.returncode == 3
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.glob("maps/**/*.png")} == {
        "maps/a.png",
        "maps/deep/a.png",
        "maps/c.png",
    }
    again = subprocess.run([*command, "--idle", "0.5"], capture_output=True, text=True, check=False)
    assert (again.returncode, again.stdout) == (0, "")


def test_a_model_without_a_bank(run: Any, without_bank: Path, products: Path, tmp_path: Path) -> None:  # noqa: ANN401
    """Every command works that has a meaning for it; the others say why they do not."""
    images = products / "stripes" / "test" / "good"
    code, lines, _ = run("predict", without_bank, images, "--output", tmp_path / "maps")
    assert (code, len(lines)) == (3 if any(line["pred_label"] for line in lines) else 0, 6)
    assert all(Path(line["overlay"]).is_file() and line["variant"] is None for line in lines)
    code, lines, _ = run("parity", without_bank, images)
    assert (code, lines[0]["same"], lines[0]["largest_difference_of_pred_score"]) == (0, True, 0)
    code, lines, _ = run("benchmark", without_bank, "--devices", "CPU", "--seconds", "0.1")
    assert (code, len(lines)) == (0, 2)
    code, lines, _ = run(
        "watch", without_bank, images, "--output", tmp_path / "maps", "--idle", "2", "--interval", "0.05"
    )
    assert len(lines) == 6
    for command, message in ((["learn", images], "no memory bank"), (["undo"], "no previous state")):
        code, _, errors = run(command[0], without_bank, *command[1:])
        assert code == 1
        assert message in errors


def test_as_a_command(exported: Path, products: Path) -> None:
    """The exit code and the lines reach a shell; neither torch nor anomalib is imported."""
    code = (
        "import sys; from openvino_export.cli import main; code = main(sys.argv[1:]); "
        "print(sorted({'torch', 'anomalib', 'lightning'} & set(sys.modules))); sys.exit(code)"
    )
    image = products / "stripes" / "test" / "hole" / "000.png"
    environment = {key: value for key, value in os.environ.items() if key != "OPENBLAS_NUM_THREADS"}
    result = subprocess.run(
        [sys.executable, "-c", code, "predict", exported, image],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert result.returncode == 3, result.stderr
    line, imported = result.stdout.splitlines()
    assert json.loads(line)["pred_label"] is True
    assert imported == "[]"
    assert not result.stderr
