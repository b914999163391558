# SPDX-License-Identifier: Apache-2.0
"""What models that extend reverse distillation share: fusion, students, anomaly maps.

Reverse distillation (RD4AD) is by Deng and Li, CVPR 2022, arXiv 2201.10703. The parts are Anomalib's where it has
them. Feature maps are lists of three levels, from the largest map to the smallest, of strides 4, 8 and 16.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from anomalib.data import InferenceBatch
from anomalib.models.components.backbone import get_decoder
from anomalib.models.image.reverse_distillation.anomaly_map import AnomalyMapGenerationMode, AnomalyMapGenerator
from anomalib.models.image.reverse_distillation.components import get_bottleneck_layer
from torch import nn

from .checks import check_scores

LEVELS = ("layer1", "layer2", "layer3")
# The students halve the smallest level once more and then double it three times.
STRIDE = 32
# With less, a map of one value is left, which batch normalisation cannot work on.
SMALLEST_MIRRORED_SIDE = 2 * STRIDE


def architecture(backbone: str) -> str:
    """Return the name under which Anomalib knows the decoder of a backbone, which has no tag.

    Raises:
        ValueError: If there is no decoder that mirrors the backbone.
    """
    name = backbone.split(".", maxsplit=1)[0]
    try:
        with torch.device("meta"):  # only to see whether there is one
            get_decoder(name)
    except ValueError as error:
        msg = (
            f"Backbone {backbone!r} has no three levels that a decoder mirrors. Take a ResNet, such as resnet18, "
            "resnet34, resnet50 or wide_resnet50_2, with or without a tag of its weights."
        )
        raise ValueError(msg) from error
    return name


class Student(nn.Module):
    """One-class embedding and decoder of reverse distillation (RD4AD, sections 3.2 and 3.3).

    Args:
        backbone: Name of the teacher's backbone, which the decoder mirrors.
        in_channels: Number of channels of the fused features.
    """

    def __init__(self, backbone: str, in_channels: int) -> None:
        super().__init__()
        name = architecture(backbone)
        self.embedding = get_bottleneck_layer(name).bn_layer
        first = self.embedding[0]
        if first.conv1.in_channels != in_channels:  # Anomalib's takes three concatenated levels
            first.conv1 = _with_inputs(first.conv1, in_channels)
            first.downsample[0] = _with_inputs(first.downsample[0], in_channels)
        self.decoder = get_decoder(name)

    def forward(self, fused: torch.Tensor) -> list[torch.Tensor]:
        """Reconstruct the teacher's maps from fused features of shape ``(B, in_channels, H / 16, W / 16)``."""
        return self.decoder(self.embedding(fused))


def _with_inputs(convolution: nn.Conv2d, channels: int) -> nn.Conv2d:
    """Make a convolution like this one, for another number of input channels."""
    kernel, stride, padding = convolution.kernel_size, convolution.stride, convolution.padding
    return _initialised(nn.Conv2d(channels, convolution.out_channels, kernel, stride, padding, bias=False))


def _initialised(convolution: nn.Conv2d) -> nn.Conv2d:
    """Initialise as reverse distillation does."""
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution


def resize_block(channels: Sequence[int]) -> nn.Sequential:
    """Bring maps to a deeper level: 3 x 3 convolution of stride 2, batch normalisation and ReLU for each level.

    Args:
        channels: Number of channels of each level on the way, first and last included.
    """
    layers: list[nn.Module] = []
    for before, after in pairwise(channels):
        convolution = _initialised(nn.Conv2d(before, after, 3, 2, 1, bias=False))
        layers += [convolution, nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class MultiScaleFusion(nn.Module):
    """Reverse distillation's own fusion (RD4AD's MFF): all levels brought to the size of the deepest, concatenated.

    Args:
        channels: Number of channels of the three levels.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.resize = nn.ModuleList([resize_block(channels), resize_block(channels[1:])])

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Fuse three levels to ``(B, 3 * C3, H / 16, W / 16)``."""
        return torch.cat([self.resize[0](features[0]), self.resize[1](features[1]), features[2]], dim=1)


def check_size(height: int, width: int) -> None:
    """Refuse images whose maps a student cannot give back in the same size.

    Raises:
        ValueError: If a side is no multiple of 32, or below 64.
    """
    if min(height, width) < SMALLEST_MIRRORED_SIDE or height % STRIDE or width % STRIDE:
        near = [max(SMALLEST_MIRRORED_SIDE, (side + STRIDE // 2) // STRIDE * STRIDE) for side in (height, width)]
        msg = (
            f"Images of {height} x {width} pixels have feature maps that the decoder cannot mirror: both sides must be "
            f"multiples of {STRIDE}, and at least {SMALLEST_MIRRORED_SIDE}. Resize to {near[0]} x {near[1]}, for "
            f"example by pre_processor=configure_pre_processor(({near[0]}, {near[1]}))."
        )
        raise ValueError(msg)


def score(
    images: torch.Tensor,
    teacher: Sequence[torch.Tensor],
    students: Sequence[Sequence[torch.Tensor]],
) -> InferenceBatch:
    """Score images by how far students are from the teacher, as reverse distillation does (RD4AD, section 3.4).

    Args:
        images: Images, shape ``(B, 3, H, W)``.
        teacher: The teacher's feature maps.
        students: Feature maps of each student; their anomaly maps are averaged.

    Returns:
        Anomaly maps ``(B, 1, H, W)``, in [0, 2 * levels] as sums of cosine distances, blurred with a sigma of 4
        pixels; and their maxima as image scores, ``(B,)``.

    Raises:
        ValueError: If a score is not finite.
    """
    height, width = images.shape[-2:]
    generator = AnomalyMapGenerator((height, width), mode=AnomalyMapGenerationMode.ADD)
    with torch.autocast(images.device.type, enabled=False):
        given = [level.float() for student in students for level in student]
        # The blur is linear, so that the mean of maps is the map of all levels.
        anomaly_map = generator(given, [level.float() for level in teacher] * len(students)) / len(students)
        pred_score = anomaly_map.amax(dim=(1, 2, 3))
    check_scores(pred_score)
    return InferenceBatch(pred_score=pred_score, anomaly_map=anomaly_map)
