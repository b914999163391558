# SPDX-License-Identifier: Apache-2.0
"""Tests of what loggers are told of drift."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from anomalib.models import ContinualPatchCore
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

Make = Callable[..., Any]


class Told(CSVLogger):
    """A logger that remembers what it was told of drift."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.drift: dict[str, float] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Remember."""
        super().log_metrics(metrics, step)
        self.drift |= {name: value for name, value in metrics.items() if name.startswith("drift/")}


def images(folder: Path, files: list[Path], rises: float) -> Path:
    """Write each image several times, brighter and brighter."""
    folder.mkdir()
    for number in range(80):
        with Image.open(files[number % len(files)]) as image:
            pixels = np.asarray(image.convert("RGB"), np.float32) + rises * number
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{number:03}.png")
    return folder


def test_loggers_are_told(
    model: ContinualPatchCore,
    make_engine: Make,
    files: Make,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Parts that grow brighter and brighter are warned of, and the value passes 1; parts as learned are not."""
    model.set_decision(false_alarm_rate=0.001)  # accept what drifts
    values = []
    for name, rises in (("same", 0.0), ("brighter", 0.05)):
        told = Told(tmp_path / f"{name}_log")
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            folder = images(tmp_path / name, files("stripes", "test/good"), rises)
            make_engine(logger=told).predict(model, data_path=folder)
        values.append(told.drift["drift/stripes"])
        assert ("Good images of stripes no longer look as learned" in caplog.text) == (name == "brighter")
        assert told.drift["drift/dots"] == 0
    assert values[0] < 1 < values[1]
    model.post_processor = None
    told = Told(tmp_path / "without")
    make_engine(logger=told).predict(model, data_path=tmp_path / "same")
    assert told.drift == {}
