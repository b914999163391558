# SPDX-License-Identifier: Apache-2.0
"""The learning rates, by what a step changes."""

import pytest
import torch

from anomalib_ext.models import RdAkf
from anomalib_ext.models.rd_akf.lightning_model import FUSION_RATE


def test_the_first_step_moves_parameters_by_their_rates() -> None:
    """Adam's first step moves each parameter by its rate, whatever the gradient: by the paper's, or the weights'."""
    size = RdAkf.configure_pre_processor((64, 64), "resnet18")
    model = RdAkf("resnet18", pre_trained=False, pre_processor=size, visualizer=False)
    before = {name: parameter.detach().clone() for name, parameter in model.model.named_parameters()}
    optimizer = model.configure_optimizers()
    model.loss(*model.model(torch.rand(2, 3, 64, 64))).backward()
    optimizer.step()
    moved = {
        name: float((parameter.detach() - before[name]).abs().max())
        for name, parameter in model.model.named_parameters()
    }
    assert {name for name, distance in moved.items() if not distance} == {
        name for name in moved if name.startswith("teacher.")
    }
    weights = {name: moved.pop(f"fusion.{name}.weights") for name in ("sum_2", "sum_3")}
    assert list(weights.values()) == pytest.approx([FUSION_RATE * 1e-4] * 2, rel=0.01)
    assert max(moved.values()) == pytest.approx(1e-4, rel=0.01)
    for part in ("fusion.", "student."):
        assert max(distance for name, distance in moved.items() if name.startswith(part)) > 0.99e-4
