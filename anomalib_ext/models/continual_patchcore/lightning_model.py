# SPDX-License-Identifier: Apache-2.0
"""ContinualPatchCore in a trainer: learning, calibration, checkpoints and reports.

PatchCore (arXiv 2106.08265) that goes on learning, after arXiv 2512.13497, of which the abstract and summaries were
available; the update rule, the shares of the budget and the thresholds by variant are ours. See the README beside this
file.
"""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

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
from torch import nn

from anomalib_ext.export import BundleContent
from anomalib_ext.models.components.backbone import backbone_pre_processor
from anomalib_ext.models.components.checks import check_files
from anomalib_ext.models.components.patchcore import PatchCoreModule
from openvino_export.edits import BankEdits
from openvino_export.learning import Region
from openvino_export.memory.memory_bank import MemoryBank
from openvino_export.memory.names import checked_name
from openvino_export.memory.report import Report
from openvino_export.memory.thresholds import image_thresholds

from .drift import DriftCallback
from .graph import bundle_content
from .learning import add_batch, add_images, named_images, variants_of
from .metrics import memory_metrics
from .post_processor import VariantPostProcessor
from .torch_model import ContinualInferenceBatch, ContinualPatchCoreModel
from .validation import ValidatedImages

logger = logging.getLogger(__name__)


class ContinualPatchCore(BankEdits, PatchCoreModule, AnomalibModule):  # most are hooks of Lightning and Anomalib
    """PatchCore that learns product after product within a fixed memory budget.

    Every ``Engine.fit`` on the same model, every ``--ckpt_path`` given to ``anomalib train`` or ``fit``, and every
    :meth:`partial_fit` adds to what is known. No task id is needed at inference.

    Args:
        backbone: Name of a timm CNN or ViT.
        layers: Layers whose features are concatenated.
        pre_trained: Whether to use pretrained weights.
        backbone_weights: File with the backbone's weights; without it they are looked up in the Hugging Face cache, in
            the package of the extra ``offline``, and on the hub, in this order.
        memory_size: Largest number of vectors in the memory bank, for all variants together. By default 10,000, or that
            of a checkpoint that is loaded; a larger one is filled by what is learned from then on.
        num_neighbors: Neighbors that weigh the image score. With the default of 1 the score is the largest patch
            distance, which no later learning can raise by more than the radius bound; weighing breaks that promise, and
            `false_alarm_rate` holds without it only.
        false_alarm_rate: Share of good images that may be called anomalous. By default 0.02, or that of a checkpoint
            that is loaded.
        variant: Name of the variant that is learned. By default it is the category or the name of the datamodule,
            with ``MultiCategory`` the category of each image, and found from the images where there is none.
            ``load_from_checkpoint`` brings back the one that was given.
        precision: ``float32`` or ``float16``, in which the memory bank is kept; that of a checkpoint that is loaded
            is used.
        pre_processor: Pre-processor, or whether to use the default one.
        post_processor: Post-processor, or whether to use the default one.
        evaluator: Evaluator, or whether to use the default one.
        visualizer: Visualizer, or whether to use the default one.
        few_shot_views: Without effect; augmented views of few images are no longer learned.
        one_shot: Former name of `few_shot_views`.

    Raises:
        ValueError: If the backbone or a layer is unknown, a size is not positive, or the rate is out of range.
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
        backbone_weights: str | Path | None = None,
        memory_size: int | None = None,
        num_neighbors: int = 1,
        false_alarm_rate: float | None = None,
        variant: str | None = None,
        precision: str = "float32",
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
        few_shot_views: bool | None = None,
        one_shot: bool | None = None,
    ) -> None:
        _warn_of_former(few_shot_views, one_shot)
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
            false_alarm_rate=false_alarm_rate,
        )
        super().__init__(
            # Only here is the backbone, and with it the normalisation, known.
            pre_processor=self.configure_pre_processor(backbone=backbone) if pre_processor is True else pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.model = model
        self.variant = variant
        self.last_report: Report | None = None
        self._validated = ValidatedImages()

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
        return bundle_content(self.model, self.pre_processor, self.post_processor, size)

    # Learning

    def partial_fit(
        self,
        images: torch.Tensor | str | Path | Sequence[str | Path],
        variant: str | None = None,
        hold_back: bool = False,
        defective: bool = False,
        regions: Region | Sequence[Region] | None = None,
    ) -> Report:
        """Learn normal images, or what a defect looks like, without a trainer. When it fails, nothing is changed.

        Args:
            images: RGB images of shape ``(B, 3, H, W)`` in [0, 1], or the path of an image, or several.
            variant: Name of their variant; the model's `variant` by default, and found for each image without one.
            hold_back: Whether images that look anomalous are held back, as on the edge PC. The report names them.
            defective: Whether the images are shown as defective; see :meth:`EdgeDetector.learn`, also for `regions`.
            regions: Where the defect is in each.

        Returns:
            What changed.

        Raises:
            RuntimeError: If a trainer is fitting the model.
            TypeError: If something else than that is given.
            FileNotFoundError: If there is no such file.
            ValueError: If there are no images, or one is unreadable, too small, of unsuitable depth or not finite, or
                if the variant's name is blank, or differs from a known one by case or blanks alone.
        """
        self._check_idle()
        named = named_images(images)
        variant = self.variant if variant is None else variant
        variant = None if variant is None else checked_name(variant, self.model.bank.variants)
        # As a trainer; the pre-processor's own call is for exported models, and resizes less smoothly.
        prepare = getattr(self.pre_processor, "transform", self.pre_processor) or nn.Identity()
        was_training = self.training
        self.eval()
        try:
            update = self.model.begin_update()
            limits = image_thresholds(self.model.bank) if hold_back else None
            add_images(update, self.model, named, prepare, variant, limits, defective=defective, regions=regions)
            report = self._commit()
        except BaseException:
            self._drop_update()
            raise
        finally:
            self.train(was_training)
        return report

    def configure_callbacks(self) -> list[Callback]:
        """Anomalib's callbacks, one for what fails, and one for drift."""
        return [*cast("list[Callback]", super().configure_callbacks()), _DropUpdate(), DriftCallback()]

    def on_train_epoch_start(self) -> None:
        """Begin to learn."""
        self.model.begin_update()

    def learn_batch(self, batch: ImageBatch) -> None:
        """Learn a batch of normal images."""
        assert self.model.update is not None
        add_batch(self.model.update, self, batch)

    def on_validation_start(self) -> None:
        """Validate what the epoch has learned so far; Lightning validates before the epoch ends."""
        self._validated = ValidatedImages()
        if self.model.update is not None:
            self.model.update.flush()
        self.model.refresh()

    def on_train_epoch_end(self) -> None:
        """Bring the epoch's images into the bank and report."""
        report = self._commit()
        for name, value in memory_metrics(report, self.model.bank).items():
            self.log(name, value, prog_bar=name in {"memory/vectors", "memory/radius_bound"}, sync_dist=True)

    def _commit(self) -> Report:
        """Bring what was learned into the bank, with thresholds, and report it."""
        assert self.model.update is not None
        self.last_report = report = self.model.update.commit()
        self._refresh()  # what fails until here is undone by dropping the update
        self.model.end_update()
        logger.info("%s", report)
        for sentence in report.advice:
            logger.warning(sentence)
        return report

    def edit_bank(self, change: Callable[[MemoryBank], MemoryBank]) -> None:
        """Judge from now on by what a function makes of the bank; refused while a trainer is fitting the model."""
        self._check_idle()
        self.model.edit_bank(change)
        self._refresh()

    def _drop_update(self) -> None:
        """Forget an update that is under way."""
        self.model.update = None
        self._refresh()

    # Thresholds

    def on_validation_epoch_end(self) -> None:
        """Keep what sets the thresholds of the variants that were validated."""
        self._validated.kept = dict(self.gathered(list(self._validated.kept.items())))
        for name, images in self._validated:
            self.model.validate(name, images)
        self._refresh()

    def _refresh(self) -> None:
        """Judge by the bank, or the update, as it is now."""
        self.model.refresh()
        if isinstance(self.post_processor, VariantPostProcessor):
            self.post_processor.refresh(self.model.searched)

    # Judging

    def validation_step(self, batch: Batch, *args, **kwargs) -> STEP_OUTPUT:
        """Score a batch and keep what calibrates the thresholds."""
        del args, kwargs
        embedding = self._search_and_score(batch)
        if batch.gt_label is None:
            return batch
        pairs = zip(variants_of(self, batch), cast("Any", batch).variant.tolist(), strict=True)
        variants = [label or list(self.model.searched.variants)[position] for label, position in pairs]
        arrays = (each.float().cpu().numpy() for each in (embedding, cast("Any", batch).image))
        self._validated.add(self.model.searched, variants, batch.gt_label.tolist(), *arrays)
        return batch

    def _score(self, batch: Batch) -> Batch:
        self._search_and_score(batch)
        return batch

    def _search_and_score(self, batch: Batch) -> torch.Tensor:
        """Write what the model says into the batch, and return the patch embeddings."""
        check_files(getattr(batch, "image_path", None))
        images = cast("torch.Tensor", batch.image)
        embedding = self.model.embed(images)
        scores, locations = self.model.search(embedding)
        predictions = self.model.score(embedding, scores, locations, images.shape[-2:])
        batch.update(**predictions._asdict())
        setattr(batch, "variant", predictions.variant)  # noqa: B010  # for the post-processor; no field of Anomalib's
        return embedding

    # Checkpoints

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse foreign checkpoints, and let a fit that starts from one learn.

        Raises:
            ValueError: If the checkpoint is of another model.
        """
        _check(self.model, checkpoint["state_dict"])  # before anything of it is taken over
        super().on_load_checkpoint(checkpoint)
        if self._is_fitting:
            # Or the trainer believes that the epoch is over, and its callbacks that the best is saved already.
            checkpoint.pop("loops", None)
            checkpoint.pop("callbacks", None)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:  # noqa: ANN401
        """Load weights and bank, or nothing if they do not fit; thresholds follow from the bank."""
        before = [(tensor, tensor.clone()) for tensor in (*self.parameters(), *self.buffers())]
        model = self.model
        known = model.bank, model.update, model.interrupted
        _check(model, state_dict)  # first, for differing shapes of the backbone would hide the reason
        try:
            result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        except BaseException:
            for tensor, value in before:
                tensor.data.copy_(value)
            model.bank, model.update, model.interrupted = known
            model.refresh()
            raise
        self._refresh()
        return result


def _check(model: ContinualPatchCoreModel, state_dict: Mapping[str, Any]) -> None:
    """Refuse a state that is of another model or damaged."""
    if "model._extra_state" not in state_dict:
        keys = list(state_dict)
        msg = (
            "The checkpoint is not of ContinualPatchCore: it holds no memory bank of variants. It has "
            f"{len(keys)} tensors, such as {keys[:3]}. Load it with the model that it was made with."
        )
        raise ValueError(msg)
    model.read_state(state_dict["model._extra_state"])


def _warn_of_former(few_shot_views: bool | None, one_shot: bool | None) -> None:
    if few_shot_views is not None or one_shot is not None:
        msg = "few_shot_views and one_shot have no effect any more; few images are learned as they are."
        warnings.warn(msg, FutureWarning, stacklevel=3)


class _DropUpdate(Callback):
    """After a fit that failed, what was known before remains."""

    def on_exception(  # noqa: PLR6301  # Lightning's hook
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Drop the update."""
        del exception
        if trainer.state.fn == TrainerFn.FITTING and isinstance(pl_module, ContinualPatchCore):
            pl_module._drop_update()  # noqa: SLF001  # its own module
