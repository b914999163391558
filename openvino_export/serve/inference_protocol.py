# SPDX-License-Identifier: Apache-2.0
"""The Open Inference Protocol, version 2, over HTTP, so that clients of Triton, KServe and OpenVINO Model Server work.

As in the KServe specification, with its extension for binary tensors. Input and outputs are those of `model.xml`: a
batch of images in [0, 1]; images of 8 bits are taken, too. Parts that come this way are judged, but not kept.
"""

from __future__ import annotations

import json
import math
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response

from .parts import NotThereError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from numpy.typing import NDArray

    from .station import Station

MODEL, VERSION = "model", "1"
TYPES: dict[str, np.dtype[Any]] = {"FP32": np.dtype("<f4"), "UINT8": np.dtype("u1"), "BOOL": np.dtype("?")}
INPUT = "image"
OUTPUTS = {"pred_score": "FP32", "pred_label": "BOOL", "anomaly_map": "FP32", "pred_mask": "BOOL"}
_LENGTH = "inference-header-content-length"


def protocol_routes(
    station: Station, judged: Callable[[Callable[[], Any]], Awaitable[Any]], may_judge: Sequence[Any]
) -> APIRouter:
    """The routes below `/v2`.

    Args:
        station: What judges.
        judged: Runs a function on the threads that judge.
        may_judge: What must be allowed for all but the question whether the server lives.
    """
    routes = APIRouter(tags=["Open Inference Protocol"])
    closed = APIRouter(prefix="/v2", dependencies=may_judge)
    height, width = station.detector.input_size
    about = {
        "name": MODEL,
        "versions": [VERSION],
        "platform": "openvino",
        "inputs": [{"name": INPUT, "datatype": "FP32", "shape": [-1, 3, -1, -1]}],
        "outputs": [
            {
                "name": name,
                "datatype": kind,
                "shape": [-1, 1, height, width] if name in {"anomaly_map", "pred_mask"} else [-1],
            }
            for name, kind in OUTPUTS.items()
        ],
    }

    @closed.get("")
    async def server() -> dict[str, Any]:
        """What this server is."""
        return {"name": "anomalib-edge", "version": VERSION, "extensions": ["binary_tensor_data"]}

    @routes.get("/v2/health/live")
    async def live() -> dict[str, bool]:
        """Whether the server answers."""
        return {"live": True}

    @closed.get("/health/ready")
    async def ready() -> Response:
        """Whether parts are judged."""
        return Response(json.dumps({"ready": not station.paused}), 503 if station.paused else 200)

    for prefix in (f"/models/{MODEL}", f"/models/{MODEL}/versions/{VERSION}"):
        closed.add_api_route(prefix, lambda: about, name=prefix)
        closed.add_api_route(f"{prefix}/ready", ready, name=f"{prefix}/ready")

    async def infer(request: Request) -> Response:
        """Judge a batch of images."""
        asked, images = read_request(await request.body(), request.headers.get(_LENGTH))
        results = await judged(partial(station.detector.predict, images))
        tensors = {
            "pred_score": np.array([each.pred_score for each in results], np.float32),
            "pred_label": np.array([bool(each.pred_label) for each in results]),
            "anomaly_map": np.stack([each.anomaly_map for each in results])[:, None].astype(np.float32),
        }
        if all(each.pred_mask is not None for each in results):
            tensors["pred_mask"] = np.stack([each.pred_mask for each in results])[:, None]
        return write_response(asked, tensors)

    for prefix in (f"/models/{MODEL}", f"/models/{MODEL}/versions/{VERSION}"):
        closed.add_api_route(f"{prefix}/infer", infer, methods=["POST"], name=f"{prefix}/infer")

    @closed.api_route("/{rest:path}", methods=["GET", "POST"], include_in_schema=False)
    def unknown(rest: str) -> None:
        msg = f"There is no {rest}; the only model is {MODEL!r}, of version {VERSION}."
        raise NotThereError(msg)

    routes.include_router(closed)
    return routes


def read_request(body: bytes, length: str | None) -> tuple[dict[str, Any], list[NDArray[Any]]]:
    """What a request asks for, and its images.

    Args:
        body: JSON, with binary tensors after it if `length` is given.
        length: Bytes of the JSON.

    Returns:
        The JSON, and images of shape `(H, W, 3)`.

    Raises:
        ValueError: If the request cannot be understood.
    """
    try:
        asked = json.loads(body[: len(body) if length is None else int(length)])
        tensor = next(each for each in asked["inputs"] if each["name"] == INPUT)
        shape, dtype = [int(side) for side in tensor["shape"]], TYPES[tensor["datatype"]]
        data = body[int(length or 0) :] if "binary_data_size" in (tensor.get("parameters") or {}) else None
        inputs = len(asked["inputs"])
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration, RecursionError) as error:
        msg = f"The request is none of the Open Inference Protocol with an input {INPUT!r} of FP32 or UINT8: {error!r}."
        raise ValueError(msg) from error
    if inputs != 1 or len(shape) != 4 or shape[1] != 3 or min(shape) < 1:
        msg = f"The only input must be {INPUT!r} of shape (batch, 3, height, width), got {inputs} of shape {shape}."
        raise ValueError(msg)
    try:
        values = np.frombuffer(data, dtype) if data is not None else np.array(tensor["data"], dtype).ravel()
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        msg = f"The data of {INPUT!r} cannot be read as {tensor['datatype']}: {error}."
        raise ValueError(msg) from error
    if values.size != math.prod(shape):
        msg = f"{INPUT!r} has {values.size} values, its shape {shape} says {math.prod(shape)}."
        raise ValueError(msg)
    return asked, list(values.reshape(shape).transpose(0, 2, 3, 1))


def write_response(asked: dict[str, Any], tensors: dict[str, NDArray[Any]]) -> Response:
    """An answer with the outputs that were asked for, all by default, in the form that was asked for.

    Raises:
        ValueError: If there is no such output.
    """
    wanted = asked.get("outputs") or [{"name": name} for name in tensors]
    all_binary = bool((asked.get("parameters") or {}).get("binary_data_output"))
    outputs, binary = [], b""
    for output in wanted:
        name = output["name"]
        if name not in tensors:
            msg = f"There is no output {name!r}; there are {', '.join(tensors)}."
            raise ValueError(msg)
        kind = OUTPUTS[name]
        values = np.ascontiguousarray(tensors[name], TYPES[kind])
        described: dict[str, Any] = {"name": name, "datatype": kind, "shape": list(values.shape)}
        if (output.get("parameters") or {}).get("binary_data", all_binary):
            described["parameters"] = {"binary_data_size": values.nbytes}
            binary += values.tobytes()
        else:
            described["data"] = values.ravel().tolist()
        outputs.append(described)
    head = {"model_name": MODEL, "model_version": VERSION, "outputs": outputs}
    text = json.dumps({**head, "id": asked["id"]} if "id" in asked else head).encode()
    if not binary:
        return Response(text, media_type="application/json")
    return Response(text + binary, media_type="application/octet-stream", headers={_LENGTH: str(len(text))})
