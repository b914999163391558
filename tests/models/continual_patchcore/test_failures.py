# SPDX-License-Identifier: Apache-2.0
"""Tests of what cannot be learned or judged: it is refused with a reason, and nothing changes."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import Folder, ImageBatch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch.utils.data import DataLoader

from anomalib_ext.models import ContinualPatchCore
from anomalib_ext.models.continual_patchcore.post_processor import VariantPostProcessor
from openvino_export.memory import update

Make = Callable[..., Any]


@pytest.fixture(params=["committed", "interrupted", "under way"])
def known(request: pytest.FixtureRequest, begin_update: Make) -> ContinualPatchCore:
    """Return a model with what it knows at rest, or in an update of checks that a checkpoint or a copy was made in."""
    if request.param == "interrupted":
        return request.getfixturevalue("interrupted")
    model = request.getfixturevalue("model")
    if request.param == "under way":
        begin_update(model)
    return model


def fail_once(monkeypatch: pytest.MonkeyPatch, where: object, name: str, error: BaseException) -> None:
    """Have the next call of a function fail."""
    working = getattr(where, name)

    def failing(*_: object) -> None:
        monkeypatch.setattr(where, name, working)
        raise error

    monkeypatch.setattr(where, name, failing)


@pytest.mark.parametrize("fault", ["file", "thresholds", "last step"])
def test_a_failed_partial_fit_changes_nothing(
    fault: str,
    known: ContinualPatchCore,
    files: Make,
    state_of: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever fails, and however far it got: even when images of two products came before."""
    before, interrupted = state_of(known), known.model.interrupted
    images = [*files("checks", "test/good"), *files("stripes", "test/hole")]
    if fault == "file":
        with pytest.raises(FileNotFoundError, match=r"no image nowhere.png"):
            known.partial_fit([*images, "nowhere.png"])
    else:
        place = (update, "calibration_of") if fault == "thresholds" else (VariantPostProcessor, "refresh")
        fail_once(monkeypatch, *place, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            known.partial_fit(images)
    assert state_of(known) == before
    assert known.model.update is None
    assert interrupted is None or known.model.interrupted is interrupted
    report = known.partial_fit(images)
    on_their_way = sum(stream["images"] for stream in before["saved plain"]["streams"])
    assert (report.known_images, sum(report.variants.values())) == (0, len(images) + on_their_way)


@pytest.mark.parametrize("fault", ["image", "thresholds"])
def test_a_failed_fit_changes_nothing(
    fault: str,
    known: ContinualPatchCore,
    tensors: Make,
    make_engine: Make,
    make_data: Make,
    state_of: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nor does a fit of which the last batch cannot be learned, or that fails at its end; the next one works."""
    before, interrupted = state_of(known), known.model.interrupted
    images, error = [*tensors("checks")], ValueError
    if fault == "image":
        images.append(torch.full((3, 64, 64), torch.nan))
    else:
        error = MemoryError
        fail_once(monkeypatch, update, "calibration_of", MemoryError("NaN or memory"))
    loader = DataLoader(images, batch_size=7, collate_fn=lambda batch: ImageBatch(image=torch.stack(batch)))
    engine = make_engine()
    with pytest.raises(error, match="NaN"):
        engine.fit(known, train_dataloaders=loader)
    assert state_of(known) == before
    assert known.model.update is None
    assert interrupted is None or known.model.interrupted is interrupted
    engine.fit(known, datamodule=make_data("checks"))
    assert known.model.bank.variants["checks"].images == 20


def test_a_fit_that_fails_before_it_begins_changes_nothing(
    model: ContinualPatchCore,
    tensors: Make,
    make_engine: Make,
    make_data: Make,
) -> None:
    """Nor what came into the bank by another way before."""
    learning = update.Update(model.model.bank)
    learning.add(model.model.embed_arrays(tensors("checks")[:1].numpy())[0], "checks")
    learning.commit()
    model.model.bank = learning.bank
    with pytest.raises(FileNotFoundError):
        make_engine().fit(model, datamodule=make_data("checks"), ckpt_path="absent.ckpt")
    assert "checks" in model.model.bank.variants


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"layers": ["layer9"]}, r"Unknown layers \['layer9'\]"),
        ({"backbone": "resnet81"}, "Unknown backbone 'resnet81'"),
        ({"memory_size": 0}, "memory_size must be a whole number of at least 1 .*, got 0"),
        ({"memory_size": -5}, "memory_size must be a whole number of at least 1 .*, got -5"),
        ({"num_neighbors": 0}, "num_neighbors must be at least 1, got 0"),
        ({"false_alarm_rate": 0.0}, "false_alarm_rate must be above 0 and at most 0.5, got 0.0"),
        ({"false_alarm_rate": 0.7}, "false_alarm_rate must be above 0 and at most 0.5, got 0.7"),
        ({"precision": "int8"}, "precision must be 'float32' or 'float16', got 'int8'"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    """They are refused with a message that names them."""
    with pytest.raises(ValueError, match=message):
        ContinualPatchCore(**{"pre_trained": False, **kwargs})


def test_judging_before_learning(
    products: Path, tensors: Make, make_tiny: Make, make_engine: Make, tmp_path: Path
) -> None:
    """In whatever way it is tried."""
    model = make_tiny().eval()
    with pytest.raises(RuntimeError, match=r"memory bank is empty.* Learn normal images first"):
        model(tensors("stripes")[:1])
    with pytest.raises(RuntimeError, match="memory bank is empty"):
        make_engine().predict(model, data_path=products / "stripes" / "test")
    with pytest.raises(RuntimeError, match="memory bank is empty"):
        make_engine().export(model, "onnx", export_root=tmp_path)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full((1, 3, 64, 64), torch.nan), "image 1 holds NaN or infinite"),
        (torch.cat([torch.rand(1, 3, 64, 64), torch.full((1, 3, 64, 64), torch.inf)]), "image 2 holds NaN or infinite"),
        (torch.rand(1, 1, 64, 64), r"shape \(B, 3, H, W\), got torch.float32 of \(1, 1, 64, 64\)"),
        (torch.rand(3, 64, 64), r"got torch.float32 of \(3, 64, 64\)"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "got torch.uint8"),
        (torch.rand(1, 3, 64, 64) * 255, r"must lie in \[0, 1\], got .* to 25\d"),
        (torch.rand(1, 3, 64, 64) - 1, r"must lie in \[0, 1\], got -"),
        (torch.rand(1, 3, 1, 1), "image 1 has 1 x 1 pixels; at least 16 each way"),
        (torch.rand(1, 3, 64, 15), "image 1 has 15 x 64 pixels; at least 16 each way"),
        (torch.rand(0, 3, 64, 64), "no images to learn"),
        ([], "no images to learn"),
        ("absent.png", "There is no image absent.png"),
        ([torch.rand(3, 64, 64)], r"one tensor of shape \(B, 3, H, W\); got a list with Tensor in it"),
        (np.zeros((1, 3, 64, 64), np.float32), "got a list with ndarray in it"),
    ],
)
def test_bad_images(images: Any, message: str, model: ContinualPatchCore, state_of: Make) -> None:  # noqa: ANN401
    """Nothing of them is learned."""
    before = state_of(model)
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        model.partial_fit(images)
    assert state_of(model) == before


def write_bad_files(folder: Path) -> dict[str, str]:
    """Write images that cannot be learned; return the reason for each."""
    folder.mkdir(exist_ok=True)
    good = io.BytesIO()
    Image.new("RGB", (64, 64)).save(good, "png")
    (folder / "text.png").write_text("no image")
    (folder / "empty.png").touch()
    (folder / "cut.png").write_bytes(good.getvalue()[:-30])
    Image.new("RGB", (1, 1)).save(folder / "pixel.png")
    Image.fromarray(np.full((64, 64), 40_000, np.uint16)).save(folder / "deep.png")
    return {
        "text.png": "text.png cannot be read as an image: it is none of",
        "empty.png": "empty.png cannot be read as an image: it is none of",
        "cut.png": "cut.png cannot be read as an image",
        "pixel.png": "pixel.png has 1 x 1 pixels; at least 16",
        "deep.png": r"deep.png has pixels of mode 'I;16' \(more than 8 bits\)",
    }


def test_bad_files(model: ContinualPatchCore, files: Make, tmp_path: Path, state_of: Make) -> None:
    """Each is named with what is wrong with it, and nothing of the call is learned."""
    before = state_of(model)
    for name, message in write_bad_files(tmp_path).items():
        with pytest.raises(ValueError, match=message):
            model.partial_fit([files("checks")[0], tmp_path / name])
        assert state_of(model) == before


@pytest.mark.parametrize("name", ["pixel.png", "deep.png", "empty.png", "text.png", "cut.png"])
def test_bad_files_in_an_engine(
    name: str,
    model: ContinualPatchCore,
    make_engine: Make,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    state_of: Make,
) -> None:
    """Training and prediction refuse them too; where the error itself does not name the file, the log does."""
    write_bad_files(tmp_path)
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / name).rename(folder / name)
    before = state_of(model)
    data = Folder("bad", "folder", tmp_path, test_split_mode="none", val_split_mode="none", num_workers=0)
    for run in (
        lambda: make_engine().fit(model, datamodule=data),
        lambda: make_engine().predict(model, data_path=folder / name),
    ):
        caplog.clear()
        with pytest.raises((ValueError, OSError)) as raised:
            run()
        assert name in f"{raised.value}{caplog.text}"
    assert state_of(model) == before


def test_images_above_the_limit_of_pillow(
    model: ContinualPatchCore,
    make_data: Make,
    make_engine: Make,
    files: Make,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """They are learned and judged up to the limit of this package, whose variable is named; Pillow's is set back."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    make_engine().fit(model, datamodule=make_data("checks"))
    assert "checks" in model.model.bank.variants
    assert len(make_engine().predict(model, data_path=files("checks")[0])) == 1
    monkeypatch.setenv("ANOMALIB_EXT_LARGEST_IMAGE", "4000")  # Pillow refuses from twice that on
    with pytest.raises(ValueError, match=r"has 64 x 64 pixels, more than the 4,000 .*LARGEST_IMAGE to 4096"):
        make_engine().predict(model, data_path=files("checks")[0])
    monkeypatch.setenv("ANOMALIB_EXT_LARGEST_IMAGE", "1500")
    with pytest.raises(Image.DecompressionBombError):
        make_engine().predict(model, data_path=files("checks")[0])
    assert f"{files('checks')[0]} has 64 x 64 pixels, more than the 1,500" in caplog.text
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_an_empty_folder(model: ContinualPatchCore, make_engine: Make, tmp_path: Path, state_of: Make) -> None:
    """Anomalib says that it holds no images."""
    (tmp_path / "normal").mkdir()
    before = state_of(model)
    with pytest.raises(RuntimeError, match=r"Found 0 DirType.NORMAL images in"):
        make_engine().fit(model, datamodule=Folder("none", "normal", tmp_path, num_workers=0))
    assert state_of(model) == before


def test_nan_is_not_judged(model: ContinualPatchCore, tensors: Make) -> None:
    """The image is named by its place in the batch."""
    images = tensors("stripes")[:3].clone()
    images[1, 0, 5, 5] = torch.nan
    with pytest.raises(ValueError, match=r"Images \[1\] of the batch give scores that are not finite"):
        model(images)


@pytest.mark.parametrize("hold_back", [False, True])
def test_damaged_weights_learn_nothing(
    hold_back: bool, model: ContinualPatchCore, tensors: Make, state_of: Make
) -> None:
    """Images that they give NaN for are refused, also by the guard."""
    next(model.model.feature_extractor.parameters()).data.fill_(torch.nan)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"not finite|NaN or infinite"):
        model.partial_fit(tensors("stripes", "test/good"), "stripes", hold_back=hold_back)
    assert state_of(model) == before


class _Learns(Callback):
    """Has the model learn an image in the middle of a fit."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:  # noqa: PLR6301
        """Learn."""
        del trainer, args
        assert isinstance(pl_module, ContinualPatchCore)
        with pytest.raises(RuntimeError, match="A trainer is fitting this model"):
            pl_module.partial_fit(torch.rand(1, 3, 64, 64), "other")
        with pytest.raises(RuntimeError, match="A trainer is fitting this model"):
            pl_module.delete_variant("dots")


def test_a_fit_is_not_disturbed(model: ContinualPatchCore, make_data: Make, make_engine: Make) -> None:
    """In the middle of it, ``partial_fit`` is refused; when it has ended, it is not."""
    make_engine(callbacks=[_Learns()]).fit(model, datamodule=make_data("checks"))
    assert list(model.model.bank.variants) == ["stripes", "dots", "checks"]
    assert model.partial_fit(torch.rand(1, 3, 64, 64), "other").variants == {"other": 1}
