# SPDX-License-Identifier: Apache-2.0
"""Tests of what a model and its bundle agree on."""

from types import SimpleNamespace
from typing import cast

import pytest
import torch
from anomalib.data import InferenceBatch
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from torch import nn
from torchvision.transforms.v2 import CenterCrop, Compose, Normalize, Resize, Transform

from anomalib_ext.export.contract import WholeGraph, common_metadata, image_size


class Cropping(nn.Module):
    """A model of the middle of images, each pixel of which is anomalous."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.crop = CenterCrop(size)

    def forward(self, images: torch.Tensor) -> InferenceBatch:
        """Score the middle."""
        maps = self.crop(images).mean(dim=1, keepdim=True)
        return InferenceBatch(pred_score=maps.amax(dim=(1, 2, 3)), anomaly_map=maps, pred_mask=maps > 0)


def with_transform(transform: Transform | None) -> AnomalibModule:
    """Return what describes a model that has this pre-processor."""
    pre_processor = PreProcessor(transform) if transform else None
    return cast("AnomalibModule", SimpleNamespace(pre_processor=pre_processor, post_processor=None))


@pytest.mark.parametrize("size", [(8, 8), (5, 8), (5, 5), (4, 7), (1, 2)])
def test_what_is_cropped_is_normal(size: tuple[int, int]) -> None:
    """Maps are as large as the images, with each pixel where it was."""
    images = torch.rand(2, 3, 8, 8) + 0.1
    kept = CenterCrop(size)(torch.arange(64).reshape(1, 8, 8)).flatten().tolist()
    outputs = WholeGraph(Cropping(size))(images)
    assert set(outputs) == {"pred_score", "anomaly_map", "pred_mask"}
    for row in range(8):
        for column in range(8):
            inside = 8 * row + column in kept
            assert (outputs["pred_mask"][:, 0, row, column] == inside).all()
            expected = images[:, :, row, column].mean(dim=1) if inside else torch.zeros(2)
            torch.testing.assert_close(outputs["anomaly_map"][:, 0, row, column], expected)


def test_image_size() -> None:
    """What is asked for counts before what the pre-processor resizes to."""
    model = with_transform(Compose([Normalize([0.4] * 3, [0.2] * 3), Resize((96, 80))]))
    assert image_size(model, None) == (96, 80)
    assert image_size(model, (32, 48)) == (32, 48)
    for transform in (None, Resize(64), Normalize([0.4] * 3, [0.2] * 3)):
        with pytest.raises(ValueError, match="give input_size"):
            image_size(with_transform(transform), None)


def test_metadata_without_a_post_processor() -> None:
    """Nothing is decided then, and images are taken as they are if nothing normalises them."""
    metadata = common_metadata(with_transform(Resize((96, 80))), (96, 80))
    assert (metadata["input_size"], metadata["mean"], metadata["std"]) == ([96, 80], [0.0] * 3, [1.0] * 3)
    assert not metadata["normalization"]
    assert not metadata["thresholding"]
    assert metadata["last_values"] == {"image": [None] * 3, "pixel": [None] * 3}
    normalized = common_metadata(with_transform(Compose([Resize((96, 80)), Normalize([0.4] * 3, [0.2] * 3)])), (96, 80))
    assert (normalized["mean"], normalized["std"]) == ([0.4] * 3, [0.2] * 3)
