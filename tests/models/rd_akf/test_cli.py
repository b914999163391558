# SPDX-License-Identifier: Apache-2.0
"""Tests of training by Anomalib's own command with the config, and in two processes."""

import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import torch
from anomalib.cli.cli import main
from PIL import Image

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
trainer: {max_epochs: 1, limit_train_batches: 1, accelerator: cpu, enable_progress_bar: false}
"""
SCRIPT = """
    import sys

    from anomalib.data import Folder
    from anomalib.engine import Engine
    from anomalib.models import RdAkf
    from anomalib.pre_processing import PreProcessor
    from lightning.pytorch import seed_everything
    from torchvision.transforms.v2 import Resize

    class Printing(RdAkf):
        def on_train_epoch_end(self):
            if self.global_rank == 0:
                print("loss", float(self.trainer.callback_metrics["train_loss"]), flush=True)

        def on_train_end(self):
            super().on_train_end()
            moments = [buffer.mean() for name, buffer in self.model.student.named_buffers() if "running" in name]
            print(f"statistics={float(sum(moments))};", flush=True)

    if __name__ == "__main__":
        seed_everything(0)  # Anomalib's command takes a seed, but does not set it
        processes = int(sys.argv[1])
        model = Printing(
            "resnet18",
            pre_trained=False,
            evaluator=False,
            visualizer=False,
            pre_processor=PreProcessor(Resize((64, 64))),
        )
        data = Folder(
            "copies",
            normal_dir="good",
            root=".",
            train_batch_size=8 // processes,
            num_workers=0,
            val_split_mode="none",
            test_split_mode="none",
        )
        Engine(
            max_epochs=3,
            accelerator="cpu",
            strategy="ddp" if processes > 1 else "auto",
            devices=processes,
            logger=False,
            enable_progress_bar=False,
        ).fit(model, datamodule=data)
"""


def test_the_command_with_the_config(products: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second file changes only what it names."""
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(SMALL, encoding="utf-8")
    args = ["train", "--config", str(CONFIG), "--config", "small.yaml"]
    args += ["--data.root", str(products), "--data.category", "stripes", "--data.num_workers", "0"]
    monkeypatch.setattr(sys, "argv", ["anomalib", *args])
    main()
    (path,) = tmp_path.glob("results/**/model.ckpt")
    assert torch.load(path, weights_only=True)["hyper_parameters"]["backbone"] == "resnet18"


@pytest.mark.slow
def test_two_processes_learn_like_one(tmp_path: Path) -> None:
    """With the same global batch, the losses agree, and so do the statistics of batch normalisation at the end."""
    (tmp_path / "script.py").write_text(dedent(SCRIPT), encoding="utf-8")
    (tmp_path / "good").mkdir()
    # The statistics of batch normalisation are those of a process, so all images are the same here.
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for number in range(8):
        Image.fromarray(pixels).save(tmp_path / "good" / f"{number}.png")
    losses, ends = [], []
    for processes in ("1", "2"):
        command = [sys.executable, "script.py", processes]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        losses.append([float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("loss ")])
        ends.append([float(value) for value in re.findall(r"statistics=([\d.]+);", done.stdout)])
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[0][2] < losses[0][0]
    assert [len(values) for values in ends] == [1, 2], done.stdout
    assert ends[1][0] == ends[1][1]
    assert ends[1][0] == pytest.approx(ends[0][0], rel=1e-3)
