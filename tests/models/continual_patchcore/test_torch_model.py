# SPDX-License-Identifier: Apache-2.0
"""Tests of the scores, which are PatchCore's as long as the memory holds everything."""

import copy
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.callbacks import TilerConfigurationCallback
from anomalib.data.utils.tiler import Tiler
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from PIL import Image

from anomalib_ext.models import ContinualPatchCore
from anomalib_ext.models.continual_patchcore.torch_model import ContinualPatchCoreModel

Make = Callable[..., Any]

BACKBONES = {
    "resnet10t": ["layer1", "layer2"],
    "tf_efficientnet_lite0": ["blocks.2", "blocks.4"],
}


def photos(products: Path, product: str, kind: str, count: int) -> torch.Tensor:
    """Return images of a product, roughly normalised."""
    paths = sorted((products / product / kind).glob("*.png"))[:count]
    arrays = [np.asarray(Image.open(path), np.float32) for path in paths]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 64 - 2


@contextmanager
def double_precision() -> Generator[None]:
    """Have new tensors, such as a tiler's, in double precision."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def learn(model: ContinualPatchCoreModel, images: torch.Tensor, variant: str) -> None:
    """Have a model learn normalised images."""
    update = model.begin_update()
    for image in images.numpy():
        update.add(model.embed_arrays(image[None])[0], variant)
    update.commit()
    model.end_update()
    model.refresh()


def patchcore_like(model: ContinualPatchCoreModel, images: torch.Tensor) -> PatchcoreModel:
    """Return Anomalib's model with the same weights, that keeps all patches of the images.

    It is to be called in double precision, as its distances suffer from the difference of large squares.
    """
    other = PatchcoreModel(model.layers, model.backbone, pre_trained=False, num_neighbors=model.num_neighbors)
    # Ours ends at the last layer that is wanted.
    assert not other.feature_extractor.load_state_dict(model.feature_extractor.state_dict(), strict=False)[1]
    other.tiler = model.tiler
    other.memory_bank = other.double().memory_bank.double()
    other.train()(images)
    other.memory_bank = torch.vstack(other.embedding_store)
    return other.eval()


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("num_neighbors", [1, 9])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_equals_patchcore_while_all_fits(backbone: str, num_neighbors: int, tiled: bool, products: Path) -> None:
    """Maps and scores are the same as without coreset reduction, whatever the order in which images came."""
    pre_trained = backbone == "tf_efficientnet_lite0"
    model = ContinualPatchCoreModel(
        backbone,
        BACKBONES[backbone],
        pre_trained=pre_trained,
        num_neighbors=num_neighbors,
    ).eval()
    if tiled:
        model.tiler = Tiler(tile_size=32, stride=16)
    normal = torch.cat([photos(products, product, "train/good", 4) for product in ("stripes", "dots")])
    for images, variant in zip(normal.split(4), ("stripes", "dots"), strict=True):
        learn(model, images, variant)
    images = torch.cat([photos(products, "stripes", "test/hole", 3), photos(products, "dots", "test/good", 3)])
    with double_precision():
        expected = patchcore_like(model, normal)(images)
    result = model(images)
    assert torch.allclose(result.anomaly_map.double(), expected.anomaly_map.double(), rtol=1e-4, atol=1e-4)
    assert torch.allclose(result.pred_score.double(), expected.pred_score.double(), rtol=1e-4, atol=1e-4)
    assert result.variant.tolist() == [0, 0, 0, 1, 1, 1]
    assert result.pred_score[:3].min() > 2 * result.pred_score[3:].max()
    assert model(normal).pred_score.max() < 1e-4 * result.pred_score.max()


def test_patches_are_scored_one_image_at_a_time(products: Path) -> None:
    """A batch gives what its images give alone."""
    model = ContinualPatchCoreModel("test_resnet", ["layer1"], pre_trained=False, memory_size=300).eval()
    learn(model, photos(products, "stripes", "train/good", 6), "stripes")
    images = photos(products, "stripes", "test/hole", 3)
    together = model(images)
    for i, image in enumerate(images):
        alone = model(image[None])
        assert torch.allclose(alone.pred_score, together.pred_score[i : i + 1])
        assert torch.allclose(alone.anomaly_map, together.anomaly_map[i : i + 1], atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("memory_size", [1, 5])
def test_fewer_vectors_than_neighbors(memory_size: int, precision: str, products: Path) -> None:
    """A score is weighed by as many neighbors as there are; by none it is the distance itself."""
    model = ContinualPatchCoreModel(
        "test_resnet",
        ["layer1"],
        pre_trained=False,
        memory_size=memory_size,
        num_neighbors=9,
        precision=precision,
    ).eval()
    learn(model, photos(products, "stripes", "train/good", 2), "stripes")
    result = model(photos(products, "stripes", "test/hole", 2))
    assert (result.pred_score > 0).all()
    assert torch.isfinite(result.anomaly_map).all()


@pytest.mark.parametrize(("backbone", "layers"), [("test_resnet", ["layer1", "layer2"]), ("test_vit", ["blocks.1"])])
def test_training_mode_learns_what_evaluation_sees(backbone: str, layers: list[str], products: Path) -> None:
    """Batch norm and dropout of the backbone are those of evaluation also while the trainer trains."""
    model = ContinualPatchCoreModel(backbone, layers, pre_trained=False)
    images = torch.nn.functional.interpolate(photos(products, "stripes", "train/good", 2), 160)
    expected = model.eval().embed(images)
    before = copy.deepcopy(model.feature_extractor.state_dict())
    assert torch.equal(model.train().embed(images), expected)
    after = model.feature_extractor.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_vision_transformer(make_tiny: Make, make_data: Make, make_engine: Make) -> None:
    """A ViT learns and judges, and the number of tiles is its own matter."""
    model = make_tiny(
        backbone="test_vit",
        layers=["blocks.1", "blocks.3"],
        pre_processor=ContinualPatchCore.configure_pre_processor((160, 160), "test_vit"),
    )
    engine = make_engine(limit_train_batches=1)
    engine.fit(model, datamodule=make_data("stripes", eval_batch_size=4))
    batches = engine.predict(model, datamodule=make_data("stripes", eval_batch_size=4))
    assert batches[0].anomaly_map.shape == (4, 160, 160)
    assert engine.test(model, datamodule=make_data("stripes"))[0]["image_AUROC"] > 0.9


def test_tiling_through_the_engine(make_tiny: Make, make_data: Make, make_engine: Make) -> None:
    """Anomalib's callback tiles for learning and for judging."""
    model = make_tiny()
    callbacks = [TilerConfigurationCallback(enable=True, tile_size=32, stride=32)]
    make_engine(callbacks=callbacks).fit(model, datamodule=make_data("stripes"))
    assert model.model.tiler is not None
    assert make_engine().test(model, datamodule=make_data("stripes"))[0]["image_AUROC"] == pytest.approx(1)
