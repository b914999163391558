# SPDX-License-Identifier: Apache-2.0
"""The noise is drawn from what the CNN gives for the training images, prepared as for training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from PIL import Image
from torchvision.transforms.v2.functional import normalize

from anomalib_ext.models import HetNet

Make = Callable[..., Any]


class Stop(Callback):
    """Ends a fit before its first step."""

    def on_train_batch_start(self, *args: object) -> None:  # noqa: PLR6301
        """End it."""
        del args
        raise KeyError


def test_statistics_are_those_of_the_training_images(make_data: Make, make_engine: Make, products: Path) -> None:
    """Mean and deviations of the maps at each place, for all images in their order."""
    size = HetNet.configure_pre_processor((64, 64), "resnet18")
    random = {"pre_trained": False, "transformer_pre_trained": False}
    model = HetNet("resnet18", "test_vit", **random, pre_processor=size, visualizer=False)
    with pytest.raises(KeyError):
        make_engine(callbacks=[Stop()]).fit(model, datamodule=make_data(train_batch_size=8))

    paths = sorted((products / "stripes/train/good").iterdir())
    images = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in paths])).permute(0, 3, 1, 2) / 255
    normalised = normalize(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    noise = model.model.noise
    for level, mean, deviations in zip(model.model.teacher(normalised), noise.means, noise.deviations, strict=True):
        assert level.std(dim=0).max() > 0.01
        torch.testing.assert_close(mean, level.mean(dim=0), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(deviations.float(), level - level.mean(dim=0), rtol=0.01, atol=2e-3)
