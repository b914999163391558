# SPDX-License-Identifier: Apache-2.0
"""Teacher, asymptotic knowledge fusion (AKF) and student of RdAkf."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from anomalib.data import InferenceBatch
from torch import nn

from anomalib_ext.models.components.checks import check_images
from anomalib_ext.models.components.frozen_teacher import Teacher
from anomalib_ext.models.components.reverse_distillation import (
    LEVELS,
    Student,
    architecture,
    check_size,
    resize_block,
    score,
)


class RdAkfModel(nn.Module):
    """Reverse distillation with AKF in place of the multi-scale concatenation.

    Args:
        backbone: Name of a timm ResNet, the teacher.
        input_size: Height and width of the images.
        pre_trained: Whether the teacher is pretrained.
        backbone_weights: File with the teacher's weights.

    Raises:
        ValueError: If the backbone has no decoder, or the size is unknown or does not fit.
    """

    def __init__(
        self,
        backbone: str,
        input_size: tuple[int, int] | None,
        pre_trained: bool = True,
        backbone_weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        architecture(backbone)  # before anything is loaded
        if input_size is None:
            msg = (
                "RdAkf has a weight for each place of a map, so the size of the images must be known: give a "
                "pre-processor with Resize((height, width))."
            )
            raise ValueError(msg)
        check_size(*input_size)
        self.backbone = backbone  # which Anomalib Studio shows
        self.teacher = Teacher(backbone, LEVELS, pre_trained, backbone_weights)
        self.fusion = AsymptoticFusion(self.teacher.channels, input_size)
        self.student = Student(backbone, self.teacher.channels[-1])

    def forward(self, images: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]] | InferenceBatch:
        """Give the maps of teacher and student while training, anomaly maps and scores otherwise.

        Args:
            images: Normalised images, shape ``(B, 3, H, W)``.

        Raises:
            ValueError: If the images do not fit or are not finite.
        """
        check_images(images)
        check_size(*images.shape[-2:])
        teacher = self.teacher(images)
        student = self.student(self.fusion(teacher))
        return (teacher, student) if self.training else score(images, teacher, [student])


class AsymptoticFusion(nn.Module):
    """Fuses three levels step by step, from shallow to deep; the deepest level's size and channels come out.

    With ``D`` the resize block, ``f`` the levels and ``w`` free weights, one for each value of a map::

        f'2 = w21 * D(f1) + w22 * f2
        out = w32 * D(f'2) + w33 * f3

    Only neighbors are fused, and there is no way back: the paper's AKF. The equations are reconstructed from its text.

    Args:
        channels: Number of channels of the three levels.
        input_size: Height and width of the images, which the weights are tied to.
        skip: Whether the first level reaches the last one directly too, ``+ w31 * D(f1)``, which the paper advises
            against.
        softmax: Whether a softmax across the inputs of a sum makes its weights convex. Checkpoints of a former version
            need both.
    """

    def __init__(
        self,
        channels: Sequence[int],
        input_size: tuple[int, int],
        skip: bool = False,
        softmax: bool = False,
    ) -> None:
        super().__init__()
        self.skip = skip
        self.resize_12 = resize_block(channels[:2])
        if skip:
            self.resize_13 = resize_block(channels)
        self.resize_23 = resize_block(channels[1:])
        height, width = input_size
        self.sum_2 = WeightedSum(2, (channels[1], height // 8, width // 8), softmax)
        self.sum_3 = WeightedSum(3 if skip else 2, (channels[2], height // 16, width // 16), softmax)

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Fuse three levels to ``(B, C3, H / 16, W / 16)``."""
        first, second, third = features
        fused = self.sum_2([self.resize_12(first), second])
        direct = [self.resize_13(first)] if self.skip else []
        return self.sum_3([*direct, self.resize_23(fused), third])


class WeightedSum(nn.Module):
    """Weighted sum of maps with a free weight for each value; at the start, it is their mean.

    Args:
        inputs: Number of maps.
        shape: Channels, height and width of each map.
        softmax: Whether a softmax across the inputs makes the weights convex.
    """

    def __init__(self, inputs: int, shape: tuple[int, int, int], softmax: bool = False) -> None:
        super().__init__()
        self.softmax = softmax
        self.weights = nn.Parameter(torch.full((inputs, *shape), 0.0 if softmax else 1 / inputs))

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Sum maps of shape ``(B, C, h, w)``.

        Raises:
            ValueError: If the maps have another size than the weights.
        """
        if maps[0].shape[1:] != self.weights.shape[1:]:
            sizes = [tuple(int(side) for side in shape[-2:]) for shape in (maps[0].shape, self.weights.shape)]
            msg = (
                f"The weights of the fusion are for maps of {sizes[1]}, these images have maps of {sizes[0]}. Resize "
                "the images to the size that the model was made for."
            )
            raise ValueError(msg)
        weights = self.weights.softmax(dim=0) if self.softmax else self.weights
        total = weights[0] * maps[0]
        for weight, each in zip(weights[1:], maps[1:], strict=True):
            total = total + weight * each
        return total

    def _load_from_state_dict(self, state_dict: Mapping[str, torch.Tensor], prefix: str, *args, **kwargs) -> None:
        """Take over the size of the images that a checkpoint is for."""
        given = state_dict.get(f"{prefix}weights")
        if given is not None and given.shape[:2] == self.weights.shape[:2]:
            self.weights.data = torch.zeros_like(given, device=self.weights.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
