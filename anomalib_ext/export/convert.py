# SPDX-License-Identifier: Apache-2.0
"""From a model in torch to graphs of OpenVINO and their files, by way of ONNX."""

import logging
import threading
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import nn

from openvino_export.bundle import ir
from openvino_export.device import import_openvino

from .contract import EMBEDDING, INPUT, BundleContent

if TYPE_CHECKING:
    import openvino as ov

_SILENCED = threading.RLock()
# Torch's exporter has them tell of each of their passes, hundreds of lines for a model.
_CHATTY = [logging.getLogger(name) for name in ("onnx_ir", "onnxscript")]


@contextmanager
def without_telemetry() -> Generator[None]:
    """Keep OpenVINO's converter and NNCF from reporting to Intel, which both do unasked, and torch's exporter quiet.

    For each report they also fork this process, with all that it has in memory. Their own switches, a file in the
    user's home and the variable `CI` of the whole process, are not ours to set. One thread at a time is within: of two
    that overlap, the second would restore what the first had put there.
    """
    import_openvino()
    from openvino_telemetry.utils.sender import TelemetrySender

    with _SILENCED:
        send, levels = TelemetrySender.send, [each.level for each in _CHATTY]
        TelemetrySender.send = lambda *_: None
        for each in _CHATTY:
            each.setLevel(logging.WARNING)
        try:
            yield
        finally:
            TelemetrySender.send = send
            for each, level in zip(_CHATTY, levels, strict=True):
                each.setLevel(level)


def convert_content(
    content: BundleContent,
    size: tuple[int, int],
    ov_kwargs: Mapping[str, Any],
    onnx_kwargs: Mapping[str, Any],
) -> tuple["ov.Model", "ov.Model | None"]:
    """Convert what a model brings.

    Args:
        content: The model's graph and, if it is apart, what it starts from.
        size: Height and width of the images.
        ov_kwargs: Arguments of `openvino.convert_model`; `input`, a shape, fixes the batch size.
        onnx_kwargs: Arguments of `torch.onnx.export`.

    Returns:
        The graph and, if there are any, the features that it starts from. What learning changes are constants with the
        names of their tables; their values are random until :func:`save_graph`.

    Raises:
        ValueError: If an argument of `torch.onnx.export` is one that a bundle has fixed.
    """
    import openvino as ov

    reserved = {"input_names", "output_names", "dynamic_axes", "dynamic_shapes", "dynamo"} & onnx_kwargs.keys()
    if reserved:
        msg = f"onnx_kwargs may not hold {', '.join(sorted(reserved))}: a bundle has its own."
        raise ValueError(msg)
    options = dict(ov_kwargs)
    shape = options.pop("input", None)
    device = next((tensor.device for tensor in content.graph.parameters()), None)
    # Two images, since torch takes a dimension of 1 for fixed.
    example = torch.zeros(2, 3, *size, device=device)
    features, name = None, INPUT
    if content.features is not None:
        with torch.no_grad():
            embedding = content.features.eval()(example)[EMBEDDING]
        features = _convert_module(content.features, INPUT, example, {}, options, onnx_kwargs)
        example, name = embedding, EMBEDDING
    graph = _convert_module(content.graph, name, example, content.tables, options, onnx_kwargs)
    if shape is not None:
        (features or graph).reshape({INPUT: ov.PartialShape(shape)})
    return graph, features


def _convert_module(
    module: nn.Module,
    name: str,
    example: torch.Tensor,
    tables: Mapping[str, tuple[str, NDArray[Any]]],
    ov_kwargs: Mapping[str, Any],
    onnx_kwargs: Mapping[str, Any],
) -> "ov.Model":
    """Convert a module with one input of this name, and with tables as constants."""
    import openvino as ov

    module = module.eval()
    with torch.no_grad():
        outputs = list(module(example))  # errors are clear here, and not while it is traced
    arrays = [torch.from_numpy(table).to(example.device) for _, table in tables.values()]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            _BuffersAsInputs(module, [buffer for buffer, _ in tables.values()]).eval(),
            (example, *arrays),
            str(path),
            input_names=[name, *tables],
            output_names=outputs,
            dynamic_shapes=({0: torch.export.Dim("batch_size")}, *([({},) * len(arrays)] if arrays else [])),
            dynamo=True,
            **{"verbose": False, **onnx_kwargs},
        )
        graph = ov.convert_model(path, **ov_kwargs)
    for table, (_, values) in tables.items():
        parameter = next(node for node in graph.get_parameters() if table in node.output(0).names)
        if parameter.output(0).get_target_inputs():  # a post-processor may have no use for it
            parameter.output(0).replace(ir.placeholder(table, values).output(0))
        graph.remove_parameter(parameter)
    graph.validate_nodes_and_infer_types()
    return graph


class _BuffersAsInputs(nn.Module):
    """A module with some buffers as inputs, so that no conversion folds, merges or transposes them away."""

    def __init__(self, module: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        self.whole = module  # the layers of exported files are called by it
        self.names = list(names)

    def forward(self, images: torch.Tensor, *values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Run the module with these values in place of its buffers."""
        return torch.func.functional_call(self.whole, dict(zip(self.names, values, strict=True)), (images,))


def join_graphs(graph: "ov.Model", features: "ov.Model | None") -> "ov.Model":
    """The whole graph from images on; the parts stay as they are."""
    import openvino as ov

    if features is None:
        return graph
    graph, features = graph.clone(), features.clone()
    embedding = features.output(EMBEDDING).get_node().input_value(0)
    graph.input(EMBEDDING).get_node().output(0).replace(embedding)
    return ov.Model(graph.get_results(), features.get_parameters(), graph.get_friendly_name())


def accept_any_size(graph: "ov.Model") -> "ov.Model":
    """The graph for images of any height and width, which it resizes as torch does: Studio sends them as they are."""
    from openvino import Layout
    from openvino.preprocess import PrePostProcessor, ResizeAlgorithm

    processor = PrePostProcessor(graph)
    processor.input().tensor().set_spatial_dynamic_shape().set_layout(Layout("NCHW"))
    processor.input().preprocess().resize(ResizeAlgorithm.RESIZE_BILINEAR_PILLOW)
    processor.input().model().set_layout(Layout("NCHW"))
    return processor.build()


def save_graph(graph: "ov.Model", path: Path, tables: Mapping[str, NDArray[Any]]) -> Path:
    """Write a graph to a file, with the values of those of the tables that it has as constants.

    Args:
        graph: What :func:`convert_content` gave, or :func:`join_graphs` made of it.
        path: The .xml file; the .bin file lies beside it.
        tables: Values by the name of the constant.

    Returns:
        The path.
    """
    import openvino as ov

    ov.save_model(graph, path, compress_to_fp16=False)
    names = {node.get_friendly_name() for node in graph.get_ops()}
    values = {name: value for name, value in tables.items() if name in names}
    weights = path.with_suffix(".bin")
    places = ir.find_constants(path.read_bytes(), list(values))
    weights.write_bytes(ir.with_new_values(weights.read_bytes(), places, values))
    return path
