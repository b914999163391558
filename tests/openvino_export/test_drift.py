# SPDX-License-Identifier: Apache-2.0
"""Tests of the monitor that tells that good parts no longer look as learned."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from openvino_export import drift
from openvino_export.cli import main
from openvino_export.decision import Prediction
from openvino_export.drift import PARTS_UNTIL_FALSE_WARNING, DriftMonitor
from openvino_export.memory.memory_bank import MemoryBank


def part(score: float, variant: str | None = "a", is_sure: bool = True) -> Prediction:
    """Return a verdict on a part."""
    return Prediction(score, score > 0.5, np.empty(0), None, variant, is_sure)


@pytest.fixture
def make_monitor(monkeypatch: pytest.MonkeyPatch):  # noqa: ANN201
    """Return a function that makes a monitor of a variant whose good images have these scores."""

    def make(known: np.ndarray) -> DriftMonitor:
        bank = MemoryBank(1)
        bank.variants = {"a": None, "b": None}  # type: ignore[dict-item]  # only the names are looked at
        monkeypatch.setattr(drift, "good_scores", lambda *_: known)
        return DriftMonitor(bank)

    return make


def spoke_at(monitor: DriftMonitor, scores: np.ndarray) -> list[int]:
    """Return at which parts the monitor speaks."""
    return [number for number, score in enumerate(scores.tolist()) if monitor.add(part(score))]


def test_it_hardly_ever_speaks_without_drift(make_monitor) -> None:  # noqa: ANN001
    """Of a hundred sequences of 400 parts, about four may: the limit is the mean number of parts until it does."""
    rng = np.random.default_rng(0)
    spoken = sum(bool(spoke_at(make_monitor(rng.beta(2, 9, 64)), rng.beta(2, 9, 400))) for _ in range(100))
    assert spoken <= 100 * 400 / PARTS_UNTIL_FALSE_WARNING + 6


def test_it_speaks_once_before_there_are_many_false_alarms(make_monitor) -> None:  # noqa: ANN001
    """Scores rise slowly; it speaks while at most one in ten parts is called anomalous."""
    rng = np.random.default_rng(1)
    for _ in range(10):
        rising = rng.beta(2, 9, 600) + np.linspace(0, 0.5, 600)
        found = spoke_at(make_monitor(rng.beta(2, 9, 64)), rising)
        assert len(found) == 1
        assert (rising[max(0, found[0] - 50) : found[0] + 1] > 0.5).mean() < 0.1


def test_what_says_nothing(make_monitor) -> None:  # noqa: ANN001
    """Anomalous parts, parts of a variant that is not sure, and scores without a variant leave the evidence alone."""
    monitor = make_monitor(np.linspace(0.1, 0.3, 30))
    for prediction in (part(0.9), part(0.45, is_sure=False), part(0.45, variant=None)):
        assert not any(monitor.add(prediction) for _ in range(50))
    assert monitor.evidence("a") == 0
    assert not monitor.add(part(0.45))
    assert monitor.evidence("a") > 0
    assert monitor.evidence("b") == 0


def test_equal_scores_are_no_drift(make_monitor) -> None:  # noqa: ANN001
    """As those of an image that is shown again and again."""
    assert not spoke_at(make_monitor(np.full(30, 0.2)), np.full(500, 0.2))


def test_watch_tells(bundle: Path, products: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Parts that get darker are named once, in a line and in words."""
    folder = tmp_path / "camera"
    folder.mkdir()
    good = sorted((products / "stripes" / "train" / "good").glob("*.png"))
    for number in range(160):
        with Image.open(good[number % len(good)]) as image:
            pixels = np.asarray(image).astype(float) * (1 - 0.0006 * max(0, number - 20))
            noise = np.random.default_rng(number).normal(0, 0.4, pixels.shape)
            Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8)).save(folder / f"{number:03}.png")
    assert main(["watch", str(bundle), str(folder), "--interval", "0.05", "--idle", "0.5"]) in {0, 3}
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert len(lines) == 160
    (told,) = [number for number, line in enumerate(lines) if line.get("drift")]
    assert told > 20
    assert "Good parts of stripes no longer look as learned" in captured.err
    shutil.rmtree(folder)
