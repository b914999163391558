# SPDX-License-Identifier: Apache-2.0
"""Fine-tune a backbone as a classifier of product types or defect labels, for the models that take its features.

After section "TL" of Li Bing et al., DOI 10.19651/j.cnki.emt.2518329: a new fully connected layer, cross-entropy, SGD
with 0.01 and momentum 0.9, images of 256 x 256 with random rotation and horizontal flip, curves in TensorBoard. Number
of epochs, early stopping, AdamW, the frozen stem, and the angle are ours.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from anomalib.data import AnomalibDataModule
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from rich.console import Console
from safetensors.torch import save
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import Compose, Normalize, RandomHorizontalFlip, RandomRotation, Resize, Transform

from anomalib_ext.files import atomic_write
from anomalib_ext.models.components.backbone import backbone_normalization, describe_origin, load_classifier
from anomalib_ext.models.components.checks import fault_of
from openvino_export.images import load

logger = logging.getLogger(__name__)

IMAGE_SIZE = (256, 256)
ROTATION = 15  # degrees to either side
LEARNING_RATES = {"sgd": 0.01, "adamw": 1e-4}
# Share of the images of each class that is held out.
HELD_OUT = 0.2


def finetune(
    data: Path | list[AnomalibDataModule],
    output: Path,
    backbone: str = "wide_resnet50_2",
    backbone_weights: Path | None = None,
    optimizer: Literal["sgd", "adamw"] = "sgd",
    learning_rate: float | None = None,
    max_epochs: int = 30,
    patience: int = 5,
    batch_size: int = 32,
    freeze_stem: bool = False,
    results_dir: Path = Path("results/finetune"),
    num_workers: int = 0,
    accelerator: str = "auto",
    seed: int = 0,
) -> dict[str, float]:
    """Fine-tune a backbone as a classifier, and write its weights for the argument `backbone_weights` of our models.

    A fifth of the images of each class is held out; the weights with the lowest loss on it are written. Curves of loss
    and accuracy go to TensorBoard, or to a CSV file if TensorBoard is not installed.

    Args:
        data: Folder with a folder of images for each class, or Anomalib datamodules, each a product type of which the
            normal training images are taken.
        output: File to write, `.safetensors`.
        backbone: Name of a timm model.
        backbone_weights: File with the weights to start from; without it they are looked up as the models do.
        optimizer: The paper's SGD with momentum 0.9, or AdamW.
        learning_rate: 0.01 for SGD, as in the paper, and 0.0001 for AdamW if not given.
        max_epochs: Largest number of epochs.
        patience: Number of epochs without a lower loss on the held-out images after which to stop.
        batch_size: Number of images in a step.
        freeze_stem: Whether the first layers, before the blocks, keep their weights.
        results_dir: Folder of the curves.
        num_workers: Number of processes that read images.
        accelerator: Lightning's name of the device.
        seed: Seed of all random numbers.

    Returns:
        Epochs trained, and loss and accuracy on the held-out images of the weights that were written.

    Raises:
        ValueError: If the images are not of two classes or more, of two images each, or one of them is unreadable, or
            the file is no `.safetensors`. Nothing is written then.
        FileNotFoundError: If there is no such folder, or no weights to start from.
    """
    if output.suffix != ".safetensors" or output.is_dir():
        msg = f"The weights are written as a file *.safetensors, so output={str(output)!r} cannot be it."
        raise ValueError(msg)
    samples = _from_folder(data) if isinstance(data, Path) else _from_datamodules(data)
    classes = _checked_classes(samples, data)
    seed_everything(seed, verbose=False)
    train, held_out = _split([(path, classes.index(name)) for path, name in samples])
    model = Classifier(
        load_classifier(backbone, len(classes), backbone_weights),
        optimizer,
        LEARNING_RATES[optimizer] if learning_rate is None else learning_rate,
        freeze_stem,
    )
    mean, std = backbone_normalization(backbone)
    last = [Resize(IMAGE_SIZE, antialias=True), Normalize(mean=list(mean), std=list(std))]
    augmented = Compose([RandomRotation(ROTATION), RandomHorizontalFlip(), *last])
    trainer = Trainer(
        accelerator=accelerator,
        devices=1,
        max_epochs=max_epochs,
        logger=_curves(results_dir),
        callbacks=[EarlyStopping("val_loss", patience=patience, check_finite=True)],
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
    )
    # A last batch of one image would leave batch normalisation without a variance.
    options: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers}
    trainer.fit(
        model,
        DataLoader(_Images(train, augmented), shuffle=True, drop_last=len(train) % batch_size == 1, **options),
        DataLoader(_Images(held_out, Compose(last)), **options),
    )
    if not model.best:
        msg = "The loss on the held-out images was never finite, so nothing was written: lower the learning_rate."
        raise ValueError(msg)
    result = {"epochs": float(trainer.current_epoch), **model.best_values}
    with atomic_write(output) as file:
        file.write(save(model.best, {**describe_origin(backbone), "classes": json.dumps(classes)}))
    figures = ", ".join(f"{name} {value:.4g}" for name, value in result.items())
    Console().print(f"Learned to tell {len(classes)} classes apart: {figures}. The weights are in {output}")
    return result


class Classifier(LightningModule):
    """A timm model that learns to tell classes apart.

    Args:
        network: Model with a head for the classes.
        optimizer: ``sgd`` or ``adamw``.
        learning_rate: Its learning rate.
        freeze_stem: Whether the stem keeps its weights and statistics.

    Attributes:
        best: Tensors of the network, without its head, at the lowest loss so far.
        best_values: Loss and accuracy on the held-out images then.
    """

    def __init__(self, network: nn.Module, optimizer: str, learning_rate: float, freeze_stem: bool) -> None:
        super().__init__()
        self.network = network
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.stem = _stem(network) if freeze_stem else []
        for module in self.stem:
            module.requires_grad_(requires_grad=False)
        self.best: dict[str, torch.Tensor] = {}
        self.best_values = {"val_loss": float("inf")}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Set up the optimizer of what is not frozen."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=self.learning_rate, momentum=0.9)
        return torch.optim.AdamW(parameters, lr=self.learning_rate)

    def on_train_epoch_start(self) -> None:
        """Keep the statistics of a frozen stem."""
        for module in self.stem:
            module.eval()

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], *_) -> torch.Tensor:
        """Loss of a batch of images ``(B, 3, H, W)`` and classes ``(B,)``."""
        return self._step("train", batch)

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], *_) -> None:
        """Log the loss of a batch."""
        self._step("val", batch)

    def _step(self, stage: str, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        images, classes = batch
        logits = self.network(images)
        loss = F.cross_entropy(logits, classes)
        accuracy = (logits.argmax(dim=1) == classes).float().mean()
        values = {f"{stage}_loss": loss, f"{stage}_accuracy": accuracy}
        self.log_dict(values, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(images))
        return loss

    def on_validation_epoch_end(self) -> None:
        """Keep the weights if they are the best so far."""
        loss = float(self.trainer.callback_metrics["val_loss"])
        if loss < self.best_values["val_loss"]:
            self.best_values = {"val_loss": loss, "val_accuracy": float(self.trainer.callback_metrics["val_accuracy"])}
            head = {id(parameter) for parameter in self.network.get_classifier().parameters()}
            names = {name for name, parameter in self.network.named_parameters() if id(parameter) in head}
            state = self.network.state_dict().items()
            self.best = {name: tensor.cpu().clone() for name, tensor in state if name not in names}


class _Images(Dataset[tuple[torch.Tensor, int]]):
    """Image files and their classes."""

    def __init__(self, samples: Sequence[tuple[Path, int]], transform: Transform) -> None:
        self.samples = samples
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, number = self.samples[index]
        return self.transform(torch.from_numpy(load(path))), number


def _from_folder(root: Path) -> list[tuple[Path, str]]:
    """Images and class names of a folder of folders."""
    if not root.is_dir():
        msg = f"There is no folder {root}."
        raise FileNotFoundError(msg)
    samples = []
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        if (folder / "ground_truth").is_dir():
            msg = (
                f"{folder} has a folder ground_truth, the masks of which would be learned as images. Give a folder "
                "with the images of each class alone, or the products as datamodules."
            )
            raise ValueError(msg)
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
        samples += [(path, folder.name) for path in files]
    return samples


def _from_datamodules(datamodules: Sequence[AnomalibDataModule]) -> list[tuple[Path, str]]:
    """Normal training images of products, and the products' names."""
    samples = []
    for datamodule in datamodules:
        datamodule.setup()
        name = datamodule.category or datamodule.name
        samples += [(Path(path), name) for path in datamodule.train_data.samples.image_path]
    return samples


def _checked_classes(samples: Sequence[tuple[Path, str]], data: object) -> list[str]:
    """Names of the classes.

    Raises:
        ValueError: If they or their images will not do.
    """
    counts = Counter(name for _, name in samples)
    where = f"in {data}" if isinstance(data, Path) else "in these datamodules"
    if not counts:
        msg = f"There are no images {where}. Each class needs a folder of images there."
        raise ValueError(msg)
    if len(counts) == 1:
        msg = f"There is only the class {next(iter(counts))!r} {where}; a classifier needs two or more to tell apart."
        raise ValueError(msg)
    single = [name for name, count in counts.items() if count < 2]
    if single:
        msg = f"The classes {single} {where} have one image each; one to learn and one to hold out are needed."
        raise ValueError(msg)
    faults = [fault for path, _ in samples if (fault := fault_of(path))]
    if faults:
        msg = f"{len(faults)} files cannot be learned, repair or remove them. {' '.join(faults[:5])}"
        raise ValueError(msg)
    return sorted(counts)


def _split(samples: Sequence[tuple[Path, int]]) -> tuple[list[tuple[Path, int]], list[tuple[Path, int]]]:
    """Divide the images of each class into those to learn and those that are held out."""
    train, held_out = [], []
    for number in sorted({number for _, number in samples}):
        members = [sample for sample in samples if sample[1] == number]
        order = [members[i] for i in torch.randperm(len(members)).tolist()]
        count = max(1, round(len(order) * HELD_OUT))
        held_out += order[:count]
        train += order[count:]
    return train, held_out


def _stem(network: nn.Module) -> list[nn.Module]:
    """What comes before the blocks, as timm describes it."""
    pattern = network.group_matcher(coarse=True)["stem"]
    return [module for name, module in network.named_modules() if name and re.match(pattern, name)]


def _curves(folder: Path) -> Logger:
    if find_spec("tensorboard") or find_spec("tensorboardX"):
        return TensorBoardLogger(folder, name=None)
    logger.warning("TensorBoard is not installed (extra `loggers`), so the curves go to metrics.csv in %s.", folder)
    return CSVLogger(folder, name=None)
