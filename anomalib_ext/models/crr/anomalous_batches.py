# SPDX-License-Identifier: Apache-2.0
"""Batches that hold each image twice: as it is, and with a synthetic anomaly."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, cast

import torch
from anomalib.data import ImageBatch, ImageItem
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Compose, Resize, Transform
from torchvision.tv_tensors import Image, Mask

from anomalib_ext.data.anomaly_synthesis import AnomalySynthesis


class WithAnomalies:
    """Collates each image together with a copy that has a synthetic anomaly; the copies are the second half.

    It runs where the images are loaded, in the workers of a dataloader. Anomalies are made on resized images.

    Args:
        collate: Makes a batch of items.
        resize: Resizes an image, if wanted.
        synthesis: Makes the anomalies. It has a new seed for each batch, from the random numbers of the process, whose
            state comes with checkpoints: so a training that is resumed sees what it would have seen.
    """

    def __init__(
        self,
        collate: Callable[[list[ImageItem]], ImageBatch],
        resize: Transform | None,
        synthesis: AnomalySynthesis,
    ) -> None:
        self.collate = collate
        self.resize = resize or nn.Identity()
        self.synthesis = synthesis

    def __call__(self, items: Sequence[ImageItem]) -> ImageBatch:
        """Make a batch."""
        self.synthesis.reseed(int(torch.randint(2**31, ())))
        clean, anomalous = [], []
        for item in items:
            image = self.resize(cast("torch.Tensor", item.image)).as_subclass(torch.Tensor)
            changed, mask = self.synthesis(image, item.image_path)
            nothing = Mask(torch.zeros(mask.shape[-2:], dtype=torch.uint8))
            clean.append(replace(item, image=Image(image), gt_mask=nothing))
            anomalous.append(replace(item, image=Image(changed), gt_mask=Mask(mask[0].to(torch.uint8))))
        return self.collate([*clean, *anomalous])


class AnomalousBatches(Callback):
    """Has the datamodule of a fit load its training batches :class:`WithAnomalies`.

    Args:
        synthesis: Arguments of :class:`anomalib_ext.data.AnomalySynthesis`.
    """

    def __init__(self, synthesis: dict[str, Any]) -> None:
        self.synthesis = synthesis
        self._undo = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replace the training dataloader.

        Raises:
            ValueError: If there is no datamodule, or a folder of the synthesis will not do.
        """
        if stage != TrainerFn.FITTING:
            return
        datamodule = getattr(trainer, "datamodule", None)
        if datamodule is None:
            msg = "Crr makes its anomalies while images are loaded: fit it with a datamodule, not with dataloaders."
            raise ValueError(msg)
        synthesis = AnomalySynthesis(**self.synthesis)
        transform = getattr(pl_module.pre_processor, "transform", None)
        transforms = transform.transforms if isinstance(transform, Compose) else [transform]
        resize = transforms[0] if isinstance(transforms[0], Resize) else None
        train_dataloader = datamodule.train_dataloader

        def with_anomalies() -> DataLoader:
            loader = train_dataloader()
            if not isinstance(loader, DataLoader):
                msg = f"Crr learns from one DataLoader, got {type(loader).__name__}."
                raise TypeError(msg)
            loader.collate_fn = WithAnomalies(loader.collate_fn, resize, synthesis)
            return loader

        datamodule.train_dataloader = with_anomalies
        self._undo.callback(delattr, datamodule, "train_dataloader")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the datamodule as it was."""
        del trainer, pl_module, stage
        self._undo.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Likewise, for after a failure there is no teardown."""
        del trainer, pl_module, exception
        self._undo.close()
