# SPDX-License-Identifier: Apache-2.0
"""Crr in a trainer: two stages in one fit. See the README beside this file for what is the paper's and what is ours."""

import logging
from pathlib import Path
from typing import Any, cast

import torch
from anomalib.data import Batch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.models.image.dinomaly.components import StableAdamW
from anomalib.models.image.dinomaly.lightning_model import TRAINING_CONFIG
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.optim import Adam, Optimizer
from torchvision.transforms.v2 import CenterCrop, Compose, Normalize, Resize

from anomalib_ext.export import BundleContent
from anomalib_ext.models.components.backbone import backbone_normalization, describe_vit
from anomalib_ext.models.components.checks import check_files
from anomalib_ext.models.components.frozen_teacher import FrozenTeacherModule

from .anomalous_batches import AnomalousBatches
from .loss import repair_loss, segment_loss
from .stages import STAGES, RepairSchedule, StagesProgress, current_stage
from .torch_model import CrrModel

logger = logging.getLogger(__name__)

ENCODER = "vit_base_patch14_reg4_dinov2.lvd142m"


class Crr(FrozenTeacherModule, AnomalibModule):
    """One model for many classes: Dinomaly that repairs synthetic anomalies, with a head that segments them (CRR).

    After Wang et al., arXiv 2512.11401. One fit learns in two stages: ``repair`` trains bottleneck and decoder,
    ``segment`` the head, with all else frozen. The stages' lengths end the fit, which needs no number of epochs.

    Args:
        encoder: Name of a plain timm vision transformer, with or without a tag; it is frozen.
        pre_trained: Whether the encoder has pretrained weights.
        backbone_weights: File with the encoder's weights; without it they are looked up in the Hugging Face cache, in
            installed packages and on the hub, in this order.
        stage: ``both`` stages, or one alone: ``repair`` makes a model without a head; ``segment`` begins with what a
            checkpoint brings.
        repair: Whether the decoder learns from images with synthetic anomalies, too.
        repair_steps: Number of steps of the first stage.
        segment_steps: Number of steps of the second stage, each with half a batch.
        mask_ratio: Share of the fused feature's elements that are masked at random.
        inference_mask: Whether, when judging, the mask is replaced by what is ``expected`` of it or goes on to
            ``sample``, as in the paper's code, so that scores differ from time to time.
        bottleneck_dropout: Dropout of the bottleneck.
        head_width: Width of the head: 192 is the paper's, 64 light.
        alpha: Weight of the cosine map in the fused map; that of the head's map is ``1 - alpha``.
        texture_dir: Folder with images of textures, as for :class:`anomalib_ext.data.AnomalySynthesis`.
        texture_only: Whether, or for which categories, textures are the only source of anomalies, as there.
        foreground_dir: Folder with maps of what is object, as there.
        pre_processor: Pre-processor, or whether to use the default one.
        post_processor: Post-processor, or whether to use the default one.
        evaluator: Evaluator, or whether to use the default one.
        visualizer: Visualizer, or whether to use the default one.

    Raises:
        ValueError: If the encoder, the size of the images or an option does not fit.
        FileNotFoundError: If the encoder's weights are nowhere to be found.

    Example:
        >>> from anomalib.data import MVTecAD
        >>> from anomalib.engine import Engine
        >>> from anomalib.models import Crr
        >>> Engine().train(Crr(), datamodule=MVTecAD(category="bottle", train_batch_size=16))
    """

    model: CrrModel
    backbone_argument = "encoder"
    save_teachers = True

    def __init__(
        self,
        encoder: str = ENCODER,
        pre_trained: bool = True,
        backbone_weights: str | Path | None = None,
        stage: str = "both",
        repair: bool = True,
        repair_steps: int = 10_000,
        segment_steps: int = 8_000,
        mask_ratio: float = 0.4,
        inference_mask: str = "expected",
        bottleneck_dropout: float = 0.2,
        head_width: int = 192,
        alpha: float = 0.7,
        texture_dir: str | Path | None = None,
        texture_only: bool | list[str] = False,
        foreground_dir: str | Path | None = None,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        if stage not in {"both", *STAGES}:
            msg = f"stage must be 'both', 'repair' or 'segment', got {stage!r}."
            raise ValueError(msg)
        if min(repair_steps, segment_steps) < 1:
            msg = f"repair_steps and segment_steps must be 1 or more, got {repair_steps} and {segment_steps}."
            raise ValueError(msg)
        model = CrrModel(
            encoder,
            pre_trained,
            backbone_weights,
            mask_ratio,
            inference_mask,
            bottleneck_dropout,
            None if stage == "repair" else head_width,
            alpha,
        )
        super().__init__(
            # Only here is the encoder, and with it the normalisation, known.
            pre_processor=self.configure_pre_processor(encoder=encoder) if pre_processor is True else pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        if self.input_size is not None:
            model.check_size(*self.input_size)
        self.automatic_optimization = False  # the stages have an optimizer each
        self.model = model
        self.backbone = encoder
        self.repair = repair
        self.lengths = (repair_steps * (stage != "segment"), segment_steps * (stage != "repair"))
        self.synthesis = {"texture_dir": texture_dir, "texture_only": texture_only, "foreground_dir": foreground_dir}
        self._begins = False

    @staticmethod
    def configure_pre_processor(
        image_size: tuple[int, int] | None = None,
        crop_size: tuple[int, int] | None = None,
        encoder: str = ENCODER,
    ) -> PreProcessor:
        """Resize, crop the middle, and normalise as the encoder was trained.

        Args:
            image_size: Height and width to resize to. By default 32 patches each way, of which the middle 28 are
                cropped: 448 and 392 pixels with patches of 14 pixels, as in the paper.
            crop_size: Height and width of the middle that is left; all of it, if only ``image_size`` is given.
            encoder: Name of a timm vision transformer.
        """
        mean, std = backbone_normalization(encoder)
        if image_size is None:
            _, patch = describe_vit(encoder)
            image_size, crop_size = (32 * patch, 32 * patch), crop_size or (28 * patch, 28 * patch)
        crop = [CenterCrop(crop_size)] if crop_size else []
        return PreProcessor(
            Compose([Resize(image_size, antialias=True), *crop, Normalize(mean=list(mean), std=list(std))]),
        )

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """The stages end the fit, not a number of epochs; nothing is scored before the first step."""
        return {**super().trainer_arguments, "max_epochs": -1}

    @property
    def current_stage(self) -> str | None:
        """Name of the stage that is to be learned next, if any is left."""
        return current_stage(self.model.steps, self.lengths)

    @property
    def loads_anomalies(self) -> bool:
        """Whether batches hold each image twice, clean and with an anomaly."""
        return self.repair or self.model.head is not None

    # Learning

    def setup(self, stage: str) -> None:
        """As for all models here; and plain ``ddp`` is told that each stage leaves parameters without gradients."""
        super().setup(stage)
        if isinstance(self.trainer.strategy, DDPStrategy):
            self.trainer.strategy._ddp_kwargs.setdefault("find_unused_parameters", True)  # noqa: SLF001

    def configure_callbacks(self) -> list[Callback]:
        """Those of all models here, and what surrounds the two stages."""
        anomalies = [AnomalousBatches(self.synthesis)] if self.loads_anomalies else []
        return [*super().configure_callbacks(), *anomalies, StagesProgress(self.model, self.lengths)]

    def configure_optimizers(self) -> tuple[list[Optimizer], list[RepairSchedule]]:
        """StableAdamW with warm-up and cosine for the first stage, and Adam for the second."""
        parameters = [*self.model.bottleneck.parameters(), *self.model.decoder.parameters()]
        first = StableAdamW(parameters, **{**TRAINING_CONFIG["optimizer"], "eps": 1e-10})
        length = max(self.lengths[0], 1)
        schedule = {**TRAINING_CONFIG["scheduler"], "total_iters": length}
        # The warm-up of short runs is a tenth of them (ours).
        schedule["warmup_iters"] = min(schedule["warmup_iters"], length // 10)
        optimizers: list[Optimizer] = [first]
        if self.model.head is not None:
            optimizers.append(Adam(self.model.head.parameters(), lr=1e-4))
        return optimizers, [RepairSchedule(first, **schedule)]

    def on_train_start(self) -> None:
        """See what there is to learn.

        Raises:
            ValueError: If the second stage is to begin, but the first one was never learned, or with half precision.
        """
        if str(self.trainer.precision).startswith("16"):
            # Its gradients are scaled, and would be clipped as they are.
            msg = f"Crr cannot be trained with precision {self.trainer.precision}; use 32-true or bf16-mixed."
            raise ValueError(msg)
        # A fit that does not resume one learns all its stages from their first step on.
        self._begins = self.trainer.ckpt_path is None
        if self.lengths[0] == 0 and self.model.steps[0] == 0:
            msg = (
                "stage='segment' needs a model that has learned the first stage. Give its checkpoint (--ckpt_path, or "
                "Crr.load_from_checkpoint(path, stage='segment')), or learn both stages with stage='both'."
            )
            raise ValueError(msg)
        if not self._begins and self.current_stage is None:
            logger.warning(
                "The checkpoint has learned all of stage=%r; nothing is left to learn.", self.hparams["stage"]
            )
            self.trainer.should_stop = True

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Learn one step of the stage that it is time for.

        Raises:
            ValueError: If the images cannot be learned.
        """
        del batch_idx
        images = cast("torch.Tensor", batch.image)
        check_files(getattr(batch, "image_path", None))
        self.model.check(images)
        if self._begins:
            done = zip(self.model.steps, self.lengths, strict=True)
            self.model.steps = [0 if length else steps for steps, length in done]
            self._begins = False
        stage = self.current_stage
        assert stage is not None  # or the trainer would have stopped
        clean, anomalous = images.chunk(2) if self.loads_anomalies else (images, None)
        if stage == "repair":
            loss = repair_loss(self.model, clean, anomalous if self.repair else None)
        else:
            assert anomalous is not None
            half = slice(max(1, len(anomalous) // 2))
            masks = cast("torch.Tensor", batch.gt_mask)[len(clean) :]
            loss = segment_loss(self.model, anomalous[half], masks[half])
        if not torch.isfinite(loss):
            msg = f"The loss is {float(loss)}. Train with precision 32-true or bf16-mixed."
            raise ValueError(msg)
        self._learn_from(loss, STAGES.index(stage))
        self.log(f"{stage}_loss", loss.detach(), on_epoch=True, batch_size=len(clean), sync_dist=True)

    def _learn_from(self, loss: torch.Tensor, index: int) -> None:
        """Take a step of a stage."""
        optimizers = self.optimizers()
        optimizer = optimizers[index] if isinstance(optimizers, list) else optimizers
        optimizer.zero_grad()
        self.manual_backward(loss)
        if index == 0:
            self.clip_gradients(optimizer, TRAINING_CONFIG["trainer"]["gradient_clip_val"], "norm")
        optimizer.step()
        if index == 0:
            cast("RepairSchedule", self.lr_schedulers()).step()
        else:
            # What the first stage leaves behind is four times as large as the decoder.
            first = self.trainer.optimizers[0]
            first.zero_grad()
            first.state.clear()
        self.model.steps[index] += 1

    def on_train_end(self) -> None:
        """Say so, if something else than the stages' lengths ended the fit."""
        if self.current_stage is not None:
            logger.warning(
                "The fit ended in stage %s, after %d and %d of %d and %d steps. Without the second stage, images are "
                "judged by the cosine map alone.",
                self.current_stage,
                *self.model.steps,
                *self.lengths,
            )

    # Checkpoints and export

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over a first stage without a head, too."""
        state = checkpoint["state_dict"]
        if self.model.head is not None and not any(key.startswith("model.head.") for key in state):
            own = {key: value for key, value in self.state_dict().items() if key.startswith("model.head.")}
            checkpoint["state_dict"] = {**state, **own}
        super().on_load_checkpoint(checkpoint)

    def bundle_content(self, size: tuple[int, int]) -> BundleContent:
        """What the model brings to its bundle."""
        self._check_deterministic()
        return super().bundle_content(size)

    def to_onnx(self, *args, **kwargs) -> Path:
        """Export to ONNX, as Anomalib does."""
        self._check_deterministic()
        return super().to_onnx(*args, **kwargs)

    def _check_deterministic(self) -> None:
        if self.model.mask.ratio and self.model.mask.inference == "sample":
            msg = (
                "An exported model always judges an image alike, but inference_mask='sample' masks at random. "
                "Export what Crr.load_from_checkpoint(path, inference_mask='expected') gives."
            )
            raise ValueError(msg)
