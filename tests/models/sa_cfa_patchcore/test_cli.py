# SPDX-License-Identifier: Apache-2.0
"""Tests of Anomalib's own command with the model."""

import sys
from pathlib import Path

import pytest
import torch
from anomalib.cli.cli import main

CONFIG = Path(__file__).parents[3] / "configs/model/sa_cfa_patchcore.yaml"
QUIET = ["--seed_everything", "0", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]


def test_train_and_predict(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The shipped settings work with another backbone; the checkpoint judges a folder of images."""
    monkeypatch.chdir(tmp_path)

    def command(*args: str) -> None:
        monkeypatch.setattr(sys, "argv", ["anomalib", *args])
        main()

    backbone = ["--model.backbone", "tf_efficientnet_lite0", "--model.layers", "[blocks.2, blocks.4]"]
    data = ["--data", "anomalib_ext.data.PhotoVariants", "--data.root", "photos", "--data.category", "cell"]
    command("train", "--config", str(CONFIG), *backbone, *data, *QUIET)
    assert "image_AUROC" in "".join(capfd.readouterr())
    (path,) = tmp_path.glob("results/SaCfaPatchCore/**/model.ckpt")
    assert torch.load(path, weights_only=True)["state_dict"]["model.memory_bank"].shape[1] == 15
    model = ["--model", "SaCfaPatchCore", *backbone, "--ckpt_path", str(path)]
    command("predict", *model, "--data", "photos/cell/test/stain", *QUIET)
    assert len(list(tmp_path.glob("results/SaCfaPatchCore/**/images/**/*.png"))) >= 4
