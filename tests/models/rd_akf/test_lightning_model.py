# SPDX-License-Identifier: Apache-2.0
"""Tests of what is RdAkf's own in a trainer; what it shares is tested with the frozen teachers."""

import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.callbacks import ModelCheckpoint
from torch.optim import Adam

from anomalib_ext.models import RdAkf

Make = Callable[..., Any]


def test_the_paper_s_optimizer() -> None:
    """Adam for fusion and student; `test_learning_rate.py` measures its rates."""
    model = RdAkf("resnet18", pre_trained=False, visualizer=False)
    optimizer = model.configure_optimizers()
    assert type(optimizer) is Adam
    assert all((group["betas"], group["weight_decay"]) == ((0.9, 0.999), 0) for group in optimizer.param_groups)
    learned = [*model.model.fusion.parameters(), *model.model.student.parameters()]
    given = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(given) == sorted(map(id, learned))


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


def test_the_weights_of_the_fusion_learn(make_data: Make, make_engine: Make) -> None:
    """In few steps they are not the mean any more, each place its own; the softmax of a former version stayed there."""
    model = RdAkf(
        "resnet18", pre_trained=False, visualizer=False, pre_processor=RdAkf.configure_pre_processor((64, 64))
    )
    engine = make_engine(max_steps=5, limit_val_batches=0, callbacks=[ModelCheckpoint(save_top_k=0)])
    engine.fit(model, datamodule=make_data(train_batch_size=10))
    for part in (model.model.fusion.sum_2, model.model.fusion.sum_3):
        moved = part.weights.detach() - 0.5
        assert moved.square().mean().sqrt() > 0.001
        assert (moved > 0.001).any()
        assert (moved < -0.001).any()


def test_content_is_refused_and_position_is_told_to_be_idle() -> None:
    """In configs, and in checkpoints that were made with it."""
    parts = {"pre_trained": False, "visualizer": False}
    with pytest.raises(ValueError, match="weighting='content' is gone"):
        RdAkf("resnet18", weighting="content", **parts)
    with pytest.warns(FutureWarning, match="weighting has no effect"):
        model = RdAkf("resnet18", weighting="position", **parts)
    with pytest.raises(ValueError, match="weighting='content' is gone"):
        model.on_load_checkpoint({"state_dict": {}, "hyper_parameters": {"weighting": "content"}})


def test_a_checkpoint_of_a_former_version_keeps_its_fusion(tmp_path: Path) -> None:
    """Saved anew, it says the same; one that does not fit for another reason changes nothing."""
    packed = Path(__file__).parents[2] / "old_files" / "rd_akf.ckpt.xz"
    path = tmp_path / "old.ckpt"
    path.write_bytes(lzma.decompress(packed.read_bytes()))
    model = RdAkf.load_from_checkpoint(path).eval()
    assert len(model.configure_optimizers().param_groups) == 1
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"] = model.state_dict()
    torch.save(checkpoint, path)
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(RdAkf.load_from_checkpoint(path).eval()(images).anomaly_map, model(images).anomaly_map)
    other = RdAkf("resnet34", pre_trained=False, visualizer=False)
    fusion = other.model.fusion
    with pytest.raises(ValueError, match="does not fit this RdAkf"):
        other.on_load_checkpoint(checkpoint)
    assert other.model.fusion is fusion
