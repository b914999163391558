# SPDX-License-Identifier: Apache-2.0
"""Encoder, random mask, bottleneck, decoder and segmentation head of CRR.

After Wang et al., "CRR", arXiv 2512.11401, and its parent Dinomaly (Guo et al., CVPR 2025), whose parts are Anomalib's.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from anomalib.data import InferenceBatch
from anomalib.models.components import GaussianBlur2d
from anomalib.models.image.dinomaly.components import DinomalyMLP, LinearAttention
from anomalib.models.image.dinomaly.torch_model import DecoderViTBlock, DinomalyModel
from torch import nn
from torch.nn import functional as F  # noqa: N812

from anomalib_ext.models.components.backbone import describe_vit
from anomalib_ext.models.components.checks import check_images, check_scores
from anomalib_ext.models.components.frozen_teacher import Teacher

# Side in pixels of the maps that are fused, blurred and scored, and the number of pixels that make up the score.
MAP_SIDE = 256
SCORED_PIXELS = MAP_SIDE**2 // 100


class CrrModel(nn.Module):
    """Dinomaly with a random mask before the bottleneck and a segmentation head after the decoder.

    Args:
        encoder: Name of a plain timm vision transformer, with or without a tag.
        pre_trained: Whether the encoder is pretrained.
        backbone_weights: File with the encoder's weights.
        mask_ratio: Share of the fused feature's elements that the mask removes.
        inference_mask: What the mask does in evaluation mode, see :class:`RandomMask`.
        bottleneck_dropout: Dropout of the bottleneck.
        head_width: Width of the head, see :class:`SegmentationHead`; without one there is no head.
        alpha: Weight of the cosine map in the fused map; that of the head's map is ``1 - alpha``.

    Attributes:
        steps: Number of steps that each of the two stages has learned for. Part of the state.
        patch_size: Side of the encoder's patches in pixels.

    Raises:
        ValueError: If the encoder is none, or an option is out of range.
        FileNotFoundError: If the encoder's weights are nowhere to be found.
    """

    def __init__(
        self,
        encoder: str,
        pre_trained: bool = True,
        backbone_weights: str | Path | None = None,
        mask_ratio: float = 0.4,
        inference_mask: str = "expected",
        bottleneck_dropout: float = 0.2,
        head_width: int | None = 192,
        alpha: float = 0.7,
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            msg = f"alpha, the weight of the cosine map, must lie in [0, 1], got {alpha}."
            raise ValueError(msg)
        self.backbone = encoder  # which Anomalib Studio shows
        self.alpha = alpha
        self.mask = RandomMask(mask_ratio, inference_mask)
        layers = encoder_layers(encoder)
        self.encoder = Teacher(encoder, layers, pre_trained, backbone_weights, tokens=True)
        extractor = self.encoder.extractor
        self.patch_size: int = extractor.patch_size
        self.prefix_tokens: int = extractor.num_prefix_tokens
        dim = self.encoder.channels[0]
        self.bottleneck = DinomalyMLP(dim, 4 * dim, dim, drop=bottleneck_dropout, bias=True, apply_input_dropout=True)
        self.decoder = nn.ModuleList(
            DecoderViTBlock(
                dim,
                num_heads=extractor.feature_extractor.blocks[0].attn.num_heads,
                qkv_bias=True,
                norm_layer=partial(nn.LayerNorm, eps=1e-8),  # type: ignore[arg-type]
                attn=LinearAttention,
            )
            for _ in layers
        )
        for module in [*self.bottleneck.modules(), *self.decoder.modules()]:
            if isinstance(module, nn.Linear):  # the parent's initialisation
                nn.init.trunc_normal_(module.weight, std=0.01, a=-0.03, b=0.03)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.head = None if head_width is None else SegmentationHead(2 * dim, head_width)
        self.blur = GaussianBlur2d(sigma=4, channels=1, kernel_size=5)
        self.steps = [0, 0]

    def reconstruct(self, images: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Encode images and decode them again.

        Args:
            images: Normalised images, shape ``(B, 3, H, W)``, both sides multiples of the patches'.

        Returns:
            Two maps of the encoder and two of the decoder, each of shape ``(B, C, H / patch, W / patch)``: the means of
            the shallow and of the deep half of the layers.
        """
        encoded = self.encoder(images)
        tokens = self.bottleneck(self.mask(torch.stack(encoded, dim=1).mean(dim=1)))
        decoded = []
        for block in self.decoder:
            tokens = block(tokens)
            decoded.append(tokens)
        size = (images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size)
        return self._grouped(encoded, size), self._grouped(decoded[::-1], size)

    def _grouped(self, layers: Sequence[torch.Tensor], size: tuple[int, int]) -> list[torch.Tensor]:
        half = len(layers) // 2
        means = [torch.stack(list(group), dim=1).mean(dim=1) for group in (layers[:half], layers[half:])]
        # without class token and registers
        return [mean[:, self.prefix_tokens :].transpose(1, 2).unflatten(2, size).contiguous() for mean in means]

    def forward(self, images: torch.Tensor) -> InferenceBatch:
        """Score images.

        Args:
            images: Normalised images, shape ``(B, 3, H, W)``.

        Returns:
            Anomaly maps ``(B, 1, H, W)``, and as image scores the means of the highest percent of their pixels at
            256 x 256, ``(B,)``. As long as the head has learned nothing, they come from the cosine map alone.

        Raises:
            ValueError: If the images do not fit, or they or the scores are not finite.
        """
        self.check(images)
        encoded, decoded = self.reconstruct(images)
        with torch.autocast(images.device.type, enabled=False):
            encoded, decoded = ([level.float() for level in maps] for maps in (encoded, decoded))
            fused, _ = DinomalyModel.calculate_anomaly_maps(encoded, decoded, MAP_SIDE)
            if self.head is not None and self.steps[1]:
                segmented = self.head(encoded, decoded).softmax(dim=1)[:, 1:]
                fused = self.alpha * fused + (1 - self.alpha) * segmented
            fused = self.blur(fused)
            pred_score = fused.flatten(1).topk(SCORED_PIXELS).values.mean(dim=1)
            anomaly_map = F.interpolate(fused, images.shape[-2:], mode="bilinear", align_corners=False)
        check_scores(pred_score)
        return InferenceBatch(pred_score=pred_score, anomaly_map=anomaly_map)

    def check(self, images: torch.Tensor) -> None:
        """Refuse images that cannot be learned or scored.

        Raises:
            ValueError: If the shape does not fit, or a value is not finite.
        """
        check_images(images)
        self.check_size(images.shape[-2], images.shape[-1])

    def check_size(self, height: int, width: int) -> None:
        """Refuse images that cannot be cut into patches.

        Raises:
            ValueError: If a side is no multiple of that of the patches.
        """
        patch = self.patch_size
        if height % patch or width % patch:
            near = [max(patch, round(side / patch) * patch) for side in (height, width)]
            msg = (
                f"Images of {height} x {width} pixels cannot be cut into the encoder's patches of {patch} x {patch}. "
                f"Resize to {near[0]} x {near[1]}, for example by pre_processor=configure_pre_processor"
                f"(({near[0]}, {near[1]}))."
            )
            raise ValueError(msg)

    # State

    def get_extra_state(self) -> torch.Tensor:
        """What is state, but no parameter: how far both stages are."""
        return torch.tensor(self.steps)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Take it over."""
        self.steps = state.tolist()


def encoder_layers(encoder: str) -> list[str]:
    """Return the names of the blocks that are reconstructed, an even number of at most 8.

    They begin after a sixth of the depth, and go on evenly. With 12 blocks they are 2 to 9, with 24 blocks 4, 6 to 18,
    as in Dinomaly; the rule for other depths is ours.

    Raises:
        ValueError: If the encoder is unknown or no plain vision transformer.
    """
    depth, _ = describe_vit(encoder)
    first, step = depth // 6, max(1, depth // 12)
    pairs = min(4, (depth - first) // step // 2)
    return [f"blocks.{first + step * i}" for i in range(2 * pairs)]


class RandomMask(nn.Module):
    """Sets elements of a feature to zero, each for itself, and does not rescale the others.

    Args:
        ratio: Probability with which an element is removed, the paper's lambda.
        inference: In evaluation mode, ``expected`` multiplies by ``1 - ratio``, so that the scale is that of the
            training (ours); ``sample`` goes on masking, as the paper's code does.

    Raises:
        ValueError: If the ratio or the mode is none.
    """

    def __init__(self, ratio: float, inference: str = "expected") -> None:
        super().__init__()
        if not 0 <= ratio < 1:
            msg = f"mask_ratio must lie in [0, 1), got {ratio}."
            raise ValueError(msg)
        if inference not in {"expected", "sample"}:
            msg = f"inference_mask must be 'expected' or 'sample', got {inference!r}."
            raise ValueError(msg)
        self.ratio = ratio
        self.inference = inference

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        """Mask a feature of any shape."""
        if not self.ratio:
            return feature
        if self.training or self.inference == "sample":
            return feature * torch.empty_like(feature).bernoulli_(1 - self.ratio)
        return feature * (1 - self.ratio)


class SegmentationHead(nn.Module):
    """Convolutions from the products of normalised encoder and decoder maps to logits of normal and anomalous.

    Four times, the map is enlarged and goes through three 3 x 3 convolutions with batch normalisation and ReLU. From
    ``8 * width`` channels on, their number is halved each time, at last quartered. With 768 channels of the encoder and
    a width of 192 it is the paper's. For other numbers a 1 x 1 convolution comes first (ours).

    Args:
        channels: Number of channels of both levels together.
        width: Number of channels of the last but one step.

    Raises:
        ValueError: If the width is not a positive multiple of 4.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        if width < 4 or width % 4:
            msg = f"head_width must be a positive multiple of 4, got {width}."
            raise ValueError(msg)
        widths = [8 * width, 4 * width, 2 * width, width, width // 4]
        same = channels == widths[0]
        self.reduce = nn.Identity() if same else nn.Conv2d(channels, widths[0], 1, bias=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(*_convolution(before, before), *_convolution(before, before), *_convolution(before, after))
            for before, after in pairwise(widths)
        )
        self.classify = nn.Conv2d(widths[-1], 2, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1, 0.02)

    def forward(self, encoded: Sequence[torch.Tensor], decoded: Sequence[torch.Tensor]) -> torch.Tensor:
        """Segment.

        Args:
            encoded: Two maps of the encoder, each of shape ``(B, C, h, w)``.
            decoded: Those of the decoder.

        Returns:
            Logits of normal and anomalous, shape ``(B, 2, 256, 256)``.
        """
        levels = zip(encoded, decoded, strict=True)
        x = self.reduce(torch.cat([-F.normalize(e, dim=1) * F.normalize(d, dim=1) for e, d in levels], dim=1))
        for i, block in enumerate(self.blocks, start=1):
            size = [2 * side for side in x.shape[-2:]] if i < len(self.blocks) else [MAP_SIDE, MAP_SIDE]
            x = block(F.interpolate(x, size, mode="bilinear", align_corners=True))
        return self.classify(x)


def _convolution(before: int, after: int) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
