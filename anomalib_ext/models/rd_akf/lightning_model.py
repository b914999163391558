# SPDX-License-Identifier: Apache-2.0
"""RdAkf in a trainer. See the README beside this file for what is the paper's and what is reconstructed."""

from pathlib import Path

import torch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.models.image.reverse_distillation.loss import ReverseDistillationLoss
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from torch import nn
from torch.optim import Adam

from anomalib_ext.models.components.backbone import backbone_pre_processor
from anomalib_ext.models.components.frozen_teacher import FrozenTeacherModule, check_save_teachers

from .torch_model import RdAkfModel


class RdAkf(FrozenTeacherModule, AnomalibModule):
    """Reverse distillation with asymptotic knowledge fusion (RD-AKF).

    After Zhao et al., DOI 10.19651/j.cnki.emt.2519279.

    Args:
        backbone: Name of a timm ResNet, with or without a tag; the frozen teacher, whose ``layer1`` to ``layer3`` the
            student reconstructs.
        pre_trained: Whether the teacher has pretrained weights.
        backbone_weights: File with the teacher's weights; without it they are looked up in the Hugging Face cache, in
            installed packages and on the hub, in this order.
        weighting: What the weights of the fusion depend on: ``position`` or ``content``.
        save_teachers: Whether checkpoints hold the teacher's weights.
        pre_processor: Pre-processor, or whether to use the default one. It sets the size of the images.
        post_processor: Post-processor, or whether to use the default one.
        evaluator: Evaluator, or whether to use the default one.
        visualizer: Visualizer, or whether to use the default one.

    Raises:
        ValueError: If the backbone, the size of the images or an option does not fit.
        FileNotFoundError: If the teacher's weights are nowhere to be found.

    Example:
        >>> from anomalib.data import MVTecAD
        >>> from anomalib.engine import Engine
        >>> from anomalib.models import RdAkf
        >>> Engine(max_epochs=100).train(RdAkf(), datamodule=MVTecAD(category="bottle"))
    """

    model: RdAkfModel
    map_size_suffixes = ("logits",)

    def __init__(
        self,
        backbone: str = "wide_resnet50_2",
        pre_trained: bool = True,
        backbone_weights: str | Path | None = None,
        weighting: str = "position",
        save_teachers: bool = True,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        check_save_teachers(save_teachers, pre_trained)
        super().__init__(
            # Only here is the backbone, and with it the normalisation, known.
            pre_processor=self.configure_pre_processor(backbone=backbone) if pre_processor is True else pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.backbone = backbone
        self.save_teachers = save_teachers
        self.model = RdAkfModel(backbone, self.input_size, weighting, pre_trained, backbone_weights)
        self.loss = ReverseDistillationLoss()

    @staticmethod
    def configure_pre_processor(
        image_size: tuple[int, int] | None = None,
        backbone: str = "wide_resnet50_2",
    ) -> PreProcessor:
        """Resize, and normalise as the backbone was trained.

        Args:
            image_size: Height and width, 256 each by default; multiples of 32.
            backbone: Name of a timm model.
        """
        return backbone_pre_processor(backbone, image_size)

    def configure_optimizers(self) -> Adam:
        """Adam with the paper's learning rate, for fusion and student."""
        return Adam(self.trainable_parameters(), lr=1e-4)

    def training_loss(self, images: torch.Tensor) -> torch.Tensor:
        """Loss of reverse distillation."""
        teacher, student = ([level.float() for level in maps] for maps in self.model(images))
        return self.loss(teacher, student)
