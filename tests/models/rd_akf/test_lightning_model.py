# SPDX-License-Identifier: Apache-2.0
"""Tests of what is RdAkf's own in a trainer; what it shares is tested with the frozen teachers."""

import torch
from torch.optim import Adam

from anomalib_ext.models import RdAkf


def test_the_paper_s_optimizer() -> None:
    """Adam for fusion and student; `test_learning_rate.py` measures its rate."""
    model = RdAkf("resnet18", pre_trained=False, visualizer=False)
    optimizer = model.configure_optimizers()
    assert type(optimizer) is Adam
    (group,) = optimizer.param_groups
    assert (group["betas"], group["weight_decay"]) == ((0.9, 0.999), 0)
    learned = [*model.model.fusion.parameters(), *model.model.student.parameters()]
    assert {id(parameter) for parameter in group["params"]} == {id(parameter) for parameter in learned}


def test_the_loss_is_reverse_distillation_s() -> None:
    """Summed over the levels, one minus the cosine of the flattened maps, which mixed precision does not round."""
    model = RdAkf(
        "resnet18",
        pre_trained=False,
        visualizer=False,
        pre_processor=RdAkf.configure_pre_processor((64, 64)),
    )
    maps = [[torch.randn(2, c, s, s).bfloat16() for c, s in ((64, 16), (128, 8), (256, 4))] for _ in range(2)]
    model.model.forward = lambda _: maps
    expected = sum(
        (1 - torch.cosine_similarity(a.float().flatten(1), b.float().flatten(1))).mean()
        for a, b in zip(*maps, strict=True)
    )
    torch.testing.assert_close(model.training_loss(torch.rand(2, 3, 64, 64)), expected)
