# SPDX-License-Identifier: Apache-2.0
"""Tests of AKF against a plain reference, and of the whole against Anomalib's reverse distillation."""

import pytest
import torch
from anomalib.models.image.reverse_distillation.anomaly_map import AnomalyMapGenerationMode
from anomalib.models.image.reverse_distillation.torch_model import ReverseDistillationModel
from torch import nn

from anomalib_ext.models.components.reverse_distillation import MultiScaleFusion, Student
from anomalib_ext.models.rd_akf.torch_model import AsymptoticFusion, RdAkfModel

CHANNELS = (4, 6, 8)


def levels(side: int = 64, batch: int = 2) -> list[torch.Tensor]:
    """Return random maps of three levels."""
    return [torch.randn(batch, c, side // s, side // s) for c, s in zip(CHANNELS, (4, 8, 16), strict=True)]


def test_the_fusion_against_a_reference() -> None:
    """Two steps of the note, each of neighbors, with a free weight for each value of a map."""
    fusion = AsymptoticFusion(CHANNELS, (64, 96)).eval()
    for part in (fusion.sum_2, fusion.sum_3):
        nn.init.normal_(part.weights)
    f1, f2, f3 = (torch.randn(2, c, 64 // s, 96 // s) for c, s in zip(CHANNELS, (4, 8, 16), strict=True))
    w2, w3 = fusion.sum_2.weights, fusion.sum_3.weights
    assert (w2.shape, w3.shape) == ((2, 6, 8, 12), (2, 8, 4, 6))
    expected = w3[0] * fusion.resize_23(w2[0] * fusion.resize_12(f1) + w2[1] * f2) + w3[1] * f3
    torch.testing.assert_close(fusion([f1, f2, f3]), expected)


def test_only_neighbors_are_fused() -> None:
    """What the second level does not take from the first one never reaches the third."""
    fusion = AsymptoticFusion(CHANNELS, (64, 64)).eval()
    first, *others = levels()
    assert not torch.allclose(fusion([first, *others]), fusion([-first, *others]))
    nn.init.zeros_(fusion.sum_2.weights[0])
    assert torch.equal(fusion([first, *others]), fusion([-first, *others]))


@pytest.mark.parametrize("softmax", [False, True])
def test_a_fusion_starts_as_a_mean(softmax: bool) -> None:
    """With the path of a former version, and with its softmax, which keeps a sum convex whatever is learned."""
    fusion = AsymptoticFusion(CHANNELS, (64, 64), skip=True, softmax=softmax).eval()
    f1, f2, f3 = levels()
    middle = (fusion.resize_12(f1) + f2) / 2
    torch.testing.assert_close(fusion([f1, f2, f3]), (fusion.resize_13(f1) + fusion.resize_23(middle) + f3) / 3)
    nn.init.normal_(fusion.sum_2.weights)
    same = torch.rand(2, 6, 8, 8)
    assert torch.allclose(fusion.sum_2([same, same]), same) == softmax


@pytest.mark.parametrize("backbone", ["resnet18", "resnet34.tv_in1k", "resnet50"])
def test_backbones(backbone: str) -> None:
    """The student's maps have the shapes of the teacher's, with a tag and without."""
    model = RdAkfModel(backbone, (64, 96), pre_trained=False).train()
    teacher, student = model(torch.rand(2, 3, 64, 96))
    assert [level.shape for level in teacher] == [level.shape for level in student]
    assert len(teacher) == 3


def test_with_the_traditional_fusion_it_is_anomalibs_reverse_distillation() -> None:
    """The same weights give the same features in training, and the same maps and scores."""
    mode = AnomalyMapGenerationMode.ADD
    expected = ReverseDistillationModel("resnet18", (64, 64), ["layer1", "layer2", "layer3"], mode, pre_trained=False)
    model = RdAkfModel("resnet18", (64, 64), pre_trained=False)
    model.fusion = MultiScaleFusion(model.teacher.channels)
    model.student = Student("resnet18", 3 * model.teacher.channels[-1])
    theirs = expected.bottleneck
    model.teacher.extractor.feature_extractor.load_state_dict(expected.encoder.feature_extractor.state_dict())
    model.student.embedding.load_state_dict(theirs.bn_layer.state_dict())
    model.student.decoder.load_state_dict(expected.decoder.state_dict())
    pairs = zip(
        (model.fusion.resize[0][0], model.fusion.resize[0][1], model.fusion.resize[0][3], model.fusion.resize[0][4]),
        (theirs.conv1, theirs.bn1, theirs.conv2, theirs.bn2),
        strict=True,
    )
    for ours, other in (*pairs, (model.fusion.resize[1][0], theirs.conv3), (model.fusion.resize[1][1], theirs.bn3)):
        ours.load_state_dict(other.state_dict())

    images = torch.rand(3, 3, 64, 64)
    model.train()
    expected.train()
    for ours, other in zip(model(images), expected(images), strict=True):
        for level, level_of_other in zip(ours, other, strict=True):
            torch.testing.assert_close(level, level_of_other, atol=1e-5, rtol=1e-5)
    model.eval()
    expected.eval()
    ours, other = model(images), expected(images)
    torch.testing.assert_close(ours.anomaly_map, other.anomaly_map, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.pred_score, other.pred_score.flatten(), atol=1e-5, rtol=1e-5)


def test_bad_options() -> None:
    """Each error says what to do."""
    with pytest.raises(ValueError, match="size of the images must be known"):
        RdAkfModel("resnet18", None, pre_trained=False)
    model = RdAkfModel("resnet18", (64, 64), pre_trained=False).eval()
    with pytest.raises(ValueError, match=r"for maps of \(8, 8\), these images have maps of \(12, 12\)"):
        model(torch.rand(1, 3, 96, 96))


def test_weights_that_are_not_finite() -> None:
    """The score would be NaN, which nobody would see as an anomaly."""
    model = RdAkfModel("resnet18", (64, 64), pre_trained=False).eval()
    nn.init.constant_(model.fusion.sum_3.weights, torch.nan)
    with pytest.raises(ValueError, match=r"Images \[0\] .* not finite"):
        model(torch.rand(1, 3, 64, 64))
