# SPDX-License-Identifier: Apache-2.0
"""The command as a whole: exit codes, messages, and what its start imports."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., tuple[int, list[dict[str, Any]], str]]

# Runs the command with all arguments but the first, and prints which of the modules that the first names it imported.
PROCESS = """
import sys
from openvino_export.cli import main
try:
    code = main(sys.argv[2:])
except SystemExit as end:
    code = end.code
print(*(name for name in sys.argv[1].split(",") if name in sys.modules))
sys.exit(code)
"""


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
        (["parity", "BUNDLE", "BUNDLE", "--reference", "model.ckpt"], "model.ckpt .* use anomalib-ext parity"),
        (["set", "BUNDLE", "--memory_size", "1000000000"], "Unable to allocate .* for an array"),
        (["set", "BUNDLE", "--memory_size", "1000000000000"], "memory_size must be .* below 2.*31"),
    ],
)
def test_errors(run: Run, args: list[str], message: str, bundle: Path) -> None:
    """They are one line, without a traceback."""
    code, lines, errors = run(*(arg.replace("BUNDLE", str(bundle)) for arg in args))
    assert (code, lines) == (1, [])
    assert re.search(message, errors)
    assert "Traceback" not in errors


def test_a_model_without_a_bank(
    run: Run, set_clock: Callable[..., Any], without_bank: Path, products: Path, tmp_path: Path
) -> None:
    """Every command works that has a meaning for it; the others say why they do not."""
    images = products / "stripes" / "test" / "good"
    code, lines, _ = run("predict", without_bank, images, "--output", tmp_path / "maps")
    assert (code, len(lines)) == (3 if any(line["pred_label"] for line in lines) else 0, 6)
    assert all(Path(line["overlay"]).is_file() and line["variant"] is None for line in lines)
    code, lines, _ = run("parity", without_bank, images)
    assert (code, lines[0]["same"], lines[0]["largest_difference_of_pred_score"]) == (0, True, 0)
    code, lines, _ = run("benchmark", without_bank, "--devices", "CPU", "--seconds", "0.1")
    assert (code, len(lines)) == (0, 2)
    set_clock()
    code, lines, _ = run("watch", without_bank, images, "--output", tmp_path / "maps", "--idle", "2")
    assert len(lines) == 6
    for command, message in ((["learn", images], "no memory bank"), (["undo"], "no previous state")):
        code, _, errors = run(command[0], without_bank, *command[1:])
        assert code == 1
        assert message in errors


def test_as_a_command(exported: Path, products: Path) -> None:
    """The exit code and the lines reach a shell; neither torch nor anomalib is imported."""
    image = products / "stripes" / "test" / "hole" / "000.png"
    code, lines, imported, errors = in_a_process("torch,anomalib,lightning", "predict", exported, image)
    assert (code, imported, errors) == (3, "", "")
    assert [json.loads(line)["pred_label"] for line in lines] == [True]


@pytest.mark.parametrize(("args", "expected"), [(["--help"], 0), (["learn"], 2)])
def test_help_comes_at_once(args: list[str], expected: int) -> None:
    """It imports none of what the commands need, and neither does a refusal of wrong arguments."""
    modules = "numpy,openvino,faiss,PIL,cv2,safetensors,openvino_export.detector"
    code, lines, imported, errors = in_a_process(modules, *args)
    assert (code, imported) == (expected, "")
    assert "usage:" in "".join([*lines, errors])


def in_a_process(modules: str, *args: object) -> tuple[int, list[str], str, str]:
    """Run the command in a process of its own; return exit code, lines, which modules it imported, and errors."""
    environment = {key: value for key, value in os.environ.items() if key != "OPENBLAS_NUM_THREADS"}
    command = [sys.executable, "-c", PROCESS, modules, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    *lines, imported = done.stdout.splitlines()
    return done.returncode, lines, imported, done.stderr
