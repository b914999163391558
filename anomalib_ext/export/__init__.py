# SPDX-License-Identifier: Apache-2.0
"""Export of a model to OpenVINO as a bundle: a folder that an edge PC without torch inspects with, and learns on.

The folder holds the whole graph (`model.xml`, from images in [0, 1] to decisions), `metadata.json`, and whatever a
model adds. A model that learns on the edge is cut at its embedding: `features.xml` ends there, and what learning
changes are constants of the whole graph with fixed names, so that only their bytes in `model.bin` ever change.
"""

import logging
import math
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
from anomalib.data import AnomalibDataModule
from anomalib.deploy import CompressionType
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from numpy.typing import NDArray
from torch import nn
from torchmetrics.functional.classification import binary_auroc, binary_f1_score
from torchvision.transforms.v2 import Compose, Normalize, Resize, Transform
from torchvision.transforms.v2.functional import resize

from anomalib_ext import __version__
from openvino_export.bundle import folder as bundle
from openvino_export.bundle import ir
from openvino_export.device import core

if TYPE_CHECKING:
    import openvino as ov

logger = logging.getLogger(__name__)

INPUT, EMBEDDING = "input", "embedding"
# As many as NNCF looks at by default.
CALIBRATION_IMAGES = 300
# OpenVINO computes in bfloat16 where the processor can, which changes scores in the second digit.
PRECISION_HINT = "f32"
OUTPUTS = ("pred_score", "pred_label", "anomaly_map", "pred_mask")


@dataclass
class Bundle:
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
        """Judge images."""
        outputs = {name: value for name, value in self.model(images)._asdict().items() if value is not None}
        for name in {"anomaly_map", "pred_mask"} & outputs.keys():
            height, width = (a - b for a, b in zip(images.shape[-2:], outputs[name].shape[-2:], strict=True))
            if height or width:
                left, top = round(width / 2), round(height / 2)  # as torchvision crops
                outputs[name] = nn.functional.pad(outputs[name], (left, width - left, top, height - top))
        return outputs


class _WithInputs(nn.Module):
    """A graph with some buffers as inputs, so that no conversion folds, merges or transposes them away."""

    def __init__(self, graph: nn.Module, buffers: Iterable[str]) -> None:
        super().__init__()
        self.whole = graph  # `graph` is what torch.fx calls its own
        self.buffers_given = list(buffers)

    def forward(self, images: torch.Tensor, *tables: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the graph with these tables in place of its buffers."""
        return torch.func.functional_call(self.whole, dict(zip(self.buffers_given, tables, strict=True)), (images,))


@contextmanager
def _without_telemetry() -> Generator[None]:
    """Keep OpenVINO's converter and NNCF from reporting to Intel, which both do unasked.

    For each report they also fork this process, with all that it has in memory.
    """
    from openvino_telemetry.utils.sender import TelemetrySender

    with mock.patch.object(TelemetrySender, "send"):
        yield


@_without_telemetry()
def export_bundle(
    model: AnomalibModule,
    content: Callable[[Any, tuple[int, int]], Bundle],
    export_root: str | Path,
    input_size: tuple[int, int] | None = None,
    compression_type: CompressionType | None = None,
    datamodule: AnomalibDataModule | None = None,
    max_drop: float = 0.01,
    ov_kwargs: Mapping[str, Any] | None = None,
    onnx_kwargs: Mapping[str, Any] | None = None,
) -> Path:
    """Write the bundle of a model to `export_root/weights/openvino`.

    All is made and checked before the first file of an older bundle there is replaced; a kill leaves one of the two.

    Args:
        model: Model whose pre- and post-processor describe the images and the scores.
        content: Gives what the model brings, for images of a height and width.
        export_root: Folder of exports.
        input_size: Height and width of the images. Without them, `model.xml` takes images of any size, and resizes them
            to that of the pre-processor; with them, it also describes itself to Intel's ModelAPI.
        compression_type: `FP16` halves the bytes of the backbone's weights. `INT8_PTQ` and `INT8_ACQ` quantise the
            backbone except for its most sensitive layers, `INT8` its weights alone. What follows the embedding stays
            as it is.
        datamodule: Its normal training images calibrate the quantisation; with its test images, compressed and
            uncompressed model are compared. Needed for `INT8_PTQ` and `INT8_ACQ`.
        max_drop: Largest loss of image AUROC or F1 by compression; one decision may always change.
        ov_kwargs: Arguments of `openvino.convert_model`; `input`, a shape, fixes the batch size.
        onnx_kwargs: Arguments of `torch.onnx.export`.

    Returns:
        Path of `model.xml`.

    Raises:
        ValueError: If the size of the images is unknown, arguments do not fit, or compression loses more than allowed.
        ModuleNotFoundError: If OpenVINO, or NNCF where it is needed, is not installed.
    """
    import openvino as ov

    compression = CompressionType(compression_type) if compression_type else None
    quantised = compression in {CompressionType.INT8_PTQ, CompressionType.INT8_ACQ}
    if quantised and datamodule is None:
        msg = f"{compression} needs a datamodule: its normal images calibrate, its test images check what was lost."
        raise ValueError(msg)
    size = _image_size(model, input_size)
    brought = content(model, size)
    graph, features = _convert(brought, size, ov_kwargs or {}, onnx_kwargs or {})
    whole = _joined(graph, features)
    values = {name: table for name, (_, table) in brought.tables.items()}
    metadata = {
        **_description(model, size),
        **brought.metadata,
        "compression": {None: "FP32", CompressionType.FP16: "FP16"}.get(compression, "INT8"),
    }
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if compression:
            reference = _save(whole, folder / "reference.xml", values)
            images = _training_images(datamodule, size) if datamodule and quantised else []
            if features is None:
                whole = _compressed(whole, compression, images)
            else:
                features = _compressed(features, compression, images)
                whole = _joined(graph, features)
        if input_size is None and not (ov_kwargs or {}).get("input"):
            whole = _of_any_size(whole)
        elif {next(iter(output.names)) for output in whole.outputs} == set(OUTPUTS):
            _describe_to_model_api(whole, size)
        path = _save(whole, folder / "model.xml", values)
        if features is not None:
            ov.save_model(features, folder / "features.xml", compress_to_fp16=False)
        if compression and datamodule:
            metadata["accuracy"] = _compare(reference, path, datamodule, size, max_drop, metadata["compression"])
        names = ["model.xml", "model.bin", *(["features.xml", "features.bin"] if features is not None else [])]
        files = {**{name: (folder / name).read_bytes() for name in names}, **brought.files}
    target = Path(export_root) / "weights" / "openvino"
    bundle.create(target, files, metadata)
    return target / "model.xml"


def _image_size(model: AnomalibModule, input_size: tuple[int, int] | None) -> tuple[int, int]:
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


def _convert(
    brought: Bundle,
    size: tuple[int, int],
    ov_kwargs: Mapping[str, Any],
    onnx_kwargs: Mapping[str, Any],
) -> tuple["ov.Model", "ov.Model | None"]:
    """The graph and, if what is learned is apart from it, the features that it starts from."""
    import openvino as ov

    fixed = {"input_names", "output_names", "dynamic_axes", "dynamic_shapes", "dynamo"} & onnx_kwargs.keys()
    if fixed:
        msg = f"onnx_kwargs may not hold {', '.join(sorted(fixed))}: a bundle has its own."
        raise ValueError(msg)
    options = dict(ov_kwargs)
    shape = options.pop("input", None)
    device = next((tensor.device for tensor in brought.graph.parameters()), None)
    # Two images, since torch takes a dimension of 1 for fixed.
    start = torch.zeros(2, 3, *size, device=device)
    features, name = None, INPUT
    if brought.features is not None:
        with torch.no_grad():
            embedding = brought.features.eval()(start)[EMBEDDING]
        features = _to_openvino(brought.features, INPUT, start, {}, options, onnx_kwargs)
        start, name = embedding, EMBEDDING
    graph = _to_openvino(brought.graph, name, start, brought.tables, options, onnx_kwargs)
    if shape is not None:
        (features or graph).reshape({INPUT: ov.PartialShape(shape)})
    return graph, features


def _to_openvino(
    module: nn.Module,
    name: str,
    start: torch.Tensor,
    tables: Mapping[str, tuple[str, NDArray[Any]]],
    ov_kwargs: Mapping[str, Any],
    onnx_kwargs: Mapping[str, Any],
) -> "ov.Model":
    """Convert a module with one input of this name, and with tables as constants."""
    import openvino as ov

    module = module.eval()
    with torch.no_grad():
        outputs = list(module(start))  # errors are clear here, and not while it is traced
    arrays = [torch.from_numpy(table).to(start.device) for _, table in tables.values()]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            _WithInputs(module, [buffer for buffer, _ in tables.values()]).eval(),
            (start, *arrays),
            str(path),
            input_names=[name, *tables],
            output_names=outputs,
            dynamic_shapes=({0: torch.export.Dim("batch_size")}, *([({},) * len(arrays)] if arrays else [])),
            dynamo=True,
            **{"verbose": False, **onnx_kwargs},
        )
        model = ov.convert_model(path, **ov_kwargs)
    for table, (_, values) in tables.items():
        parameter = next(node for node in model.get_parameters() if table in node.output(0).names)
        if parameter.output(0).get_target_inputs():  # a post-processor may have no use for it
            parameter.output(0).replace(ir.placeholder(table, values).output(0))
        model.remove_parameter(parameter)
    model.validate_nodes_and_infer_types()
    return model


def _joined(graph: "ov.Model", features: "ov.Model | None") -> "ov.Model":
    """The whole graph from images on; the parts stay as they are."""
    import openvino as ov

    if features is None:
        return graph
    graph, features = graph.clone(), features.clone()
    embedding = features.output(EMBEDDING).get_node().input_value(0)
    graph.input(EMBEDDING).get_node().output(0).replace(embedding)
    return ov.Model(graph.get_results(), features.get_parameters(), graph.get_friendly_name())


def _save(model: "ov.Model", path: Path, values: Mapping[str, NDArray[Any]]) -> Path:
    """Write a model with these values of its tables."""
    import openvino as ov

    ov.save_model(model, path, compress_to_fp16=False)
    held = {node.get_friendly_name() for node in model.get_ops()}
    values = {name: value for name, value in values.items() if name in held}
    weights = path.with_suffix(".bin")
    places = ir.constants(path.read_bytes(), list(values))
    weights.write_bytes(ir.replaced(weights.read_bytes(), places, values))
    return path


# Compression


def _compressed(model: "ov.Model", compression: CompressionType, images: list[NDArray[np.float32]]) -> "ov.Model":
    """A model with its weights in less precision; for quantisation, the images calibrate it."""
    if compression is CompressionType.FP16:
        return _halved(model)
    import nncf

    if compression is CompressionType.INT8:
        return nncf.compress_weights(model.clone(), mode=nncf.CompressWeightsMode.INT8_SYM)
    # What pools and joins the layers is cheap, and would press all layers into the range of the largest.
    kept = nncf.IgnoredScope(names=_sensitive(model), types=["AvgPool", "Interpolate", "Concat"], validate=False)
    return nncf.quantize(
        model,
        nncf.Dataset(images),
        preset=nncf.QuantizationPreset.MIXED,  # closer to the embedding in float32 than the default
        subset_size=len(images),
        ignored_scope=kept,
    )


def _sensitive(model: "ov.Model") -> list[str]:
    """Names of the convolutions that stay in float: the first one and the depthwise ones.

    They have few weights for each output, so that their rounding does not average out. Alone, the first two layers of
    tf_efficientnet_lite0 move the embedding by 16 and 26 %, each of the next ten by 1 to 4 %.
    """
    convolutions = [node for node in model.get_ordered_ops() if node.get_type_name().endswith("Convolution")]
    # Weights of groups have the shape (groups, outputs of each, inputs of each, height, width).
    depthwise = [
        node
        for node in convolutions
        if node.get_type_name() == "GroupConvolution" and node.input(1).get_partial_shape().to_shape()[1:3] == [1, 1]
    ]
    return [node.get_friendly_name() for node in [*convolutions[:1], *depthwise]]


def _halved(model: "ov.Model") -> "ov.Model":
    """The model with its weights in float16."""
    import openvino as ov

    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        ov.save_model(model, path, compress_to_fp16=True)
        # From memory, since a file that is mapped cannot be removed everywhere.
        return core().read_model(path.read_bytes(), path.with_suffix(".bin").read_bytes())


def _resized(item: Any, size: tuple[int, int]) -> NDArray[np.float32]:  # noqa: ANN401  # an item of any data set
    """Image of an item, as the graph takes it, shape `(1, 3, H, W)`."""
    return resize(item.image[None], list(size), antialias=True).numpy()


def _training_images(datamodule: AnomalibDataModule, size: tuple[int, int]) -> list[NDArray[np.float32]]:
    """Normal images for calibration, spread over the training set."""
    datamodule.setup()
    items = datamodule.train_data
    count = min(len(items), CALIBRATION_IMAGES)
    if not count:
        msg = "The datamodule has no training images, which the quantisation is to be calibrated with."
        raise ValueError(msg)
    return [_resized(items[int(i)], size) for i in np.linspace(0, len(items) - 1, count)]


def _compare(
    reference: Path,
    compressed: Path,
    datamodule: AnomalibDataModule,
    size: tuple[int, int],
    max_drop: float,
    name: str,
) -> dict[str, dict[str, float]]:
    """Accuracy of a model before and after compression, on the test images.

    Raises:
        ValueError: If it lost more than `max_drop`, or there is nothing to compare.
    """
    datamodule.setup()
    items = datamodule.test_data
    if not len(items):
        msg = f"The datamodule has no test images, which {name} is to be compared with FP32 on."
        raise ValueError(msg)
    models = {
        "FP32": core().compile_model(reference, "CPU", {"INFERENCE_PRECISION_HINT": PRECISION_HINT}),
        name: core().compile_model(compressed, "CPU", {"INFERENCE_PRECISION_HINT": PRECISION_HINT}),
    }
    scores: dict[str, list[float]] = {key: [] for key in models}
    decisions: dict[str, list[bool]] = {key: [] for key in models}
    labels = []
    for item in items:
        image = _resized(item, size)
        labels.append(bool(item.gt_label))
        for key, model in models.items():
            result = model(image)
            scores[key].append(float(result["pred_score"].item()))
            if any("pred_label" in output.names for output in model.outputs):
                decisions[key].append(bool(result["pred_label"].item()))
    truth = torch.tensor(labels).int()
    figures = {}
    if 0 < truth.sum() < len(truth):
        figures["image_AUROC"] = {key: float(binary_auroc(torch.tensor(scores[key]), truth)) for key in models}
        if decisions[name]:
            f1 = {key: float(binary_f1_score(torch.tensor(decisions[key]).int(), truth)) for key in models}
            figures["image_F1Score"] = f1
    elif decisions[name]:  # of one kind of images, only the decisions can be compared
        equal = float(np.mean(np.equal(decisions[name], decisions["FP32"])))
        figures["equal decisions"] = {"FP32": 1.0, name: equal}
    else:
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


# Description


def _description(model: AnomalibModule, size: tuple[int, int]) -> dict[str, Any]:
    """Entries of `metadata.json` that every model has."""
    normalize = next((t for t in _transforms(model) if isinstance(t, Normalize)), None)
    processor = model.post_processor if isinstance(model.post_processor, PostProcessor) else None
    last = {
        kind: [_number(getattr(processor, f"{kind}_{name}", None)) for name in ("threshold", "min", "max")]
        for kind in ("image", "pixel")
    }
    return {
        "schema_version": bundle.SCHEMA_VERSION,
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


def _of_any_size(model: "ov.Model") -> "ov.Model":
    """The model for images of any height and width, which it resizes as torch does: Studio sends them as they are."""
    from openvino import Layout
    from openvino.preprocess import PrePostProcessor, ResizeAlgorithm

    processor = PrePostProcessor(model)
    processor.input().tensor().set_spatial_dynamic_shape().set_layout(Layout("NCHW"))
    processor.input().preprocess().resize(ResizeAlgorithm.RESIZE_BILINEAR_PILLOW)
    processor.input().model().set_layout(Layout("NCHW"))
    return processor.build()


def _describe_to_model_api(model: "ov.Model", size: tuple[int, int]) -> None:
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
        model.set_rt_info(value, ["model_info", name])
