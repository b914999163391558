# SPDX-License-Identifier: Apache-2.0
"""Tests of what is HetNet's own in a trainer; what it shares is tested with the frozen teachers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from anomalib.callbacks import ModelCheckpoint
from lightning.pytorch import Callback
from torch.optim import Adam

from anomalib_ext.models import HetNet

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def model() -> HetNet:
    """Return a small model with random teachers."""
    return HetNet(
        "resnet18",
        "test_vit",
        pre_trained=False,
        transformer_pre_trained=False,
        pre_processor=HetNet.configure_pre_processor((64, 64)),
        visualizer=False,
    )


def test_the_optimizer_of_reverse_distillation(model: HetNet) -> None:
    """Adam with its rates, for fusion and students."""
    optimizer = model.configure_optimizers()
    assert type(optimizer) is Adam
    (group,) = optimizer.param_groups
    assert group["lr"] == pytest.approx(0.005)
    assert (group["betas"], group["weight_decay"]) == ((0.5, 0.999), 0)
    parts = (model.model.fusion, model.model.multi_scale, model.model.reconstruction, model.model.denoising)
    learned = {id(parameter) for part in parts for parameter in part.parameters()}
    assert {id(parameter) for parameter in group["params"]} == learned


class Statistics(Callback):
    """Keeps the statistics of the noise as they are at the first batch."""

    def on_train_batch_start(self, trainer: Any, pl_module: HetNet, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        """Keep them."""
        del trainer, batch, batch_idx
        self.means, self.deviations = pl_module.model.noise.means, pl_module.model.noise.deviations


def test_the_noise_has_the_statistics_of_the_training_images(model: HetNet, make_data: Make, make_engine: Make) -> None:
    """Of all of them, prepared as in training, and as the CNN sees them; afterwards their memory is given back."""
    seen, data = Statistics(), make_data(train_batch_size=6)
    engine = make_engine(max_steps=1, limit_val_batches=0, callbacks=[seen, ModelCheckpoint(save_top_k=0)])
    engine.fit(model, datamodule=data)
    images = torch.stack([item.image for item in data.train_data])
    assert images.shape == (20, 3, 64, 64)
    maps = model.model.teacher(model.pre_processor.transform(images))
    for mean, deviations, level in zip(seen.means, seen.deviations, maps, strict=True):
        assert (mean - level.mean(0)).abs().max() < 1e-4 * level.std()
        expected = level - level.mean(0)
        assert deviations.shape == expected.shape
        # The images differ by noise alone, and half precision rounds their maps.
        assert torch.stack([deviations.float().flatten(), expected.flatten()]).corrcoef()[0, 1] > 0.99
    assert not model.model.noise.means
