# SPDX-License-Identifier: Apache-2.0
"""Tests of the parts of reverse distillation, and of what they refuse."""

import pytest
import torch
from torch import nn

from anomalib_ext.models import RdAkf
from anomalib_ext.models.components.reverse_distillation import architecture, check_size, resize_block


def test_resize_block_is_convolution_normalisation_and_relu_for_each_level() -> None:
    """As the note says, and no bias."""
    block = resize_block([2, 3, 5]).eval()
    for part in block.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_mean)
            nn.init.uniform_(part.weight)
    x = torch.randn(2, 2, 16, 16)
    expected = x
    for i in (0, 3):
        norm = block[i + 1]
        y = nn.functional.conv2d(expected, block[i].weight, None, stride=2, padding=1)
        mean, std = norm.running_mean, (norm.running_var + norm.eps).sqrt()
        y = (y - mean[:, None, None]) / std[:, None, None] * norm.weight[:, None, None] + norm.bias[:, None, None]
        expected = y.clamp(min=0)
    assert expected.shape == (2, 5, 4, 4)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("size", [(32, 64), (64, 100), (250, 256)])
def test_sizes_that_the_decoder_cannot_mirror(size: tuple[int, int]) -> None:
    """The message says which sizes are near; the model refuses them too, before it has loaded anything."""
    with pytest.raises(ValueError, match=r"cannot mirror: both sides must be multiples of 32.*Resize to \d+ x \d+"):
        check_size(*size)
    with pytest.raises(ValueError, match="cannot mirror"):
        RdAkf("resnet18", pre_processor=RdAkf.configure_pre_processor(size), visualizer=False)


def test_the_decoder_of_a_backbone() -> None:
    """It is found with a tag and without; a network without three levels has none."""
    assert architecture("resnet18") == architecture("resnet18.tv_in1k") == "resnet18"
    with pytest.raises(ValueError, match="'tf_efficientnet_lite0' has no three levels"):
        architecture("tf_efficientnet_lite0")
