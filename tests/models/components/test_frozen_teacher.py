# SPDX-License-Identifier: Apache-2.0
"""Tests of what models with frozen teachers share, in a trainer where a user meets it there."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import Folder, ImageBatch
from anomalib.models import ReverseDistillation
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from safetensors.torch import save_file

from anomalib_ext.models import HetNet, RdAkf
from anomalib_ext.models.components import frozen_teacher
from anomalib_ext.models.components.frozen_teacher import Teacher

Make = Callable[..., Any]

SIDE = 64


def make_rd(**kwargs: Any) -> RdAkf:  # noqa: ANN401
    """Return a small RdAkf with random teachers."""
    pre_processor = RdAkf.configure_pre_processor((SIDE, SIDE))
    defaults = {"backbone": "resnet18", "pre_trained": False, "pre_processor": pre_processor, "visualizer": False}
    return RdAkf(**{**defaults, **kwargs})


def make_het(**kwargs: Any) -> HetNet:  # noqa: ANN401
    """Return a small HetNet with random teachers."""
    return HetNet(**{
        "backbone": "resnet18",
        "transformer": "test_vit",
        "pre_trained": False,
        "transformer_pre_trained": False,
        "pre_processor": HetNet.configure_pre_processor((SIDE, SIDE)),
        "visualizer": False,
        **kwargs,
    })


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return two files with different weights of a ResNet-18."""
    paths = []
    for seed in range(2):
        torch.manual_seed(seed)
        paths.append(tmp_path_factory.mktemp("weights") / f"{seed}.safetensors")
        save_file(timm.create_model("resnet18").state_dict(), paths[-1])
    return paths


@pytest.fixture(scope="module")
def saved(weights: list[Path], make_data: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[RdAkf, Path]:
    """Return a model that was trained for a step, and its checkpoint without teachers."""
    from anomalib.engine import Engine

    model = make_rd(pre_trained=True, backbone_weights=weights[0], save_teachers=False)
    root = tmp_path_factory.mktemp("saved")
    engine = Engine(default_root_dir=root, max_steps=1, accelerator="cpu", enable_progress_bar=False)
    engine.fit(model, datamodule=make_data(train_batch_size=4))
    return model.eval(), Path(engine.best_model_path)


class Kill(Callback):
    """Ends the training in the middle of an epoch, as a kill would."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:  # noqa: ANN401
        """Fail."""
        del args
        if trainer.current_epoch == self.epoch:
            msg = "killed"
            raise KeyError(msg)


# Teachers


@pytest.mark.parametrize("make", [make_rd, make_het])
def test_gradients_reach_what_is_trained_and_nothing_else(make: Make) -> None:
    """Every trainable tensor has a gradient and is in the optimizer; teachers have none, and never move."""
    model = make(noise="randn") if make is make_het else make()
    frozen = {key: value.clone() for key, value in model.state_dict().items() if model._is_teachers(key)}
    assert any(key.endswith("running_mean") for key in frozen)
    model.train()
    teachers = [part for part in model.modules() if isinstance(part, Teacher)]
    assert teachers
    assert not any(part.training for teacher in teachers for part in teacher.modules())
    optimizer = model.configure_optimizers()
    model.training_step(ImageBatch(image=torch.rand(2, 3, SIDE, SIDE)), 0).backward()
    optimizer.step()
    optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        frozen_one = model._is_teachers(name)
        assert (parameter.grad is None) == frozen_one, name
        assert frozen_one or parameter.grad.abs().max() > 0, name
        assert (id(parameter) not in optimized) == frozen_one, name
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in frozen.items())


@pytest.fixture(autouse=True)
def _without_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have nothing logged where there is no trainer."""
    log = frozen_teacher.FrozenTeacherModule.log
    monkeypatch.setattr(
        frozen_teacher.FrozenTeacherModule,
        "log",
        lambda self, *args, **kwargs: log(self, *args, **kwargs) if self._trainer else None,
    )


# Training


@pytest.mark.parametrize("make", [make_rd, pytest.param(make_het, marks=pytest.mark.slow)])
def test_resuming_after_a_kill_gives_the_same_end(make: Make, make_data: Make, make_engine: Make) -> None:
    """Every tensor is the same as without the kill, whatever the seed of the second start."""
    kwargs = {"max_epochs": 2, "limit_train_batches": 2, "limit_val_batches": 1}
    data = make_data(train_batch_size=4)

    def seeded(seed: int) -> Any:  # noqa: ANN401
        torch.manual_seed(seed)
        model = make()
        if make is make_het:  # the state of Adam, which the other model has, would triple a large file
            model.configure_optimizers = lambda: torch.optim.SGD(model.trainable_parameters(), lr=0.01)
        return model

    whole = seeded(1)
    make_engine(**kwargs, callbacks=[ModelCheckpoint(save_top_k=0)]).fit(whole, datamodule=data)
    engine = make_engine(**kwargs, callbacks=[Kill(epoch=1)])
    with pytest.raises(KeyError, match="killed"):
        engine.fit(seeded(1), datamodule=data)
    resumed = seeded(2)
    # Afterwards this tests, and must not load, the checkpoint that it started from.
    make_engine(**kwargs).train(resumed, datamodule=data, ckpt_path=engine.trainer.checkpoint_callback.best_model_path)
    for (key, value), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(value, other), key


def test_loggers_early_stopping_and_the_best_checkpoint(make_data: Make, make_engine: Make, tmp_path: Path) -> None:
    """The loss is in the log and goes down; the best checkpoint is kept; training stops when it is good enough."""
    best = ModelCheckpoint(dirpath=tmp_path, filename="best", monitor="train_loss", auto_insert_metric_name=False)
    stop = EarlyStopping("train_loss", stopping_threshold=2.5, check_on_train_epoch_end=True)
    model = make_rd()
    model.configure_optimizers = lambda: torch.optim.Adam(model.trainable_parameters(), lr=1e-3)
    engine = make_engine(max_epochs=10, logger=CSVLogger(tmp_path), log_every_n_steps=1, callbacks=[best, stop])
    engine.fit(model, datamodule=make_data(train_batch_size=10))
    assert 1 <= engine.trainer.current_epoch < 10
    with (Path(engine.trainer.logger.log_dir) / "metrics.csv").open() as file:
        losses = [float(row["train_loss_step"]) for row in csv.DictReader(file) if row["train_loss_step"]]
    assert losses[-1] < losses[0] - 0.05
    assert Path(best.best_model_path) == tmp_path / "best.ckpt"


@pytest.mark.parametrize("make", [make_rd, make_het])
def test_mixed_precision_and_gradient_accumulation(make: Make, make_data: Make, make_engine: Make) -> None:
    """Both work together; two batches make one step; a last batch of one image is learned; grey images are judged."""
    model = make()
    before = [parameter.detach().clone() for parameter in model.trainable_parameters()]
    kwargs = {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "callbacks": [ModelCheckpoint(save_top_k=0)]}
    engine = make_engine(max_epochs=1, **kwargs)
    engine.fit(model, datamodule=make_data(train_batch_size=19))
    assert engine.trainer.global_step == 1
    after = [parameter.detach() for parameter in model.trainable_parameters()]
    assert all(torch.isfinite(each).all() for each in after)
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    if make is make_het:
        assert not model.model.noise.means, "the statistics are needed in training only"


# Checkpoints


def test_a_checkpoint_without_teachers_is_small_and_loads(
    saved: tuple[RdAkf, Path],
    make_data: Make,
    make_engine: Make,
) -> None:
    """It holds no tensor of a teacher, and gives the same scores; the size of the images comes with it."""
    model, path = saved
    keys = torch.load(path, weights_only=True)["state_dict"].keys()
    assert not any(key.startswith("model.teacher.") for key in keys)
    assert any(key.startswith("model.student.") for key in keys)
    loaded = RdAkf.load_from_checkpoint(path).eval()
    images = torch.rand(2, 3, SIDE, SIDE)
    assert torch.equal(loaded(images).anomaly_map, model(images).anomaly_map)
    (result,) = make_engine().test(loaded, datamodule=make_data(), ckpt_path=path)
    assert 0 <= result["image_AUROC"] <= 1


def test_a_checkpoint_of_other_teachers_is_refused(
    saved: tuple[RdAkf, Path],
    weights: list[Path],
    make_engine: Make,
    make_data: Make,
) -> None:
    """Of other weights, and of another backbone; nothing of it is taken over."""
    _, path = saved
    with pytest.raises(ValueError, match="other weights of theirs"):
        RdAkf.load_from_checkpoint(path, backbone_weights=weights[1])
    model = make_rd(backbone="resnet34")
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"does not fit this RdAkf.*backbone='resnet18' \(here 'resnet34'\)"):
        make_engine().test(model, datamodule=make_data(), ckpt_path=path)
    assert all(torch.equal(model.model.state_dict()[key], value) for key, value in before.items())


def test_a_checkpoint_of_another_model_is_refused(saved: tuple[RdAkf, Path]) -> None:
    """Of one of ours, and of Anomalib's reverse distillation."""
    with pytest.raises(ValueError, match="does not fit this HetNet"):
        make_het().on_load_checkpoint(torch.load(saved[1], weights_only=True))
    other = ReverseDistillation("resnet18", pre_trained=False)
    with pytest.raises(ValueError, match=r"does not fit this RdAkf: .* are missing.* are unknown"):
        make_rd().on_load_checkpoint({"state_dict": other.state_dict(), "hyper_parameters": dict(other.hparams)})


def test_random_teachers_must_be_saved() -> None:
    """They could not be made again."""
    for make in (make_rd, make_het):
        with pytest.raises(ValueError, match="random ones would be lost"):
            make(save_teachers=False)


# Bad input


@pytest.mark.parametrize("make", [make_rd, make_het])
def test_backbones_without_three_levels(make: Make) -> None:
    """They are refused before weights are looked for; so is an unknown one."""
    with pytest.raises(ValueError, match="'tf_efficientnet_lite0' has no three levels"):
        make(backbone="tf_efficientnet_lite0", pre_trained=True)
    with pytest.raises(ValueError, match=r"Unknown backbone 'resnet18\.unknown'"):
        make(backbone="resnet18.unknown")


def test_images_that_cannot_be_used() -> None:
    """NaN, one channel, no batch, another size: an error, and no statistics of batch normalisation have moved."""
    model = make_rd()
    model.train()
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    images = torch.rand(2, 3, SIDE, SIDE)
    images[1, 0, 5, 5] = torch.nan
    cases = {
        r"Images \[1\] of the batch hold NaN": images,
        r"shape \(B, 3, H, W\)": torch.rand(2, 1, SIDE, SIDE),
        r"Images must have the shape": torch.rand(3, SIDE, SIDE),
        "cannot mirror": torch.rand(2, 3, 70, SIDE),
    }
    for message, given in cases.items():
        with pytest.raises(ValueError, match=message):
            model.model(given)
    with pytest.raises(ValueError, match="batches have one image"):
        model.training_step(ImageBatch(image=torch.rand(1, 3, SIDE, SIDE)), 0)
    assert all(torch.equal(model.model.state_dict()[key], value) for key, value in before.items())


def test_bad_image_files(tmp_path: Path, make_engine: Make, caplog: pytest.LogCaptureFixture) -> None:
    """Grey images are learned as they are; one of 16 bits is refused; an unreadable one is named."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "good"
    folder.mkdir()
    for index in range(4):
        Image.fromarray(rng.integers(0, 255, (SIDE, SIDE), dtype=np.uint8)).save(folder / f"{index}.png")

    def fit(model: RdAkf) -> None:
        data = Folder("grey", tmp_path, "good", val_split_mode="none", test_split_mode="none", num_workers=0)
        make_engine(max_epochs=1).fit(model, datamodule=data)

    model = make_rd()
    fit(model)
    Image.fromarray(rng.integers(0, 2**16, (SIDE, SIDE)).astype(np.uint16)).save(folder / "deep.png")
    with pytest.raises(ValueError, match=r"deep.png has pixels of mode 'I;16'"):
        fit(model)
    (folder / "deep.png").write_bytes((folder / "0.png").read_bytes()[:500])
    with pytest.raises(OSError, match="truncated"):
        fit(model)
    assert "deep.png cannot be read as an image" in caplog.text
