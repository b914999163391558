# SPDX-License-Identifier: Apache-2.0
"""Where images come from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from openvino_export import EdgeDetector

Run = Callable[..., tuple[int, list[dict[str, Any]], str]]


def test_video(run: Run, exported: Path, products: Path, tmp_path: Path) -> None:
    """Its frames are judged in order, as the same pictures are."""
    cv2 = pytest.importorskip("cv2")
    images = sorted((products / "stripes" / "test").glob("*/00[01].png"))
    video = tmp_path / "line.avi"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter_fourcc(*"FFV1"), 10, (64, 64))  # without loss
    for path in images:
        writer.write(cv2.imread(str(path)))
    writer.release()
    for options, count in ((["--output", tmp_path / "maps"], 4), (["--frames", "2"], 2)):
        code, lines, errors = run("predict", exported, video, *options)
        expected = EdgeDetector(exported).predict(images[:count])
        assert [line["pred_label"] for line in lines] == [result.pred_label for result in expected]
        assert [line["source"] for line in lines] == [f"line_{number:06}" for number in range(count)]
        for line, result in zip(lines, expected, strict=True):
            assert line["pred_score"] == pytest.approx(result.pred_score, abs=1e-3)
        assert code == (3 if any(line["pred_label"] for line in lines) else 0), errors
    overlays = sorted((tmp_path / "maps").iterdir())
    assert [path.name for path in overlays] == [f"line_{number:06}.png" for number in range(4)]
