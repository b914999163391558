# SPDX-License-Identifier: Apache-2.0
"""Tests of Crr in a trainer: losses, stages, checkpoints."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from anomalib.data import ImageBatch, ImageItem
from anomalib.engine import Engine
from anomalib.models import ReverseDistillation
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import CenterCrop, Compose, Resize
from torchvision.tv_tensors import Image

from anomalib_ext.models import Crr
from anomalib_ext.models.crr import lightning_model
from anomalib_ext.models.crr.anomalous_batches import WithAnomalies
from anomalib_ext.models.crr.loss import repair_loss, segment_loss

Make = Callable[..., Any]
SIDE = 64


def make_crr(**kwargs: Any) -> Crr:  # noqa: ANN401
    """Return a small Crr with a random encoder, and stages of four steps."""
    defaults = {"pre_trained": False, "head_width": 8, "repair_steps": 4, "segment_steps": 4, "visualizer": False}
    pre_processor = Crr.configure_pre_processor((SIDE, SIDE), encoder="test_vit")
    return Crr(**{"encoder": "test_vit", "pre_processor": pre_processor, **defaults, **kwargs})


def digest(*modules: nn.Module) -> str:
    """Return a hash of parameters and buffers."""
    hashed = hashlib.sha256()
    for module in modules:
        for tensor in module.state_dict().values():
            hashed.update(tensor.numpy().tobytes())
    return hashed.hexdigest()


class Watch(Callback):
    """Notes after each step what there is of both stages; ends the training in an epoch, as a kill would."""

    def __init__(self, killed_in_epoch: int | None = None) -> None:
        self.killed_in_epoch = killed_in_epoch
        self.first: list[str] = []
        self.head: list[str] = []
        self.training: list[set[bool]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Crr, *args: Any) -> None:  # noqa: ANN401
        """Note."""
        del args
        model = pl_module.model
        self.first.append(digest(model.encoder, model.bottleneck, model.decoder))
        self.head.append(digest(model.head) if model.head else "")
        self.training.append({part.training for part in model.decoder.modules()})
        if trainer.current_epoch == self.killed_in_epoch:
            msg = "killed"
            raise KeyError(msg)


@pytest.fixture(scope="module")
def saved(make_data: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the checkpoint of a model that has learned the first stage alone."""
    root = tmp_path_factory.mktemp("saved")
    engine = Engine(default_root_dir=root, accelerator="cpu", enable_progress_bar=False, limit_val_batches=1)
    engine.fit(make_crr(stage="repair", repair_steps=2), datamodule=make_data(train_batch_size=4))
    return Path(engine.best_model_path)


# Losses


def test_repair_loss_is_mined_apart_for_each_term(monkeypatch: pytest.MonkeyPatch) -> None:
    """L_hm(e, d) + L_hm(e, d_a): both against the clean features, and what is easy counts a tenth within its term."""
    crr = make_crr()
    crr.model.steps = [500, 0]  # the easy share rises to 0.9 over 1000 steps
    encoded = [torch.randn(4, 8, 5, 5) for _ in range(2)]
    # those of anomalous images are further off, so that one quantile for both would not do
    leaves = [(e.repeat(2, 1, 1, 1)[:4] + torch.randn(4, 8, 5, 5)).requires_grad_() for e in encoded]
    with torch.no_grad():
        for e, leaf in zip(encoded, leaves, strict=True):
            leaf[2:] = e[:2] + 3 * torch.randn(2, 8, 5, 5)
    monkeypatch.setattr(crr.model, "reconstruct", lambda _: (encoded, [leaf * 1 for leaf in leaves]))
    loss = repair_loss(crr.model, torch.zeros(2, 3, SIDE, SIDE), torch.zeros(2, 3, SIDE, SIDE))
    loss.backward()

    expected = 0
    for e, leaf in zip(encoded, leaves, strict=True):
        for part in (leaf[:2], leaf[2:]):
            expected = expected + (1 - F.cosine_similarity(e[:2].flatten(1), part.flatten(1))).mean() / 2
    torch.testing.assert_close(loss, expected)
    for leaf, gradient, e in zip(leaves, torch.autograd.grad(expected, leaves), encoded, strict=True):
        for part in (slice(2), slice(2, 4)):
            distance = 1 - F.cosine_similarity(e[:2], leaf.detach()[part])
            easy = distance < distance.flatten().sort(descending=True).values[int(50 * 0.55) - 1]
            assert easy.sum() == 50 - int(50 * 0.55)
            factor = torch.where(easy, 0.1, 1.0)[:, None]
            torch.testing.assert_close(leaf.grad[part], gradient[part] * factor)


def test_segment_loss_is_the_focal_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean of -(1 - p_t)^2 log p_t, and the mask is enlarged before it is cut at a half."""
    crr = make_crr()
    logits = torch.randn(2, 2, 256, 256)
    monkeypatch.setattr(crr.model.head, "forward", lambda *_: logits)
    masks = torch.zeros(2, SIDE, SIDE, dtype=torch.uint8)
    masks[0, 10:30, 20:25] = 1
    masks[1, 40:, :7] = 1
    loss = segment_loss(crr.model, torch.rand(2, 3, SIDE, SIDE), masks)
    anomalous = F.interpolate(masks[:, None].float(), scale_factor=4, mode="bilinear")[:, 0] >= 0.5
    assert (anomalous.float().mean() - masks.float().mean()).abs() < 1e-3
    p_t = torch.where(anomalous, logits.softmax(1)[:, 1], logits.softmax(1)[:, 0])
    p_t = p_t + 1e-5 * (2 - 2 * p_t)  # labels and probabilities are smoothed
    torch.testing.assert_close(loss, (-((1 - p_t) ** 2) * p_t.log()).mean())


def test_optimizers() -> None:
    """Those of the paper; the schedule warms up for 100 steps, and ends at a tenth."""
    (first, second), (schedule,) = make_crr(repair_steps=10_000).configure_optimizers()
    group = first.param_groups[0]
    settings = {key: group[key] for key in ("betas", "weight_decay", "amsgrad", "eps", "clip_threshold")}
    expected = {"betas": (0.9, 0.999), "weight_decay": 1e-4, "amsgrad": True, "eps": 1e-10, "clip_threshold": 1.0}
    assert settings == expected
    assert [schedule.schedule[i] for i in (0, 99)] == [0, 2e-3]
    assert schedule.schedule[-1] == pytest.approx(2e-4, rel=1e-3)
    assert second.param_groups[0]["lr"] == pytest.approx(1e-4)
    assert second.param_groups[0]["betas"] == (0.9, 0.999)


# Data


class Brighten:
    """Stands for a synthesis: makes the upper half brighter by a number that depends on the seed."""

    def reseed(self, seed: int) -> None:
        """Take a seed."""
        self.seed = seed

    def __call__(self, image: torch.Tensor, image_path: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return image and mask."""
        assert image_path == "a.png"
        mask = torch.zeros(1, *image.shape[1:])
        mask[:, : image.shape[1] // 2] = 1
        return image + mask * (self.seed % 1000) / 1000, mask


def test_batches_with_anomalies() -> None:
    """The second half are the same images with anomalies, made on resized images; each batch has a seed of its own."""
    items = [ImageItem(image=Image(torch.rand(3, 40, 30)), image_path="a.png", gt_label=torch.tensor(0))] * 2
    collate = WithAnomalies(ImageBatch.collate, Resize((32, 16)), Brighten())
    torch.manual_seed(0)
    batch, other = collate(items), collate(items)
    assert batch.image.shape == (4, 3, 32, 16)
    assert batch.gt_mask.shape == (4, 32, 16)
    assert not batch.gt_mask[:2].any()
    assert torch.equal(batch.image[:2], Resize((32, 16))(torch.stack([item.image for item in items])))
    changed = (batch.image[2:] != batch.image[:2]).any(dim=1)
    assert torch.equal(changed, batch.gt_mask[2:].bool())
    assert changed.any()
    assert not torch.equal(batch.image[2:], other.image[2:])
    torch.manual_seed(0)
    assert torch.equal(collate(items).image, batch.image)
    # The model's pre-processor crops masks like images.
    PreProcessor(Compose([Resize((32, 16)), CenterCrop((20, 8))])).on_train_batch_start(None, None, batch, 0)
    assert batch.gt_mask.shape == (4, 20, 8)
    assert torch.equal((batch.image[2:] != batch.image[:2]).any(dim=1), batch.gt_mask[2:].bool())


# Stages


def test_two_stages_in_one_fit(make_data: Make, make_engine: Make) -> None:
    """The head waits in the first; in the second, it alone moves. Then the fit ends, and can be repeated."""
    model, data, watch = make_crr(), make_data(train_batch_size=8), Watch()
    before = digest(model.model.head)
    engine = make_engine(callbacks=[watch], check_val_every_n_epoch=2, log_every_n_steps=1)
    engine.fit(model, datamodule=data)
    assert model.model.steps == [4, 4]
    assert engine.trainer.global_step == 8
    assert len(set(watch.first[:4])) == 4
    assert len(set(watch.first[3:])) == 1
    assert set(watch.head[:4]) == {before}
    assert len(set(watch.head[3:])) == 5
    assert watch.training == [{True}] * 4 + [{False}] * 4
    assert not any(p.requires_grad or p.grad is not None for p in model.model.encoder.parameters())
    # The end is in the middle of the third epoch, and was saved and judged nevertheless.
    state = torch.load(engine.best_model_path, weights_only=True)
    assert state["state_dict"]["model._extra_state"].tolist() == [4, 4]
    assert torch.isfinite(model.post_processor.image_threshold)
    assert engine.trainer.check_val_every_n_epoch == 2
    assert "train_dataloader" not in vars(data)

    engine.fit(model, datamodule=data)  # anew, from the learned weights on
    assert model.model.steps == [4, 4]
    assert len(watch.first) == 16
    assert len(set(watch.first[8:12])) == 4
    assert len(set(watch.first[11:])) == 1


@pytest.mark.parametrize(("epoch", "workers"), [pytest.param(1, 1, marks=pytest.mark.slow), (3, 0)])
def test_resuming_in_either_stage_gives_the_same_end(
    epoch: int, workers: int, make_data: Make, make_engine: Make
) -> None:
    """Every tensor is the same as without the kill, whatever the seed of the second start; with workers, too."""
    kwargs = {"limit_train_batches": 2, "limit_val_batches": 1}
    data = make_data(train_batch_size=4, num_workers=workers)

    def seeded(seed: int) -> Crr:
        torch.manual_seed(seed)
        return make_crr()

    whole = seeded(1)
    make_engine(**kwargs).fit(whole, datamodule=data)
    engine = make_engine(**kwargs, callbacks=[Watch(epoch)])
    with pytest.raises(KeyError, match="killed"):
        engine.fit(seeded(1), datamodule=data)
    assert "train_dataloader" not in vars(data)
    resumed = seeded(2)
    path = engine.trainer.checkpoint_callback.best_model_path
    assert torch.load(path, weights_only=True)["state_dict"]["model._extra_state"].sum() == 2 * epoch
    # Afterwards this tests, and must not load, the checkpoint that it started from.
    make_engine(**kwargs).train(resumed, datamodule=data, ckpt_path=path)
    for (key, value), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(value, other), key


def test_the_stages_one_by_one(
    saved: Path, make_data: Make, make_engine: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """The second begins with what a checkpoint brings, in the command and in Python; not with nothing."""
    data = make_data(train_batch_size=8)
    with pytest.raises(ValueError, match="stage='segment' needs a model that has learned the first stage"):
        make_engine().fit(make_crr(stage="segment"), datamodule=data)
    first = Crr.load_from_checkpoint(saved)
    assert first.model.head is None
    assert first.hparams.stage == "repair"
    watch = Watch()
    resumed = make_crr(stage="segment", segment_steps=3)
    engine = make_engine(callbacks=[watch], limit_val_batches=1)
    engine.fit(resumed, datamodule=data, ckpt_path=saved)
    loaded = Crr.load_from_checkpoint(saved, stage="segment", segment_steps=2)
    make_engine(callbacks=[watch], limit_val_batches=1).fit(loaded, datamodule=data)
    parts = (first.model.encoder, first.model.bottleneck, first.model.decoder)
    assert set(watch.first) == {digest(*parts)}
    assert len(watch.first) == 3 + 2
    assert (resumed.model.steps, loaded.model.steps) == ([2, 3], [2, 2])
    again = make_crr(stage="segment", segment_steps=3)
    make_engine(limit_val_batches=1).fit(again, datamodule=data, ckpt_path=engine.best_model_path)
    assert "nothing is left to learn" in caplog.text


def test_repair_off(make_data: Make, make_engine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the first stage sees clean images only, and alone it makes no anomalies; another end is told."""
    seen = []
    monkeypatch.setattr(
        lightning_model,
        "repair_loss",
        lambda model, clean, anomalous: seen.append((len(clean), anomalous)) or repair_loss(model, clean, anomalous),
    )
    missing = {"texture_dir": "missing"}
    data = make_data(train_batch_size=10)
    alone = make_crr(stage="repair", repair=False, **missing)
    make_engine(limit_val_batches=1).fit(alone, datamodule=data)
    make_engine(limit_val_batches=1).fit(make_crr(repair=False), datamodule=data)
    assert seen == [(10, None)] * 8
    with pytest.raises(NotADirectoryError, match="texture folder missing"):
        make_engine().fit(make_crr(stage="repair", **missing), datamodule=data)


def test_it_ends_early(make_data: Make, make_engine: Make, caplog: pytest.LogCaptureFixture) -> None:
    """A limit of the user's holds; that the head has learned nothing is said, and judging goes without it."""
    model = make_crr()
    make_engine(max_steps=2, limit_val_batches=1).fit(model, datamodule=make_data())
    assert "ended in stage repair, after 2 and 0 of 4 and 4 steps" in caplog.text
    images = torch.rand(2, 3, SIDE, SIDE)
    before = model.eval()(images).pred_score
    nn.init.normal_(model.model.head.classify.bias)
    assert torch.equal(model(images).pred_score, before)
    model.model.steps = [2, 1]
    assert not torch.equal(model(images).pred_score, before)


def test_half_precision_is_refused(make_data: Make, make_engine: Make) -> None:
    """Gradients that are scaled would be clipped as they are."""
    with pytest.raises(ValueError, match="precision 16-true; use 32-true or bf16-mixed"):
        make_engine(precision="16-true").fit(make_crr(), datamodule=make_data(train_batch_size=4))


def test_bfloat16(make_data: Make, make_engine: Make) -> None:
    """Both stages learn in mixed precision."""
    model = make_crr(repair_steps=2, segment_steps=2)
    make_engine(precision="bf16-mixed", limit_val_batches=1).fit(model, datamodule=make_data(train_batch_size=4))
    assert model.model.steps == [2, 2]
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_several_processes_need_no_other_strategy(make_data: Make, make_engine: Make) -> None:
    """Plain ``ddp`` will do, though in each stage parameters go without gradients; one process fails alike."""
    model = make_crr(repair_steps=2, segment_steps=2)
    with mock.patch.dict(os.environ):
        engine = make_engine(strategy="ddp", devices=1, limit_val_batches=1)
        engine.fit(model, datamodule=make_data(train_batch_size=4))
        torch.distributed.destroy_process_group()
    assert model.model.steps == [2, 2]


# Checkpoints


def test_foreign_checkpoints(saved: Path) -> None:
    """Of another encoder, with another head, and of another model; nothing of them is taken over."""
    checkpoint = torch.load(saved, weights_only=True)
    other = make_crr(encoder="test_vit2")
    before = digest(other.model.bottleneck, other.model.decoder)
    with pytest.raises(ValueError, match=r"does not fit this Crr.*encoder='test_vit' \(here 'test_vit2'\)"):
        other.on_load_checkpoint(dict(checkpoint))
    assert digest(other.model.bottleneck, other.model.decoder) == before
    wide = make_crr(head_width=16)
    state = {"state_dict": wide.state_dict(), "hyper_parameters": dict(wide.hparams)}
    with pytest.raises(ValueError, match=r"have other shapes.*head_width=16 \(here 8\)"):
        make_crr().on_load_checkpoint(state)
    with pytest.raises(ValueError, match=r"are unknown, such as model.head.*stage='both' \(here 'repair'\)"):
        make_crr(stage="repair").on_load_checkpoint(state)
    foreign = ReverseDistillation("resnet18", pre_trained=False)
    with pytest.raises(ValueError, match=r"does not fit this Crr: .* are missing.* are unknown"):
        make_crr().on_load_checkpoint({"state_dict": foreign.state_dict(), "hyper_parameters": dict(foreign.hparams)})
    # which a name alone tells
    with pytest.raises(ValueError, match="another backbone"):
        make_crr(stage="repair").on_load_checkpoint(
            {**checkpoint, "hyper_parameters": {**checkpoint["hyper_parameters"], "encoder": "test_vit.r160_in1k"}},
        )


# Bad input


def test_bad_arguments() -> None:
    """They are refused before anything is loaded."""
    with pytest.raises(ValueError, match="stage must be 'both', 'repair' or 'segment', got 'first'"):
        make_crr(stage="first")
    with pytest.raises(ValueError, match="repair_steps and segment_steps must be 1 or more, got 0 and 4"):
        make_crr(repair_steps=0)
    with pytest.raises(ValueError, match="60 x 64 pixels cannot be cut"):
        make_crr(pre_processor=Crr.configure_pre_processor((60, 64), encoder="test_vit"))
    assert tuple(Crr(encoder="test_vit", pre_trained=False).input_size) == (448, 448)
    default = Crr.configure_pre_processor().transform.transforms
    assert (list(default[0].size), list(default[1].size)) == ([448, 448], [392, 392])


def test_bad_images_lose_nothing(make_data: Make, make_engine: Make) -> None:
    """A model that has learned keeps what it has, and how it judges."""

    class Spoil(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:  # noqa: ANN401, PLR6301
            """Make a pixel NaN."""
            del trainer, pl_module, batch_idx
            batch.image[0, 0, 3, 3] = torch.nan

    model = make_crr()
    model.model.steps = [4, 4]
    before = digest(model.model.bottleneck, model.model.decoder, model.model.head)
    with pytest.raises(ValueError, match=r"Images \[0\] of the batch hold NaN"):
        make_engine(callbacks=[Spoil()]).fit(model, datamodule=make_data())
    assert model.model.steps == [4, 4]
    assert digest(model.model.bottleneck, model.model.decoder, model.model.head) == before
    with pytest.raises(ValueError, match="fit it with a datamodule, not with dataloaders"):
        make_engine().fit(model, train_dataloaders=DataLoader([]))
