# SPDX-License-Identifier: Apache-2.0
"""Tests of HetNet's fusion, loss and scores against plain references."""

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_ext.models.components.reverse_distillation import MultiScaleFusion
from anomalib_ext.models.het_net.loss import HetNetLoss
from anomalib_ext.models.het_net.torch_model import CrossAttention, HetNetModel, HybridFusion, _pooling

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def make(**kwargs: Any) -> HetNetModel:  # noqa: ANN401
    """Return a small model with random teachers."""
    defaults = {"backbone": "resnet18", "transformer": "test_vit", "noise": "randn"}
    return HetNetModel(**{**defaults, "pre_trained": False, "transformer_pre_trained": False, **kwargs})


def attention(part: CrossAttention, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Attend head by head."""
    q, k, v = part.query(queries), part.key(keys), part.value(keys)
    heads = []
    for start in range(0, q.shape[-1], 64):
        one = slice(start, start + 64)
        scores = q[..., one] @ k[..., one].transpose(1, 2) / math.sqrt(64)
        heads.append(scores.softmax(-1) @ v[..., one])
    return torch.cat(heads, -1)


def tokens(maps: torch.Tensor) -> torch.Tensor:
    """Flatten ``(B, C, h, w)`` to ``(B, h * w, C)``."""
    return maps.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("use_attention", [True, False])
def test_fusion_against_a_reference(use_attention: bool) -> None:
    """``L + H + G`` with two heads, keys and values averaged from 32 x 24 to 16 x 12."""
    fusion = HybridFusion(128, 10, use_attention).eval()
    local, context = torch.randn(2, 128, 32, 24), torch.randn(2, 10, 8, 6)
    a = fusion.resize_local(local)
    b = fusion.resize_global(F.interpolate(context, (32, 24), mode="bilinear"))
    expected = a + b
    if use_attention:
        pooled_a, pooled_b = (F.adaptive_avg_pool2d(maps, (16, 12)) for maps in (a, b))
        hybrid = attention(fusion.local_to_global, tokens(a), tokens(pooled_b))
        hybrid = hybrid + attention(fusion.global_to_local, tokens(b), tokens(pooled_a))
        expected = expected + fusion.project(hybrid).transpose(1, 2).reshape(2, 128, 32, 24)
    torch.testing.assert_close(fusion(local, context), expected, atol=1e-5, rtol=1e-4)


def test_number_of_parameters() -> None:
    """That of the design note, 12.4 million for a wide ResNet-50 and a ViT-B, less the biases of keys."""
    counts = [sum(p.numel() for p in HybridFusion(channels, 768).parameters()) for channels in (256, 512, 1024)]
    assert counts == [723_200, 2_494_976, 9_184_256]


@pytest.mark.parametrize(("side", "pooled"), [(8, 8), (16, 16), (24, 12), (40, 10), (64, 16), (104, 13)])
def test_pooling_divides(side: int, pooled: int) -> None:
    """At most 16 places remain, and none is left out."""
    assert side // _pooling(side) == pooled
    assert side % _pooling(side) == 0


def test_multi_scale_fusion_has_three_times_the_channels() -> None:
    """The deepest level comes through as it is."""
    maps = [torch.randn(2, c, 32 // s, 32 // s) for c, s in ((3, 2), (4, 4), (5, 8))]
    fused = MultiScaleFusion((3, 4, 5))(maps)
    assert fused.shape == (2, 15, 4, 4)
    assert torch.equal(fused[:, 10:], maps[2])


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_loss_against_a_reference(stop_gradient: bool) -> None:
    """One minus the cosine of the flattened maps, summed over the levels, for both students."""
    teacher, first, second = (
        [torch.randn(3, c, s, s, requires_grad=True) for c, s in ((2, 8), (4, 4), (6, 2))] for _ in range(3)
    )

    def distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> torch.Tensor:
        total = torch.zeros(())
        for x, y in zip(a, b, strict=True):
            for one, other in zip(x, y, strict=True):
                total = total + (1 - (one * other).sum() / (one.norm() * other.norm())) / len(x)
        return total

    loss = HetNetLoss(stop_gradient)(teacher, first, second)
    targets = [level.detach() for level in first] if stop_gradient else first
    expected = distance(teacher, first) + distance(targets, second)
    torch.testing.assert_close(loss, expected)
    for level in (*first, *second):
        torch.testing.assert_close(
            *(torch.autograd.grad(value, level, retain_graph=True)[0] for value in (loss, expected)),
        )


def test_scores() -> None:
    """The maps are those of the students that are asked for, or their mean; nothing is random in evaluation."""
    model = make().eval()
    results = {}
    for model.score_from in ("sr", "sd", "both"):
        results[model.score_from] = model(IMAGES)
    maps = {name: result.anomaly_map for name, result in results.items()}
    torch.testing.assert_close(maps["both"], (maps["sr"] + maps["sd"]) / 2)
    assert not torch.allclose(maps["sr"], maps["sd"])
    assert torch.equal(results["both"].pred_score, maps["both"].amax((1, 2, 3)))
    assert torch.equal(model(IMAGES).anomaly_map, maps["both"])
    with pytest.raises(ValueError, match=r"Images \[0, 1\] of the batch hold NaN"):
        model(IMAGES * torch.nan)


def test_only_the_second_student_sees_noise() -> None:
    """Noise in the CNN's features changes its output alone; without noise both see the same."""
    model = make().train()
    model.noise.noise = "none"
    clean = model(IMAGES)
    model.noise.noise = "randn"
    noisy = model(IMAGES)
    for i, same in ((0, True), (1, True), (2, False)):
        assert torch.allclose(clean[i][2], noisy[i][2]) == same
    model.denoising.load_state_dict(model.reconstruction.state_dict())
    model.noise.noise = "none"
    _, first, second = model(IMAGES)
    torch.testing.assert_close(first, second)


def test_the_transformer_sees_images_normalised_for_it() -> None:
    """Images come normalised for the CNN; `vit_tiny_patch16_224` wants a mean and deviation of 0.5."""
    model = make(transformer="vit_tiny_patch16_224").eval()
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close((IMAGES - mean) / std * model.scale + model.shift, (IMAGES - 0.5) / 0.5)
    assert not any(key.endswith(("scale", "shift")) for key in model.state_dict())


def test_bad_options() -> None:
    """Each error names what is wrong."""
    with pytest.raises(ValueError, match="score_from must be one of sr, sd, both, got 'all'"):
        make(score_from="all")
    for name in ("resnet18", "levit_128"):
        with pytest.raises(ValueError, match=f"'{name}' is no plain vision transformer"):
            make(transformer=name)
    with pytest.raises(ValueError, match="Unknown backbone 'vit_of_mine'"):
        make(transformer="vit_of_mine")
    with pytest.raises(ValueError, match=r"patches of 14 x 14. Resize to multiples of both 32 and 14"):
        make(transformer="vit_small_patch14_dinov2", input_size=(256, 256))
