# SPDX-License-Identifier: Apache-2.0
"""Tests of the model in Anomalib's engine: fits, checkpoints and bad images."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import Folder
from anomalib.models import Padim
from lightning.pytorch import Callback
from PIL import Image

from anomalib_ext.models import ContinualPatchCore, SaCfaPatchCore

Make = Callable[..., Any]


def test_fit(fitted: tuple[SaCfaPatchCore, Path, float]) -> None:
    """One epoch gives a bank of the right size, and tells good from bad; no embeddings are left."""
    model, _, auroc = fitted
    patches = 20 * (64 // 4) ** 2  # 20 images, the shallower layer at stride 4
    assert model.model.memory_bank.shape == (int(patches * 0.05), model.model.embedding.dimension)
    assert model.model.embedding_store == []
    assert auroc > 0.9


def test_default_backbone_is_the_paper_s() -> None:
    """1536 channels of two layers become 154, half of the deeper layer's channels have attention."""
    model = SaCfaPatchCore(pre_trained=False)
    assert model.model.embedding.out_dims == [512, 1024]
    assert model.model.embedding.dimension == 154
    assert model.model.embedding.attention_ratio == pytest.approx(0.5)
    assert model.coreset_sampling_ratio == pytest.approx(0.01)


def test_a_second_fit_learns_anew(new_model: Make, make_data: Make, make_engine: Make) -> None:
    """The bank is then of the second product alone, as that of a new model."""
    model, fresh = new_model(), new_model()
    make_engine().fit(model, datamodule=make_data("dots"))
    engine = make_engine()
    for _ in range(2):  # the second time with the same trainer
        torch.manual_seed(0)
        engine.fit(model, datamodule=make_data("checks"))
    torch.manual_seed(0)
    make_engine().fit(fresh, datamodule=make_data("checks"))
    assert torch.allclose(model.model.memory_bank, fresh.model.memory_bank)


def test_validation_in_the_middle_of_an_epoch(new_model: Make, make_data: Make, make_engine: Make) -> None:
    """What came before it is not forgotten."""
    whole, halves = new_model(), new_model()
    for model, kwargs in ((whole, {}), (halves, {"val_check_interval": 1})):
        torch.manual_seed(0)
        make_engine(**kwargs).fit(model, datamodule=make_data("stripes"))
    assert torch.equal(whole.model.memory_bank, halves.model.memory_bank)


class _Stop(Callback):
    """Fails after the first batch."""

    def on_train_batch_end(self, *_) -> None:  # noqa: PLR6301
        """Fail."""
        msg = "power cut"
        raise RuntimeError(msg)


def test_a_failed_fit_changes_nothing(new_model: Make, make_data: Make, make_engine: Make) -> None:
    """The old bank judges on, also when it is validated next."""
    model = new_model()
    make_engine().fit(model, datamodule=make_data("stripes"))
    bank = model.model.memory_bank.clone()
    with pytest.raises(RuntimeError, match="power cut"):
        make_engine(callbacks=[_Stop()]).fit(model, datamodule=make_data("dots"))
    make_engine().validate(model, datamodule=make_data("stripes"))
    assert torch.equal(model.model.memory_bank, bank)


def test_checkpoint(
    fitted: tuple[SaCfaPatchCore, Path, float], new_model: Make, make_data: Make, make_engine: Make
) -> None:
    """Nothing in it is code, and a new model judges the same with it."""
    model, path, auroc = fitted
    checkpoint = torch.load(path, weights_only=True)
    loaded = SaCfaPatchCore.load_from_checkpoint(path, visualizer=False)
    assert torch.equal(loaded.model.memory_bank, model.model.memory_bank)
    assert torch.equal(loaded.model.squares, model.model.squares)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images).pred_score, model.eval()(images).pred_score)
    tested = make_engine().test(new_model(seed=2), datamodule=make_data("stripes"), ckpt_path=path, verbose=False)[0]
    assert tested["image_AUROC"] == auroc
    assert checkpoint["hyper_parameters"]["backbone"] == "test_resnet"


def test_a_checkpoint_brings_attention_and_groups(
    new_model: Make,
    make_data: Make,
    make_engine: Make,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A model made with other ratios takes those that the bank was made with, and says so."""
    model = new_model(attention_ratio=0.25, reduction_ratio=0.3, channel_seed=5)
    make_engine().fit(model, datamodule=make_data("stripes"))
    other = new_model(seed=2)
    other.load_state_dict(model.state_dict())
    assert "The checkpoint's attention_ratio 0.25 and 24 groups of channels are used, not 0.5 and 8" in caplog.text
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(other.eval()(images).anomaly_map, model.eval()(images).anomaly_map)


def test_foreign_checkpoints_are_refused(new_model: Make, make_data: Make, make_engine: Make, tmp_path: Path) -> None:
    """Of another model, backbone or layers; the model stays as it is. And ours is refused by others."""
    model = new_model()
    state = model.model.state_dict()
    before = {name: value.clone() for name, value in state.items() if isinstance(value, torch.Tensor)}
    continual = ContinualPatchCore(pre_trained=False, visualizer=False)
    padim = Padim("resnet18", ["layer1"], pre_trained=False, n_features=10)
    for foreign in (continual, padim):
        with pytest.raises(ValueError, match=r"The checkpoint is not of SaCfaPatchCore. It has \d+ tensors, such as"):
            model.load_state_dict(foreign.state_dict())
    for other, message in (
        (new_model(backbone="test_efficientnet", layers=["blocks.1", "blocks.2"]), "has backbone 'test_efficientnet'"),
        (new_model(layers=["layer2", "layer3"]), r"has layers \['layer2', 'layer3'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model.load_state_dict(other.state_dict())
    assert all(torch.equal(before[name], model.model.state_dict()[name]) for name in before)
    with pytest.raises(ValueError, match="The checkpoint is not of ContinualPatchCore"):
        continual.load_state_dict(model.state_dict())

    path = tmp_path / "padim.ckpt"
    torch.save({"state_dict": padim.state_dict(), "pytorch-lightning_version": "2.6.0"}, path)
    with pytest.raises(ValueError, match="The checkpoint is not of SaCfaPatchCore"):
        make_engine().test(model, datamodule=make_data("stripes"), ckpt_path=path)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"coreset_sampling_ratio": 0}, r"coreset_sampling_ratio must lie in \(0, 1\], got 0"),
        ({"coreset_sampling_ratio": 1.5}, r"coreset_sampling_ratio must lie in \(0, 1\], got 1.5"),
        ({"backbone": "resnet81"}, "Unknown backbone 'resnet81'"),
        ({"layers": ["layer2"]}, "two or more layers"),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    """They are refused with a message that names them."""
    with pytest.raises(ValueError, match=message):
        SaCfaPatchCore(**{"backbone": "test_resnet", "layers": ["layer1", "layer2"], "pre_trained": False, **kwargs})


@pytest.mark.parametrize("kind", ["truncated", "tiny", "deep"])
def test_bad_images_are_named(
    kind: str,
    new_model: Make,
    products: Path,
    make_engine: Make,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An image that cannot be learned ends the fit, and is named; nothing was learned."""
    folder = tmp_path / "good"
    folder.mkdir()
    for path in sorted((products / "dots/train/good").iterdir())[:4]:
        (folder / path.name).write_bytes(path.read_bytes())
    bad = folder / "bad.png"
    if kind == "truncated":
        bad.write_bytes((folder / "000.png").read_bytes()[:2000])
    else:
        Image.new("RGB" if kind == "tiny" else "I;16", (8, 8) if kind == "tiny" else (64, 64)).save(bad)
    model = new_model()
    data = Folder(
        "product",
        root=tmp_path,
        normal_dir="good",
        num_workers=0,
        test_split_mode="none",
        val_split_mode="none",
    )
    with pytest.raises((ValueError, OSError)) as error:
        make_engine().fit(model, datamodule=data)
    assert re.search(r"bad\.png", f"{error.value}{caplog.text}")
    assert len(model.model.memory_bank) == 0
