# SPDX-License-Identifier: Apache-2.0
"""Tests of Anomalib's own command with the model: by its console script, and by its main where that finds the same."""

import csv
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from anomalib.cli.cli import main

CONFIGS = Path(__file__).parents[3] / "configs"
# A small backbone, and so are the images that it takes.
BACKBONE = {"backbone": "test_vit", "layers": "[blocks.1,blocks.3]", "pre_trained": "false", "memory_size": "500"}
MODEL = [
    "--model",
    "ContinualPatchCore",
    *(word for name, value in BACKBONE.items() for word in (f"--model.{name}", value)),
]
DATA = ["--data", "MVTecAD", "--data.root", "products", "--data.num_workers", "0", "--data.category"]
QUIET = ["--seed_everything", "0", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]


@pytest.fixture(scope="module")
def folder(products: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which the command has learned one product, and the console script another on top of it."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "products").symlink_to(products)
    with pytest.MonkeyPatch.context() as patch:
        run(patch, folder, "train", *MODEL, *DATA, "stripes", *QUIET)
    (folder / "results/ContinualPatchCore/MVTecAD/stripes/v0/weights/lightning/model.ckpt").rename(folder / "1.ckpt")
    script = Path(sysconfig.get_path("scripts")) / "anomalib"
    words = [script, "train", *MODEL, *DATA, "dots", *QUIET, "--ckpt_path", "1.ckpt"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "image_AUROC" in done.stdout
    assert "Testing what was learned on top of" in done.stdout + done.stderr
    assert "swigfaiss" not in done.stdout + done.stderr
    assert "deprecated" not in done.stdout + done.stderr
    (folder / "results/ContinualPatchCore/MVTecAD/dots/v0/weights/lightning/model.ckpt").rename(folder / "2.ckpt")
    return folder


def run(patch: pytest.MonkeyPatch, folder: Path, *args: str) -> None:
    """Do in this process what the console script does in a folder."""
    patch.chdir(folder)
    patch.setattr(sys, "argv", ["anomalib", *args])
    main()


@pytest.fixture
def command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that does what the console script does in the folder."""
    return partial(run, monkeypatch, folder)


def variants(checkpoint: Path) -> list[str]:
    """Return what a checkpoint knows."""
    state = torch.load(checkpoint, weights_only=True)["state_dict"]["model._extra_state"]
    return [variant["name"] for variant in state["plain"]["variants"]]


def test_training_on_top_of_a_checkpoint(folder: Path) -> None:
    """The new checkpoint knows both, the old one is untouched."""
    assert variants(folder / "1.ckpt") == ["stripes"]
    assert variants(folder / "2.ckpt") == ["stripes", "dots"]


def test_prediction(command: Callable[..., None], folder: Path) -> None:
    """It judges a folder of images with a checkpoint, which brings its own memory size, and shows them."""
    command("predict", *MODEL[:-2], "--data", "products/stripes/test/hole", "--ckpt_path", "2.ckpt", *QUIET)
    assert len(list(folder.glob("results/ContinualPatchCore/**/images/**/*.png"))) >= 6


@pytest.mark.parametrize("category", ["stripes", "dots"])
def test_test(category: str, command: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    """Both categories are judged well with the last checkpoint."""
    command("test", *MODEL, *DATA, category, *QUIET, "--model.visualizer", "false", "--ckpt_path", "2.ckpt")
    values = dict(line.strip("│ ").split("│") for line in capsys.readouterr().out.splitlines() if "│" in line)
    results = {name.strip(): float(value) for name, value in values.items()}
    assert results["image_AUROC"] > 0.9
    assert results["image_F1Score"] > 0.8


def test_benchmark(command: Callable[..., None], folder: Path) -> None:
    """Anomalib's benchmark runs the model by its name alone."""
    (folder / "benchmark.yaml").write_text(
        """
        accelerator: cpu
        benchmark:
          seed: 0
          model:
            class_path: ContinualPatchCore
            init_args: {backbone: test_vit, layers: [blocks.1, blocks.3], pre_trained: false, memory_size: 500}
          data: {class_path: MVTecAD, init_args: {root: products, category: stripes, num_workers: 0}}
        """,
    )
    command("benchmark", "--config", "benchmark.yaml")
    (table,) = folder.glob("runs/benchmark/*/results.csv")
    (row,) = csv.DictReader(table.open())
    assert row["model.class_path"] == "ContinualPatchCore"
    assert float(row["image_AUROC"]) > 0.9


def test_fit(command: Callable[..., None], folder: Path) -> None:
    """So does ``fit`` learn on top of a checkpoint."""
    command("fit", *MODEL, *DATA, "checks", *QUIET, "--ckpt_path", "2.ckpt", "--trainer.limit_train_batches", "1")
    (path,) = folder.glob("results/ContinualPatchCore/MVTecAD/checks/v0/**/*.ckpt")
    assert variants(path) == ["stripes", "dots", "checks"]


def test_configs(command: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    """The files that the README names go together."""
    files = ("model/continual_patch_core_edge.yaml", "data/folder.yaml")
    with pytest.raises(SystemExit) as end:
        command("train", *(word for file in files for word in ("--config", str(CONFIGS / file))), "--print_config")
    printed = capsys.readouterr().out
    assert end.value.code == 0
    assert "precision: float16" in printed
    assert "normal_dir: train/good" in printed


def test_export(command: Callable[..., None], folder: Path) -> None:
    """A checkpoint is exported."""
    command("export", *MODEL[:-2], "--export_type", "torch", "--ckpt_path", "1.ckpt", "--export_root", "exported")
    model = torch.load(folder / "exported/weights/torch/model.pt", weights_only=False)["model"]
    assert list(model.model.bank.variants) == ["stripes"]


# The command, with all that it asks of the network, and each copy of this process, on its last line.
WATCHED = """
import sys
seen = []
events = {"socket.connect", "socket.getaddrinfo", "os.fork", "os.forkpty"}
sys.addaudithook(lambda event, args: seen.append((event, args)) if event in events else None)
from anomalib.cli.cli import main
main()
print(seen)
"""


@pytest.mark.slow
def test_export_is_quiet(folder: Path, tmp_path: Path) -> None:
    """Neither OpenVINO nor NNCF looks up a host, forks or leaves a file in home, and there is little to read."""
    home = {**os.environ, "HOME": str(tmp_path), "MLFLOW_DISABLE_TELEMETRY": "true"}
    for name in ("CI", "NNCF_CI", "PYTEST_CURRENT_TEST"):
        home.pop(name, None)
    words = ["export", *MODEL, "--export_type", "openvino", "--compression_type", "INT8", "--input_size", "[64,64]"]
    words += ["--ckpt_path", "1.ckpt", "--export_root", str(tmp_path / "e")]
    command = [sys.executable, "-c", WATCHED, *words]
    done = subprocess.run(command, cwd=folder, env=home, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert (tmp_path / "e/weights/openvino/model.xml").is_file()
    assert not (tmp_path / "intel").exists()
    printed = done.stdout + done.stderr
    assert "deprecated" not in printed
    assert "onnx" not in printed
    assert len(printed.splitlines()) < 60, printed  # most are Anomalib's own, each twice
