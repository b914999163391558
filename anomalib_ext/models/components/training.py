# SPDX-License-Identifier: Apache-2.0
"""What models do alike in a trainer: safe files, and image files that are refused or named when unreadable."""

import csv
import io
import logging
import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from anomalib import LearningType
from anomalib.data import AnomalibDataModule, Batch
from anomalib.engine.plugins import AnomalibCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from PIL import Image
from torch import nn

logger = logging.getLogger(__name__)

# An image with a shorter side than this holds no surface to judge.
SMALLEST_SIDE = 16


def prepare_fit(trainer: Trainer) -> None:
    """Make a further fit with the same trainer possible, and its checkpoints safe against a kill."""
    # A finished epoch of an earlier fit would let the trainer stop before the first batch.
    trainer.fit_loop.epoch_progress.reset()
    plugin = trainer.strategy.checkpoint_io
    if type(plugin) is AnomalibCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO(plugin.extra_safe_globals)
    datamodule = getattr(trainer, "datamodule", None)
    if isinstance(datamodule, AnomalibDataModule) and not hasattr(datamodule, "val_data"):
        # With `val_split_mode=none`, Anomalib's own method fails instead of saying that there is nothing.
        setattr(datamodule, "val_dataloader", lambda: [])  # noqa: B010, PIE807  # Lightning wants a function


class InspectionModule(LightningModule):
    """What most models do alike in a trainer. To be named before ``AnomalibModule`` as base.

    Attributes:
        model: Gives an ``InferenceBatch`` for images in evaluation mode.
    """

    model: nn.Module

    @property
    def learning_type(self) -> LearningType:
        """Learns from normal images."""
        return LearningType.ONE_CLASS

    def configure_callbacks(self) -> list[Callback]:
        """Anomalib's callbacks, and one that names unreadable images."""
        return [*cast("list[Callback]", super().configure_callbacks()), UnreadableImages()]

    def setup(self, stage: str) -> None:
        """Make a further fit with the same trainer possible, and its checkpoints safe against a kill."""
        if stage == TrainerFn.FITTING:
            prepare_fit(self.trainer)

    def validation_step(self, batch: Batch, *args, **kwargs) -> STEP_OUTPUT:
        """Score a batch."""
        del args, kwargs
        return self._judge(batch)

    def test_step(self, batch: Batch, batch_idx: int, *args, **kwargs) -> STEP_OUTPUT:
        """Score a batch."""
        del batch_idx, args, kwargs
        return self._judge(batch)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> STEP_OUTPUT:
        """Score a batch."""
        del batch_idx, dataloader_idx
        return self._judge(batch)

    def _judge(self, batch: Batch) -> Batch:
        check_files(getattr(batch, "image_path", None))
        return batch.update(**self.model(batch.image)._asdict())


class UnreadableImages(Callback):
    """Names the images that cannot be read, if those were why a trainer failed."""

    def on_exception(  # noqa: PLR6301  # Lightning's hook
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        exception: BaseException,
    ) -> None:
        """Name them."""
        del pl_module
        # Pillow's error for a truncated image does not say which one it is; those of the system have a number.
        if isinstance(exception, SyntaxError) or (isinstance(exception, OSError) and exception.errno is None):
            for path in _image_files(trainer):
                if not is_readable(path):
                    logger.error("%s cannot be read as an image; repair or remove it.", path)


class AtomicCheckpointIO(AnomalibCheckpointIO):
    """Writes a checkpoint beside the old one, syncs it and renames it over: a kill leaves one of the two whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:  # noqa: ANN401
        """Save as Lightning does, then replace ``path`` at once."""
        if storage_options is not None or "://" in str(path):  # a remote file has no directory to rename in
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with replacing(Path(path)) as file:
            torch.save(checkpoint, file)


@contextmanager
def replacing(path: Path) -> Generator[BinaryIO]:
    """Give a file to write beside ``path``, then sync it and rename it over; if writing fails, the old file stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")  # always the same, so that the next save removes a killed one's
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a directory cannot be synced
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)


def write_table(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a CSV file all at once, so that an interruption leaves the one before.

    Args:
        rows: At least one; the keys of the first are the header.
        path: The file.
    """
    with replacing(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        writer = csv.DictWriter(text, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
        text.detach()


def check_files(paths: Sequence[str] | None) -> None:
    """Refuse image files that Anomalib would read as something else than what they show."""
    for path in paths or ():
        try:
            with Image.open(path) as image:
                width, height, mode = *image.size, image.mode
        except OSError:  # whoever reads the pixels says so, or needs no such file
            continue
        if min(width, height) < SMALLEST_SIDE:
            msg = f"{path} has {width} x {height} pixels; at least {SMALLEST_SIDE} each way are needed to judge it."
            raise ValueError(msg)
        if mode.startswith(("I", "F")):
            msg = (
                f"{path} has pixels of mode {mode!r} (more than 8 bits). They would be clipped to 8 bits: "
                "convert the image to 8 bits first, in the same way for learning and for judging."
            )
            raise ValueError(msg)


def check_images(images: torch.Tensor) -> None:
    """Refuse normalised images that cannot be learned or judged.

    Raises:
        ValueError: If the shape is not ``(B, 3, H, W)``, or a value is not finite.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        msg = f"Images must have the shape (B, 3, H, W), got {tuple(images.shape)}."
        raise ValueError(msg)
    if not torch.compiler.is_compiling() and not torch.isfinite(images).all():
        bad = (~torch.isfinite(images).flatten(1).all(dim=1)).nonzero().flatten().tolist()
        msg = f"Images {bad} of the batch hold NaN or infinite values. Nothing of the batch was used."
        raise ValueError(msg)


def check_scores(scores: torch.Tensor) -> None:
    """Refuse image scores of shape ``(B,)`` that are not finite.

    Raises:
        ValueError: If one is not.
    """
    if not torch.compiler.is_compiling() and not torch.isfinite(scores).all():
        bad = (~torch.isfinite(scores)).nonzero().flatten().tolist()
        msg = f"Images {bad} of the batch give scores that are not finite; look for NaN in the weights of the model."
        raise ValueError(msg)


def _image_files(trainer: Trainer) -> list[str]:
    """Image files of the trainer's datasets."""
    paths: list[str] = []
    for loaders in (
        trainer.train_dataloader,
        trainer.val_dataloaders,
        trainer.test_dataloaders,
        trainer.predict_dataloaders,
    ):
        for loader in loaders if isinstance(loaders, list) else [loaders]:
            dataset = getattr(loader, "dataset", None)
            samples = getattr(dataset, "samples", None)
            paths.extend(getattr(dataset, "image_filenames", []) if samples is None else samples.image_path)
    return list(map(str, paths))


def is_readable(path: str | Path) -> bool:
    """Whether a file can be decoded as an image."""
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError):
        return False
    return True
