# SPDX-License-Identifier: Apache-2.0
"""ContinualPatchCore in a trainer: learning, calibration, checkpoints and reports.

PatchCore (arXiv 2106.08265) that goes on learning, after arXiv 2512.13497, of which the abstract and summaries were
available; the update rule, the thresholds by variant and the one-shot views are ours. See the README beside this file.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib import LearningType
from anomalib.data import Batch, ImageBatch, InferenceBatch
from anomalib.data.utils import read_image
from anomalib.engine.plugins import AnomalibCheckpointIO
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_ext.models.components.backbone import backbone_normalization

from .memory_bank import Report
from .post_processor import VariantPostProcessor
from .torch_model import NUM_VIEWS, ContinualInferenceBatch, ContinualPatchCoreModel, augmented_views

logger = logging.getLogger(__name__)

# Up to this many images of a variant, each is learned with augmented views.
FEW_IMAGES = 16
# An image with a shorter side than this holds no surface to judge.
SMALLEST_SIDE = 16


class ContinualPatchCore(AnomalibModule):
    """PatchCore that learns product after product within a fixed memory budget.

    Every ``Engine.fit`` on the same model, every ``--ckpt_path`` given to ``anomalib train`` or ``fit``, and every
    :meth:`partial_fit` adds to what is known. No task id is needed at inference.

    Args:
        backbone: Name of a timm CNN or ViT.
        layers: Layers whose features are concatenated.
        pre_trained: Whether to use pretrained weights.
        weights: File with the backbone's weights; without it they are looked up in the Hugging Face cache, in the
            package of the extra ``offline``, and on the hub, in this order.
        memory_size: Largest number of vectors in the memory bank, for all variants together.
        num_neighbors: Neighbors that weigh the image score. With the default of 1 the score is the largest patch
            distance, which no later learning can raise by more than the radius bound; weighing breaks that promise.
        one_shot: Whether a variant of at most 16 images is learned with augmented views of them.
        variant: Name of the variant that is learned. By default it is the category or the name of the datamodule,
            and found from the images where there is none.
        precision: ``float32`` or ``float16``, in which the memory bank is kept.
        pre_processor: Pre-processor, or whether to use the default one.
        post_processor: Post-processor, or whether to use the default one.
        evaluator: Evaluator, or whether to use the default one.
        visualizer: Visualizer, or whether to use the default one.

    Raises:
        ValueError: If the backbone or a layer is unknown, or a size is not positive.
        FileNotFoundError: If the weights are nowhere to be found.

    Example:
        >>> from anomalib.data import MVTecAD
        >>> from anomalib.engine import Engine
        >>> from anomalib.models import ContinualPatchCore
        >>> model = ContinualPatchCore()
        >>> for category in ("bottle", "pill"):
        ...     Engine().fit(model, datamodule=MVTecAD(category=category))
    """

    model: ContinualPatchCoreModel

    def __init__(
        self,
        backbone: str = "tf_efficientnet_lite0",
        layers: Sequence[str] = ("blocks.2", "blocks.4"),
        pre_trained: bool = True,
        weights: str | Path | None = None,
        memory_size: int = 10_000,
        num_neighbors: int = 1,
        one_shot: bool = True,
        variant: str | None = None,
        precision: str = "float32",
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        if precision not in {"float32", "float16"}:
            msg = f"precision must be 'float32' or 'float16', got {precision!r}."
            raise ValueError(msg)
        model = ContinualPatchCoreModel(
            backbone=backbone,
            layers=layers,
            pre_trained=pre_trained,
            weights=weights,
            memory_size=memory_size,
            num_neighbors=num_neighbors,
            precision=precision,
        )
        super().__init__(
            # Only here is the backbone, and with it the normalisation, known.
            pre_processor=self.configure_pre_processor(backbone=backbone) if pre_processor is True else pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.model = model
        self.one_shot = one_shot
        self.variant = variant
        self.last_report: Report | None = None
        self._calibration: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._few_images: list[torch.Tensor] = []
        self._continued_from: str | None = None

    @staticmethod
    def configure_pre_processor(
        image_size: tuple[int, int] | None = None,
        backbone: str = "tf_efficientnet_lite0",
    ) -> PreProcessor:
        """Resize, and normalise as the backbone was trained.

        Args:
            image_size: Height and width, 256 each by default.
            backbone: Name of a timm model.
        """
        mean, std = backbone_normalization(backbone)
        return PreProcessor(
            Compose([Resize(image_size or (256, 256), antialias=True), Normalize(mean=list(mean), std=list(std))]),
        )

    @staticmethod
    def configure_post_processor() -> PostProcessor:
        """Post-processor with thresholds by variant."""
        return VariantPostProcessor()

    @staticmethod
    def configure_optimizers() -> None:
        """Nothing is optimised."""

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """One pass over the images on one device."""
        return {"gradient_clip_val": 0, "max_epochs": 1, "num_sanity_val_steps": 0, "devices": 1}

    @property
    def learning_type(self) -> LearningType:
        """Learns from normal images."""
        return LearningType.ONE_CLASS

    def forward(self, batch: torch.Tensor, *args, **kwargs) -> InferenceBatch:
        """Pre-process, score and post-process images of shape ``(B, 3, H, W)`` in [0, 1]."""
        predictions = super().forward(batch, *args, **kwargs)
        if isinstance(predictions, ContinualInferenceBatch):  # without a post-processor
            return InferenceBatch(pred_score=predictions.pred_score, anomaly_map=predictions.anomaly_map)
        return predictions

    # Learning

    def partial_fit(
        self,
        images: torch.Tensor | str | Path | Sequence[str | Path],
        variant: str | None = None,
    ) -> Report:
        """Learn normal images, without a trainer. When it fails, nothing is changed.

        Args:
            images: RGB images of shape ``(B, 3, H, W)`` in [0, 1], or the path of an image, or several.
            variant: Name of their variant; found for each image if not given.

        Returns:
            What changed.

        Raises:
            ValueError: If an image is unreadable, too small, of unsuitable depth or not finite.
        """
        tensors = _as_images(images)
        known = self.model.bank.variants.get(variant or "")
        few = self.one_shot and len(tensors) + (known.images if known else 0) <= FEW_IMAGES
        prepared = []
        was_training = self.training
        self.eval()
        try:
            for image in tensors:
                batch = image[None].to(self.device)
                prepared.append((self.pre_processor(batch) if self.pre_processor else batch)[0])
                self.model.learn(prepared[-1][None], variant, augment=few)
            report = self._commit()
        except BaseException:
            self.model.bank.discard()
            raise
        finally:
            self.train(was_training)
        for name in report.variants:
            self._calibrate_from_views(name, prepared)
        self._refresh()
        return report

    def setup(self, stage: str) -> None:
        """Make a further fit with the same trainer possible, and its checkpoints safe against a kill."""
        if stage == TrainerFn.FITTING:
            # A finished epoch of an earlier fit would let the trainer stop before the first batch.
            self.trainer.fit_loop.epoch_progress.reset()
            plugin = self.trainer.strategy.checkpoint_io
            if type(plugin) is AnomalibCheckpointIO:
                self.trainer.strategy.checkpoint_io = AtomicCheckpointIO(plugin.extra_safe_globals)

    def on_train_epoch_start(self) -> None:
        """Begin with an empty stream."""
        self.model.bank.discard()
        self._few_images = []

    def training_step(self, batch: ImageBatch, *args, **kwargs) -> torch.Tensor:
        """Learn a batch of normal images."""
        del args, kwargs
        assert batch.image is not None
        _check_files(batch.image_path)
        variant = self._variant_label
        known = self.model.bank.variants.get(variant or "")
        images = int(self.trainer.num_training_batches) * len(batch.image) + (known.images if known else 0)
        self.model.learn(batch.image, variant, augment=self.one_shot and images <= FEW_IMAGES)
        self._few_images = [*self._few_images, *batch.image][-FEW_IMAGES:]
        # Lightning wants a loss.
        return torch.tensor(0.0, requires_grad=True, device=self.device)

    def on_validation_start(self) -> None:
        """Validate what the epoch has learned so far; Lightning validates before the epoch ends."""
        self.model.bank.flush()
        self.model.refresh()

    def on_train_epoch_end(self) -> None:
        """Bring the epoch's images into the bank and report."""
        report = self._commit()
        if not sum(self.trainer.num_val_batches):  # no validation will set the thresholds
            for variant in report.variants:
                self._calibrate_from_views(variant, self._few_images)
        self._few_images = []
        self._refresh()
        values = {
            "vectors": report.num_vectors,
            "radius_bound": report.radius_bound,
            "bytes": report.nbytes,
            "seconds": report.seconds,
            "known_images": report.known_images,
            **{f"images/{name}": count for name, count in report.variants.items()},
            **{f"added/{name}": count for name, count in report.added.items()},
            **{f"removed/{name}": count for name, count in report.removed.items()},
        }
        shown = {"vectors", "radius_bound"}
        for name, value in values.items():
            self.log(f"memory/{name}", float(value), prog_bar=name in shown)

    def _commit(self) -> Report:
        report = self.model.bank.commit()
        self.model.refresh()
        logger.info("%s", report)
        self.last_report = report
        return report

    @property
    def _variant_label(self) -> str | None:
        if self.variant is not None:
            return self.variant
        datamodule = getattr(self.trainer, "datamodule", None)
        return (getattr(datamodule, "category", None) or getattr(datamodule, "name", None)) if datamodule else None

    # Thresholds

    def _calibrate_from_views(self, variant: str, images: list[torch.Tensor]) -> None:
        """Without a validation set, views that were not learned show how normal images score."""
        known = self.model.bank.variants[variant].calibration
        if not images or (known is not None and known.labels.any()):
            return  # scores of real anomalies stay the better guide
        images = images[-FEW_IMAGES:]
        views = torch.cat([
            augmented_views(image, max(1, FEW_IMAGES // len(images)), seed=NUM_VIEWS + i)
            for i, image in enumerate(images)
        ])
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            maps = [self.model(view[None]).anomaly_map for view in views]
        patches = torch.cat([self.model.calibration_patches(view[None]) for view in views])
        self.model.train(was_training)
        highest, lowest = max(float(m.max()) for m in maps), min(float(m.min()) for m in maps)
        labels = torch.zeros(len(views), dtype=torch.bool)
        # As Anomalib does when no image is anomalous: the highest normal score is the threshold.
        self.model.bank.calibrate(variant, patches.cpu().numpy(), labels.numpy(), (highest, lowest, highest))

    def on_validation_epoch_start(self) -> None:
        """Collect anew."""
        self._calibration = []

    def on_validation_epoch_end(self) -> None:
        """Keep what sets the thresholds of the variant that was validated."""
        collected, self._calibration = self._calibration, []
        variant = self._variant_label or self._routed(collected)
        if not collected or variant not in self.model.bank.variants:
            return
        patches, labels = (torch.cat([part[i] for part in collected]).cpu().numpy() for i in (0, 1))
        nan = float("nan")
        pixel = (nan, nan, nan)
        last = self.post_processor
        if isinstance(last, VariantPostProcessor):
            pixel = (float(last.pixel_threshold), float(last.pixel_min), float(last.pixel_max))
        self.model.bank.calibrate(variant, patches, labels, pixel)
        self._refresh()

    def _routed(self, collected: list[tuple[torch.Tensor, torch.Tensor]]) -> str | None:
        """Variant of most validation images, where none was named."""
        if not collected:
            return None
        names = list(self.model.bank.variants)
        _, index = self.model.nearest_neighbors(torch.cat([patches for patches, _ in collected]).flatten(0, 1))
        return names[int(self.model.owners[index].bincount().argmax())]

    def _refresh(self) -> None:
        if isinstance(self.post_processor, VariantPostProcessor):
            self.post_processor.refresh(self.model.bank)

    # Judging

    def validation_step(self, batch: Batch, *args, **kwargs) -> STEP_OUTPUT:
        """Score a batch and keep what calibrates the thresholds."""
        del args, kwargs
        if batch.gt_label is not None:
            self._calibration.append((self.model.calibration_patches(batch.image), batch.gt_label.bool()))
        return self._judge(batch)

    def test_step(self, batch: Batch, batch_idx: int, *args, **kwargs) -> STEP_OUTPUT:
        """Score a batch."""
        del args, kwargs, batch_idx
        return self._judge(batch)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> STEP_OUTPUT:
        """Score a batch."""
        del batch_idx, dataloader_idx
        return self._judge(batch)

    def _judge(self, batch: Batch) -> Batch:
        _check_files(getattr(batch, "image_path", None))
        predictions = self.model(batch.image)
        batch.update(**predictions._asdict())
        setattr(batch, "variant", predictions.variant)  # noqa: B010  # for the post-processor; no field of Anomalib's
        return batch

    # Checkpoints

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse foreign checkpoints, and let a fit that starts from one learn.

        Raises:
            ValueError: If the checkpoint is of another model.
        """
        if "model._extra_state" not in checkpoint["state_dict"]:
            keys = list(checkpoint["state_dict"])
            msg = (
                "The checkpoint is not of ContinualPatchCore: it holds no memory bank of variants. It has "
                f"{len(keys)} tensors, such as {keys[:3]}. Load it with the model that it was made with."
            )
            raise ValueError(msg)
        super().on_load_checkpoint(checkpoint)
        trainer = self._trainer
        path = str(trainer.ckpt_path) if trainer is not None else None
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            checkpoint.pop("loops", None)  # or the trainer believes that the epoch is over
            self._continued_from = path
        elif trainer is not None and trainer.state.fn == TrainerFn.TESTING and path == self._continued_from:
            # `Engine.train` tests with the checkpoint that it started from; going back there would lose the learned.
            logger.warning("Testing what was learned on top of %s; load it into a new model to test it alone.", path)
            checkpoint["state_dict"] = self.state_dict()
            self._continued_from = None

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True, assign: bool = False) -> Any:  # noqa: ANN401
        """Load weights and bank; thresholds follow from the bank."""
        # Checked first, for differing shapes of the backbone would hide the reason.
        self.model.set_extra_state(state_dict["model._extra_state"])
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        self._refresh()
        return result


class AtomicCheckpointIO(AnomalibCheckpointIO):
    """Writes a checkpoint beside the old one, syncs it and renames it over: a kill leaves one of the two whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:  # noqa: ANN401
        """Save as Lightning does, then replace ``path`` at once."""
        path = Path(path)
        beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            super().save_checkpoint(checkpoint, beside, storage_options)
            with beside.open("rb+") as file:
                os.fsync(file.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


def _check_files(paths: Sequence[str] | None) -> None:
    """Refuse image files that Anomalib would read as something else than what they show."""
    for path in paths or ():
        with Image.open(path) as image:
            width, height, mode = *image.size, image.mode
        if min(width, height) < SMALLEST_SIDE:
            msg = f"{path} has {width} x {height} pixels; at least {SMALLEST_SIDE} each way are needed to judge it."
            raise ValueError(msg)
        if mode.startswith(("I", "F")):
            msg = (
                f"{path} has pixels of mode {mode!r} (more than 8 bits). They would be clipped to 8 bits: "
                "convert the image to 8 bits first, in the same way for learning and for judging."
            )
            raise ValueError(msg)


def _as_images(images: torch.Tensor | str | Path | Sequence[str | Path]) -> list[torch.Tensor]:
    """Images of shape ``(3, H, W)`` in [0, 1] from a batch or from files."""
    if isinstance(images, torch.Tensor):
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            msg = f"Images must be floats of shape (B, 3, H, W), got {images.dtype} of {tuple(images.shape)}."
            raise ValueError(msg)
        if min(images.shape[-2:]) < SMALLEST_SIDE:
            msg = f"Images must have at least {SMALLEST_SIDE} pixels each way, got {tuple(images.shape[-2:])}."
            raise ValueError(msg)
        if not torch.isfinite(images).all():
            msg = "Images hold NaN or infinite values; none of them was learned."
            raise ValueError(msg)
        if len(images) and (images.min() < 0 or images.max() > 1):
            msg = f"Images must lie in [0, 1], got {float(images.min()):.3g} to {float(images.max()):.3g}."
            raise ValueError(msg)
        tensors = list(images)
    else:
        tensors = [_read(path) for path in ([images] if isinstance(images, str | Path) else images)]
    if not tensors:
        msg = "There are no images to learn."
        raise ValueError(msg)
    return tensors


def _read(path: str | Path) -> torch.Tensor:
    try:
        _check_files([str(path)])
        return read_image(path, as_tensor=True)
    except OSError as error:  # Pillow's error for an unreadable image is one too
        msg = f"{path} cannot be read as an image: {error}. Nothing of this call was learned."
        raise ValueError(msg) from error
