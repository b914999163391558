# SPDX-License-Identifier: Apache-2.0
"""HetNet in a trainer. See the README beside this file for what is the paper's and what is ours."""

from pathlib import Path

import torch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from torch import nn
from torch.optim import Adam
from torch.utils.data import DataLoader

from anomalib_ext.models.components.backbone import backbone_pre_processor
from anomalib_ext.models.components.frozen_teacher import FrozenTeacherModule, check_save_teachers

from .loss import HetNetLoss
from .torch_model import HetNetModel


class HetNet(FrozenTeacherModule, AnomalibModule):
    """Reverse distillation with a CNN and a transformer as teachers, and a second student that undoes noise.

    After Yu et al., arXiv 2506.16050, for products whose views, poses and light vary.

    Args:
        backbone: Name of a timm ResNet, with or without a tag; the frozen teacher, whose ``layer1`` to ``layer3`` the
            students reconstruct.
        transformer: Name of a plain timm vision transformer, the frozen teacher that gives context.
        pre_trained: Whether the CNN has pretrained weights.
        transformer_pre_trained: Whether the transformer has pretrained weights.
        backbone_weights: File with the CNN's weights; without it they are looked up in the Hugging Face cache, in
            installed packages and on the hub, in this order.
        transformer_weights: File with the transformer's weights, likewise.
        use_algf: Whether local and global features are fused by attention too, or by their sum alone.
        noise: What replaces boxes of the CNN's features for the second student: draws from local Gaussians (``mgd``),
            from them without covariances (``diag``), from the standard normal distribution (``randn``), or ``none``.
        score_from: Student that scores: reconstruction (``sr``), denoising (``sd``) or ``both``.
        save_teachers: Whether checkpoints hold the teachers' weights.
        pre_processor: Pre-processor, or whether to use the default one.
        post_processor: Post-processor, or whether to use the default one.
        evaluator: Evaluator, or whether to use the default one.
        visualizer: Visualizer, or whether to use the default one.

    Raises:
        ValueError: If a teacher, the size of the images or an option does not fit.
        FileNotFoundError: If a teacher's weights are nowhere to be found.

    Example:
        >>> from anomalib.data import MVTecAD
        >>> from anomalib.engine import Engine
        >>> from anomalib.models import HetNet
        >>> Engine(max_epochs=200).train(HetNet(), datamodule=MVTecAD(category="bottle", train_batch_size=16))
    """

    model: HetNetModel

    def __init__(
        self,
        backbone: str = "wide_resnet50_2",
        transformer: str = "vit_base_patch16_224",
        pre_trained: bool = True,
        transformer_pre_trained: bool = True,
        backbone_weights: str | Path | None = None,
        transformer_weights: str | Path | None = None,
        use_algf: bool = True,
        noise: str = "mgd",
        score_from: str = "both",
        save_teachers: bool = True,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        check_save_teachers(save_teachers, pre_trained and transformer_pre_trained)
        super().__init__(
            # Only here is the backbone, and with it the normalisation, known.
            pre_processor=self.configure_pre_processor(backbone=backbone) if pre_processor is True else pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.backbone = backbone
        self.save_teachers = save_teachers
        self.model = HetNetModel(
            backbone,
            transformer,
            self.input_size,
            use_algf,
            noise,
            score_from,
            pre_trained,
            transformer_pre_trained,
            backbone_weights,
            transformer_weights,
        )
        self.loss = HetNetLoss()

    @staticmethod
    def configure_pre_processor(
        image_size: tuple[int, int] | None = None,
        backbone: str = "wide_resnet50_2",
    ) -> PreProcessor:
        """Resize, and normalise as the CNN was trained; the model itself adapts this for the transformer.

        Args:
            image_size: Height and width, 256 each by default; multiples of 32 and of the transformer's patches.
            backbone: Name of a timm model.
        """
        return backbone_pre_processor(backbone, image_size)

    def configure_optimizers(self) -> Adam:
        """Adam as in reverse distillation's own code, for fusion and students."""
        return Adam(self.trainable_parameters(), lr=0.005, betas=(0.5, 0.999))

    def on_train_start(self) -> None:
        """Estimate what is normal at each place, which the noise is drawn from."""
        if not self.model.noise.needs_statistics:
            return
        loader = self.trainer.train_dataloader
        if not isinstance(loader, DataLoader):
            msg = f"noise={self.model.noise.noise!r} is estimated from one DataLoader, got {type(loader).__name__}."
            raise TypeError(msg)
        # In order, all images in each process, and without touching the random numbers of the training.
        ordered = DataLoader(
            loader.dataset,
            loader.batch_size or 1,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
        )
        with torch.random.fork_rng(devices=[]):
            maps = map(self.model.teacher, self.prepared_images(ordered, "Statistics of the noise"))
            self.model.noise.fit(maps, len(ordered.dataset))

    def on_train_end(self) -> None:
        """Give the memory of the noise back."""
        super().on_train_end()
        self.model.noise.clear()

    def training_loss(self, images: torch.Tensor) -> torch.Tensor:
        """Loss of both students."""
        return self.loss(*self.model(images))
