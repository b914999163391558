# SPDX-License-Identifier: Apache-2.0
"""Export of a model to OpenVINO as a bundle: a folder that an edge PC without torch inspects with, and learns on.

The folder holds the whole graph (`model.xml`, from images in [0, 1] to decisions), `metadata.json`, and whatever a
model adds. A model that learns on the edge is cut at its embedding: `features.xml` ends there, and what learning
changes are constants of the whole graph with fixed names, so that only their bytes in `model.bin` ever change.

`contract` says what a model brings and how it is described, `convert` makes the graphs, `compress` makes them smaller
and checks what that loses; here is the order of the work.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from anomalib import TaskType
from anomalib.data import AnomalibDataModule
from anomalib.deploy import CompressionType
from anomalib.models.components import AnomalibModule
from torch import nn
from torchmetrics import Metric

from openvino_export.bundle import folder as bundles

from .compress import calibration_images, compare_accuracy, compress_graph
from .contract import (
    EMBEDDING,
    OUTPUTS,
    BundleContent,
    WholeGraph,
    common_metadata,
    describe_to_model_api,
    image_size,
)
from .convert import accept_any_size, convert_content, join_graphs, save_graph, without_telemetry

__all__ = ["EMBEDDING", "OUTPUTS", "BundleContent", "BundleExport", "WholeGraph", "export_bundle"]


@without_telemetry()
def export_bundle(
    model: AnomalibModule,
    content_function: Callable[[Any, tuple[int, int]], BundleContent],
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
        content_function: Gives what the model brings, for the model and the height and width of images.
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
    size = image_size(model, input_size)
    content = content_function(model, size)
    graph, features = convert_content(content, size, ov_kwargs or {}, onnx_kwargs or {})
    whole = join_graphs(graph, features)
    tables = {name: values for name, (_, values) in content.tables.items()}
    metadata = {
        **common_metadata(model, size),
        **content.metadata,
        "compression": {None: "FP32", CompressionType.FP16: "FP16"}.get(compression, "INT8"),
    }
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if compression:
            reference = save_graph(whole, folder / "reference.xml", tables)
            images = calibration_images(datamodule, size) if datamodule and quantised else []
            if features is None:
                whole = compress_graph(whole, compression, images)
            else:
                features = compress_graph(features, compression, images)
                whole = join_graphs(graph, features)
        if input_size is None and not (ov_kwargs or {}).get("input"):
            whole = accept_any_size(whole)
        elif {next(iter(output.names)) for output in whole.outputs} == set(OUTPUTS):
            describe_to_model_api(whole, size)
        path = save_graph(whole, folder / "model.xml", tables)
        if features is not None:
            ov.save_model(features, folder / "features.xml", compress_to_fp16=False)
        if compression and datamodule:
            metadata["accuracy"] = compare_accuracy(
                reference, path, datamodule, size, max_drop, metadata["compression"]
            )
        names = [*bundles.WHOLE, *(bundles.FEATURES if features is not None else ())]
        files = {**{name: (folder / name).read_bytes() for name in names}, **content.files}
    target = Path(export_root) / "weights" / "openvino"
    bundles.create(target, files, metadata)
    return target / "model.xml"


class BundleExport(nn.Module):
    """Exports a model to OpenVINO as a bundle. To be named before `AnomalibModule` as base."""

    def bundle_content(self, size: tuple[int, int]) -> BundleContent:
        """What the model brings to its bundle, for images of a height and width."""
        raise NotImplementedError

    def to_openvino(
        self,
        export_root: str | Path,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        datamodule: AnomalibDataModule | None = None,
        metric: Metric | None = None,
        task: TaskType | None = None,
        max_drop: float = 0.01,
        ov_kwargs: dict[str, Any] | None = None,
        onnx_kwargs: dict[str, Any] | None = None,
    ) -> Path:
        """Write a bundle, with which an edge PC inspects, to `export_root/weights/openvino`; see :func:`export_bundle`.

        Args:
            export_root: Folder of exports.
            model_file_name: Must be ``model``, by which the edge PC finds the graph.
            input_size: As for :func:`export_bundle`.
            compression_type: As for :func:`export_bundle`.
            datamodule: Its training images calibrate the quantisation, its test images show what compression loses.
            metric: Not used; image AUROC and F1 are compared.
            task: Not used.
            max_drop: Largest loss of AUROC or F1 by compression; one decision may always change.
            ov_kwargs: Arguments of ``openvino.convert_model``; ``{"input": [1, 3, H, W]}`` fixes the batch size.
            onnx_kwargs: Arguments of ``torch.onnx.export``.

        Returns:
            Path of ``model.xml``.

        Raises:
            RuntimeError: If a model that scores by what it has learned has learned nothing.
            ValueError: If an argument does not fit, or compression loses more than allowed. An older bundle remains.
        """
        del metric, task
        if model_file_name != "model":
            msg = f"A bundle holds its graph in model.xml, not in {model_file_name}.xml; name its folder instead."
            raise ValueError(msg)
        return export_bundle(
            cast("AnomalibModule", self.eval()),
            type(self).bundle_content,
            export_root,
            input_size=input_size,
            compression_type=compression_type,
            datamodule=datamodule,
            max_drop=max_drop,
            ov_kwargs=ov_kwargs,
            onnx_kwargs=onnx_kwargs,
        )
