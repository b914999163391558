# SPDX-License-Identifier: Apache-2.0
"""What OpenVINO runs of a bundle: the backbone of a model that learns, or the whole of another."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from .bundle.folder import BANK, Bundle, BundleError, running_files
from .device import FAILURES, check_device, core

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float32]


class Network:
    """A compiled graph that takes an image in [0, 1]; several threads may call it at once.

    Args:
        bundle: The bundle, with the files that run.
        size: Height and width of the images.
        device: Device of OpenVINO.
        precision: Precision that OpenVINO computes in.

    Attributes:
        last_dimension: Length of the last dimension of the embedding, or of the anomaly map.
        parallel: Number of images that :attr:`workers` run at a time.

    Raises:
        BundleError: If the graph does not take such images, or lacks an output.
        ValueError: If there is no such device, or it cannot run the graph.
    """

    def __init__(self, bundle: Bundle, size: tuple[int, int], device: str, precision: str) -> None:
        check_device(device)
        name, weights = running_files(bundle.metadata)[:2]
        height, width = size
        # From memory, so that the files may be replaced while they are in use, and are what was verified.
        try:
            model = core().read_model(bundle.contents[name], bundle.contents[weights])
            model.reshape([1, 3, height, width])  # a fixed shape compiles and runs faster
        except FAILURES as error:
            msg = (
                f"{name} of {bundle.folder} cannot be used for images of {height} x {width} pixels: {error} "
                "Copy the whole folder again, or export the model again."
            )
            raise BundleError(msg) from error
        self._names = [next(iter(output.names), "") for output in model.outputs]
        needed = {"embedding"} if BANK in bundle.contents else {"pred_score", "anomaly_map"}
        if missing := needed - set(self._names):
            msg = f"{name} of {bundle.folder} has no output {', '.join(sorted(missing))}; export the model again."
            raise BundleError(msg)
        # That of an embedding, `(1, h, w, d)`, or of a map with as many pixels as the image.
        shape = model.output("embedding" if BANK in bundle.contents else "anomaly_map").partial_shape
        sides = [] if shape.is_dynamic else list(shape.to_shape())
        if not (len(sides) == 4 and sides[0] == 1 if BANK in bundle.contents else math.prod(sides) == height * width):
            msg = f"{name} of {bundle.folder} gives arrays of the shape {shape} for an image; export the model again."
            raise BundleError(msg)
        self.last_dimension = sides[-1]
        self._compile = lambda hint: core().compile_model(
            model, device, {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": hint}
        )
        try:
            self._compiled = self._compile("LATENCY")
        except FAILURES as error:
            reason = str(error).strip().splitlines()[-1]
            msg = f"{name} of {bundle.folder} cannot be run on {device} in {precision}: {reason}"
            raise ValueError(msg) from error
        self._own = threading.local()
        self._starting = threading.Lock()
        self.parallel = 1

    def __call__(self, image: Array) -> dict[str, NDArray[Any]]:
        """Run it on an image of shape `(3, H, W)` in [0, 1]; the outputs are without the batch dimension."""
        if not hasattr(self._own, "request"):
            self._own.request = self._compiled.create_infer_request()
        request = self._own.request
        request.infer([np.ascontiguousarray(image[None])], share_inputs=True)
        # Copies, since the request will be used again.
        return {name: request.get_output_tensor(i).data[0].copy() for i, name in enumerate(self._names)}

    @property
    def workers(self) -> ThreadPoolExecutor:
        """Threads for many images: as many as OpenVINO runs at a time when it is to reach the highest throughput.

        Not OpenVINO's own queue: a callback that is still running when Python ends aborts the process.
        """
        with self._starting:  # two threads that ask first would compile twice
            return self._workers

    @cached_property
    def _workers(self) -> ThreadPoolExecutor:
        compiled, own = self._compile("THROUGHPUT"), self._own
        self.parallel = int(compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))

        def begin() -> None:
            own.request = compiled.create_infer_request()

        return ThreadPoolExecutor(self.parallel, "predict", begin)
