# SPDX-License-Identifier: Apache-2.0
"""Test of Anomalib's own command with the model's config."""

import sys
from pathlib import Path

import pytest
import torch
from anomalib.cli.cli import main

CONFIG = Path(__file__).parents[3] / "configs" / "model" / "crr.yaml"
SMALL = """
model:
  class_path: Crr
  init_args:
    encoder: test_vit
    pre_trained: false
    head_width: 8
    repair_steps: 3
    segment_steps: 2
    visualizer: false
    pre_processor:
      class_path: anomalib.pre_processing.PreProcessor
      init_args:
        transform: {class_path: torchvision.transforms.v2.Resize, init_args: {size: [64, 64]}}
data:
  init_args: {train_batch_size: 4, num_workers: 1}
trainer: {accelerator: cpu}
"""


def test_both_stages_and_a_test(
    products: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """One bar tells the stage and counts the steps; the result is judged and saved."""
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(SMALL, encoding="utf-8")
    args = ["train", "--config", str(CONFIG), "--config", "small.yaml"]
    args += ["--data.root", str(products), "--data.category", "stripes"]
    monkeypatch.setattr(sys, "argv", ["anomalib", *args])
    main()
    printed = "".join(capfd.readouterr())
    bars = [line for line in printed.replace("\r", "\n").splitlines() if "/5 [" in line]
    assert bars[0].startswith("repair:")
    assert bars[-1].startswith("segment: 100%")
    assert "Epoch" not in printed
    assert "image_AUROC" in printed
    (path,) = tmp_path.glob("results/Crr/**/model.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["state_dict"]["model._extra_state"].tolist() == [3, 2]
    assert checkpoint["hyper_parameters"]["mask_ratio"] == pytest.approx(0.4)
