# SPDX-License-Identifier: Apache-2.0
"""Teachers that never move, and the life in a trainer of models that learn from them."""

import copy
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from anomalib.data import Batch
from anomalib.data.transforms.utils import extract_transforms_by_type
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torchvision.transforms.v2 import Resize
from tqdm.auto import tqdm

from anomalib_ext.export import BundleContent, WholeGraph

from .backbone import load_backbone
from .batch_norm import estimate_batch_statistics
from .checks import check_files, check_images
from .training import InspectionModule


class Teacher(nn.Module):
    """A frozen feature extractor that stays in evaluation mode, so that its batch normalisation never moves.

    Args:
        backbone: Name of a timm model.
        layers: Layers to extract.
        pre_trained: Whether to use pretrained weights.
        backbone_weights: File with the weights, as for :func:`anomalib_ext.models.components.backbone.load_backbone`.
        tokens: Whether a vision transformer gives its tokens, as there.

    Attributes:
        channels: Number of channels of each layer.
    """

    def __init__(
        self,
        backbone: str,
        layers: Sequence[str],
        pre_trained: bool,
        backbone_weights: str | Path | None,
        tokens: bool = False,
    ) -> None:
        super().__init__()
        self.extractor = load_backbone(backbone, layers, pre_trained, backbone_weights, tokens)
        self.channels: list[int] = list(self.extractor.out_dims)
        self.eval()

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode."""
        del mode
        return super().train(mode=False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Extract one map ``(B, C, h, w)``, or tokens, for each layer from images of shape ``(B, 3, H, W)``."""
        return list(self.extractor(images).values())


class FrozenTeacherModule(InspectionModule):
    """Life in a trainer of a model with :class:`Teacher` modules. To be named before ``AnomalibModule`` as base.

    Attributes:
        backbone: Name of the teacher that is reconstructed.
        backbone_argument: Name of the constructor's argument that gives it.
        save_teachers: Whether checkpoints hold the teachers' weights. Without them, they are those of the model that
            a checkpoint is loaded into, which must be the same.
        map_size_suffixes: Ends of the names of tensors as large as feature maps. Their size comes with a checkpoint,
            as the pre-processor does.
    """

    backbone: str
    backbone_argument = "backbone"
    save_teachers: bool
    map_size_suffixes: tuple[str, ...] = ()
    _has_statistics = False  # whether those of batch normalisation are of the weights as they are

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Nothing is scored before the first step."""
        return {"num_sanity_val_steps": 0}

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return what is learned: all but the teachers."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    # Steps

    def training_loss(self, images: torch.Tensor) -> torch.Tensor:
        """Loss of normalised images of shape ``(B, 3, H, W)``."""
        raise NotImplementedError

    def training_step(self, batch: Batch, batch_idx: int) -> STEP_OUTPUT:
        """Check a batch, and return and log its loss.

        Raises:
            ValueError: If the images cannot be learned, or come one by one, or the loss is not finite.
        """
        check_files(getattr(batch, "image_path", None))
        images = cast("torch.Tensor", batch.image)
        check_images(images)
        if len(images) == 1 and batch_idx == 0:  # the last batch of an epoch may be smaller than the others
            msg = (
                "The batches have one image, whose statistics batch normalisation would take for those of all images. "
                "Set train_batch_size of the datamodule to 2 or more, and give at least 2 images."
            )
            raise ValueError(msg)
        loss = self.training_loss(images)
        if not torch.isfinite(loss):
            msg = f"The loss is {float(loss)}. Train with precision 32-true or bf16-mixed, or a lower learning rate."
            raise ValueError(msg)
        self.log("train_loss", loss.detach(), on_epoch=True, prog_bar=True, batch_size=len(images), sync_dist=True)
        return loss

    def on_train_batch_end(self, outputs: STEP_OUTPUT, batch: Batch, batch_idx: int) -> None:
        """After the last step, estimate the statistics of batch normalisation before anything is judged or saved."""
        del outputs, batch, batch_idx
        trainer = self.trainer
        self._has_statistics = trainer.global_step == trainer.max_steps or (
            trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        )
        if self._has_statistics:
            self._estimate_batch_statistics()

    def on_train_end(self) -> None:
        """Do so now if the end was not foreseen, as with early stopping, and judge once more for the thresholds."""
        if self._has_statistics:
            return
        self._has_statistics = True
        self._estimate_batch_statistics()
        if self.trainer.enable_validation:
            self.trainer.validating = True
            self.trainer.fit_loop.epoch_loop.val_loop.run()
            self.trainer.training = True

    def _estimate_batch_statistics(self) -> None:
        loader = cast("Iterable[Any]", self.trainer.train_dataloader)
        if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
            loader = self._without_augmentation(loader)
        estimate_batch_statistics(self.model, self.prepared_images(loader, "Statistics of batch normalisation"))

    def _without_augmentation(self, loader: DataLoader) -> DataLoader:
        """Return a loader of all images in each process, so that all have the same statistics."""
        dataset = copy.copy(loader.dataset)
        if hasattr(dataset, "augmentations"):  # Anomalib resizes with them
            resizes = extract_transforms_by_type(getattr(self.pre_processor, "transform", None), Resize)
            dataset.augmentations = resizes[0] if resizes else None
        return DataLoader(
            dataset,
            loader.batch_size if loader.batch_sampler is None else getattr(loader.batch_sampler, "batch_size", 1),
            shuffle=True,  # images that follow each other may be alike
            generator=torch.Generator().manual_seed(0),  # which leaves the random numbers of the training alone
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
        )

    @torch.no_grad()
    def prepared_images(self, batches: Iterable[Any], description: str) -> Iterator[torch.Tensor]:
        """Yield the images of batches as a trainer gives them to the model, and show how far it is."""
        # As a trainer does it; the pre-processor's own call is for exported models, and resizes less smoothly.
        prepare = getattr(self.pre_processor, "transform", self.pre_processor) or nn.Identity()
        hidden = self.trainer.progress_bar_callback is None or not self.trainer.is_global_zero
        for batch in tqdm(batches, desc=description, disable=hidden):
            yield self.trainer.precision_plugin.convert_input(prepare(batch.image.to(self.device)))

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the teachers out, if that is wanted, and add the state of the random numbers."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["rng_state"] = torch.get_rng_state()
        if not self.save_teachers:
            state = checkpoint["state_dict"]
            checkpoint["state_dict"] = {key: value for key, value in state.items() if not self._is_teachers(key)}
            checkpoint["teachers"] = self._digest()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that does not fit, before anything of it is taken over; go on as if never stopped.

        Raises:
            ValueError: If the checkpoint is of another model, backbone or teacher.
        """
        if "teachers" in checkpoint:
            own = {key: value for key, value in self.state_dict().items() if self._is_teachers(key)}
            checkpoint["state_dict"] = {**own, **checkpoint["state_dict"]}
        self._check_state(checkpoint["state_dict"], checkpoint.get("hyper_parameters", {}))
        if "teachers" in checkpoint and checkpoint["teachers"] != self._digest():
            msg = (
                "The checkpoint holds no teachers, and was made with other weights of theirs than this model has. Make "
                "the model with the weights that it was trained with (backbone_weights=PATH)."
            )
            raise ValueError(msg)
        super().on_load_checkpoint(checkpoint)
        if self._is_fitting:
            torch.set_rng_state(checkpoint["rng_state"].cpu())

    def _check_state(self, state: Mapping[str, torch.Tensor], made_with: Mapping[str, Any]) -> None:
        def shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
            found = {key: value.shape for key, value in tensors.items() if key.startswith("model.")}
            return {key: shape[:-2] if key.endswith(self.map_size_suffixes) else shape for key, shape in found.items()}

        own, given = shapes(self.state_dict()), shapes(state)
        missing, unknown = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
        reshaped = [key for key in sorted(own.keys() & given.keys()) if own[key] != given[key]]
        other_backbone = made_with.get(self.backbone_argument, self.backbone) != self.backbone
        if not (missing or unknown or reshaped or other_backbone):
            return
        parts = [
            f"{len(keys)} tensors {what}, such as {keys[0]}"
            for keys, what in ((missing, "are missing"), (unknown, "are unknown"), (reshaped, "have other shapes"))
            if keys
        ]
        differing = [
            f"{key}={made_with[key]!r} (here {self.hparams[key]!r})"
            for key in self.hparams
            if key in made_with and made_with[key] != self.hparams[key]
        ]
        msg = (
            f"The checkpoint does not fit this {type(self).__name__}: {'; '.join(parts) or 'another backbone'}. "
            + (f"It was made with {', '.join(differing)}. " if differing else "")
            + "Load it with a model like the one that it was made with."
        )
        raise ValueError(msg)

    def _is_teachers(self, key: str) -> bool:
        return any(isinstance(part, Teacher) and key.startswith(f"{name}.") for name, part in self.named_modules())

    def _digest(self) -> str:
        """Return what tells whether teachers are the same."""
        digest = hashlib.sha256()
        for part in self.modules():
            if isinstance(part, Teacher):
                for tensor in part.state_dict().values():
                    digest.update(tensor.float().cpu().numpy().tobytes())
        return digest.hexdigest()

    # Export

    def bundle_content(self, size: tuple[int, int]) -> BundleContent:
        """What the model brings to its bundle, which resizes by itself."""
        del size
        return BundleContent(graph=WholeGraph(self), metadata={"backbone": self.backbone})


def check_save_teachers(save_teachers: bool, pre_trained: bool) -> None:
    """Refuse to leave teachers out of checkpoints that could not be made again.

    Raises:
        ValueError: If they are random.
    """
    if not (save_teachers or pre_trained):
        msg = "save_teachers=False needs pretrained teachers: random ones would be lost with the model."
        raise ValueError(msg)
