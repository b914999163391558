# SPDX-License-Identifier: Apache-2.0
"""Tests of Anomalib's own command with the model: two processes by its console script, one process by its main."""

import csv
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from anomalib.cli.cli import main

CONFIG = Path(__file__).parents[3] / "configs" / "model" / "rd_akf.yaml"
SMALL = """
model:
  class_path: RdAkf
  init_args:
    backbone: resnet18
    pre_trained: false
    visualizer: false
    pre_processor:
      class_path: anomalib.pre_processing.PreProcessor
      init_args:
        transform: {class_path: torchvision.transforms.v2.Resize, init_args: {size: [64, 64]}}
trainer:
  max_epochs: 3
  accelerator: cpu
  enable_progress_bar: false
  log_every_n_steps: 1
  logger: {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: logs}}
"""


def losses(folder: Path) -> list[float]:
    """Return the mean loss of each epoch."""
    (path,) = folder.glob("logs/**/metrics.csv")
    with path.open() as file:
        return [float(row["train_loss_epoch"]) for row in csv.DictReader(file) if row["train_loss_epoch"]]


def test_two_processes_learn_like_one(products: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same global batch, the losses agree but for the statistics of batch normalisation, which are local."""
    args = ["train", "--config", str(CONFIG), "--config", "small.yaml", "--seed_everything", "0"]
    args += ["--data.root", str(products), "--data.category", "stripes", "--data.num_workers", "0"]
    folders = tmp_path / "two", tmp_path / "one"
    for folder in folders:
        folder.mkdir()
        (folder / "small.yaml").write_text(SMALL, encoding="utf-8")
    script = Path(sysconfig.get_path("scripts")) / "anomalib"
    two = [*args, "--data.train_batch_size", "10", "--trainer.strategy", "ddp", "--trainer.devices", "2"]
    done = subprocess.run([script, *two], cwd=folders[0], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "image_AUROC" in done.stdout

    monkeypatch.chdir(folders[1])
    monkeypatch.setattr(sys, "argv", ["anomalib", *args, "--data.train_batch_size", "20"])
    main()
    assert losses(folders[0]) == pytest.approx(losses(folders[1]), rel=0.03)
    # Not the config's: the second file changes only what it names.
    (path,) = folders[1].glob("results/**/model.ckpt")
    assert torch.load(path, weights_only=True)["hyper_parameters"]["weighting"] == "position"
