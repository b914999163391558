# SPDX-License-Identifier: Apache-2.0
"""Tests of Anomalib's own command with the model, by its console script and, for the cheaper commands, its main."""

import csv
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from anomalib.cli.cli import main

CONFIGS = Path(__file__).parents[3] / "configs"
MODEL = ["--model", "ContinualPatchCore", "--model.memory_size", "2000"]
DATA = ["--data", "anomalib_ext.data.PhotoVariants", "--data.root", "photos", "--data.category"]
QUIET = ["--seed_everything", "0", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]


def script(folder: Path, *args: str) -> str:
    """Run the console script in a folder, and return what it prints."""
    path = Path(sysconfig.get_path("scripts")) / "anomalib"
    done = subprocess.run([path, *args], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def command(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that does what the console script does, in this process."""
    monkeypatch.chdir(trained)

    def run(*args: str) -> None:
        monkeypatch.setattr(sys, "argv", ["anomalib", *args])
        main()

    return run


def variants(checkpoint: Path) -> list[str]:
    """Return what a checkpoint knows."""
    state = torch.load(checkpoint, weights_only=True)["state_dict"]["model._extra_state"]
    return [variant["name"] for variant in state["plain"]["variants"]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which the command has learned one category, and another on top of it."""
    folder = tmp_path_factory.mktemp("cli")
    script(folder, "train", *MODEL, *DATA, "cell", *QUIET)
    (folder / "results/ContinualPatchCore/PhotoVariants/cell/v0/weights/lightning/model.ckpt").rename(folder / "1.ckpt")
    printed = script(folder, "train", *MODEL, *DATA, "moon", *QUIET, "--ckpt_path", "1.ckpt")
    assert "image_AUROC" in printed
    assert "Testing what was learned on top of" in printed
    (folder / "results/ContinualPatchCore/PhotoVariants/moon/v0/weights/lightning/model.ckpt").rename(folder / "2.ckpt")
    return folder


def test_training_on_top_of_a_checkpoint(trained: Path) -> None:
    """The new checkpoint knows both, the old one is untouched."""
    assert variants(trained / "1.ckpt") == ["cell"]
    assert variants(trained / "2.ckpt") == ["cell", "moon"]


def test_prediction(trained: Path) -> None:
    """The script judges a folder of images with a checkpoint, and shows them."""
    folder = "photos/cell/test/stain"
    script(trained, "predict", *MODEL[:2], "--data", folder, "--ckpt_path", "2.ckpt", *QUIET)
    assert len(list(trained.glob("results/ContinualPatchCore/**/images/**/*.png"))) >= 4


@pytest.mark.parametrize("category", ["cell", "moon"])
def test_test(category: str, command: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    """Both categories are judged well with the last checkpoint."""
    command("test", *MODEL, *DATA, category, *QUIET, "--model.visualizer", "false", "--ckpt_path", "2.ckpt")
    values = dict(line.strip("│ ").split("│") for line in capsys.readouterr().out.splitlines() if "│" in line)
    results = {name.strip(): float(value) for name, value in values.items()}
    assert results["image_AUROC"] > 0.9
    assert results["image_F1Score"] > 0.8


def test_benchmark(command: Callable[..., None], trained: Path) -> None:
    """Anomalib's benchmark runs the model by its name alone."""
    (trained / "benchmark.yaml").write_text(
        """
        accelerator: cpu
        benchmark:
          seed: 0
          model: {class_path: ContinualPatchCore, init_args: {memory_size: 2000}}
          data: {class_path: MVTecAD, init_args: {root: photos, category: cell, num_workers: 0}}
        """,
    )
    command("benchmark", "--config", "benchmark.yaml")
    (table,) = trained.glob("runs/benchmark/*/results.csv")
    (row,) = csv.DictReader(table.open())
    assert row["model.class_path"] == "ContinualPatchCore"
    assert float(row["image_AUROC"]) > 0.9


def test_fit(command: Callable[..., None], trained: Path) -> None:
    """So does ``fit`` learn on top of a checkpoint."""
    command("fit", *MODEL, *DATA, "brick", *QUIET, "--ckpt_path", "2.ckpt", "--trainer.limit_train_batches", "1")
    (path,) = trained.glob("results/ContinualPatchCore/PhotoVariants/brick/v0/**/*.ckpt")
    assert variants(path) == ["cell", "moon", "brick"]


def test_configs(command: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    """The files that the README names go together."""
    files = ("model/continual_patch_core_edge.yaml", "data/folder.yaml")
    with pytest.raises(SystemExit) as end:
        command("train", *(word for file in files for word in ("--config", str(CONFIGS / file))), "--print_config")
    printed = capsys.readouterr().out
    assert end.value.code == 0
    assert "precision: float16" in printed
    assert "normal_dir: train/good" in printed


def test_export(command: Callable[..., None], trained: Path) -> None:
    """A checkpoint is exported."""
    command("export", *MODEL[:2], "--export_type", "torch", "--ckpt_path", "1.ckpt", "--export_root", "exported")
    model = torch.load(trained / "exported/weights/torch/model.pt", weights_only=False)["model"]
    assert list(model.model.bank.variants) == ["cell"]
