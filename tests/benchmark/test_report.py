# SPDX-License-Identifier: Apache-2.0
"""Tables and plots of the benchmark."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anomalib_ext.benchmark.learners import Joint
from anomalib_ext.benchmark.report import _summary, write_report
from anomalib_ext.benchmark.results import Row

PRODUCTS = ("stripes", "dots", "checks")


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """Return rows of learners in one order, and of some mixed and of few images."""
    rng = np.random.default_rng(0)
    learners = (f"{Joint.title}, 300", "reservoir, 300", "reservoir, 100")
    streams = [
        Row(stream, 1, learner, step, learned, task, *rng.uniform(0.5, 1, 6), *rng.uniform(1, 100, 4))
        for stream in ("products", "mixed")
        for learner in (learners if stream == "products" else learners[:2])
        for step, learned in enumerate(PRODUCTS, start=1)
        for task in PRODUCTS[:step]
    ]
    few = [
        Row("few-shot", 1, learner, count, task, task, *rng.uniform(0.5, 1, 6), *rng.uniform(1, 100, 4))
        for learner in learners[:2]
        for count in (1, 2)
        for task in PRODUCTS
    ]
    return [*streams, *few]


def test_report(rows: list[Row], tmp_path: Path) -> None:
    """Tables with the metrics of the rows, and plots that can be read."""
    write_report(rows, tmp_path)
    text = (tmp_path / "report.md").read_text()
    last = [row.image_AUROC for row in rows if (row.stream, row.learner, row.step) == ("products", "reservoir, 300", 3)]
    own = [row for row in rows if (row.stream, row.learner) == ("products", "reservoir, 300")]
    best = [max(row.image_AUROC for row in own if row.task == task and row.step < 3) for task in PRODUCTS[:2]]
    line = next(line for line in text.splitlines() if line.startswith("| reservoir, 300 |"))
    assert line.split(" | ")[1] == f"{np.mean(last):.4f}"
    assert line.split(" | ")[3] == f"{np.mean(np.subtract(best, last[:2])):.4f}"
    pictures = [line.split("(")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert {"products_image_AUROC.png", "products_curves.png", "mixed_pixel_AUPRO.png", "few_shot.png"} <= {*pictures}
    for picture in pictures:
        with Image.open(tmp_path / picture) as image:
            assert min(image.size) > 200
            assert len(image.convert("RGB").getcolors(2**24)) > 20  # something is drawn


def test_without_masks(rows: list[Row], tmp_path: Path) -> None:
    """Without pixel metrics there are no tables and plots of them."""
    nan = float("nan")
    write_report([replace(row, pixel_AUROC=nan, pixel_AUPRO=nan) for row in rows if row.stream == "products"], tmp_path)
    assert not list(tmp_path.glob("products_pixel*"))
    assert (tmp_path / "products_image_AUROC.png").exists()


def test_gap_is_to_the_largest_joint_bank() -> None:
    """Where there is none as large; and empty in an order without joint selection."""

    def row(learner: str, order: int, value: float) -> Row:
        return Row("products", order, learner, 1, "a", "a", value, *[0.0] * 9)

    rows = [
        row(f"{Joint.title}, 10000", 1, 0.90),
        row(f"{Joint.title}, 2000", 1, 0.95),
        row("reservoir, 1000", 1, 0.81),
    ]
    last = _summary(rows, "image_AUROC").splitlines()[-1]
    assert last.split("|")[-2].strip() == "0.1000"
    last = _summary([*rows, row("reservoir, 1000", 2, 0.81)], "image_AUROC").splitlines()[-1]
    assert last.split("|")[-2].strip() == ""
