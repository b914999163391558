# SPDX-License-Identifier: Apache-2.0
"""ContinualPatchCore in a trainer: learning, calibration, checkpoints and reports.

PatchCore (arXiv 2106.08265) that goes on learning, after arXiv 2512.13497, of which the abstract and summaries were
available; the update rule, the thresholds by variant and the one-shot views are ours. See the README beside this file.
"""

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from anomalib.data import Batch, ImageBatch, InferenceBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from numpy.typing import NDArray
from torch import nn

from anomalib_ext.data import MultiCategory
from anomalib_ext.export import BundleContent
from anomalib_ext.models.components.backbone import backbone_pre_processor
from anomalib_ext.models.components.checks import check_files
from anomalib_ext.models.components.patchcore import PatchCoreModule
from anomalib_ext.models.components.training import UnreadableImages
from openvino_export.images import check_values, load
from openvino_export.memory.guard import SUSPICION, excess
from openvino_export.memory.thresholds import calibrated, calibration_patches, thresholds
from openvino_export.memory.update import Report

from .graph import bundle_content
from .post_processor import VariantPostProcessor
from .torch_model import ContinualInferenceBatch, ContinualPatchCoreModel

logger = logging.getLogger(__name__)


class ContinualPatchCore(PatchCoreModule, AnomalibModule):  # most are hooks of Lightning and Anomalib
    """PatchCore that learns product after product within a fixed memory budget.

    Every ``Engine.fit`` on the same model, every ``--ckpt_path`` given to ``anomalib train`` or ``fit``, and every
    :meth:`partial_fit` adds to what is known. No task id is needed at inference.

    Args:
        backbone: Name of a timm CNN or ViT.
        layers: Layers whose features are concatenated.
        pre_trained: Whether to use pretrained weights.
        backbone_weights: File with the backbone's weights; without it they are looked up in the Hugging Face cache, in
            the package of the extra ``offline``, and on the hub, in this order.
        memory_size: Largest number of vectors in the memory bank, for all variants together. A checkpoint that is
            loaded brings its own, and its own precision.
        num_neighbors: Neighbors that weigh the image score. With the default of 1 the score is the largest patch
            distance, which no later learning can raise by more than the radius bound; weighing breaks that promise.
        few_shot_views: Whether a variant of at most 4 images is learned with augmented views of them. Images without a
            name are counted by call.
        variant: Name of the variant that is learned. By default it is the category or the name of the datamodule,
            with ``MultiCategory`` the category of each image, and found from the images where there is none.
            ``load_from_checkpoint`` brings back the one that was given.
        precision: ``float32`` or ``float16``, in which the memory bank is kept.
        pre_processor: Pre-processor, or whether to use the default one.
        post_processor: Post-processor, or whether to use the default one.
        evaluator: Evaluator, or whether to use the default one.
        visualizer: Visualizer, or whether to use the default one.
        one_shot: Former name of `few_shot_views`.

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
    # Of validation images by variant: patches that give the score, and whether the image is anomalous.
    _validation: dict[str, list[tuple[NDArray[np.float32], bool]]]

    def __init__(
        self,
        backbone: str = "tf_efficientnet_lite0",
        layers: Sequence[str] = ("blocks.2", "blocks.4"),
        pre_trained: bool = True,
        backbone_weights: str | Path | None = None,
        memory_size: int = 10_000,
        num_neighbors: int = 1,
        few_shot_views: bool = True,
        variant: str | None = None,
        precision: str = "float32",
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
        one_shot: bool | None = None,
    ) -> None:
        if one_shot is not None:
            warnings.warn("one_shot is now few_shot_views; use that name.", FutureWarning, stacklevel=2)
            few_shot_views = one_shot
        if precision not in {"float32", "float16"}:
            msg = f"precision must be 'float32' or 'float16', got {precision!r}."
            raise ValueError(msg)
        model = ContinualPatchCoreModel(
            backbone=backbone,
            layers=layers,
            pre_trained=pre_trained,
            backbone_weights=backbone_weights,
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
        self.few_shot_views = few_shot_views
        self.variant = variant
        self.last_report: Report | None = None
        self._validation = {}

    @staticmethod
    def configure_pre_processor(
        image_size: tuple[int, int] | None = None,
        backbone: str = "tf_efficientnet_lite0",
    ) -> PreProcessor:
        """Resize, and normalise as the backbone was trained.

        Args:
            image_size: Height and width; by default 256 each, or the only size that the backbone takes.
            backbone: Name of a timm model.
        """
        return backbone_pre_processor(backbone, image_size)

    @staticmethod
    def configure_post_processor() -> PostProcessor:
        """Post-processor with thresholds by variant."""
        return VariantPostProcessor()

    def forward(self, batch: torch.Tensor, *args, **kwargs) -> InferenceBatch:
        """Pre-process, score and post-process images of shape ``(B, 3, H, W)`` in [0, 1]."""
        predictions = super().forward(batch, *args, **kwargs)
        if isinstance(predictions, ContinualInferenceBatch):  # without a post-processor
            return InferenceBatch(pred_score=predictions.pred_score, anomaly_map=predictions.anomaly_map)
        return predictions

    def bundle_content(self, size: tuple[int, int]) -> BundleContent:
        """What the model brings to its bundle, for images of a height and width."""
        return bundle_content(self.model, self.pre_processor, self.post_processor, self.few_shot_views, size)

    # Learning

    def partial_fit(
        self,
        images: torch.Tensor | str | Path | Sequence[str | Path],
        variant: str | None = None,
        hold_back: bool = False,
    ) -> Report:
        """Learn normal images, without a trainer. When it fails, nothing is changed.

        Args:
            images: RGB images of shape ``(B, 3, H, W)`` in [0, 1], or the path of an image, or several.
            variant: Name of their variant; the model's `variant` by default, and found for each image without one.
            hold_back: Whether images that look anomalous are held back, as on the edge PC. The report names them.

        Returns:
            What changed.

        Raises:
            TypeError: If something else than that is given.
            ValueError: If an image is unreadable, too small, of unsuitable depth or not finite.
        """
        items = _checked(images)
        variant = self.variant if variant is None else variant
        was_training = self.training
        self.eval()
        try:
            self._add(items, variant, hold_back)
            report = self._commit()
        except BaseException:
            self._drop()
            raise
        finally:
            self.train(was_training)
        return report

    def _add(self, items: Sequence[torch.Tensor | str | Path], variant: str | None, hold_back: bool) -> None:
        """Begin an update with images."""
        update = self.model.begin_update(self.few_shot_views)
        limits = self._image_thresholds() if hold_back else {}
        # As a trainer does it; the pre-processor's own call is for exported models, and resizes less smoothly.
        prepare = getattr(self.pre_processor, "transform", self.pre_processor) or nn.Identity()
        for number, item in enumerate(items, 1):  # one by one, for they may be many and differ in size
            image = item if isinstance(item, torch.Tensor) else torch.from_numpy(load(item))
            prepared = _to_array(prepare(image[None].to(self.device)))
            multiple = self._excess(prepared, variant, limits) if hold_back else 0.0
            if multiple > SUSPICION:
                name = f"image {number}" if isinstance(item, torch.Tensor) else str(item)
                update.report.held_back[name] = multiple
            else:
                update.add(prepared, variant)

    def _excess(self, image: NDArray[np.float32], variant: str | None, limits: Mapping[str, float]) -> float:
        """Score of an image of shape ``(1, 3, H, W)`` as a multiple of the threshold of its variant."""
        embedding = self.model.embed_arrays(image)
        return excess(embedding.reshape(-1, embedding.shape[-1]), variant, self.model.bank, limits)

    def _image_thresholds(self) -> dict[str, float]:
        """Threshold of the raw image scores of each variant, as it is judged by."""
        names = list(self.model.bank.variants)
        if isinstance(self.post_processor, VariantPostProcessor):
            return dict(zip(names, self.post_processor.image_thresholds(len(names)), strict=True))
        return {name: thresholds(self.model.bank, name)["image"][0] for name in names}

    def configure_callbacks(self) -> list[Callback]:
        """Anomalib's callbacks, and one for what fails."""
        return [*cast("list[Callback]", super().configure_callbacks()), _AfterException()]

    def on_train_epoch_start(self) -> None:
        """Begin to learn."""
        self.model.begin_update(self.few_shot_views)

    def learn_batch(self, batch: ImageBatch) -> None:
        """Learn a batch of normal images."""
        assert batch.image is not None
        assert self.model.update is not None
        labels, images = self._labels(batch), _to_array(batch.image)
        for label in dict.fromkeys(labels):
            self.model.update.add(images[[other == label for other in labels]], label)

    def on_validation_start(self) -> None:
        """Validate what the epoch has learned so far; Lightning validates before the epoch ends."""
        self._validation = {}
        update = self.model.update
        if update is not None:
            update.flush()
        self.model.refresh(self.model.bank if update is None else update.bank)

    def on_train_epoch_end(self) -> None:
        """Bring the epoch's images into the bank and report."""
        report = self._commit()
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
        for name, variant in self.model.bank.variants.items():
            values[f"share/{name}"] = len(variant.radii) / report.num_vectors
            for kind, (threshold, _, _) in thresholds(self.model.bank, name).items():
                if not np.isnan(threshold):  # as that of pixels, without masks
                    values[f"{kind}_threshold/{name}"] = threshold
        shown = {"vectors", "radius_bound"}
        for name, value in values.items():
            self.log(f"memory/{name}", float(value), prog_bar=name in shown)

    def _commit(self) -> Report:
        """Bring what was learned into the bank, with thresholds, and report it."""
        report = self.model.commit_update()
        self._refresh_thresholds()
        logger.info("%s", report)
        self.last_report = report
        return report

    def _drop(self) -> None:
        """Forget what was learned since the beginning of an update that is under way."""
        if self.model.update is not None:
            self.model.drop_update()
            self._refresh_thresholds()

    def _labels(self, batch: Batch) -> list[str | None]:
        """Name of the variant of each image; None where it is to be found."""
        datamodule = getattr(self.trainer, "datamodule", None)
        if self.variant is None and isinstance(datamodule, MultiCategory):
            return list(datamodule.categories_of(cast("Any", batch).image_path))
        label = getattr(datamodule, "category", None) or getattr(datamodule, "name", None)
        return [label if self.variant is None else self.variant] * len(cast("torch.Tensor", batch.image))

    # Thresholds

    def on_validation_epoch_end(self) -> None:
        """Keep what sets the thresholds of the variants that were validated."""
        if not self._validation:
            return
        model, last = self.model, self.post_processor
        pixel = (float("nan"),) * 3
        if isinstance(last, VariantPostProcessor):
            pixel = (float(last.pixel_threshold), float(last.pixel_min), float(last.pixel_max))
        for name, images in self._validation.items():
            kept = np.stack([patches for patches, _ in images])
            labels = np.array([label for _, label in images])
            if model.update is not None:
                model.update.calibrate(name, kept, labels, pixel)
                continue
            model.bank = calibrated(model.bank, name, kept, labels, pixel)
            if model.interrupted is not None and name in model.interrupted.bank.variants:
                model.interrupted.calibrate(name, kept, labels, pixel)
        model.refresh(model.bank if model.update is None else model.update.bank)
        self._refresh_thresholds()

    def _refresh_thresholds(self) -> None:
        if isinstance(self.post_processor, VariantPostProcessor):
            self.post_processor.refresh(self.model.searched)

    # Judging

    def validation_step(self, batch: Batch, *args, **kwargs) -> STEP_OUTPUT:
        """Score a batch and keep what calibrates the thresholds."""
        del args, kwargs
        embedding, scores = self._search_and_score(batch)
        if batch.gt_label is None:
            return batch
        bank = self.model.searched
        names = list(bank.variants)
        found = [names[i] for i in cast("Any", batch).variant.tolist()]
        variants = [label or other for label, other in zip(self._labels(batch), found, strict=True)]
        arrays = (embedding.flatten(1, 2).cpu().numpy(), scores.cpu().numpy())
        for name, label, patches, distances in zip(variants, batch.gt_label.tolist(), *arrays, strict=True):
            if name in bank.variants:
                kept = calibration_patches(bank, name, patches, distances)
                self._validation.setdefault(name, []).append((kept, bool(label)))
        return batch

    def _score(self, batch: Batch) -> Batch:
        self._search_and_score(batch)
        return batch

    def _search_and_score(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Write what the model says into the batch, and return the patch embeddings and their scores."""
        check_files(getattr(batch, "image_path", None))
        images = cast("torch.Tensor", batch.image)
        embedding = self.model.embed(images)
        scores, locations = self.model.search(embedding)
        predictions = self.model.score(embedding, scores, locations, images.shape[-2:])
        batch.update(**predictions._asdict())
        setattr(batch, "variant", predictions.variant)  # noqa: B010  # for the post-processor; no field of Anomalib's
        return embedding, scores

    # Checkpoints

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse foreign checkpoints, and let a fit that starts from one learn.

        Raises:
            ValueError: If the checkpoint is of another model.
        """
        self._read_bank(checkpoint["state_dict"])  # before anything of it is taken over
        super().on_load_checkpoint(checkpoint)
        if self._is_fitting:
            # Or the trainer believes that the epoch is over, and its callbacks that the best is saved already.
            checkpoint.pop("loops", None)
            checkpoint.pop("callbacks", None)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:  # noqa: ANN401
        """Load weights and bank, or nothing if they do not fit; thresholds follow from the bank."""
        before = [(tensor, tensor.clone()) for tensor in (*self.parameters(), *self.buffers())]
        known = self.model.bank, self.model.interrupted
        self._read_bank(state_dict)  # first, for differing shapes of the backbone would hide the reason
        try:
            result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        except Exception:
            for tensor, value in before:
                tensor.data.copy_(value)
            self.model.bank, self.model.interrupted = known
            self.model.refresh(self.model.bank)
            raise
        self._refresh_thresholds()
        return result

    def _read_bank(self, state_dict: Mapping[str, Any]) -> None:
        if "model._extra_state" not in state_dict:
            keys = list(state_dict)
            msg = (
                "The checkpoint is not of ContinualPatchCore: it holds no memory bank of variants. It has "
                f"{len(keys)} tensors, such as {keys[:3]}. Load it with the model that it was made with."
            )
            raise ValueError(msg)
        self.model.read_state(state_dict["model._extra_state"])


class _AfterException(UnreadableImages):
    """After a fit that failed, what was known before remains; and unreadable images are named, if those were why."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Drop the update and explain."""
        if trainer.state.fn == TrainerFn.FITTING and isinstance(pl_module, ContinualPatchCore):
            pl_module._drop()  # noqa: SLF001  # its own module
        super().on_exception(trainer, pl_module, exception)


def _checked(images: torch.Tensor | str | Path | Sequence[str | Path]) -> list[torch.Tensor] | list[str | Path]:
    """Images of shape ``(3, H, W)`` in [0, 1], or the paths of images."""
    if not isinstance(images, torch.Tensor):
        items = [images] if isinstance(images, str | Path) else list(images)
        if not items:
            msg = "There are no images to learn."
            raise ValueError(msg)
        wrong = [type(item).__name__ for item in items if not isinstance(item, str | Path)]
        if wrong:
            msg = f"Images must be paths, or one tensor of shape (B, 3, H, W); got a list with {wrong[0]} in it."
            raise TypeError(msg)
        return items
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        msg = f"Images must be floats of shape (B, 3, H, W), got {images.dtype} of {tuple(images.shape)}."
        raise ValueError(msg)
    if not len(images):
        msg = "There are no images to learn."
        raise ValueError(msg)
    for number, image in enumerate(images.float(), 1):
        check_values(image.cpu().numpy(), f"image {number}")
    return list(images.float())


def _to_array(images: torch.Tensor) -> NDArray[np.float32]:
    return images.detach().float().cpu().numpy()
