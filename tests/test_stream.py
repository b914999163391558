# SPDX-License-Identifier: Apache-2.0
"""The command ``anomalib-ext stream`` in a real process."""

import csv
import subprocess
import sys
from pathlib import Path

from anomalib.models import ContinualPatchCore

CONFIG = """
model: {class_path: ContinualPatchCore, init_args: {memory_size: 300}}
data:
  datamodules:
    - {class_path: anomalib_ext.data.PhotoVariants, init_args: {category: cell, val_split_mode: from_test, seed: 0}}
    - {class_path: anomalib_ext.data.PhotoVariants, init_args: {category: retina, val_split_mode: from_test, seed: 0}}
results_dir: results
"""


def test_stream_learns_evaluates_and_draws(tmp_path: Path) -> None:
    """Every known variant is tested after each step, and the last step leaves pictures and a checkpoint."""
    (tmp_path / "config.yaml").write_text(CONFIG)
    command = [str(Path(sys.executable).with_name("anomalib-ext")), "stream", "--config", "config.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "image_AUROC of each variant after each step" in done.stdout
    with (tmp_path / "results" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["variant"]) for row in rows] == [("1", "cell"), ("2", "cell"), ("2", "retina")]
    assert all(float(row["image_AUROC"]) > 0.6 for row in rows)
    for variant in ("cell", "retina"):
        assert len(list((tmp_path / "results" / "images" / variant).rglob("*.png"))) == 12  # half is for validation
    checkpoints = list((tmp_path / "results").rglob("retina/v0/weights/lightning/model.ckpt"))
    assert list(ContinualPatchCore.load_from_checkpoint(checkpoints[0]).model.bank.variants) == ["cell", "retina"]


def test_without_anomalib_the_error_names_the_extra() -> None:
    """On an edge PC the command says what it needs."""
    code = "import sys; sys.modules['anomalib'] = None; from anomalib_ext.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "anomalib-ext[train]" in done.stderr
