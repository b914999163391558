# SPDX-License-Identifier: Apache-2.0
"""Crr in a trainer: two stages in one fit. See the README beside this file for what is the paper's and what is ours."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from anomalib.data import Batch, ImageBatch, ImageItem
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.models.image.dinomaly.components import CosineHardMiningLoss, StableAdamW, WarmCosineScheduler
from anomalib.models.image.dinomaly.lightning_model import TRAINING_CONFIG
from anomalib.models.image.glass.loss import FocalLoss
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import Adam, Optimizer
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import CenterCrop, Compose, Normalize, Resize, Transform
from torchvision.tv_tensors import Image, Mask
from tqdm.auto import tqdm

from anomalib_ext.data.anomaly_synthesis import AnomalySynthesis
from anomalib_ext.export import BundleContent
from anomalib_ext.models.components.backbone import backbone_normalization, describe_vit
from anomalib_ext.models.components.reverse_distillation import DistillationModule
from anomalib_ext.models.components.training import check_files

from .torch_model import MAP_SIDE, CrrModel

logger = logging.getLogger(__name__)

STAGES = ("repair", "segment")
ENCODER = "vit_base_patch14_reg4_dinov2.lvd142m"


class Crr(DistillationModule, AnomalibModule):
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
        self.distance = CosineHardMiningLoss()
        self.focal_loss = FocalLoss(nn.Softmax(dim=1), gamma=2)
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
        """The stages end the fit, not a number of epochs; nothing is judged before the first step."""
        return {**super().trainer_arguments, "max_epochs": -1}

    @property
    def current_stage(self) -> str | None:
        """Name of the stage that is to be learned next, if any is left."""
        left = (
            name for name, done, length in zip(STAGES, self.model.steps, self.lengths, strict=True) if done < length
        )
        return next(left, None)

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
        return [*super().configure_callbacks(), _Stages(self.synthesis if self.loads_anomalies else None)]

    def configure_optimizers(self) -> tuple[list[Optimizer], list[WarmCosineScheduler]]:
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
        return optimizers, [_Schedule(first, **schedule)]

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
            loss = self.repair_loss(clean, anomalous if self.repair else None)
        else:
            assert anomalous is not None
            half = slice(max(1, len(anomalous) // 2))
            loss = self.segment_loss(anomalous[half], cast("torch.Tensor", batch.gt_mask)[len(clean) :][half])
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
            cast("_Schedule", self.lr_schedulers()).step()
        else:
            # What the first stage leaves behind is four times as large as the decoder.
            first = self.trainer.optimizers[0]
            first.zero_grad()
            first.state.clear()
        self.model.steps[index] += 1

    def repair_loss(self, clean: torch.Tensor, anomalous: torch.Tensor | None = None) -> torch.Tensor:
        """Loss of the first stage: both kinds of images are to be decoded to what the encoder makes of the clean ones.

        Args:
            clean: Images, shape ``(B, 3, H, W)``.
            anomalous: The same images with anomalies, if there is repair.
        """
        self.model.train()
        images = clean if anomalous is None else torch.cat([clean, anomalous])
        encoded, decoded = ([level.float() for level in maps] for maps in self.model.reconstruct(images))
        target = [level[: len(clean)] for level in encoded]
        # One call for each term: the loss turns down the gradient of the places that are easy among those of a call.
        terms = zip(*(level.split(len(clean)) for level in decoded), strict=True)
        return sum(
            (self.distance(target, list(term), self.model.steps[0]) for term in terms), start=target[0].new_zeros(())
        )

    def segment_loss(self, images: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Loss of the second stage: focal loss of the head, with all else as when judging.

        Args:
            images: Images with anomalies, shape ``(B, 3, H, W)``.
            masks: Where these are, shape ``(B, H, W)``.
        """
        head = self.model.head
        assert head is not None
        self.model.eval()
        head.train()
        with torch.no_grad():
            encoded, decoded = self.model.reconstruct(images)
        target = F.interpolate(masks[:, None].float(), MAP_SIDE, mode="bilinear", align_corners=False) >= 0.5
        return self.focal_loss(head(encoded, decoded).float(), target)

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


class _Schedule(WarmCosineScheduler):
    """The parent's schedule without NumPy, which checkpoints that run no code do not hold."""

    def get_lr(self) -> list[float]:
        """Learning rate of each group."""
        return [float(rate) for rate in super().get_lr()]

    def state_dict(self) -> dict[str, Any]:
        """How far it is; how long it is, the model says."""
        return {key: value for key, value in super().state_dict().items() if key not in {"schedule", "total_iters"}}


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


class _Stages(Callback):
    """What surrounds the stages of a fit: anomalies in the batches, one progress bar, and an end.

    Args:
        synthesis: Arguments of the synthesis, if anomalies are needed.
    """

    def __init__(self, synthesis: dict[str, Any] | None) -> None:
        self.synthesis = synthesis
        self.bar: tqdm | None = None
        self.undo: list[Callable[[], None]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have the datamodule load anomalies."""
        if stage != TrainerFn.FITTING or self.synthesis is None:
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
        self.undo.append(lambda: delattr(datamodule, "train_dataloader"))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have one bar for the fit in place of one for each epoch."""
        del pl_module
        shown = trainer.progress_bar_callback
        if shown is not None:
            shown.disable()
            self.undo.append(shown.enable)
            self.bar = tqdm(disable=not trainer.is_global_zero, dynamic_ncols=True)
            self.undo.append(self.bar.close)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Crr, *args) -> None:
        """Show how far the fit is, and end it."""
        del args
        steps, lengths = pl_module.model.steps, pl_module.lengths
        stage = pl_module.current_stage
        if self.bar is not None:
            self.bar.total = sum(lengths)
            if stage is not None:
                self.bar.set_description(stage, refresh=False)
            self.bar.update(sum(done for done, length in zip(steps, lengths, strict=True) if length) - self.bar.n)
        if stage is None:
            trainer.should_stop = True
            if trainer.check_val_every_n_epoch is not None:
                # The end is validated, and with that saved, whichever epoch it comes in.
                every, trainer.check_val_every_n_epoch = trainer.check_val_every_n_epoch, 1
                self.undo.append(lambda: setattr(trainer, "check_val_every_n_epoch", every))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave trainer and datamodule as they were."""
        del trainer, pl_module, stage
        while self.undo:
            self.undo.pop()()
        self.bar = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Likewise."""
        del exception
        self.teardown(trainer, pl_module, "")
