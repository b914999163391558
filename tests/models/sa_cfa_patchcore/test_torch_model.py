# SPDX-License-Identifier: Apache-2.0
"""Tests of the formulas: against plain NumPy written from the paper's equations, and against Anomalib's Patchcore."""

import numpy as np
import pytest
import torch
from anomalib.data.utils.tiler import Tiler
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from anomalib_ext.models.sa_cfa_patchcore.torch_model import (
    PatchEmbedding,
    SaCfaPatchCoreModel,
    attend,
    channel_groups,
)

BACKBONE, LAYERS = "test_resnet", ["layer2", "layer3"]


def windows(features: np.ndarray, border: float) -> np.ndarray:
    """Return the 3 x 3 neighborhoods of a map ``(C, H, W)``, shape ``(C, H, W, 9)``."""
    padded = np.pad(features, ((0, 0), (1, 1), (1, 1)), constant_values=border)
    height, width = features.shape[1:]
    parts = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return np.stack(parts, axis=-1)


def numpy_attention(features: np.ndarray, channels: int) -> np.ndarray:
    """Steps 2 and 3 of SA for a map ``(C, H, W)``, with the explicit softmax."""
    first, second = features[:channels], features[channels:]
    if not channels:
        return windows(second, 0).mean(axis=-1)
    tokens = windows(first, -np.inf).max(axis=-1).reshape(channels, -1).T
    weights = np.exp(tokens @ tokens.T / np.sqrt(channels) - (tokens**2).sum(axis=1).max() / np.sqrt(channels))
    weights /= weights.sum(axis=1, keepdims=True)
    attended = (weights @ tokens).T.reshape(first.shape)
    return np.concatenate([attended, windows(second, 0).mean(axis=-1)])


def numpy_resize(features: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear interpolation between pixel centers."""
    for axis, size in ((1, height), (2, width)):
        old = features.shape[axis]
        place = np.clip((np.arange(size) + 0.5) * old / size - 0.5, 0, old - 1)
        low = np.floor(place).astype(int)
        high = np.minimum(low + 1, old - 1)
        share = (place - low).reshape([-1 if i == axis else 1 for i in range(3)])
        features = features.take(low, axis) * (1 - share) + features.take(high, axis) * share
    return features


def numpy_embedding(shallow: np.ndarray, deep: np.ndarray, channels: int, groups: list[list[int]]) -> np.ndarray:
    """The whole embedding of an image from its two feature maps, in the order of the paper."""
    maps = [windows(shallow, 0).mean(axis=-1), numpy_resize(numpy_attention(deep, channels), *shallow.shape[1:])]
    whole = np.concatenate(maps)
    return np.stack([whole[group].mean(axis=0) for group in groups])


def photos(count: int, side: int = 96, seed: int = 0) -> torch.Tensor:
    """Return smooth random images."""
    small = torch.randn(count, 3, side // 8, side // 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(small, size=(side, side), mode="bilinear")


@pytest.mark.parametrize("channel_seed", [None, 3])
@pytest.mark.parametrize(
    ("attention_ratio", "reduction_ratio"), [(0.5, 0.1), (0.25, 0.3), (1, 0.99), (0, 0.1), (0.5, 1)]
)
def test_embedding_equals_numpy(attention_ratio: float, reduction_ratio: float, channel_seed: int | None) -> None:
    """Pooling, attention, resizing and the means of groups give what the equations say, to 1e-5 of the range."""
    model = PatchEmbedding(
        BACKBONE,
        LAYERS,
        pre_trained=False,
        attention_ratio=attention_ratio,
        reduction_ratio=reduction_ratio,
        channel_seed=channel_seed,
    ).eval()
    images = photos(2)
    shallow, deep = (maps.double().numpy() for maps in model.feature_extractor(images).values())
    total = shallow.shape[1] + deep.shape[1]
    groups = [np.flatnonzero(model.groups.numpy() == group).tolist() for group in range(round(total * reduction_ratio))]
    channels = round(deep.shape[1] * attention_ratio)
    expected = np.stack([numpy_embedding(*maps, channels, groups) for maps in zip(shallow, deep, strict=True)])
    result = model(images).numpy()
    assert result.shape == expected.shape
    if reduction_ratio < 1 or channel_seed is None:  # single channels in another order mean nothing, and are left
        assert np.abs(result - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_attention_equals_the_explicit_softmax(scale: float) -> None:
    """For near-uniform and for sharp weights, and for shapes that are not square."""
    features = scale * torch.randn(2, 10, 5, 7, generator=torch.Generator().manual_seed(0))
    for channels in (1, 5, 10):
        result = attend(features, channels)
        for image, expected in zip(result, features.double().numpy(), strict=True):
            assert np.abs(image.numpy() - numpy_attention(expected, channels)).max() < 1e-5 * scale


def test_attention_keeps_no_matrix_of_all_pairs() -> None:
    """Torch's kernel with bounded memory takes the tokens as they are laid out, and no other is needed."""
    features = torch.randn(1, 16, 32, 32)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # fails where that kernel cannot be used
        result = attend(features, 8)
    assert torch.allclose(result, attend(features, 8), atol=1e-6)


@given(st.integers(1, 2000), st.floats(0.001, 1), st.none() | st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_groups(channels: int, ratio: float, seed: int | None) -> None:
    """Each channel is in one group, no group is empty, sizes differ by at most one."""
    count = max(1, round(channels * ratio))
    groups = channel_groups(channels, count, seed)
    assert groups.shape == (channels,)
    sizes = groups.bincount(minlength=count)
    assert len(sizes) == count
    assert sizes.min() >= 1
    assert sizes.max() - sizes.min() <= 1
    if seed is None:
        assert (groups.diff() >= 0).all()  # consecutive
        if channels % count == 0:  # the paper's G_i = {i * k, ..., i * k + k - 1}
            assert torch.equal(groups, torch.arange(count).repeat_interleave(channels // count))


def test_random_groups_depend_on_the_seed_alone() -> None:
    """The same seed gives the same groups, another one others."""
    first, again, other = (channel_groups(200, 20, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def learned(images: torch.Tensor, ratio: float = 0.1, **kwargs) -> SaCfaPatchCoreModel:
    """Return a model that has learned images."""
    model = SaCfaPatchCoreModel(BACKBONE, LAYERS, pre_trained=False, **kwargs).eval()
    for batch in images.split(2):
        model.collect(batch)
    model.subsample_embedding(ratio)
    model.embedding_store.clear()
    return model


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("num_neighbors", [1, 9])
@pytest.mark.parametrize(
    ("backbone", "layers"),
    [("test_resnet", ["layer2", "layer3"]), ("test_efficientnet", ["blocks.1", "blocks.3"])],
)
def test_equals_patchcore_with_both_switched_off(
    backbone: str,
    layers: list[str],
    num_neighbors: int,
    tiled: bool,
) -> None:
    """Embeddings, and with the same memory bank scores and maps, are those of Anomalib's model."""
    ours = SaCfaPatchCoreModel(
        backbone,
        layers,
        num_neighbors,
        pre_trained=False,
        attention_ratio=0,
        reduction_ratio=1,
    ).eval()
    theirs = PatchcoreModel(layers, backbone, pre_trained=False, num_neighbors=num_neighbors)
    state = ours.embedding.feature_extractor.state_dict()
    assert not theirs.feature_extractor.load_state_dict(state, strict=False).unexpected_keys
    if tiled:
        ours.tiler = theirs.tiler = Tiler(tile_size=64, stride=32)
    normal, images = photos(6, 128), photos(3, 128, seed=1)
    ours.collect(normal)
    theirs.train()(normal)
    (expected,) = theirs.embedding_store
    (embedding,) = ours.embedding_store
    assert torch.allclose(embedding, expected, atol=1e-5)
    ours.subsample_embedding(0.2)
    theirs.memory_bank = ours.memory_bank
    result, expected = ours(images), theirs.eval()(images)
    assert result.pred_score.min() > 0
    assert torch.allclose(result.pred_score, expected.pred_score, rtol=1e-4, atol=1e-4)
    assert torch.allclose(result.anomaly_map, expected.anomaly_map, rtol=1e-4, atol=1e-4)


def test_memory_bank_is_a_coreset() -> None:
    """It keeps the share that was asked for, of embeddings that occurred, all of them different."""
    model = SaCfaPatchCoreModel(BACKBONE, LAYERS, pre_trained=False).eval()
    for batch in photos(4).split(2):
        model.collect(batch)
    points = torch.cat(model.embedding_store)
    model.subsample_embedding(0.05)
    assert model.memory_bank.shape == (int(len(points) * 0.05), model.embedding.dimension)
    assert all((points == vector).all(dim=1).any() for vector in model.memory_bank)
    assert len(model.memory_bank.unique(dim=0)) == len(model.memory_bank)
    radius = torch.cdist(points, model.memory_bank).min(dim=1).values.max()
    gaps = torch.cdist(model.memory_bank, model.memory_bank).fill_diagonal_(torch.inf)
    assert radius <= gaps.min() + 1e-5  # what farthest-first promises


def test_bank_of_one_vector() -> None:
    """At least one vector is kept, and fewer than `num_neighbors` are enough."""
    model = learned(photos(2), ratio=1e-9)
    assert len(model.memory_bank) == 1
    assert torch.isfinite(model(photos(1, seed=1)).pred_score).all()


def test_nothing_learned() -> None:
    """A model without memory judges nothing."""
    model = SaCfaPatchCoreModel(BACKBONE, LAYERS, pre_trained=False).eval()
    with pytest.raises(RuntimeError, match="The memory bank is empty"):
        model(photos(1))


def test_not_a_number() -> None:
    """Images with NaN are neither learned nor judged, and nothing is lost."""
    model = learned(photos(2))
    bank = model.memory_bank.clone()
    images = photos(3)
    images[1, 0, 5, 5] = torch.nan
    with pytest.raises(ValueError, match=r"Images \[1\] of the batch give embeddings that are not finite"):
        model.collect(images)
    assert model.is_selected
    with pytest.raises(ValueError, match=r"Images \[1\] of the batch give scores that are not finite"):
        model(images)
    assert torch.equal(model.memory_bank, bank)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"reduction_ratio": 1.01}, r"reduction_ratio must lie in \(0, 1\], got 1.01: .* less than one channel"),
        ({"reduction_ratio": 0}, r"reduction_ratio must lie in \(0, 1\], got 0"),
        ({"reduction_ratio": 1e-4}, r"reduction_ratio=0.0001 leaves none of \d+ channels; take at least 0.0"),
        ({"attention_ratio": -0.1}, r"attention_ratio must lie in \[0, 1\], .* got -0.1"),
        ({"attention_ratio": float("nan")}, r"attention_ratio must lie in \[0, 1\]"),
        ({"attention_ratio": 1e-4}, r"attention_ratio=0.0001 leaves none of \d+ channels with attention"),
        ({"layers": ["layer3"]}, r"two or more layers, got \['layer3'\]. .* attention_ratio=0"),
        ({"layers": ["layer9", "layer1"]}, r"Unknown layers \['layer9'\]"),
        ({"num_neighbors": 0}, "num_neighbors must be at least 1, got 0"),
    ],
)
def test_bad_arguments(kwargs: dict, message: str) -> None:
    """They are refused, with what would do."""
    with pytest.raises(ValueError, match=message):
        SaCfaPatchCoreModel(**{"backbone": BACKBONE, "layers": LAYERS, "pre_trained": False, **kwargs})


def test_one_layer_without_attention() -> None:
    """It is enough for aggregation alone."""
    model = SaCfaPatchCoreModel(BACKBONE, ["layer2"], pre_trained=False, attention_ratio=0).eval()
    model.collect(photos(2))
    assert model.embedding_store[0].shape[1] == model.embedding.dimension == round(model.embedding.out_dims[0] * 0.1)
