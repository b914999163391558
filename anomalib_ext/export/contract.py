# SPDX-License-Identifier: Apache-2.0
"""What a model and its bundle agree on: names, parts, and the description of images and scores."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from numpy.typing import NDArray
from torch import nn
from torchvision.transforms.v2 import Compose, Normalize, Resize, Transform

from anomalib_ext import __version__

if TYPE_CHECKING:
    import openvino as ov

# Names in the graphs.
INPUT, EMBEDDING = "input", "embedding"
OUTPUTS = ("pred_score", "pred_label", "anomaly_map", "pred_mask")
# OpenVINO computes in bfloat16 where the processor can, which changes scores in the second digit.
PRECISION_HINT = "f32"


@dataclass
class BundleContent:
    """What a model brings to its bundle.

    Attributes:
        graph: Gives the outputs by name, for images `(B, 3, H, W)` in [0, 1], or for their embedding.
        features: Gives the `embedding` by that name for such images, if there is something to learn on the edge.
        tables: What learning changes, by the name of the constant: the name of the buffer of `graph` that it takes the
            place of, and its values.
        files: Contents of further files by name.
        metadata: Further entries of `metadata.json`.
    """

    graph: nn.Module
    features: nn.Module | None = None
    tables: Mapping[str, tuple[str, NDArray[Any]]] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)


class WholeGraph(nn.Module):
    """A model with its pre- and post-processor, from images of shape `(B, 3, H, W)` in [0, 1] to outputs by name.

    Maps are as large as the images: what a pre-processor crops from these is normal in them.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Score images."""
        outputs = {name: value for name, value in self.model(images)._asdict().items() if value is not None}
        for name in {"anomaly_map", "pred_mask"} & outputs.keys():
            height, width = (a - b for a, b in zip(images.shape[-2:], outputs[name].shape[-2:], strict=True))
            if height or width:
                left, top = round(width / 2), round(height / 2)  # as torchvision crops
                outputs[name] = nn.functional.pad(outputs[name], (left, width - left, top, height - top))
        return outputs


def image_size(model: AnomalibModule, input_size: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of the images that a bundle is made for.

    Args:
        model: Model whose pre-processor may resize.
        input_size: What the user asked for.

    Raises:
        ValueError: If neither says it.
    """
    if input_size is not None:
        height, width = input_size
        return height, width
    for transform in _transforms(model):
        if isinstance(transform, Resize) and transform.size is not None and len(transform.size) == 2:
            height, width = transform.size
            return height, width
    msg = (
        "The size of the images is not known, and an edge bundle is made for one size: give input_size=(height, width) "
        "to the export, or a pre-processor with Resize((height, width)) to the model."
    )
    raise ValueError(msg)


def _transforms(model: AnomalibModule) -> list[Transform]:
    """The pre-processor's transforms, in order."""
    transform = getattr(model.pre_processor, "transform", None)
    return list(transform.transforms) if isinstance(transform, Compose) else [transform] if transform else []


def common_metadata(model: AnomalibModule, size: tuple[int, int]) -> dict[str, Any]:
    """Entries of `metadata.json` that every model has: how it takes images, and how it decides on scores.

    Args:
        model: Model with its pre- and post-processor.
        size: Height and width of the images.
    """
    normalize = next((t for t in _transforms(model) if isinstance(t, Normalize)), None)
    processor = model.post_processor if isinstance(model.post_processor, PostProcessor) else None
    last = {
        kind: [_number(getattr(processor, f"{kind}_{name}", None)) for name in ("threshold", "min", "max")]
        for kind in ("image", "pixel")
    }
    return {
        "anomalib_ext": __version__,
        "model": type(model).__name__,
        "input_size": list(size),
        "mean": [float(value) for value in normalize.mean] if normalize else [0.0] * 3,
        "std": [float(value) for value in normalize.std] if normalize else [1.0] * 3,
        "precision_hint": PRECISION_HINT,
        "last_values": last,
        "normalization": bool(getattr(processor, "enable_normalization", False)),
        "thresholding": bool(getattr(processor, "enable_thresholding", False)),
        "image_sensitivity": float(getattr(processor, "image_sensitivity", 0.5)),
        "pixel_sensitivity": float(getattr(processor, "pixel_sensitivity", 0.5)),
        "variants": [],
    }


def _number(value: torch.Tensor | None) -> float | None:
    """A number for JSON, which knows no NaN."""
    number = math.nan if value is None else float(value)
    return number if math.isfinite(number) else None


def describe_to_model_api(graph: "ov.Model", size: tuple[int, int]) -> None:
    """Tell Intel's ModelAPI how to bring an image, which it holds in BGR and 8 bits, into the graph."""
    height, width = size
    description = {
        "model_type": "AnomalyDetection",
        "task": "segmentation",
        "labels": "Normal Anomaly",
        "image_threshold": "0.5",
        "pixel_threshold": "0.5",
        "normalization_scale": "1.0",
        "resize_type": "standard",
        "interpolation_mode": "LINEAR",
        "reverse_input_channels": "True",
        "scale_values": "255.0 255.0 255.0",
        "orig_height": str(height),
        "orig_width": str(width),
    }
    for name, value in description.items():
        graph.set_rt_info(value, ["model_info", name])
