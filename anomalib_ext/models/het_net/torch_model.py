# SPDX-License-Identifier: Apache-2.0
"""Two teachers, their fusion, and two students of HetNet."""

from collections.abc import Sequence
from pathlib import Path

import torch
from anomalib.data import InferenceBatch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from anomalib_ext.models.components.backbone import backbone_normalization, describe_vit
from anomalib_ext.models.components.checks import check_images
from anomalib_ext.models.components.frozen_teacher import Teacher
from anomalib_ext.models.components.reverse_distillation import (
    LEVELS,
    MultiScaleFusion,
    Student,
    architecture,
    check_size,
    score,
)

from .noise import LocalGaussianNoise

HEAD_CHANNELS = 64
# Keys and values are averaged to at most so many places along a side, or the largest level is dear.
KEY_SIDE = 16

STUDENTS = {"sr": ("reconstruction",), "sd": ("denoising",), "both": ("reconstruction", "denoising")}


class HetNetModel(nn.Module):
    """Students that reconstruct a CNN's features from a CNN's and a transformer's, one of them under noise.

    Args:
        backbone: Name of a timm ResNet, the teacher that is reconstructed.
        transformer: Name of a plain timm vision transformer, the teacher that only gives context.
        input_size: Height and width of the images, if known.
        use_algf: Whether the teachers are fused by attention too, or by their sum alone.
        noise: See :class:`LocalGaussianNoise`.
        score_from: Student that scores, ``sr`` (reconstruction), ``sd`` (denoising) or ``both``.
        pre_trained: Whether the CNN is pretrained.
        transformer_pre_trained: Whether the transformer is pretrained.
        backbone_weights: File with the CNN's weights.
        transformer_weights: File with the transformer's weights.

    Raises:
        ValueError: If a teacher, the size or an option does not fit.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(
        self,
        backbone: str,
        transformer: str,
        input_size: tuple[int, int] | None = None,
        use_algf: bool = True,
        noise: str = "mgd",
        score_from: str = "both",
        pre_trained: bool = True,
        transformer_pre_trained: bool = True,
        backbone_weights: str | Path | None = None,
        transformer_weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        if score_from not in STUDENTS:
            msg = f"score_from must be one of {', '.join(STUDENTS)}, got {score_from!r}."
            raise ValueError(msg)
        architecture(backbone)  # before anything is loaded
        last = f"blocks.{describe_vit(transformer)[0] - 1}"
        self.backbone = backbone  # which Anomalib Studio shows
        self.score_from = score_from
        self.noise = LocalGaussianNoise(noise)
        self.teacher = Teacher(backbone, LEVELS, pre_trained, backbone_weights)
        self.transformer = Teacher(transformer, [last], transformer_pre_trained, transformer_weights)
        self.patch_size: int = self.transformer.extractor.patch_size
        if input_size is not None:
            self._check_sizes(*input_size)
        # Images come normalised for the CNN.
        (mean, std), (other_mean, other_std) = (
            (torch.tensor(values).reshape(3, 1, 1) for values in backbone_normalization(name))
            for name in (backbone, transformer)
        )
        self.register_buffer("scale", std / other_std, persistent=False)
        self.register_buffer("shift", (mean - other_mean) / other_std, persistent=False)
        channels = self.teacher.channels
        self.fusion = nn.ModuleList(HybridFusion(each, self.transformer.channels[0], use_algf) for each in channels)
        self.multi_scale = MultiScaleFusion(channels)
        self.reconstruction = Student(backbone, 3 * channels[-1])
        self.denoising = Student(backbone, 3 * channels[-1])

    def forward(
        self,
        images: torch.Tensor,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]] | InferenceBatch:
        """Give the maps of teacher and both students while training, anomaly maps and scores otherwise.

        Args:
            images: Images of shape ``(B, 3, H, W)``, normalised for the CNN.

        Raises:
            ValueError: If the images do not fit or are not finite.
            RuntimeError: If the model is to be trained without a trainer, and the noise has no statistics.
        """
        check_images(images)
        self._check_sizes(*images.shape[-2:])
        local = self.teacher(images)
        (context,) = self.transformer(images * self.scale + self.shift)
        clean = self._fuse(local, context)
        if not self.training:
            students = [getattr(self, name)(clean) for name in STUDENTS[self.score_from]]
            return score(images, local, students)
        # Apart from the clean ones, so that batch normalisation sees each on its own.
        noisy = clean if self.noise.noise == "none" else self._fuse(self.noise(local), context)
        return local, self.reconstruction(clean), self.denoising(noisy)

    def _fuse(self, local: Sequence[torch.Tensor], context: torch.Tensor) -> torch.Tensor:
        return self.multi_scale([fuse(level, context) for fuse, level in zip(self.fusion, local, strict=True)])

    def _check_sizes(self, height: int, width: int) -> None:
        check_size(height, width)
        if height % self.patch_size or width % self.patch_size:
            msg = (
                f"Images of {height} x {width} pixels cannot be cut into the transformer's patches of "
                f"{self.patch_size} x {self.patch_size}. Resize to multiples of both 32 and {self.patch_size}."
            )
            raise ValueError(msg)


class HybridFusion(nn.Module):
    """Adaptive local-global fusion (ALGF) of one level: ``L + G``, and what attention between both finds.

    The structure is that of the paper's figure. The layers in it are ours: local and global features are resized by a
    1 x 1 convolution and batch normalisation; the hybrid is one projection of the sum of two multi-head
    cross-attentions, from local places to global features and back.

    Args:
        channels: Number of channels of the local features, a multiple of 64, and of the result.
        global_channels: Number of channels of the global features.
        use_attention: Whether there is attention.
    """

    def __init__(self, channels: int, global_channels: int, use_attention: bool = True) -> None:
        super().__init__()
        self.resize_local = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.resize_global = nn.Sequential(
            nn.Conv2d(global_channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.use_attention = use_attention
        if use_attention:
            self.local_to_global = CrossAttention(channels)
            self.global_to_local = CrossAttention(channels)
            self.project = nn.Linear(channels, channels)

    def forward(self, local: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Fuse local features ``(B, C, h, w)`` with global ones ``(B, D, p, q)`` to ``(B, C, h, w)``."""
        local_map = self.resize_local(local)
        context = F.interpolate(context, size=local.shape[-2:], mode="bilinear", align_corners=False)
        global_map = self.resize_global(context)
        fused = local_map + global_map
        if not self.use_attention:
            return fused
        hybrid = self.local_to_global(local_map, global_map) + self.global_to_local(global_map, local_map)
        return fused + self.project(hybrid).transpose(1, 2).unflatten(2, local.shape[-2:])


class CrossAttention(nn.Module):
    """Multi-head attention of the places of one map to those of another, without an output projection.

    Args:
        channels: Number of channels of both maps, a multiple of 64.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels, bias=False)  # the softmax would not feel it
        self.value = nn.Linear(channels, channels)

    def forward(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Attend from ``(B, C, h, w)`` to ``(B, C, h, w)``; the result has the shape ``(B, h * w, C)``."""
        keys = F.avg_pool2d(keys, [_pooling(side) for side in keys.shape[-2:]])
        queries, keys = (maps.flatten(2).transpose(1, 2) for maps in (queries, keys))
        heads = (
            tokens.unflatten(2, (-1, HEAD_CHANNELS)).transpose(1, 2)
            for tokens in (self.query(queries), self.key(keys), self.value(keys))
        )
        return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


def _pooling(side: int) -> int:
    """Return the smallest divisor of a side that leaves at most 16 places."""
    return next(size for size in range(1, side + 1) if side % size == 0 and side // size <= KEY_SIDE)
