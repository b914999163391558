# SPDX-License-Identifier: Apache-2.0
"""What the models do alike in a trainer: steps, checkpoints, export, and what a failed run says."""

import logging
from pathlib import Path
from typing import Any, cast

import torch
from anomalib import LearningType, TaskType
from anomalib.data import AnomalibDataModule, Batch
from anomalib.deploy import CompressionType
from anomalib.engine.plugins import AnomalibCheckpointIO
from anomalib.models.components import AnomalibModule
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.types import STEP_OUTPUT
from PIL import Image
from torch import nn
from torchmetrics import Metric

from anomalib_ext.export import BundleContent, export_bundle
from anomalib_ext.files import atomic_write, check_checkpoint
from openvino_export.images import largest_image

from .checks import check_files, fault_of

logger = logging.getLogger(__name__)


class InspectionModule(LightningModule):
    """What all models do alike in a trainer. To be named before ``AnomalibModule`` as base.

    Attributes:
        model: Gives an ``InferenceBatch`` for images in evaluation mode.

    Raises:
        TypeError: If a class names it after ``AnomalibModule``, whose methods would hide those of this one.
    """

    # It does not derive from `AnomalibModule`, for Anomalib takes each of its subclasses for a model.

    model: nn.Module
    # Trainer, by its id since models are copied without trainers, and checkpoint that the last fit started from.
    _continued_from: tuple[int, str] | None = None

    def __init_subclass__(cls, **kwargs) -> None:
        """Refuse bases in the wrong order."""
        super().__init_subclass__(**kwargs)
        if issubclass(cls, AnomalibModule) and cls.mro().index(AnomalibModule) < cls.mro().index(InspectionModule):
            own = next(base.__name__ for base in cls.__bases__ if issubclass(base, InspectionModule))
            msg = f"{cls.__name__} must name {own} before its bases of Anomalib, or their methods would hide its own."
            raise TypeError(msg)

    @property
    def learning_type(self) -> LearningType:
        """Learns from normal images."""
        return LearningType.ONE_CLASS

    @property
    def _is_fitting(self) -> bool:
        state = None if self._trainer is None else self._trainer.state
        return state is not None and (state.fn, state.status) == (TrainerFn.FITTING, TrainerStatus.RUNNING)

    def _check_idle(self) -> None:
        """Refuse to change the model while a trainer is fitting it."""
        if self._is_fitting:
            msg = "A trainer is fitting this model. Change what it knows when the fit has ended."
            raise RuntimeError(msg)

    # Steps

    def configure_callbacks(self) -> list[Callback]:
        """Anomalib's callbacks, and one for large images and those that cannot be read."""
        return [*cast("list[Callback]", super().configure_callbacks()), ImageFiles()]

    def setup(self, stage: str) -> None:
        """Make a further fit with the same trainer possible, and its checkpoints safe against a kill."""
        plugin = self.trainer.strategy.checkpoint_io
        if type(plugin) in {AnomalibCheckpointIO, TorchCheckpointIO}:
            self.trainer.strategy.checkpoint_io = AtomicCheckpointIO(getattr(plugin, "extra_safe_globals", None))
        if stage != TrainerFn.FITTING:
            return
        # A finished epoch of an earlier fit would let the trainer stop before the first batch.
        self.trainer.fit_loop.epoch_progress.reset()
        datamodule = getattr(self.trainer, "datamodule", None)
        if isinstance(datamodule, AnomalibDataModule) and not hasattr(datamodule, "val_data"):
            # With `val_split_mode=none`, Anomalib's own method fails instead of saying that there is nothing.
            setattr(datamodule, "val_dataloader", lambda: [])  # noqa: B010, PIE807  # Lightning wants a function

    def validation_step(self, batch: Batch, *args, **kwargs) -> STEP_OUTPUT:
        """Score a batch."""
        del args, kwargs
        return self._score(batch)

    def test_step(self, batch: Batch, batch_idx: int, *args, **kwargs) -> STEP_OUTPUT:
        """Score a batch."""
        del batch_idx, args, kwargs
        return self._score(batch)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> STEP_OUTPUT:
        """Score a batch."""
        del batch_idx, dataloader_idx
        return self._score(batch)

    def _score(self, batch: Batch) -> Batch:
        check_files(getattr(batch, "image_path", None))
        return batch.update(**self.model(batch.image)._asdict())

    # Checkpoints

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]  # noqa: ANN401
        """Make a model of a checkpoint, as Anomalib does.

        Raises:
            ValueError: If it is damaged, or of another model.
        """
        if isinstance(checkpoint_path, (str, Path)):
            check_checkpoint(checkpoint_path)
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let ``Engine.train`` test what was learned: it asks for the checkpoint that it started from.

        What was learned on top of it would be lost; so, asked by the same trainer, the model stays as it is.
        """
        trainer = self._trainer
        continued_from, self._continued_from = self._continued_from, None
        asked_for = None if trainer is None else (id(trainer), str(trainer.ckpt_path))
        if trainer is not None and trainer.state.fn == TrainerFn.TESTING and asked_for == continued_from:
            logger.warning("Testing what was learned on top of %s; load it apart to test it alone.", trainer.ckpt_path)
            checkpoint["state_dict"] = self.state_dict()
            checkpoint.pop("callbacks", None)  # with the thresholds and the path of the old checkpoint
            return
        super().on_load_checkpoint(checkpoint)
        if self._is_fitting:
            self._continued_from = asked_for

    # Export

    def bundle_content(self, size: tuple[int, int]) -> BundleContent:
        """What the model brings to its bundle, for images of a height and width."""
        raise NotImplementedError

    def to_openvino(
        self,
        export_root: str | Path,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        datamodule: AnomalibDataModule | None = None,
        metric: Metric | None = None,
        task: TaskType | None = None,
        max_drop: float = 0.01,
        ov_kwargs: dict[str, Any] | None = None,
        onnx_kwargs: dict[str, Any] | None = None,
    ) -> Path:
        """Write a bundle, with which an edge PC inspects, to `export_root/weights/openvino`; see :func:`export_bundle`.

        Args:
            export_root: Folder of exports.
            model_file_name: Must be ``model``, by which the edge PC finds the graph.
            input_size: As for :func:`export_bundle`.
            compression_type: As for :func:`export_bundle`.
            datamodule: Its training images calibrate the quantisation, its test images show what compression loses.
            metric: Not used; image AUROC and F1 are compared.
            task: Not used.
            max_drop: Largest loss of AUROC or F1 by compression; one decision may always change.
            ov_kwargs: Arguments of ``openvino.convert_model``; ``{"input": [1, 3, H, W]}`` fixes the batch size.
            onnx_kwargs: Arguments of ``torch.onnx.export``.

        Returns:
            Path of ``model.xml``.

        Raises:
            RuntimeError: If a model that judges by what it has learned has learned nothing.
            ValueError: If an argument does not fit, or compression loses more than allowed. An older bundle remains.
        """
        del metric, task
        if model_file_name != "model":
            msg = f"A bundle holds its graph in model.xml, not in {model_file_name}.xml; name its folder instead."
            raise ValueError(msg)
        return export_bundle(
            cast("AnomalibModule", self.eval().float()),
            type(self).bundle_content,
            export_root,
            input_size=input_size,
            compression_type=compression_type,
            datamodule=datamodule,
            max_drop=max_drop,
            ov_kwargs=ov_kwargs,
            onnx_kwargs=onnx_kwargs,
        )


class ImageFiles(Callback):
    """Lets Anomalib read as large images as an edge PC does, and names those that cannot be read."""

    _limit: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise Pillow's limit of pixels, which is one for the whole process, for this run."""
        del trainer, pl_module, stage
        self._limit = Image.MAX_IMAGE_PIXELS
        if self._limit is not None:
            Image.MAX_IMAGE_PIXELS = max(self._limit, largest_image())

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set it back."""
        del trainer, pl_module, stage
        self._set_back()

    def _set_back(self) -> None:
        if self._limit is not None:
            Image.MAX_IMAGE_PIXELS, self._limit = self._limit, None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Name the images, if they were why a trainer failed."""
        del pl_module
        self._set_back()
        # Pillow's error for a truncated image does not say which one it is; those of the system have a number.
        is_pillows = isinstance(exception, (SyntaxError, Image.DecompressionBombError))
        if is_pillows or (isinstance(exception, OSError) and exception.errno is None):
            for path in _image_files(trainer):
                if fault := fault_of(path):
                    logger.error("%s Repair or remove it.", fault)


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


class AtomicCheckpointIO(AnomalibCheckpointIO):
    """Writes a checkpoint beside the old one, syncs it and renames it over: a kill leaves one of the two whole.

    Refuses to load one that was changed since.
    """

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:  # noqa: ANN401
        """Check, then load as Anomalib does."""
        check_checkpoint(path)
        return super().load_checkpoint(path, *args, **kwargs)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:  # noqa: ANN401
        """Save as Lightning does, then replace ``path`` at once."""
        if storage_options is not None or "://" in str(path):  # a remote file has no directory to rename in
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        with atomic_write(Path(path)) as file:
            torch.save(checkpoint, file)
