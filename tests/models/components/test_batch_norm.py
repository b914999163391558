# SPDX-License-Identifier: Apache-2.0
"""Statistics of batch normalisation at the end of a fit are those of all training images and of the last weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from anomalib.callbacks import ModelCheckpoint
from lightning.pytorch import Callback
from torch import nn
from torchvision.transforms.v2 import RandomInvert

from anomalib_ext.models import HetNet, RdAkf
from anomalib_ext.models.components import frozen_teacher
from anomalib_ext.models.components.batch_norm import estimate_batch_statistics

Make = Callable[..., Any]

SIDE = 64
COMMON = {"backbone": "resnet18", "pre_trained": False, "visualizer": False}


def make_rd() -> RdAkf:
    """Return a small RdAkf with a random teacher."""
    return RdAkf(pre_processor=RdAkf.configure_pre_processor((SIDE, SIDE)), **COMMON)


def make_het() -> HetNet:
    """Return a small HetNet with random teachers."""
    parts = {"transformer": "test_vit", "transformer_pre_trained": False, "noise": "randn"}
    return HetNet(pre_processor=HetNet.configure_pre_processor((SIDE, SIDE)), **parts, **COMMON)


def small_network() -> nn.Sequential:
    """Return two layers with normalisation, and one that is frozen."""
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    network[4].requires_grad_(requires_grad=False)
    return network


def test_all_images_in_one_batch() -> None:
    """Judging is then what training does; a frozen layer and the mode stay."""
    network = small_network().eval()
    network[4].train = lambda _: network[4]  # as a teacher's, it is always in evaluation mode
    images = torch.randn(6, 3, 5, 5) * 3 + 2
    estimate_batch_statistics(network, [images])
    assert not network[0].training
    judged = network(images)
    assert network[4].running_mean.count_nonzero() == 0
    torch.testing.assert_close(judged, network.train()(images))


class Partly(nn.Module):
    """Uses one of its two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.BatchNorm2d(3), nn.BatchNorm2d(2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalize images."""
        return self.used(images)


def test_the_moments_of_batches_are_pooled() -> None:
    """Of unequal batches too, exactly where nothing was normalised before; layers that are not used keep theirs."""
    network = Partly().train()
    images = torch.randn(7, 3, 4, 4) + torch.arange(7).reshape(7, 1, 1, 1)
    estimate_batch_statistics(network, images.split(3))
    torch.testing.assert_close(network.used.running_mean, images.mean((0, 2, 3)))
    torch.testing.assert_close(network.used.running_var, images.var((0, 2, 3), correction=0))
    assert torch.equal(network.unused.running_var, torch.ones(2))
    assert network.training
    assert not network.used._forward_pre_hooks


class Judged(Callback):
    """Keeps what was said of the validation images, and the running mean with which it was said."""

    def __init__(self) -> None:
        self.means: list[torch.Tensor] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ANN401
        """Keep it."""
        del trainer
        self.means.append(running_mean(pl_module))


class Stop(Callback):
    """Ends the fit after a validation, as early stopping does."""

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ANN401, PLR6301
        """End it."""
        del pl_module
        trainer.should_stop = True


def running_mean(model: Any) -> torch.Tensor:  # noqa: ANN401
    """Return a copy of the running mean of a layer that is learned."""
    return next(
        value.clone()
        for name, value in model.named_buffers()
        if name.endswith("running_mean") and not model._is_teachers(name)
    )


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets a number for each pass over the training images."""
    numbers: list[int] = []

    def counted(*args: Any) -> None:  # noqa: ANN401
        numbers.append(len(numbers))
        estimate_batch_statistics(*args)

    monkeypatch.setattr(frozen_teacher, "estimate_batch_statistics", counted)
    return numbers


@pytest.mark.parametrize("make", [make_rd, make_het])
def test_judging_after_a_fit_is_what_training_does(
    make: Make,
    passes: list[int],
    make_data: Make,
    make_engine: Make,
) -> None:
    """With one pass in all, without augmentation, before the last validation and checkpoint; with lag it is not so."""
    model, judged, saving = make(), Judged(), ModelCheckpoint(save_weights_only=True)
    data = make_data(train_batch_size=20, train_augmentations=RandomInvert(p=1))
    model.configure_optimizers = lambda: torch.optim.Adam(model.trainable_parameters(), lr=1e-3)
    make_engine(max_epochs=2, limit_val_batches=1, callbacks=[judged, saving]).fit(model, datamodule=data)
    assert passes == [0]
    state = torch.load(saving.best_model_path, weights_only=True)["state_dict"]
    assert all(torch.equal(state[name], value) for name, value in model.named_buffers() if "running" in name)
    assert len(judged.means) == 2
    assert torch.equal(judged.means[1], running_mean(model))

    data.train_data.augmentations = None
    images = model.pre_processor.transform(torch.stack([item.image for item in data.train_data]))
    network = model.model.eval()
    with torch.no_grad():
        judged_map = network(images).anomaly_map
        for name, layer in network.named_modules():
            if isinstance(layer, nn.BatchNorm2d) and not model._is_teachers(f"model.{name}."):
                layer.train()
        trained_map = network(images).anomaly_map
    torch.testing.assert_close(judged_map, trained_map, rtol=1e-3, atol=1e-4)


def test_a_fit_that_is_stopped_early(passes: list[int], make_data: Make, make_engine: Make) -> None:
    """It is judged once more, for thresholds that suit the new statistics."""
    model, judged = make_rd(), Judged()
    engine = make_engine(max_epochs=5, callbacks=[judged, Stop(), ModelCheckpoint(save_top_k=0)])
    engine.fit(model, datamodule=make_data(train_batch_size=10))
    assert passes == [0]
    assert len(judged.means) == 2
    assert not torch.equal(judged.means[0], judged.means[1])
    assert torch.equal(judged.means[1], running_mean(model))
    threshold = model.post_processor.image_threshold.clone()
    engine.validate(model, datamodule=make_data())
    assert torch.equal(threshold, model.post_processor.image_threshold)
