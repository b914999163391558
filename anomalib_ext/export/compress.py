# SPDX-License-Identifier: Apache-2.0
"""Compression of a graph to FP16 or INT8, and the check of what it loses."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from anomalib.data import AnomalibDataModule
from anomalib.deploy import CompressionType
from numpy.typing import NDArray
from torchmetrics.functional.classification import binary_auroc, binary_f1_score
from torchvision.transforms.v2.functional import resize

from openvino_export.device import core, telemetry_hidden

from .contract import PRECISION_HINT

if TYPE_CHECKING:
    import openvino as ov

logger = logging.getLogger(__name__)

# As many as NNCF looks at by default.
CALIBRATION_IMAGES = 300


def compress_graph(graph: "ov.Model", compression: CompressionType, images: list[NDArray[np.float32]]) -> "ov.Model":
    """A graph with its weights in less precision, and for quantisation its activations too.

    Args:
        graph: Graph from images on.
        compression: Kind of compression.
        images: Calibrate the quantisation, each of shape `(1, 3, H, W)`; not used for `FP16` and `INT8`.
    """
    if compression is CompressionType.FP16:
        return _to_half_precision(graph)
    with telemetry_hidden():
        import nncf

    if compression is CompressionType.INT8:
        return nncf.compress_weights(graph.clone(), mode=nncf.CompressWeightsMode.INT8_SYM)
    # What pools and joins the layers is cheap, and would press all layers into the range of the largest.
    kept = nncf.IgnoredScope(names=_sensitive_layers(graph), types=["AvgPool", "Interpolate", "Concat"], validate=False)
    return nncf.quantize(
        graph,
        nncf.Dataset(images),
        preset=nncf.QuantizationPreset.MIXED,  # closer to the embedding in float32 than the default
        subset_size=len(images),
        ignored_scope=kept,
    )


def _to_half_precision(graph: "ov.Model") -> "ov.Model":
    import openvino as ov

    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        ov.save_model(graph, path, compress_to_fp16=True)
        # From memory, since a file that is mapped cannot be removed everywhere.
        return core().read_model(path.read_bytes(), path.with_suffix(".bin").read_bytes())


def _sensitive_layers(graph: "ov.Model") -> list[str]:
    """Names of the convolutions that stay in float: the first one and the depthwise ones.

    They have few weights for each output, so that their rounding does not average out. Alone, the first two layers of
    tf_efficientnet_lite0 move the embedding by 16 and 26 %, each of the next ten by 1 to 4 %.
    """
    convolutions = [node for node in graph.get_ordered_ops() if node.get_type_name().endswith("Convolution")]
    # Weights of groups have the shape (groups, outputs of each, inputs of each, height, width).
    depthwise = [
        node
        for node in convolutions
        if node.get_type_name() == "GroupConvolution" and node.input(1).get_partial_shape().to_shape()[1:3] == [1, 1]
    ]
    return [node.get_friendly_name() for node in [*convolutions[:1], *depthwise]]


def calibration_images(datamodule: AnomalibDataModule, size: tuple[int, int]) -> list[NDArray[np.float32]]:
    """Normal images, spread over the training set.

    Args:
        datamodule: Its training set.
        size: Height and width of the images.

    Returns:
        At most :data:`CALIBRATION_IMAGES`, each of shape `(1, 3, H, W)`.

    Raises:
        ValueError: If there are none.
    """
    datamodule.setup()
    items = datamodule.train_data
    count = min(len(items), CALIBRATION_IMAGES)
    if not count:
        msg = "The datamodule has no training images, which the quantisation is to be calibrated with."
        raise ValueError(msg)
    return [_resized_image(items[int(i)], size) for i in np.linspace(0, len(items) - 1, count)]


def _resized_image(item: Any, size: tuple[int, int]) -> NDArray[np.float32]:  # noqa: ANN401  # of any data set
    """Image of an item, as the graph takes it, shape `(1, 3, H, W)`."""
    return resize(item.image[None], list(size), antialias=True).numpy()


def compare_accuracy(
    reference: Path,
    compressed: Path,
    datamodule: AnomalibDataModule,
    size: tuple[int, int],
    max_drop: float,
    name: str,
) -> dict[str, dict[str, float]]:
    """Accuracy of a model before and after compression, on the test images.

    Args:
        reference: Graph before compression, as .xml file.
        compressed: Graph after compression, as .xml file.
        datamodule: Its test set.
        size: Height and width of the images.
        max_drop: Largest loss of a figure; one decision may always change.
        name: Name of the compressed precision.

    Returns:
        Image AUROC and F1 of `FP32` and `name`, by metric; of images of one kind, the share of equal decisions.

    Raises:
        ValueError: If it lost more than `max_drop`, or there is nothing to compare.
    """
    datamodule.setup()
    items = datamodule.test_data
    if not len(items):
        msg = f"The datamodule has no test images, which {name} is to be compared with FP32 on."
        raise ValueError(msg)
    scores, decisions, labels = _score({"FP32": reference, name: compressed}, items, size)
    figures = _accuracy(scores, decisions, labels)
    if not figures:
        msg = f"Without normal and anomalous test images, {name} cannot be compared with FP32."
        raise ValueError(msg)
    text = ", ".join(f"{metric} {value[name]:.4f} (FP32: {value['FP32']:.4f})" for metric, value in figures.items())
    logger.info("%s on %d test images: %s", name, len(labels), text)
    # Among few images a single decision is more than any sensible `max_drop`, and says nothing: it is not counted.
    changed = sum(one != other for one, other in zip(decisions[name], decisions["FP32"], strict=True))
    counted = [value for metric, value in figures.items() if metric == "image_AUROC" or changed > 1]
    # `not <=`, so that NaN is refused as well
    if any(not value["FP32"] - value[name] <= max_drop for value in counted):
        msg = (
            f"{name} loses more than max_drop={max_drop} on {len(labels)} test images: {text}. Nothing was written. "
            "Export without compression or as FP16, calibrate with more images, or allow a larger max_drop."
        )
        raise ValueError(msg)
    return figures


def _score(
    paths: Mapping[str, Path],
    items: Iterable[Any],
    size: tuple[int, int],
) -> tuple[dict[str, list[float]], dict[str, list[bool]], list[bool]]:
    """Scores and decisions of each graph, and the labels; there are no decisions if a graph makes none."""
    graphs = {
        name: core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": PRECISION_HINT})
        for name, path in paths.items()
    }
    scores: dict[str, list[float]] = {name: [] for name in graphs}
    decisions: dict[str, list[bool]] = {name: [] for name in graphs}
    labels = []
    for item in items:
        image = _resized_image(item, size)
        labels.append(bool(item.gt_label))
        for name, graph in graphs.items():
            result = graph(image)
            scores[name].append(float(result["pred_score"].item()))
            if any("pred_label" in output.names for output in graph.outputs):
                decisions[name].append(bool(result["pred_label"].item()))
    return scores, decisions, labels


def _accuracy(
    scores: Mapping[str, list[float]],
    decisions: Mapping[str, list[bool]],
    labels: list[bool],
) -> dict[str, dict[str, float]]:
    """What can be compared, by metric and graph."""
    truth = torch.tensor(labels).int()
    figures = {}
    if 0 < truth.sum() < len(truth):
        figures["image_AUROC"] = {name: float(binary_auroc(torch.tensor(own), truth)) for name, own in scores.items()}
        if all(decisions.values()):
            f1 = {name: float(binary_f1_score(torch.tensor(own).int(), truth)) for name, own in decisions.items()}
            figures["image_F1Score"] = f1
    elif all(decisions.values()):  # of one kind of images, only the decisions can be compared
        equal = {name: float(np.mean(np.equal(own, decisions["FP32"]))) for name, own in decisions.items()}
        figures["equal decisions"] = equal
    return figures
