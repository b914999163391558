# SPDX-License-Identifier: Apache-2.0
"""Inspection and further learning with a bundle, without torch."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .bundle import folder as bundles
from .bundle import ir
from .bundle.constants import constants_in, graph_tables, takes_defects, variant_capacity
from .bundle.folder import BANK, Bundle, BundleError
from .decision import Decider, Prediction
from .drift import DriftMonitor
from .edits import BankEdits
from .images import image_hash, load_resized
from .info import about
from .learning import regions_of, show_defect, take_in
from .memory import state
from .memory.k_center import single_threaded
from .memory.names import checked_name
from .memory.thresholds import image_thresholds
from .memory.update import Update
from .network import Network

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Sequence
    from concurrent.futures import Future

    from numpy.typing import NDArray

    from .learning import Region
    from .memory.memory_bank import MemoryBank
    from .memory.report import Report

    Array = NDArray[np.float32]
    Source = str | Path | NDArray[Any]


@dataclass(frozen=True)
class Learned:
    """What a call of :meth:`EdgeDetector.learn` did.

    Attributes:
        report: What changed in the memory bank.
    """

    report: Report

    @property
    def held_back(self) -> dict[str, float]:
        """Images that were not learned because they look anomalous; see :class:`Report`."""
        return self.report.held_back


class OtherModelError(BundleError):
    """A bundle is of another model than before; a new :class:`EdgeDetector` takes it."""


class EdgeDetector(BankEdits):
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
        self._network = Network(read, self.input_size, device, self.precision)
        self._bundle = read
        # Replaced as a whole by learning, never modified; None without a memory bank.
        self._decider = self._saved = _decider_of(read, self._network.last_dimension) if BANK in read.contents else None
        self._changing = threading.RLock()

    @property
    def bank(self) -> MemoryBank:
        """What is known now. It never changes: learning puts another one in its place."""
        return self._known().bank

    def drift_monitor(self) -> DriftMonitor | None:
        """A monitor of what is known now; None without a memory bank, or for scores of a former version."""
        if self._decider is None or self._bundle.metadata.get("score") != "rate":
            return None
        return DriftMonitor(self._decider.bank)

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
        return self._network.workers.submit(self._predict, image)

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
            if len(waiting) > 2 * self._network.parallel:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()

    def _predict(self, images: Source) -> Prediction:
        source = _source(images)
        outputs = self._network(load_resized(images, self.input_size)[0])
        if self._decider is not None:
            return self._decider.decide(outputs["embedding"], self.input_size, source)
        label, mask = outputs.get("pred_label"), outputs.get("pred_mask")
        return Prediction(
            pred_score=float(outputs["pred_score"].item()),
            pred_label=None if label is None else bool(label.item()),
            anomaly_map=outputs["anomaly_map"].reshape(self.input_size),
            pred_mask=None if mask is None else mask.reshape(self.input_size).astype(bool),
            variant=None,
            source=source,
        )

    # Learning

    def learn(
        self,
        images: Source | Sequence[Source],
        variant: str | None = None,
        *,
        force: bool = False,
        defective: bool = False,
        regions: Region | Sequence[Region] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Learned:
        """Learn good images, or what a defect looks like; :meth:`save` makes it last. A failure changes nothing.

        The images that are learned bring the same knowledge as with ``partial_fit`` on a training PC.

        Args:
            images: As in :meth:`predict`.
            variant: Name of their variant; found for each image if not given.
            force: Whether to learn images that look anomalous too, and as a variant whose name differs from a known one
                by case or blanks alone.
            defective: Whether the images are shown as defective. What is like their defects is found from then on.
            regions: Where the defect is in each of them: a path or array of a mask of the image's size, or left, top,
                right and bottom of a box in pixels. By default it is looked for.
            progress: Called with the number of images done.

        Returns:
            What was learned, and which images were held back.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If an image is unreadable, too small, of unsuitable depth or not finite, if there are none, if
                the variant's name is blank or so alike a known one that it may be a mistake, if there is no room for
                another variant, if a defect is of a variant that is not known, or if the bundle
                has no memory bank or takes no defects.
        """
        items: list[Source] = [images] if isinstance(images, (str, Path, np.ndarray)) else list(images)
        if not items:
            msg = "There are no images to learn."
            raise ValueError(msg)
        self._known()
        places = regions_of(regions, len(items), defective=defective)
        if defective and not takes_defects(self._bundle.metadata):
            msg = f"The bundle {self._bundle.folder} takes no defects: a former version wrote it. Export it again."
            raise BundleError(msg)
        with self._changing, single_threaded():
            known = self._known()
            variant = None if variant is None else checked_name(variant, known.names, force=force)
            update = Update(known.bank)
            limits = None if force else image_thresholds(known.bank)
            for number, (item, region) in enumerate(zip(items, places, strict=True), 1):
                name = _source(item) or f"image {number}"
                image, size = load_resized(item, self.input_size, name)
                if defective:
                    embedding = self._embed(image)
                    show_defect(update, name, embedding, variant, region, image_size=size, map_size=self.input_size)
                else:
                    value = image_hash((image - self._mean) / self._std)
                    take_in(update, name, image, self._embed, variant, value, bank=known.bank, limits=limits)
                if progress is not None:
                    progress(number)
            report = update.commit()
            if update.bank is not known.bank:
                self._decider = Decider(update.bank, self._bundle.metadata)
        return Learned(report)

    def edit_bank(self, change: Callable[[MemoryBank], MemoryBank]) -> None:
        """Judge from now on by what a function makes of the bank; :meth:`save` makes it last."""
        with self._changing:
            bank = change(self._known().bank)
            if bank.size < (neighbors := int(self._bundle.metadata.get("num_neighbors", 1))):
                msg = f"memory_size must be at least {neighbors}, the num_neighbors of the model, got {bank.size}."
                raise ValueError(msg)
            self._decider = Decider(bank, self._bundle.metadata)

    def _embed(self, image: Array) -> Array:
        """Patch embeddings, shape `(h, w, d)`."""
        return self._network(image)["embedding"]

    # State

    def save(self) -> None:
        """Bring what was learned into the bundle, `model.xml`'s constants included, by one atomic step.

        Raises:
            BundleError: If another process has changed the bundle since it was read, or it cannot be written, or has
                no memory bank.
            TimeoutError: If another process is changing it.
        """
        self._known()  # before a folder is locked that may be read-only
        with self._changing, bundles.locked(self._bundle.folder):
            known = self._known()
            if known is self._saved:
                return
            read = bundles.read(self._bundle.folder, bundles.WHOLE)
            metadata = self._bundle.metadata
            capacity = max(int(metadata["variant_capacity"]), variant_capacity(len(known.names)))
            by_range = metadata.get("score") != "rate"
            tables = graph_tables(known.bank, self._network.last_dimension, capacity, by_range)
            tables = {name: tables[name] for name in constants_in(metadata)}
            xml, weights = (read.contents[name] for name in bundles.WHOLE)
            graph = ir.with_tables(xml, weights, tables)
            changes = {"variants": known.names, "variant_capacity": capacity}
            self._bundle = bundles.update(self._bundle, {BANK: state.to_bytes(known.bank), **graph}, changes)
            self._saved = known

    def reload(self, *, discard: bool = False) -> bool:
        """Take up what another process has saved in the bundle, or brought back by an undo.

        Args:
            discard: Whether what was learned here and not saved may be dropped; learn it again then.

        Returns:
            Whether there was something new.

        Raises:
            OtherModelError: If it is a bundle of another model now.
            BundleError: If there are images that were learned, but not saved, or the bundle is damaged.
        """
        with self._changing:
            if bundles.current_version(self._bundle.folder) in {self._bundle.version, ""}:
                return False
            if self._decider is not self._saved and not discard:
                msg = (
                    f"The bundle {self._bundle.folder} was changed by another process, and what was learned here is "
                    "not saved. Call reload(discard=True), which drops it, then learn it again."
                )
                raise BundleError(msg)
            # An update moves within milliseconds; one who copies may take minutes, for which nobody is to wait.
            read = bundles.read(self._bundle.folder, bundles.running_files, patience=2)
            graph = bundles.WHOLE if self._decider is None else bundles.FEATURES
            old, new = ([one.metadata["files"].get(name) for name in graph] for one in (self._bundle, read))
            if old != new or read.contents.keys() != self._bundle.contents.keys():
                msg = f"The bundle {self._bundle.folder} is of another model now; make a new EdgeDetector of it."
                raise OtherModelError(msg)
            if self._decider is not None:
                self._decider = self._saved = _decider_of(read, self._network.last_dimension)
            self._bundle = read
        return True

    def info(self) -> dict[str, Any]:
        """What the bundle is and knows, fit for JSON."""
        decider = self._decider
        return {
            "bundle": str(self._bundle.folder),
            "saved": decider is self._saved,
            "input_size": list(self.input_size),
            "device": self.device,
            "precision": self.precision,
            **about(self._bundle.metadata, None if decider is None else decider.bank),
        }

    def _known(self) -> Decider:
        if self._decider is None:
            msg = (
                f"The bundle {self._bundle.folder} of {self._bundle.metadata['model']} has no memory bank, so it "
                "cannot learn here. Train the model where torch is and export it again, or take a ContinualPatchCore."
            )
            raise BundleError(msg)
        return self._decider


def _source(image: Source) -> str | None:
    return str(image) if isinstance(image, (str, Path)) else None


def _decider_of(read: Bundle, dimension: int) -> Decider:
    """What a bundle knows whose model gives vectors of a dimension."""
    try:
        bank = state.from_bytes(read.contents[BANK])
    except ValueError as error:
        msg = f"{BANK} of {read.folder} cannot be read: {error}"
        raise BundleError(msg) from error
    if not len(bank):
        msg = f"The memory bank of {read.folder} is empty, so nothing can be judged. Export a model that has learned."
        raise BundleError(msg)
    if bank.dimension() != dimension:
        msg = (
            f"{BANK} of {read.folder} holds vectors of {bank.dimension()} numbers, the model gives "
            f"{dimension}: it is of another backbone or other layers. Copy the whole folder again."
        )
        raise BundleError(msg)
    return Decider(bank, read.metadata)
