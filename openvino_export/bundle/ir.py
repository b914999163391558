# SPDX-License-Identifier: Apache-2.0
"""The constants of an OpenVINO graph that learning changes, found and replaced in its files."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from openvino_export.device import FAILURES, core

from .constants import CONSTANTS
from .metadata import BundleError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from numpy.typing import NDArray

_DTYPES = {"f16": "float16", "f32": "float32", "f64": "float64", "i32": "int32", "i64": "int64"}


@dataclass(frozen=True)
class Constant:
    """Place of a constant of an IR in its .bin file.

    Attributes:
        offset: First byte.
        size: Number of bytes.
        dtype: NumPy's name of the element type.
        shape: Shape.
    """

    offset: int
    size: int
    dtype: str
    shape: tuple[int, ...]


def find_constants(xml: bytes, names: Collection[str] = CONSTANTS) -> dict[str, Constant]:
    """Find constants of an IR by the name of their layer.

    Args:
        xml: Content of the .xml file.
        names: Names of the layers.

    Raises:
        BundleError: If one is missing, or shares its bytes with another layer, or the file is damaged.
    """
    try:
        constants = list(_constants(xml.decode()))
    except (KeyError, ValueError) as error:
        reason = f"{type(error).__name__}: {error!s:.100}"
        msg = f"model.xml is damaged: {reason}, in the description of a constant. Export the model again."
        raise BundleError(msg) from error
    found: dict[str, Constant] = {}
    places = [(constant.offset, constant.offset + constant.size, name) for name, constant in constants]
    for name, constant in constants:
        if name in names:
            if (
                constant.dtype not in _DTYPES.values()
                or math.prod(constant.shape) * np.dtype(constant.dtype).itemsize != constant.size
            ):
                msg = f"The constant {name} of model.xml has an unknown type {constant.dtype}; export it again."
                raise BundleError(msg)
            found[name] = constant
    for name in names:
        if name not in found:
            msg = f"model.xml has no constant {name}, so it cannot take in what is learned; export the model again."
            raise BundleError(msg)
        first, last = found[name].offset, found[name].offset + found[name].size
        for begin, end, other in places:
            if other != name and begin < last and first < end:
                msg = f"The constants {name} and {other} of model.xml share their bytes; export the model again."
                raise BundleError(msg)
    return found


def _constants(xml: str) -> Iterator[tuple[str, Constant]]:
    """Name and place of each constant of an IR, of whatever type."""
    for layer, data in re.findall(r"<layer\b([^>]*)>\s*<data\b([^>]*)/>", xml):
        head, body = (dict(re.findall(r'([\w-]+)="([^"]*)"', part)) for part in (layer, data))
        if head.get("type") == "Const":
            shape = tuple(int(side) for side in body["shape"].split(",") if side.strip())
            kind = str(body["element_type"])
            yield head["name"], Constant(int(body["offset"]), int(body["size"]), _DTYPES.get(kind, kind), shape)


def placeholder(name: str, values: NDArray[Any]) -> Any:  # noqa: ANN401  # OpenVINO's node
    """Constant of an IR that takes these values once it is in a file, see :func:`with_new_values`.

    Its values are random for now, since OpenVINO writes equal constants to the same bytes.
    """
    from openvino import opset13

    random = np.random.default_rng(list(name.encode())).integers(1, 100, values.shape)
    constant = opset13.constant(random.astype(values.dtype))
    constant.set_friendly_name(name)
    return constant


def with_tables(xml: bytes, weights: bytes, values: Mapping[str, NDArray[Any]]) -> dict[str, bytes]:
    """Contents, by name, of those files of `model.xml` and `model.bin` that change with values of their constants.

    Args:
        xml: Content of the .xml file, which changes if there are other shapes.
        weights: Content of the .bin file.
        values: New values of all constants that learning changes.
    """
    places, files = find_constants(xml, values), {}
    if any(places[name].shape != value.shape for name, value in values.items()):
        xml, weights = with_new_shapes(xml, weights, values)
        files["model.xml"], places = xml, find_constants(xml, values)
    return {**files, "model.bin": with_new_values(weights, places, values)}


def with_new_shapes(xml: bytes, weights: bytes, values: Mapping[str, NDArray[Any]]) -> tuple[bytes, bytes]:
    """The .xml and .bin file of an IR, with room for constants of other shapes.

    Args:
        xml: Content of the .xml file.
        weights: Content of the .bin file.
        values: New values of all constants that learning changes, of other shapes; :func:`with_new_values` writes them.

    Raises:
        BundleError: If the temporary folder cannot take the files, or they are damaged.
    """
    import openvino as ov

    try:
        model = core().read_model(xml, weights)
        for node in model.get_ops():
            if (name := node.get_friendly_name()) in values:
                node.output(0).replace(placeholder(name, values[name]).output(0))
        model.validate_nodes_and_infer_types()
    except FAILURES as error:
        msg = f"model.xml cannot take in what is learned: {error}. Export the model again."
        raise BundleError(msg) from error
    try:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "model.xml"
            ov.save_model(model, path, compress_to_fp16=False)
            return path.read_bytes(), path.with_suffix(".bin").read_bytes()
    except (OSError, RuntimeError) as error:
        msg = f"The temporary folder cannot hold model.xml: {error}. Make room in it, or name another by TMPDIR."
        raise BundleError(msg) from error


def with_new_values(weights: bytes, places: Mapping[str, Constant], values: Mapping[str, NDArray[Any]]) -> bytes:
    """Content of the .bin file of an IR, with other values of constants of the same shapes.

    Args:
        weights: Content of the .bin file.
        places: What :func:`find_constants` found.
        values: New values, of the constants' shapes.

    Raises:
        BundleError: If a value is of another shape, or a constant lies beyond the end.
    """
    content = bytearray(weights)
    for name, value in values.items():
        place = places[name]
        if value.shape != place.shape or not 0 <= place.offset <= len(content) - place.size:
            msg = (
                f"The constant {name} of model.xml has the shape {place.shape}, not {value.shape}, or lies beyond "
                "model.bin: the files are not of one export. Export the model again."
            )
            raise BundleError(msg)
        content[place.offset : place.offset + place.size] = np.ascontiguousarray(value, place.dtype).tobytes()
    return bytes(content)
