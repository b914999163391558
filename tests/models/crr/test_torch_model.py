# SPDX-License-Identifier: Apache-2.0
"""Tests of CRR's network against the formulas, and against Anomalib's Dinomaly."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from anomalib.models.components import TimmFeatureExtractor
from anomalib.models.image.dinomaly import torch_model as dinomaly
from torch.nn import functional as F  # noqa: N812

from anomalib_ext.models import Crr
from anomalib_ext.models.crr.loss import repair_loss
from anomalib_ext.models.crr.torch_model import CrrModel, RandomMask, SegmentationHead, encoder_layers

make_model = partial(CrrModel, "test_vit", pre_trained=False, head_width=8)


def trained(**kwargs: Any) -> CrrModel:  # noqa: ANN401
    """Return a model whose decoder and head say different things of different places."""
    model = make_model(**kwargs).eval()
    model.steps = [1, 1]
    for part in (model.decoder, model.head):
        for parameter in part.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


# Parts


@pytest.mark.parametrize(
    ("encoder", "indices"),
    [
        ("vit_base_patch14_reg4_dinov2.lvd142m", range(2, 10)),
        ("vit_large_patch14_reg4_dinov2", range(4, 19, 2)),
        ("test_vit", range(1, 5)),
        ("test_vit2", range(1, 7)),
    ],
)
def test_layers(encoder: str, indices: range) -> None:
    """Those of Dinomaly for 12 and 24 blocks, and an even number for any depth."""
    assert encoder_layers(encoder) == [f"blocks.{i}" for i in indices]


def test_random_mask() -> None:
    """Each element is kept or not, without rescaling; judging has the expected value, or goes on to sample."""
    feature = torch.rand(4, 50, 100) + 1
    mask = RandomMask(0.4)
    masked = mask(feature)
    kept = masked != 0
    assert torch.equal(masked[kept], feature[kept])
    for dims in ((0, 1), (0, 2), (1, 2)):  # neither whole tokens, nor channels, nor images are removed
        assert (kept.float().mean(dims) - 0.6).abs().max() < 0.2
    assert kept.float().mean() == pytest.approx(0.6, abs=0.02)
    assert torch.equal(mask.eval()(feature), feature * 0.6)
    sampling = RandomMask(0.4, "sample").eval()
    assert not torch.equal(sampling(feature), sampling(feature))
    assert (sampling(feature) != 0).float().mean() == pytest.approx(0.6, abs=0.02)


def test_the_mask_is_at_the_input_of_the_bottleneck() -> None:
    """In eval mode, the bottleneck sees the mean of all layers, class token included, times 0.6."""
    model = trained()
    seen = []
    model.bottleneck.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    images = torch.randn(2, 3, 64, 48)
    model(images)
    expected = torch.stack(model.encoder(images)).mean(0) * 0.6
    assert expected.shape == (2, 1 + 4 * 3, 64)
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize(("width", "parameters"), [(192, 70.4), (64, 8.6)])
def test_head(width: int, parameters: float) -> None:
    """The paper's has 70.4 million parameters; a light one has a 1 x 1 convolution before."""
    with torch.device("meta"):
        head = SegmentationHead(1536, width)
        maps = [torch.empty(1, 768, 28, 28)] * 2
        assert head(maps, maps).shape == (1, 2, 256, 256)
    assert sum(p.numel() for p in head.parameters()) / 1e6 == pytest.approx(parameters, abs=0.05)
    assert isinstance(head.reduce, torch.nn.Identity) == (width == 192)


def test_the_head_sees_the_products() -> None:
    """Summed over the channels of a level, its input is minus the cosine; so sizes of features do not matter."""
    head = SegmentationHead(32, 4)
    seen = []
    head.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    encoded, decoded = ([torch.randn(2, 16, 4, 6) * 10 for _ in range(2)] for _ in range(2))
    head(encoded, decoded)
    enlarged = [
        F.interpolate(-F.cosine_similarity(e, d)[:, None], (8, 12), mode="bilinear", align_corners=True)
        for e, d in zip(encoded, decoded, strict=True)
    ]
    torch.testing.assert_close(seen[0].unflatten(1, (2, 16)).sum(2), torch.cat(enlarged, dim=1))


# Judging


@pytest.mark.parametrize("steps", [0, 5])
def test_fused_map_and_score(steps: int) -> None:
    """0.7 cosine map + 0.3 head at 256 x 256, Gaussian 5 x 5, mean of the highest 655 pixels; without head before."""
    model = trained()
    model.steps = [5, steps]
    images = torch.randn(2, 3, 64, 48)
    encoded, decoded = model.reconstruct(images)
    assert [maps.shape for maps in (*encoded, *decoded)] == [(2, 64, 4, 3)] * 4
    fused = torch.zeros(2, 1, 256, 256)
    for e, d in zip(encoded, decoded, strict=True):
        distance = 1 - (e * d).sum(1) / e.norm(dim=1) / d.norm(dim=1)
        fused += F.interpolate(distance[:, None], (256, 256), mode="bilinear", align_corners=True) / 2
    if steps:
        segmented = model.head(encoded, decoded).exp()
        segmented = segmented[:, 1:] / segmented.sum(1, keepdim=True)
        assert (segmented - segmented.mean()).abs().max() > 0.01
        fused = 0.7 * fused + 0.3 * segmented
    taps = torch.exp(-0.5 * (torch.arange(-2.0, 3) / 4) ** 2)
    kernel = torch.outer(taps, taps) / taps.sum() ** 2
    blurred = F.conv2d(F.pad(fused, (2, 2, 2, 2), mode="reflect"), kernel[None, None])
    result = model(images)
    torch.testing.assert_close(result.pred_score, blurred.flatten(1).sort(dim=1).values[:, -655:].mean(1))
    small = F.interpolate(blurred, (64, 48), mode="bilinear")
    torch.testing.assert_close(result.anomaly_map, small)


@pytest.mark.slow
def test_it_is_dinomaly_without_repair_mask_and_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same weights, loss, gradients, score and, but for the blur, map are those of Anomalib's."""

    def untrained(**kwargs: Any) -> TimmFeatureExtractor:  # noqa: ANN401
        return TimmFeatureExtractor(**{**kwargs, "pre_trained": False})

    monkeypatch.setattr(dinomaly, "TimmFeatureExtractor", untrained)
    encoder = "vit_small_patch16_224"
    theirs = dinomaly.DinomalyModel(encoder, bottleneck_dropout=0.0)
    crr = Crr(
        encoder,
        pre_trained=False,
        stage="repair",
        repair=False,
        mask_ratio=0,
        bottleneck_dropout=0,
        pre_processor=Crr.configure_pre_processor((256, 256), encoder=encoder),
    )
    ours = crr.model
    with torch.no_grad():
        pairs = list(zip(ours.decoder.parameters(), theirs.decoder.parameters(), strict=True))
        for layer in ("fc1", "fc2"):
            pairs.append((getattr(ours.bottleneck, layer).weight, getattr(theirs.bottleneck[0], layer).weight))
            assert not getattr(ours.bottleneck, layer).bias.any(), "Anomalib's has no biases"
        for own, their in pairs:
            their.copy_(own)
        their_encoder = theirs.encoder.feature_extractor.state_dict()
        for name, value in ours.encoder.extractor.feature_extractor.state_dict().items():
            their_encoder[name].copy_(value)
    # The images are square, and of the side at which both score; otherwise Anomalib's map takes a way round.
    images = torch.randn(2, 3, 256, 256)

    ours.steps = [700, 0]
    loss = repair_loss(ours, images)
    expected = theirs.train()(images, global_step=700)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for own, their in pairs:
        torch.testing.assert_close(own.grad, their.grad)

    with torch.no_grad():
        result, expected = ours.eval()(images), theirs.eval()(images)
        torch.testing.assert_close(result.pred_score, expected.pred_score)
        torch.testing.assert_close(result.anomaly_map, theirs.gaussian_blur(expected.anomaly_map))


# Bad input


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"encoder": "resnet18"}, "'resnet18' is no plain vision transformer"),
        ({"encoder": "vit_unknown"}, "Unknown backbone 'vit_unknown'"),
        ({"encoder": "vit_tiny_patch16_224", "pre_trained": True}, "are neither in the Hugging Face cache"),
        ({"alpha": 1.5}, r"alpha, the weight of the cosine map, must lie in \[0, 1\], got 1.5"),
        ({"mask_ratio": 1}, r"mask_ratio must lie in \[0, 1\), got 1"),
        ({"inference_mask": "off"}, "inference_mask must be 'expected' or 'sample', got 'off'"),
        ({"head_width": 30}, "head_width must be a positive multiple of 4, got 30"),
    ],
)
def test_arguments_that_do_not_fit(
    kwargs: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Any,  # noqa: ANN401
) -> None:
    """The message says which and why."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        CrrModel(**{"encoder": "test_vit", "pre_trained": False, **kwargs})


def spoil(images: torch.Tensor) -> torch.Tensor:
    """Return images of which one holds NaN."""
    images[1, 0, 5, 5] = torch.nan
    return images


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (lambda: torch.rand(2, 3, 64, 50), r"64 x 50 pixels cannot be cut.* patches of 16 x 16. Resize to 64 x 48"),
        (lambda: torch.rand(2, 1, 64, 64), r"shape \(B, 3, H, W\)"),
        (lambda: spoil(torch.rand(2, 3, 64, 64)), r"Images \[1\] of the batch hold NaN"),
    ],
)
def test_images_that_do_not_fit(images: Callable[[], torch.Tensor], message: str) -> None:
    """The message says what would fit."""
    with pytest.raises(ValueError, match=message):
        make_model()(images())


def test_weights_that_are_not_finite() -> None:
    """A broken model does not pass all images as good."""
    model = make_model()
    model.decoder[0].norm1.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="look for NaN in the weights"):
        model(torch.rand(1, 3, 64, 64))
