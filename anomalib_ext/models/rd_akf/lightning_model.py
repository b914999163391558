# SPDX-License-Identifier: Apache-2.0
"""RdAkf in a trainer. See the README beside this file for what is the paper's and what is reconstructed."""

import warnings
from pathlib import Path
from typing import Any, cast

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

from .torch_model import AsymptoticFusion, RdAkfModel

LEARNING_RATE = 1e-4
# The weights of the fusion learn faster by this factor: at the rate of the rest they stay where they begin.
FUSION_RATE = 10


class RdAkf(FrozenTeacherModule, AnomalibModule):
    """Reverse distillation with asymptotic knowledge fusion (RD-AKF).

    After Zhao et al., DOI 10.19651/j.cnki.emt.2519279.

    Args:
        backbone: Name of a timm ResNet, with or without a tag; the frozen teacher, whose ``layer1`` to ``layer3`` the
            student reconstructs.
        pre_trained: Whether the teacher has pretrained weights.
        backbone_weights: File with the teacher's weights; without it they are looked up in the Hugging Face cache, in
            installed packages and on the hub, in this order.
        weighting: Has no effect any more; ``content`` is refused.
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
    map_size_suffixes = ("sum_2.weights", "sum_3.weights")

    def __init__(
        self,
        backbone: str = "wide_resnet50_2",
        pre_trained: bool = True,
        backbone_weights: str | Path | None = None,
        weighting: str | None = None,
        save_teachers: bool = True,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        check_save_teachers(save_teachers, pre_trained)
        _refuse_content(weighting)
        if weighting is not None:
            msg = "weighting has no effect any more: the weights of RdAkf belong to places, not to what is seen there."
            warnings.warn(msg, FutureWarning, stacklevel=2)
        super().__init__(
            # Only here is the backbone, and with it the normalisation, known.
            pre_processor=self.configure_pre_processor(backbone=backbone) if pre_processor is True else pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.backbone = backbone
        self.save_teachers = save_teachers
        self.model = RdAkfModel(backbone, self.input_size, pre_trained, backbone_weights)
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
        """Adam with the paper's rate for resize blocks and student, and a rate of their own for the weights."""
        if self.model.fusion.skip:  # a checkpoint of a former version goes on with its state of Adam
            return Adam(self.trainable_parameters(), lr=LEARNING_RATE)
        weights = [self.model.fusion.sum_2.weights, self.model.fusion.sum_3.weights]
        others = [each for each in self.trainable_parameters() if all(each is not weight for weight in weights)]
        return Adam([{"params": others}, {"params": weights, "lr": FUSION_RATE * LEARNING_RATE}], lr=LEARNING_RATE)

    def training_loss(self, images: torch.Tensor) -> torch.Tensor:
        """Loss of reverse distillation."""
        teacher, student = ([level.float() for level in maps] for maps in self.model(images))
        return self.loss(teacher, student)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load a checkpoint of a former version too, whose fusion led from the first level to the last one as well.

        Raises:
            ValueError: If the checkpoint is of another model, backbone or teacher, or of ``weighting="content"``.
        """
        _refuse_content(checkpoint.get("hyper_parameters", {}).get("weighting"))
        state, own = checkpoint["state_dict"], self.model.fusion
        if "model.fusion.resize_13.0.weight" in state and not own.skip:
            channels, size = self.model.teacher.channels, cast("tuple[int, int]", self.input_size)
            self.model.fusion = AsymptoticFusion(channels, size, skip=True, softmax=True).to(self.device)
        for key in [key for key in state if key.startswith("model.fusion.sum_") and key.endswith(".logits")]:
            state[key.replace(".logits", ".weights")] = state.pop(key)
        try:
            super().on_load_checkpoint(checkpoint)
        except ValueError:
            self.model.fusion = own
            raise


def _refuse_content(weighting: str | None) -> None:
    if weighting == "content":
        msg = (
            "weighting='content' is gone, for it was not better: train anew without it. Models that were exported with "
            "it go on working."
        )
        raise ValueError(msg)
