# SPDX-License-Identifier: Apache-2.0
"""Tests of fine-tuning a backbone, by the command and by its function."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from anomalib_ext.finetune import Classifier, finetune
from anomalib_ext.models import ContinualPatchCore, SaCfaPatchCore
from anomalib_ext.models.components.backbone import load_backbone, load_classifier

Make = Callable[..., Any]
BACKBONE = "test_resnet"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return weights to start from."""
    path = tmp_path_factory.mktemp("start") / "start.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model(BACKBONE).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def classes(products: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a folder of ten images for each of two products."""
    root = tmp_path_factory.mktemp("classes")
    for product in ("stripes", "dots"):
        (root / product).mkdir()
        for path in sorted((products / product / "train" / "good").iterdir())[:10]:
            (root / product / path.name).symlink_to(path)
    return root


@pytest.fixture(scope="module")
def tuned(
    classes: Path, start: Path, run_command: Callable[..., str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return a folder in which the command has written weights and curves."""
    folder = tmp_path_factory.mktemp("tuned")
    options = {"data": classes, "backbone": BACKBONE, "backbone_weights": start, "output": "new.safetensors"}
    options |= {"max_epochs": 4, "batch_size": 8, "accelerator": "cpu", "freeze_stem": "true"}
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    assert "Learned to tell 2 classes apart" in run_command(folder, "finetune", *arguments)
    return folder


def test_the_file(tuned: Path, start: Path) -> None:
    """It holds the backbone without its head, other than before but for the frozen stem, and says what it is."""
    before, after = load_file(start), load_file(tuned / "new.safetensors")
    assert set(before) - set(after) == {"fc.weight", "fc.bias"}
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert "layer1.0.conv1.weight" in changed
    assert "layer4.0.conv1.weight" in changed
    assert not [name for name in changed if not name.startswith("layer")]
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    with safe_open(tuned / "new.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["architecture"] == BACKBONE
    assert metadata["classes"] == '["dots", "stripes"]'
    assert metadata["normalization"].startswith("mean (0.5, ")
    assert [path.name for path in tuned.iterdir() if path.is_file()] == ["new.safetensors"]


def test_the_curves(tuned: Path) -> None:
    """TensorBoard shows loss and accuracy of both kinds of images, and that something was learned."""
    (folder,) = (tuned / "results/finetune").iterdir()
    curves = EventAccumulator(str(folder))
    curves.Reload()
    names = {"train_loss", "train_accuracy", "val_loss", "val_accuracy"}
    assert names <= set(curves.Tags()["scalars"])
    losses = [event.value for event in curves.Scalars("train_loss")]
    assert losses[-1] < losses[0]


def test_models_take_the_file(tuned: Path, make_data: Make, make_engine: Make) -> None:
    """Every model of ours does, by the same argument."""
    path, layers = tuned / "new.safetensors", ["layer1", "layer2"]
    expected = load_file(path)["layer2.0.conv1.weight"]
    pre_processor = SaCfaPatchCore.configure_pre_processor((64, 64), BACKBONE)
    options = {"layers": layers, "backbone_weights": path, "visualizer": False, "pre_processor": pre_processor}
    continual, ours = ContinualPatchCore(BACKBONE, **options), SaCfaPatchCore(BACKBONE, **options)
    for extractor in (continual.model.feature_extractor, ours.model.embedding.feature_extractor):
        assert torch.equal(extractor.feature_extractor.state_dict()["layer2.0.conv1.weight"], expected)
    make_engine().fit(ours, datamodule=make_data("stripes"))
    assert len(ours.model.memory_bank)


def test_another_architecture_is_refused(tuned: Path, tmp_path: Path) -> None:
    """Even where the tensors would fit, as the file says what it is."""
    path = tuned / "new.safetensors"
    with pytest.raises(ValueError, match=r"backbone 'resnet18': its architecture is test_resnet, .* resnet18\. Give"):
        SaCfaPatchCore("resnet18", backbone_weights=path)
    other = tmp_path / "other.safetensors"
    metadata = {"architecture": BACKBONE, "normalization": "mean (0, 0, 0), std (1, 1, 1)"}
    save_file(load_file(path), other, metadata)
    with pytest.raises(ValueError, match=r"its normalization is mean \(0, 0, 0\), std \(1, 1, 1\), that of the backb"):
        load_backbone(BACKBONE, ["layer1"], backbone_weights=other)


def test_datamodules(make_data: Make, start: Path, tmp_path: Path) -> None:
    """Each is a product type, of which the normal training images are taken."""
    data = [make_data("stripes"), make_data("checks")]
    output = tmp_path / "a" / "new.safetensors"
    result = finetune(
        data,
        output,
        BACKBONE,
        start,
        optimizer="adamw",
        max_epochs=1,
        results_dir=tmp_path,
        accelerator="cpu",
    )
    assert result["epochs"] == 1
    assert 0 <= result["val_accuracy"] <= 1
    with safe_open(output, framework="pt") as file:
        assert file.metadata()["classes"] == '["checks", "stripes"]'


def test_early_stopping_and_the_best_weights(classes: Path, start: Path, tmp_path: Path) -> None:
    """When nothing improves any more it ends; the file has the weights of the best epoch, not of the last."""
    output = tmp_path / "new.safetensors"
    result = finetune(
        classes,
        output,
        BACKBONE,
        start,
        learning_rate=0.0,
        max_epochs=9,
        patience=2,
        results_dir=tmp_path,
        accelerator="cpu",
    )
    assert result["epochs"] < 9
    after, before = load_file(output), load_file(start)
    assert torch.equal(after["layer1.0.conv1.weight"], before["layer1.0.conv1.weight"])


@pytest.mark.parametrize("backbone", ["test_resnet", "test_efficientnet", "test_convnext", "test_vit"])
def test_freezing(backbone: str, tmp_path: Path) -> None:
    """The stem of each family is frozen, its statistics too, and nothing else."""
    path = tmp_path / "start.safetensors"
    save_file(timm.create_model(backbone).state_dict(), path)
    model = Classifier(load_classifier(backbone, 3, path), "sgd", 0.1, freeze_stem=True)
    frozen = {name for name, parameter in model.network.named_parameters() if not parameter.requires_grad}
    assert frozen
    assert not any("blocks" in name or "layer" in name or "stages" in name for name in frozen)
    state = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    model.train()
    model.on_train_epoch_start()
    (optimizer,) = [model.configure_optimizers()]
    images = torch.rand(4, 3, 160, 160)
    torch.nn.functional.cross_entropy(model.network(images), torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    same = {name for name, tensor in model.network.state_dict().items() if torch.equal(tensor, state[name])}
    assert frozen <= same
    assert not any(name.startswith(("bn1.", "conv1.", "conv_stem.", "stem.")) for name in set(state) - same)
    assert set(state) - same


def test_without_tensorboard(
    classes: Path,
    start: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The curves go to a CSV file, and it is said so."""
    monkeypatch.setattr("anomalib_ext.finetune.find_spec", lambda _: None)
    curves = tmp_path / "curves"
    options = {"max_epochs": 1, "results_dir": curves, "accelerator": "cpu"}
    finetune(classes, tmp_path / "new.safetensors", BACKBONE, start, **options)
    assert "TensorBoard is not installed (extra `loggers`), so the curves go to metrics.csv" in caplog.text
    (table,) = curves.rglob("metrics.csv")
    assert {"train_loss", "train_accuracy", "val_loss", "val_accuracy"} <= set(
        table.read_text().split("\n")[0].split(",")
    )


def image_folder(root: Path, **counts: int) -> Path:
    """Return a folder of noise."""
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(root / name / f"{index}.png")
    return root


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({}, "There are no images in "),
        ({"a": 0, "b": 0}, "There are no images in "),
        ({"a": 3}, "There is only the class 'a' in "),
        ({"a": 3, "b": 0}, "There is only the class 'a' in "),
        ({"a": 3, "b": 1}, r"The classes \['b'\] in .* have one image each"),
    ],
)
def test_too_little_data(counts: dict[str, int], message: str, tmp_path: Path) -> None:
    """It is said what is missing, and nothing is written."""
    (tmp_path / "data").mkdir()
    output = tmp_path / "new.safetensors"
    with pytest.raises(ValueError, match=message):
        finetune(image_folder(tmp_path / "data", **counts), output, BACKBONE)
    assert not output.exists()


def test_bad_files(tmp_path: Path) -> None:
    """Unreadable images, masks among them, and wrong names are found before the training begins."""
    root, output = image_folder(tmp_path / "data", a=3, b=3), tmp_path / "new.safetensors"
    output.write_bytes(b"old")
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*none"):
        finetune(tmp_path / "none", output, BACKBONE)
    with pytest.raises(ValueError, match=r"output='weights.pth' cannot be it"):
        finetune(root, Path("weights.pth"), BACKBONE)
    (root / "a" / "torn.png").write_bytes((root / "a" / "0.png").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"1 files cannot be learned, .*torn\.png cannot be read"):
        finetune(root, output, BACKBONE)
    (root / "a" / "torn.png").unlink()
    (root / "b" / "ground_truth").mkdir()
    with pytest.raises(ValueError, match=r"b has a folder ground_truth, the masks of which would be learned"):
        finetune(root, output, BACKBONE)
    assert output.read_bytes() == b"old"


def test_a_loss_that_is_not_finite(classes: Path, start: Path, tmp_path: Path) -> None:
    """Nothing is written, and the old file stays."""
    output = tmp_path / "new.safetensors"
    output.write_bytes(b"old")
    with pytest.raises(ValueError, match="never finite, so nothing was written: lower the learning_rate"):
        finetune(
            classes,
            output,
            BACKBONE,
            start,
            learning_rate=1e30,
            max_epochs=2,
            results_dir=tmp_path,
            accelerator="cpu",
        )
    assert output.read_bytes() == b"old"
