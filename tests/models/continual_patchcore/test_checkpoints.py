# SPDX-License-Identifier: Apache-2.0
"""Tests of checkpoints and copies: what is saved comes back, and what does not fit is refused as a whole."""

import copy
import functools
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.models import Patchcore
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from anomalib_ext.models import ContinualPatchCore
from openvino_export.memory import update

Make = Callable[..., Any]
Trained = tuple[ContinualPatchCore, Path]


def test_loads_into_a_model_of_default_arguments(
    trained_default: Trained, files: Make, tensors: Make, state_of: Make
) -> None:
    """By ``torch.load`` without code, though the memory has another size; learning goes on from there."""
    before, path = trained_default
    model = ContinualPatchCore()
    model.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    assert model.model.bank.size == 400
    assert state_of(model) == state_of(before)
    loaded = ContinualPatchCore.load_from_checkpoint(path).eval()
    images = tensors("dots", "test/hole")
    assert torch.equal(loaded(images).pred_score, before(images).pred_score)
    assert loaded.partial_fit(files("checks")).variants == {"variant_1": 20}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"backbone": "resnet10t", "layers": ["layer1"]},
            r"backbone 'test_resnet', this model has 'resnet10t'",
        ),
        ({"layers": ["layer1"]}, r"layers \['layer2'\], this model has \['layer1'\]"),
    ],
)
def test_a_checkpoint_of_another_backbone_is_refused(
    kwargs: dict[str, Any],
    message: str,
    trained: Trained,
    files: Make,
    make_tiny: Make,
    make_data: Make,
    make_engine: Make,
    state_of: Make,
) -> None:
    """The message says what differs, and nothing is taken over."""
    model = make_tiny(**kwargs, pre_processor=ContinualPatchCore.configure_pre_processor((32, 32)))
    model.partial_fit(files("stripes")[:2])
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        make_engine().fit(model, datamodule=make_data("dots"), ckpt_path=trained[1])
    with pytest.raises(ValueError, match=message):
        model.load_state_dict(torch.load(trained[1], weights_only=True)["state_dict"])
    assert state_of(model) == before
    assert model.pre_processor.transform.transforms[0].size == [32, 32]


def test_a_checkpoint_of_another_model_is_refused(model: ContinualPatchCore, state_of: Make) -> None:
    """Both when it is loaded as a checkpoint and as a state."""
    other = Patchcore("resnet10t", ["layer1"], pre_trained=False)
    before = state_of(model)
    for load in (lambda state: model.on_load_checkpoint({"state_dict": state}), model.load_state_dict):
        with pytest.raises(ValueError, match=r"not of ContinualPatchCore.* has \d+ tensors, such as \['_is_fitted"):
            load(other.state_dict())
    assert state_of(model) == before


def test_a_damaged_file_changes_nothing(
    model: ContinualPatchCore,
    trained: Trained,
    tmp_path: Path,
    make_data: Make,
    make_engine: Make,
    state_of: Make,
) -> None:
    """Whether it is cut off, or empty."""
    before = state_of(model)
    content = trained[1].read_bytes()
    for part in (content[: len(content) // 2], b""):
        path = tmp_path / "damaged.ckpt"
        path.write_bytes(part)
        with pytest.raises((ValueError, EOFError)):
            make_engine().fit(model, datamodule=make_data("checks"), ckpt_path=path)
        assert state_of(model) == before


@pytest.mark.parametrize("fault", ["missing", "shape", "nan", "count", "schema"])
def test_a_state_that_does_not_fit_changes_nothing(
    fault: str,
    model: ContinualPatchCore,
    files: Make,
    begin_update: Make,
    state_of: Make,
) -> None:
    """Bank and weights of two states are never mixed, and an update that is under way remains."""
    state = copy.deepcopy(model.state_dict())
    model.partial_fit(files("checks", "test/good")[:2])
    for parameter in model.parameters():
        parameter.data.mul_(1.01)
    begin_update(model)
    before, learning = state_of(model), model.model.update
    weights = [name for name in state if name.endswith("weight")]
    if fault == "missing":
        del state[weights[-1]]
    elif fault == "shape":
        state[weights[-1]] = state[weights[-1]][1:]
    elif fault == "nan":
        state["model._extra_state"]["tensors"]["vectors"][3, 5] = torch.nan
    elif fault == "count":
        state["model._extra_state"]["tensors"]["radii"] = torch.ones(3)
    else:
        state["model._extra_state"]["plain"]["schema_version"] = 99
    with pytest.raises((RuntimeError, ValueError)):
        model.load_state_dict(state)
    assert state_of(model) == before
    assert model.model.update is learning


def test_a_checkpoint_in_the_middle_of_an_update(
    trained_default: Trained,
    begin_update: Make,
    files: Make,
    tensors: Make,
    make_model: Make,
    state_of: Make,
) -> None:
    """What is judged by it has all images so far; what goes on from it ends as if there had been no checkpoint."""
    model, interrupted, again = copy.deepcopy(trained_default[0]), make_model().eval(), make_model()
    begin_update(model)
    interrupted.load_state_dict(copy.deepcopy(model.state_dict()))
    assert list(interrupted.model.bank.variants) == ["stripes", "dots", "checks"]
    assert not interrupted(tensors("checks", "test/good")).pred_label.all(), "there is a threshold already"
    assert interrupted(tensors("checks", "test/hole")).pred_label.all()
    assert list(model.model.bank.variants) == ["stripes", "dots"], "saving changes nothing"
    again.load_state_dict(copy.deepcopy(interrupted.state_dict()))  # nor does loading, or judging
    for each in (model, again):
        each.partial_fit(files("checks")[12:], "checks")
        assert each.model.bank.variants["checks"].images == 20
    assert state_of(again) == state_of(model)
    interrupted.rename_variant("checks", "chess")  # ends the update
    assert interrupted.partial_fit(files("checks"), "chess").variants == {"chess": 8}


@pytest.mark.parametrize("val_split_mode", ["same_as_test", "none"])
def test_a_fit_that_was_killed_ends_as_one_that_was_not(
    val_split_mode: str,
    make_tiny: Make,
    make_data: Make,
    make_engine: Make,
    state_of: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the same seed, from a checkpoint that was written in the middle of the epoch."""
    monkeypatch.setattr(update, "SMALLEST_POOL", 500)
    model = make_tiny(memory_size=200)
    make_engine().fit(model, datamodule=make_data("dots"))
    uninterrupted, killed, later = model, copy.deepcopy(model), make_tiny(memory_size=200)
    saving = ModelCheckpoint(every_n_train_steps=1, save_top_k=-1)
    make_stripes = functools.partial(make_data, "stripes", train_batch_size=4, val_split_mode=val_split_mode)
    seed_everything(1)
    make_engine().fit(uninterrupted, datamodule=make_stripes())
    seed_everything(1)
    with pytest.raises(RuntimeError, match="killed"):
        make_engine(callbacks=[saving, _Kill()]).fit(killed, datamodule=make_stripes())
    seed_everything(1)
    make_engine().fit(later, datamodule=make_stripes(), ckpt_path=saving.best_model_path)
    assert (later.last_report.variants, later.last_report.known_images) == ({"stripes": 20}, 12)
    assert state_of(later) == state_of(uninterrupted)


class _Kill(Callback):
    """Stops a fit after three batches."""

    def on_train_batch_start(  # noqa: PLR6301
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Stop."""
        del trainer, pl_module, batch
        if batch_idx == 3:
            msg = "killed"
            raise RuntimeError(msg)


def test_copies(model: ContinualPatchCore, files: Make, begin_update: Make, state_of: Make) -> None:
    """Copied or pickled, in the middle of an update too, a model is the same, and independent."""
    begin_update(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), torch.load(buffer, weights_only=False)]
    before = state_of(model)
    for other in copies:
        assert state_of(other) == before
        report = other.partial_fit(files("dots", "test/good"), variant="dots")
        assert report.variants == {"checks": 12, "dots": 6}
        assert len(other.model.bank.variants) == 3
    assert state_of(model) == before


def test_half_precision(make_tiny: Make, make_data: Make, make_engine: Make, tensors: Make, state_of: Make) -> None:
    """A bank of float16 takes half the bytes, scores the same up to rounding, and comes back as it was."""
    models = {}
    for precision in ("float32", "float16"):
        models[precision] = make_tiny(precision=precision)
        engine = make_engine()
        torch.manual_seed(0)  # the loader shuffles
        engine.fit(models[precision], datamodule=make_data("stripes"))
        models[precision].eval()
    half, single = models["float16"], models["float32"]
    assert half.model.memory_bank.dtype == torch.float16
    assert half.model.memory_bank.nbytes * 2 == single.model.memory_bank.nbytes
    vectors = [model.state_dict()["model._extra_state"]["tensors"]["vectors"].nbytes for model in (half, single)]
    assert vectors[0] * 2 == vectors[1]
    images = torch.cat([tensors("stripes", f"test/{kind}") for kind in ("good", "hole")])
    scores = [model.model(model.pre_processor(images)).pred_score for model in (half, single)]
    assert torch.allclose(*scores, rtol=5e-3)
    loaded = ContinualPatchCore.load_from_checkpoint(engine.best_model_path).eval()
    assert state_of(loaded) == state_of(half)
    assert torch.equal(loaded(images).pred_score, half(images).pred_score)


def test_mixed_precision(make_tiny: Make, make_data: Make, make_engine: Make) -> None:
    """The backbone may run in bfloat16, the search does not."""
    model, engine = make_tiny(), make_engine(precision="bf16-mixed")
    engine.fit(model, datamodule=make_data("stripes"))
    assert model.model.memory_bank.dtype == torch.float32
    assert engine.test(model, datamodule=make_data("stripes"))[0]["image_F1Score"] > 0.9


# Former arguments


@pytest.mark.parametrize("name", ["few_shot_views", "one_shot"])
def test_former_arguments_have_no_effect(name: str, make_tiny: Make) -> None:
    """They are named in a warning; without them there is none."""
    with pytest.warns(FutureWarning, match="few_shot_views and one_shot have no effect"):
        make_tiny(**{name: True})
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        make_tiny()


def test_a_checkpoint_that_has_a_former_argument(trained: Trained, tmp_path: Path, state_of: Make) -> None:
    """It is loaded all the same."""
    checkpoint = torch.load(trained[1], weights_only=True)
    checkpoint["hyper_parameters"]["one_shot"] = False
    torch.save(checkpoint, tmp_path / "old.ckpt")
    with pytest.warns(FutureWarning, match="few_shot_views"):
        loaded = ContinualPatchCore.load_from_checkpoint(tmp_path / "old.ckpt")
    assert state_of(loaded) == state_of(trained[0])


def test_the_false_alarm_rate_of_a_checkpoint(trained: Trained, make_tiny: Make) -> None:
    """It is kept, unless another one is asked for."""
    model = copy.deepcopy(trained[0])
    model.set_decision(false_alarm_rate=0.1)
    state = copy.deepcopy(model.state_dict())
    for asked, expected in ((None, 0.1), (0.005, 0.005)):
        other = make_tiny(**({} if asked is None else {"false_alarm_rate": asked}))
        other.load_state_dict(copy.deepcopy(state))
        assert other.model.bank.false_alarm_rate == expected
    before = model.post_processor.image_values[:, 0]
    assert (other.post_processor.image_values[:, 0] > before).all(), "a lower rate has higher thresholds"


def test_what_was_set_survives_loading(trained: Trained, make_tiny: Make) -> None:
    """Also into a model that was made with the rate that the first one was made with."""
    model = make_tiny(false_alarm_rate=0.02)
    model.load_state_dict(copy.deepcopy(trained[0].state_dict()))
    model.set_decision(false_alarm_rate=0.1)
    model.set_decision("stripes", threshold=5.0)
    other = make_tiny(false_alarm_rate=0.02)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert other.model.bank.false_alarm_rate == pytest.approx(0.1)
    assert float(other.post_processor.image_values[0, 0]) == pytest.approx(5)


def test_the_memory_size_of_a_checkpoint(trained: Trained, make_tiny: Make) -> None:
    """It is kept, unless another one is asked for: a larger one leaves room, a smaller one is cut."""
    bank = trained[0].model.bank
    for asked, size, vectors in (
        (None, bank.size, len(bank)),
        (2 * bank.size, 2 * bank.size, len(bank)),
        (20, 20, 20),
    ):
        model = make_tiny(memory_size=asked)
        model.load_state_dict(trained[0].state_dict())
        assert (model.model.bank.size, len(model.model.bank)) == (size, vectors)
        assert len(model.model.memory_bank) == size
    model.model.bank = model.model.bank.with_size(33)  # set since: lasts over a load by one that asks for the same
    again = make_tiny(memory_size=20)
    again.load_state_dict(model.state_dict())
    assert again.model.bank.size == 33
