# SPDX-License-Identifier: Apache-2.0
"""Inspection and further learning with a bundle, without torch."""

from __future__ import annotations

import copy
import json
import threading
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from openvino_export.anomaly_map import anomaly_maps
from openvino_export.bundle.constants import graph_tables, variant_capacity
from openvino_export.memory.augment import (
    NUM_VIEWS,
    RECENT_IMAGES,
    are_few,
    augmented_views,
    calibrate_from_views,
    image_hash,
)
from openvino_export.memory.k_center import single_threaded
from openvino_export.memory.memory_bank import MemoryBank, Report

from .bundle import folder as bundles
from .bundle import ir
from .bundle.constants import CONSTANTS
from .bundle.folder import BANK, Bundle, BundleError
from .device import core as device_core
from .images import load, resize
from .memory.search import NearestNeighbors

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence

    from numpy.typing import NDArray

    Array = NDArray[np.float32]
    Outputs = dict[str, NDArray[Any]]
    Source = str | Path | NDArray[Any]

# An image that is said to be good is suspicious if it scores so many times the threshold of its variant.
SUSPICION = 1.75


@dataclass(frozen=True)
class Prediction:
    """What is said about an image.

    Attributes:
        pred_score: Anomaly score; in [0, 1], with 0.5 at the threshold, if the model normalises.
        pred_label: Whether the image is anomalous; None if the model has no thresholds.
        anomaly_map: Score of each pixel of the model's input, shape `(H, W)`.
        pred_mask: Which pixels are anomalous, shape `(H, W)`; None if the model has no thresholds.
        variant: Name of the variant that the image is judged by.
        source: Path of the image, if it came from a file.
    """

    pred_score: float
    pred_label: bool | None
    anomaly_map: Array
    pred_mask: NDArray[np.bool_] | None
    variant: str | None
    source: str | None = None


@dataclass(frozen=True)
class Learned:
    """What a call of :meth:`EdgeDetector.learn` did.

    Attributes:
        report: What changed in the memory bank.
        held_back: Images that were not learned because they look anomalous, and the factor by which each exceeds the
            threshold of its variant.
    """

    report: Report
    held_back: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Knowledge:
    """All that learning changes; replaced as a whole, never modified."""

    bank: MemoryBank
    names: list[str]
    owners: NDArray[np.int64]
    values: dict[str, Array]  # "image" and "pixel": threshold, minimum and maximum of each variant, (variants, 3)
    search: NearestNeighbors


class EdgeDetector:
    """Judges images, and learns new ones, with the bundle that ``Engine.export(model, "openvino")`` has written.

    A bundle without a memory bank is judged by its ``model.xml`` and learns nothing. All methods may be called from
    several threads at once. While :meth:`learn` is at work, images are judged by what was known before.

    Args:
        bundle: Folder of the bundle.
        device: Device of OpenVINO that runs the backbone.
        precision: Precision that OpenVINO computes in, such as ``bf16``; that of the bundle by default, so that scores
            are alike on every processor.

    Raises:
        FileNotFoundError: If there is no such folder.
        BundleError: If it is no bundle, or damaged, or of a newer version.
        ValueError: If there is no such device.

    Example:
        >>> detector = EdgeDetector("weights/openvino")
        >>> result = detector.predict("part.png")
        >>> print(result.pred_label, result.pred_score, result.variant)
        >>> detector.learn(["new_1.png", "new_2.png"], variant="new")
        >>> detector.save()
    """

    def __init__(self, bundle: str | Path, device: str = "CPU", precision: str | None = None) -> None:
        self.device = device
        read = bundles.read(bundle, bundles.running_files)
        metadata = read.metadata
        height, width = metadata["input_size"]
        self.input_size = (int(height), int(width))
        self.precision = precision or str(metadata.get("precision_hint", "f32"))
        self._mean = np.array(metadata["mean"], np.float32).reshape(3, 1, 1)
        self._std = np.array(metadata["std"], np.float32).reshape(3, 1, 1)
        self._model = _Network(read, self.input_size, device, self.precision)
        self._bundle = read
        self._knowledge = self._saved = self._know(_bank(read), read) if BANK in read.contents else None
        self._changing = threading.RLock()

    # Judging

    def predict(self, images: Source | Sequence[Source]) -> Any:  # noqa: ANN401  # one result or a list of them
        """Judge an image or several.

        Args:
            images: Path of an image, or an array `(H, W)`, `(H, W, 1)`, `(H, W, 3)` or `(H, W, 4)` of 8 bits or floats
                in [0, 1], of any size, or a list of those.

        Returns:
            A :class:`Prediction`, or a list of them for a list.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If an image is unreadable, too small, of unsuitable depth or not finite.
        """
        if not isinstance(images, (str, Path, np.ndarray)):
            return [self.predict(image) for image in images]
        return self._predict(images)

    def predict_async(self, image: Source) -> Future[Prediction]:
        """Judge an image on another thread while the caller goes on; several at a time.

        Args:
            image: As in :meth:`predict`.

        Returns:
            Its result, or the error that :meth:`predict` would have raised.
        """
        return self._model.workers.submit(self._predict, image)

    def stream(self, images: Iterable[Source]) -> Generator[Prediction, None, None]:
        """Judge many images with the highest throughput, several at a time.

        Args:
            images: As in :meth:`predict`; taken as they are needed.

        Yields:
            Their results, in order.
        """
        waiting: list[Future[Prediction]] = []
        for image in images:
            waiting.append(self.predict_async(image))
            if len(waiting) > 2 * self._model.parallel:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()

    def _predict(self, images: Source) -> Prediction:
        source = _source(images)
        outputs = self._model(resize(load(images), self.input_size))
        if self._knowledge is not None:
            return self._judge_embedding(outputs["embedding"], self._knowledge, source)
        label, mask = outputs.get("pred_label"), outputs.get("pred_mask")
        return Prediction(
            pred_score=float(outputs["pred_score"].item()),
            pred_label=None if label is None else bool(label.item()),
            anomaly_map=outputs["anomaly_map"].reshape(self.input_size),
            pred_mask=None if mask is None else mask.reshape(self.input_size).astype(bool),
            variant=None,
            source=source,
        )

    def _judge_embedding(self, embedding: Array, knowledge: _Knowledge, source: str | None) -> Prediction:
        """Search and post-processing, equal to that of `model.xml`.

        Args:
            embedding: Shape `(h, w, d)`.
            knowledge: What to judge by.
            source: Path of the image.
        """
        patches = embedding.reshape(-1, embedding.shape[-1])
        scores, index = _search(patches, knowledge, source)
        position = int(np.bincount(knowledge.owners[index], minlength=1).argmax())
        metadata = self._bundle.metadata
        score = self._image_score(patches, scores, index, knowledge)
        pixels = anomaly_maps(scores.reshape(embedding.shape[:2]), *self.input_size)
        decided: dict[str, Any] = {"image": None, "pixel": None}
        results: dict[str, Array] = {"image": np.array([score], np.float32), "pixel": pixels}
        for kind, raw in list(results.items()):
            threshold, lowest, highest = knowledge.values[kind][position]
            if metadata.get("normalization"):
                results[kind] = _normalize(raw, threshold, lowest, highest)
                threshold = np.float32(1 - metadata.get(f"{kind}_sensitivity", 0.5))
            if metadata.get("thresholding"):
                decided[kind] = results[kind] > threshold
        return Prediction(
            pred_score=float(results["image"][0]),
            pred_label=None if decided["image"] is None else bool(decided["image"][0]),
            anomaly_map=results["pixel"],
            pred_mask=decided["pixel"],
            variant=knowledge.names[position],
            source=source,
        )

    def _image_score(self, patches: Array, scores: Array, index: NDArray[np.int64], knowledge: _Knowledge) -> float:
        """PatchCore's image score: the largest patch distance, weighed by its neighborhood."""
        position = int(scores.argmax())
        neighbors = min(int(self._bundle.metadata.get("num_neighbors", 1)), len(knowledge.bank))
        if neighbors == 1:
            return float(scores[position])
        vectors = knowledge.bank.vectors
        support = np.argsort(np.linalg.norm(vectors - vectors[index[position]], axis=1), kind="stable")[:neighbors]
        distances = np.linalg.norm(patches[position] - vectors[support], axis=1)
        shares = np.exp(distances - distances.max())
        return float(scores[position] * (1 - shares[0] / shares.sum()))

    # Learning

    def learn(
        self,
        images: Source | Sequence[Source],
        variant: str | None = None,
        *,
        force: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> Learned:
        """Learn good images; :meth:`save` makes it last. When it fails, nothing is changed.

        The same images bring the same knowledge as with ``partial_fit`` on a training PC.

        Args:
            images: As in :meth:`predict`.
            variant: Name of their variant; found for each image if not given.
            force: Whether to learn images that look anomalous too.
            progress: Called with the number of images done.

        Returns:
            What was learned, and which images were held back.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If an image is unreadable, too small, of unsuitable depth or not finite, if there are none, if
                there is no room for another variant, or if the bundle has no memory bank.
        """
        items: list[Source] = [images] if isinstance(images, (str, Path, np.ndarray)) else list(images)
        if not items:
            msg = "There are no images to learn."
            raise ValueError(msg)
        with self._changing, single_threaded():
            before = self._known()
            bank = copy.deepcopy(before.bank)
            few = bool(self._bundle.metadata.get("one_shot")) and are_few(bank, variant, len(items))
            recent: dict[str, list[Array]] = defaultdict(list)
            held_back: dict[str, float] = {}
            for number, item in enumerate(items, 1):
                name = _source(item) or f"image {number}"
                image = resize(load(item, name), self.input_size)
                embedding = self._model(image)["embedding"]
                patches = embedding.reshape(-1, embedding.shape[-1])
                excess = 0.0 if force else _excess(patches, variant, before, name)
                if excess > SUSPICION:
                    held_back[name] = excess
                else:
                    learned = self._take(bank, image, patches, variant, views=few)
                    if learned is not None:
                        recent[learned] = [*recent[learned], self._normalized(image)][-RECENT_IMAGES:]
                if progress is not None:
                    progress(number)
            report = bank.commit()
            if recent:
                search = NearestNeighbors(bank.vectors)
                one_shot = bool(self._bundle.metadata.get("one_shot"))
                for name, own in recent.items():
                    calibrate_from_views(bank, name, own, self._embed, search.search, one_shot)
                self._knowledge = self._know(bank, self._bundle, search)
        return Learned(report, held_back)

    def _take(self, bank: MemoryBank, image: Array, patches: Array, variant: str | None, *, views: bool) -> str | None:
        """Take an image into the bank's stream; None if it was known."""
        normalized = self._normalized(image)
        value = image_hash(normalized)
        if bank.knows(value):
            bank.count_known(1)
            return None
        changed = None
        if views:
            embedding = self._embed(augmented_views(normalized, NUM_VIEWS, seed=value))
            changed = embedding.reshape(-1, patches.shape[1])
        return bank.learn(patches, variant, value, changed)

    def _normalized(self, image: Array) -> Array:
        return (image - self._mean) / self._std

    def _embed(self, images: Array) -> Array:
        """Patch embeddings `(B, h, w, d)` of normalised images `(B, 3, H, W)`."""
        return np.stack([self._model(image * self._std + self._mean)["embedding"] for image in images])

    # State

    def save(self) -> None:
        """Bring what was learned into the bundle, `model.xml`'s constants included, by one atomic step.

        Raises:
            BundleError: If another process has changed the bundle since it was read, or it cannot be written, or has
                no memory bank.
            TimeoutError: If another process is changing it.
        """
        from safetensors.numpy import save

        self._known()  # before a folder is locked that may be read-only
        with self._changing, bundles.locked(self._bundle.folder):
            knowledge = self._known()
            if knowledge is self._saved:
                return
            read = bundles.read(self._bundle.folder, bundles.WHOLE)
            arrays, plain = knowledge.bank.to_arrays()
            metadata = self._bundle.metadata
            room = int(metadata["variant_capacity"])
            capacity = max(room, variant_capacity(len(knowledge.names)))
            tables = graph_tables(knowledge.bank, arrays["vectors"].shape[1], capacity)
            # Without thresholds by variant, the graph has no use for the owners of vectors either.
            by_variant = metadata.get("variant_thresholds", True) and (
                metadata.get("normalization") or metadata.get("thresholding")
            )
            tables = {name: tables[name] for name in (CONSTANTS if by_variant else CONSTANTS[:2])}
            xml, weights = (read.contents[name] for name in bundles.WHOLE)
            files = {BANK: save(arrays, {"plain": json.dumps(plain, allow_nan=False)})}
            if by_variant and capacity > room:
                xml, weights = ir.with_new_shapes(xml, weights, tables)
                files["model.xml"] = xml
            files["model.bin"] = ir.with_new_values(weights, ir.find_constants(xml, tables), tables)
            changes = {"variants": knowledge.names, "variant_capacity": capacity}
            self._bundle = bundles.update(self._bundle, files, changes)
            self._saved = knowledge

    def reload(self) -> bool:
        """Take up what another process has saved in the bundle, or brought back by an undo.

        Returns:
            Whether there was something new.

        Raises:
            BundleError: If there are images that were learned, but not saved, or the bundle is damaged.
        """
        with self._changing:
            if bundles.current_version(self._bundle.folder) in {self._bundle.version, ""}:
                return False
            if self._knowledge is not self._saved:
                msg = f"The bundle {self._bundle.folder} was changed by another process, and here images were learned."
                raise BundleError(msg)
            read = bundles.read(self._bundle.folder, bundles.running_files)
            graph = bundles.WHOLE if self._knowledge is None else bundles.FEATURES
            old, new = ([one.metadata["files"].get(name) for name in graph] for one in (self._bundle, read))
            if old != new or read.contents.keys() != self._bundle.contents.keys():
                msg = f"The bundle {self._bundle.folder} is of another model now; make a new EdgeDetector of it."
                raise BundleError(msg)
            if self._knowledge is not None:
                self._knowledge = self._saved = self._know(_bank(read), read)
            self._bundle = read
        return True

    def info(self) -> dict[str, Any]:
        """What the bundle is and knows, fit for JSON."""
        knowledge, metadata = self._knowledge, self._bundle.metadata
        known: dict[str, Any] = {
            "bundle": str(self._bundle.folder),
            "saved": knowledge is self._saved,
            **{key: metadata.get(key) for key in ("model", "backbone", "layers", "compression", "anomalib_ext")},
            "input_size": list(self.input_size),
            "device": self.device,
            "precision": self.precision,
        }
        if knowledge is None:
            return {**known, "threshold": metadata.get("last_values", {}).get("image", [None])[0]}
        bank = knowledge.bank
        variants = {}
        for name, variant in bank.variants.items():
            threshold = bank.thresholds(name)["image"][0]
            variants[name] = {
                "images": variant.images,
                "vectors": len(variant.radii),
                "threshold": None if np.isnan(threshold) else threshold,
            }
        return {
            **known,
            "memory_size": bank.size,
            "vectors": len(bank),
            "radius_bound": bank.radius_bound,
            "bytes": bank.nbytes,
            "variants": variants,
        }

    def _known(self) -> _Knowledge:
        if self._knowledge is None:
            msg = (
                f"The bundle {self._bundle.folder} of {self._bundle.metadata['model']} has no memory bank, so it "
                "cannot learn here. Train the model where torch is and export it again, or take a ContinualPatchCore."
            )
            raise BundleError(msg)
        return self._knowledge

    def _know(self, bank: MemoryBank, read: Bundle, search: NearestNeighbors | None = None) -> _Knowledge:
        if not len(bank):
            msg = (
                f"The memory bank of {read.folder} is empty, so nothing can be judged. Export a model that has learned."
            )
            raise BundleError(msg)
        dimension = self._model.last_dimension
        if bank.vectors.shape[1] != dimension:
            msg = (
                f"{BANK} of {read.folder} holds vectors of {bank.vectors.shape[1]} numbers, the model gives "
                f"{dimension}: it is of another backbone or other layers. Copy the whole folder again."
            )
            raise BundleError(msg)
        values = {}
        with single_threaded():
            thresholds = [bank.thresholds(name) for name in bank.variants]
        for kind in ("image", "pixel"):
            known = read.metadata.get("last_values", {}).get(kind, [None] * 3)
            last = np.array([np.nan if value is None else value for value in known], np.float32)
            rows = np.array([one[kind] for one in thresholds], np.float32)
            if not read.metadata.get("variant_thresholds", True):
                rows[:] = np.nan
            values[kind] = np.where(np.isnan(rows), last, rows)
        return _Knowledge(bank, list(bank.variants), bank.owners, values, search or NearestNeighbors(bank.vectors))


def _search(patches: Array, knowledge: _Knowledge, name: str | None) -> tuple[Array, NDArray[np.int64]]:
    if not np.isfinite(patches).all():
        msg = f"{name or 'The image'} gives embeddings that are not finite; look for damaged weights."
        raise ValueError(msg)
    return knowledge.search.search(patches)


def _excess(patches: Array, variant: str | None, knowledge: _Knowledge, name: str) -> float:
    """Score of an image as a multiple of the threshold of the variant that it is said to be of; 0 if unknown."""
    variant = variant if variant is not None else knowledge.bank.identify(patches)
    if variant not in knowledge.names:
        return 0.0
    threshold = float(knowledge.values["image"][knowledge.names.index(variant), 0])
    if not threshold > 0:
        return 0.0
    scores, _ = _search(patches, knowledge, name)
    return float(scores.max()) / threshold


class _Network:
    """What runs in OpenVINO, from an image in [0, 1]: the backbone of a model that learns, or the whole of another."""

    def __init__(self, read: Bundle, size: tuple[int, int], device: str, precision: str) -> None:
        core = device_core()
        plain = device.partition(":")[0].partition(".")[0]
        # The CPU is always there; looking for others loads their drivers.
        if plain not in {"CPU", "AUTO", "BATCH", "HETERO", "MULTI"} and not any(
            device == known or plain == known.partition(".")[0] for known in core.available_devices
        ):
            msg = f"OpenVINO finds no device {device} on this PC. It finds {', '.join(core.available_devices)}."
            raise ValueError(msg)
        name = bundles.running_files(read.metadata)[0]
        # From memory, so that the files may be replaced while they are in use, and are what was verified.
        height, width = size
        try:
            model = core.read_model(read.contents[name], read.contents[bundles.running_files(read.metadata)[1]])
            model.reshape([1, 3, height, width])  # a fixed shape compiles and runs faster
        except RuntimeError as error:
            msg = f"{name} of {read.folder} cannot be used for images of {height} x {width} pixels: {error}"
            raise BundleError(msg) from error
        self._names = [next(iter(output.names)) for output in model.outputs]
        needed = {"embedding"} if BANK in read.contents else {"pred_score", "anomaly_map"}
        if missing := needed - set(self._names):
            msg = f"{name} of {read.folder} has no output {', '.join(sorted(missing))}; export the model again."
            raise BundleError(msg)
        self.last_dimension = int(model.output(0).partial_shape[-1].get_length())
        self._compile = lambda hint: core.compile_model(
            model, device, {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": hint}
        )
        try:
            self._compiled = self._compile("LATENCY")
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            msg = f"{name} of {read.folder} cannot be run on {device} in {precision}: {reason}"
            raise ValueError(msg) from error
        self._own = threading.local()
        self.parallel = 1

    def __call__(self, image: Array) -> Outputs:
        """Run it on an image of shape `(3, H, W)` in [0, 1]; the outputs are without the batch dimension."""
        if not hasattr(self._own, "request"):
            self._own.request = self._compiled.create_infer_request()
        request = self._own.request
        request.infer([np.ascontiguousarray(image[None])], share_inputs=True)
        # Copies, since the request will be used again.
        return {name: request.get_output_tensor(i).data[0].copy() for i, name in enumerate(self._names)}

    @cached_property
    def workers(self) -> ThreadPoolExecutor:
        """Threads for many images: as many as OpenVINO runs at a time when it is to reach the highest throughput.

        Not OpenVINO's own queue: a callback that is still running when Python ends aborts the process.
        """
        compiled, own = self._compile("THROUGHPUT"), self._own
        self.parallel = int(compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))

        def begin() -> None:
            own.request = compiled.create_infer_request()

        return ThreadPoolExecutor(self.parallel, "predict", begin)


def _bank(read: Bundle) -> MemoryBank:
    """The memory bank of a bundle."""
    from safetensors import SafetensorError
    from safetensors.numpy import load as load_arrays

    content = read.contents[BANK]
    try:
        arrays = load_arrays(content)
        length = int.from_bytes(content[:8], "little")
        plain = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["plain"])
        return MemoryBank.from_arrays(arrays, plain)
    except (SafetensorError, KeyError, ValueError) as error:
        msg = f"{BANK} of {read.folder} cannot be read: {error}"
        raise BundleError(msg) from error


def _normalize(raw: Array, threshold: np.float32, lowest: np.float32, highest: np.float32) -> Array:
    """Anomalib's normalisation: 0.5 at the threshold, in units of the range, within [0, 1]."""
    if np.isnan(lowest) or np.isnan(highest):
        return raw
    if np.isnan(threshold):
        threshold = (highest + lowest) / 2
    if highest == lowest:
        return np.where(raw > threshold, 1.0, np.where(raw < threshold, 0.0, 0.5)).astype(np.float32)
    return np.clip((raw - threshold) / (highest - lowest) + np.float32(0.5), 0, 1)


def _source(image: Source) -> str | None:
    return str(image) if isinstance(image, (str, Path)) else None
