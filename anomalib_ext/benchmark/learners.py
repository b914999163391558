# SPDX-License-Identifier: Apache-2.0
"""What is compared: ways to keep patch embeddings of a stream of products. All see the same embeddings.

Where nothing else is said, an image is scored as by ``ContinualPatchCore``: its largest patch distance to the bank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from anomalib.data import InferenceBatch

from anomalib_ext.models.components.patchcore import anomaly_maps, search
from openvino_export.memory import state as memory_state
from openvino_export.memory.k_center import farthest_first
from openvino_export.memory.memory_bank import MemoryBank
from openvino_export.memory.thresholds import f1_threshold, image_thresholds
from openvino_export.memory.update import Update

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from anomalib_ext.models.continual_patchcore.torch_model import ContinualPatchCoreModel

    from .tasks import Images, Task

    Array = NDArray[np.float32]
    State = tuple[dict[str, NDArray[Any]], dict[str, Any]]


class Learner:
    """A way to learn a stream.

    Args:
        size: Largest number of vectors in a memory bank.
        seed: Seed of whatever is random.

    Attributes:
        title: Name in tables and plots.
        needs_tasks: Whether it must be told which product an image shows, and so cannot learn a mixed stream.
        learns_images: Whether it learns image by image, and never holds the patches of more at once.
        keeps_images: Whether it must keep the images of all earlier steps to learn another.
        is_shared: Whether what it learns of one task can change how it judges another.
    """

    title: str
    needs_tasks = False
    learns_images = False
    keeps_images = False
    is_shared = True

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size = size
        self.seed = seed
        self.vectors: Array = np.empty((0, 0), np.float32)

    def nbytes(self) -> int:
        """Bytes of what judging needs."""
        return self.vectors.nbytes

    def learn(self, images: Sequence[Array], seen: Sequence[Array], task: Task | None) -> None:
        """Take in the images of a step.

        Args:
            images: Patch embeddings of each, shape ``(n, d)``.
            seen: Those of all steps so far, these included.
            task: What they are images of; None in a mixed stream.
        """
        raise NotImplementedError

    def bank(self, task: Task) -> Array:  # noqa: ARG002  # only some depend on the task
        """Vectors in which the patches of a task are looked up, shape ``(m, d)``."""
        return self.vectors

    def predict(self, images: Images, task: Task) -> InferenceBatch:
        """Scores and anomaly maps of images of a task."""
        vectors = torch.from_numpy(self.bank(task))
        scores, _ = search(images.patches.flatten(1, 2), vectors, vectors.square().sum(dim=1))
        maps = anomaly_maps(scores.unflatten(1, images.patches.shape[1:3])[:, None], images.size)
        return InferenceBatch(pred_score=scores.amax(dim=1), anomaly_map=maps)

    def decide(self, test: InferenceBatch, validation: InferenceBatch, task: Task) -> torch.Tensor:  # noqa: PLR6301
        """Which test images are called anomalous: by the threshold that is best on the task's validation images."""
        assert validation.pred_score is not None
        assert test.pred_score is not None
        return test.pred_score > f1_threshold(validation.pred_score.numpy(), task.validation.labels.numpy())

    def state(self) -> State:
        """What the next step depends on, as arrays and as plain data."""
        return {"vectors": self.vectors}, {}

    def load(self, state: State) -> None:
        """Go on from what :meth:`state` gave."""
        self.vectors = state[0]["vectors"]


class ContinualPatchCoreLearner(Learner):
    """``ContinualPatchCore``, which judges each image by the threshold of the variant that it finds."""

    title = "ContinualPatchCore"
    learns_images = True

    def __init__(self, size: int, seed: int, model: ContinualPatchCoreModel) -> None:
        super().__init__(size, seed)
        self.memory = MemoryBank(size)
        self._model = model

    def nbytes(self) -> int:
        """Bytes of the bank, with what renews the thresholds."""
        return self.memory.nbytes()

    def learn(self, images: Sequence[Array], seen: Sequence[Array], task: Task | None) -> None:
        """Learn. Good images set the thresholds."""
        del seen
        update = Update(self.memory)
        for image in images:
            update.add(image, task.variant if task else None)
        update.commit()
        self.memory = update.bank

    def predict(self, images: Images, task: Task) -> Any:  # noqa: ANN401  # with variant
        """As the model does."""
        del task
        self._model.bank = self.memory
        self._model.refresh()
        return self._model.score(images.patches, *self._model.search(images.patches), images.size)

    def decide(self, test: Any, validation: InferenceBatch, task: Task) -> torch.Tensor:  # noqa: ANN401  # with variant
        """By the threshold of the variant that each image is found to be of."""
        del validation, task
        limits = torch.tensor(list(image_thresholds(self.memory).values()))
        return test.pred_score > limits[test.variant]

    def state(self) -> State:
        """The bank."""
        return memory_state.to_arrays(self.memory)

    def load(self, state: State) -> None:
        """Go on with a bank."""
        self.memory = memory_state.from_arrays(*state).bank


class Joint(Learner):
    """PatchCore learned anew on all images so far: farthest-first over all their patches."""

    title = "PatchCore, joint"
    keeps_images = True

    def learn(self, images: Sequence[Array], seen: Sequence[Array], task: Task | None) -> None:
        """Select anew."""
        del images, task
        self.vectors = _farthest_first(seen, self.size)


class LastProduct(Learner):
    """PatchCore learned anew on the images of the last step only."""

    title = "PatchCore, last product"

    def learn(self, images: Sequence[Array], seen: Sequence[Array], task: Task | None) -> None:
        """Select anew."""
        del seen, task
        self.vectors = _farthest_first(images, self.size)


class PerProduct(Learner):
    """A PatchCore of each product, and someone who says which product an image shows."""

    title = "PatchCore, per product"
    needs_tasks = True
    is_shared = False

    def __init__(self, size: int, seed: int = 0) -> None:
        super().__init__(size, seed)
        self.banks: dict[str, Array] = {}

    def nbytes(self) -> int:
        """Bytes of all banks."""
        return sum(bank.nbytes for bank in self.banks.values())

    def learn(self, images: Sequence[Array], seen: Sequence[Array], task: Task | None) -> None:
        """Select a bank of its own."""
        del seen
        assert task is not None
        self.banks = {**self.banks, task.name: _farthest_first(images, self.size)}

    def bank(self, task: Task) -> Array:
        """The bank of the task."""
        return self.banks[task.name]

    def state(self) -> State:
        """All banks."""
        return {f"bank.{name}": bank for name, bank in self.banks.items()}, {}

    def load(self, state: State) -> None:
        """Go on with these banks."""
        self.banks = {name.removeprefix("bank."): bank for name, bank in state[0].items()}


class Reservoir(Learner):
    """A bank that is at any time a random sample of all patches so far (Vitter 1985, algorithm R)."""

    title = "reservoir"
    learns_images = True

    def __init__(self, size: int, seed: int = 0) -> None:
        super().__init__(size, seed)
        self.count = 0  # of patches so far

    def learn(self, images: Sequence[Array], seen: Sequence[Array], task: Task | None) -> None:
        """Let each patch take a random place, if there is one for it."""
        del seen, task
        rng = np.random.default_rng([self.seed, self.count])
        for image in images:
            free = min(self.size - len(self.vectors), len(image))
            if free:
                self.vectors = np.concatenate([self.vectors.reshape(-1, image.shape[1]), image[:free]])
            order = np.arange(self.count + free, self.count + len(image))
            places = rng.integers(0, order + 1)
            taken = places < self.size
            self.vectors[places[taken]] = image[free:][taken]  # of several for one place the last stays
            self.count += len(image)

    def state(self) -> State:
        """The bank, and how many patches it stands for."""
        return {"vectors": self.vectors}, {"count": self.count}

    def load(self, state: State) -> None:
        """Go on from there."""
        super().load(state)
        self.count = state[1]["count"]


def _farthest_first(images: Sequence[Array], size: int) -> Array:
    patches = np.concatenate(images)
    return patches[farthest_first(patches, size)[0]]
