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
    STRIDE,
    Student,
    architecture,
    check_size,
    resize_block,
    score,
)

# Channels of a level that its weights are computed from, as in AFPN's code.
COMPRESSED = 8


class RdAkfModel(nn.Module):
    """Reverse distillation with AKF in place of the multi-scale concatenation.

    Args:
        backbone: Name of a timm ResNet, the teacher.
        input_size: Height and width of the images; needed for ``weighting="position"``.
        weighting: ``position`` or ``content``, see :class:`AsymptoticFusion`.
        pre_trained: Whether the teacher is pretrained.
        backbone_weights: File with the teacher's weights.

    Raises:
        ValueError: If the backbone has no decoder, or the size does not fit.
    """

    def __init__(
        self,
        backbone: str,
        input_size: tuple[int, int] | None,
        weighting: str = "position",
        pre_trained: bool = True,
        backbone_weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        architecture(backbone)  # before anything is loaded
        if input_size is not None:
            check_size(*input_size)
        self.backbone = backbone  # which Anomalib Studio shows
        self.teacher = Teacher(backbone, LEVELS, pre_trained, backbone_weights)
        self.fusion = AsymptoticFusion(self.teacher.channels, input_size, weighting)
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

    With ``D`` the resize block, ``f`` the levels and ``w`` weights that a softmax across the inputs of a sum makes
    convex::

        f'2 = w21 * D(f1) + w22 * f2
        out = w31 * D(f1) + w32 * D(f'2) + w33 * f3

    Neighbours first, weights of every position and channel, no way back: the paper's AKF. The equations and the softmax
    are reconstructed after AFPN (Yang et al., TCSVT 2024).

    Args:
        channels: Number of channels of the three levels.
        input_size: Height and width of the images; needed for ``weighting="position"``.
        weighting: ``position`` has one free weight for each value of a map (the paper's), which ties the model to a
            size of images; ``content`` computes one for each place from the maps (AFPN's).

    Raises:
        ValueError: If `weighting` is unknown, or lacks a size.
    """

    def __init__(self, channels: Sequence[int], input_size: tuple[int, int] | None, weighting: str) -> None:
        super().__init__()
        if weighting not in {"position", "content"}:
            msg = f"weighting must be 'position' or 'content', got {weighting!r}."
            raise ValueError(msg)
        if weighting == "position" and input_size is None:
            msg = (
                "weighting='position' has a weight for each place of a map, so the size of the images must be known: "
                "give a pre-processor with Resize((height, width)), or weighting='content'."
            )
            raise ValueError(msg)
        self.resize_12 = resize_block(channels[:2])
        self.resize_13 = resize_block(channels)
        self.resize_23 = resize_block(channels[1:])

        def weighted_sum(inputs: int, level: int) -> nn.Module:
            if weighting == "content" or input_size is None:
                return ContentWeightedSum(inputs, channels[level])
            stride = STRIDE // 2 ** (3 - level)
            return PositionWeightedSum(inputs, (channels[level], input_size[0] // stride, input_size[1] // stride))

        self.sum_2 = weighted_sum(2, level=1)
        self.sum_3 = weighted_sum(3, level=2)

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Fuse three levels to ``(B, C3, H / 16, W / 16)``."""
        first, second, third = features
        fused = self.sum_2([self.resize_12(first), second])
        return self.sum_3([self.resize_13(first), self.resize_23(fused), third])


class PositionWeightedSum(nn.Module):
    """Weighted sum of maps with a free weight for each value, equal at the start.

    Args:
        inputs: Number of maps.
        shape: Channels, height and width of each map.
    """

    def __init__(self, inputs: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(inputs, *shape))

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Sum maps of shape ``(B, C, h, w)``.

        Raises:
            ValueError: If the maps have another size than the weights.
        """
        if maps[0].shape[1:] != self.logits.shape[1:]:
            sizes = [tuple(int(side) for side in shape[-2:]) for shape in (maps[0].shape, self.logits.shape)]
            msg = (
                f"The weights of the fusion are for maps of {sizes[1]}, these images have maps of {sizes[0]}. Resize "
                "the images to the size that the model was made for, or make it with weighting='content'."
            )
            raise ValueError(msg)
        return _weighted_sum(self.logits.softmax(dim=0), maps)

    def _load_from_state_dict(self, state_dict: Mapping[str, torch.Tensor], prefix: str, *args, **kwargs) -> None:
        """Take over the size of the images that a checkpoint is for."""
        given = state_dict.get(f"{prefix}logits")
        if given is not None and given.shape[:2] == self.logits.shape[:2]:
            self.logits.data = torch.zeros_like(given, device=self.logits.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class ContentWeightedSum(nn.Module):
    """Weighted sum of maps with weights for each place that 1 x 1 convolutions compute from them.

    Args:
        inputs: Number of maps.
        channels: Number of channels of each map.
    """

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.compress = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, COMPRESSED, 1, bias=False), nn.BatchNorm2d(COMPRESSED), nn.ReLU())
            for _ in range(inputs)
        )
        self.weigh = nn.Conv2d(COMPRESSED * inputs, inputs, 1)

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Sum maps of shape ``(B, C, h, w)``."""
        compressed = [compress(each) for compress, each in zip(self.compress, maps, strict=True)]
        weights = self.weigh(torch.cat(compressed, dim=1)).softmax(dim=1)
        return _weighted_sum(weights.unsqueeze(2).unbind(dim=1), maps)


def _weighted_sum(weights: Sequence[torch.Tensor] | torch.Tensor, maps: Sequence[torch.Tensor]) -> torch.Tensor:
    total = weights[0] * maps[0]
    for weight, each in zip(weights[1:], maps[1:], strict=True):
        total = total + weight * each
    return total
