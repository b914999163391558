# SPDX-License-Identifier: Apache-2.0
"""Tests of Anomalib's own command with the model, by its console script."""

import subprocess
import sysconfig
from pathlib import Path

import torch

CONFIG = Path(__file__).parents[3] / "configs/model/sa_cfa_patchcore.yaml"
QUIET = ["--seed_everything", "0", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]


def script(folder: Path, *args: str) -> str:
    """Run the console script in a folder, and return what it prints."""
    path = Path(sysconfig.get_path("scripts")) / "anomalib"
    done = subprocess.run([path, *args], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_train_and_predict(tmp_path: Path) -> None:
    """The shipped settings work with another backbone; the checkpoint judges a folder of images."""
    backbone = ["--model.backbone", "tf_efficientnet_lite0", "--model.layers", "[blocks.2, blocks.4]"]
    data = ["--data", "anomalib_ext.data.PhotoVariants", "--data.root", "photos", "--data.category", "cell"]
    printed = script(tmp_path, "train", "--config", str(CONFIG), *backbone, *data, *QUIET)
    assert "image_AUROC" in printed
    (path,) = tmp_path.glob("results/SaCfaPatchCore/**/model.ckpt")
    assert torch.load(path, weights_only=True)["state_dict"]["model.memory_bank"].shape[1] == 15
    model = ["--model", "SaCfaPatchCore", *backbone, "--ckpt_path", str(path)]
    script(tmp_path, "predict", *model, "--data", "photos/cell/test/stain", *QUIET)
    assert len(list(tmp_path.glob("results/SaCfaPatchCore/**/images/**/*.png"))) >= 4
