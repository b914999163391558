# SPDX-License-Identifier: Apache-2.0
"""What models with PatchCore's memory bank share (arXiv 2106.08265): embedding, search, scores, life in a trainer.

The results are those of Anomalib's ``Patchcore``. The ways to them are ours, fast and ready for export: the bank's
squared lengths are given and not taken anew, one matrix product ranks the vectors, and only the nearest one's distance
is taken.
"""

from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from anomalib.data import ImageBatch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from openvino_export.anomaly_map import map_matrix

from .checks import check_files
from .training import InspectionModule

if TYPE_CHECKING:
    from anomalib.data.utils.tiler import Tiler

T = TypeVar("T")
# Patches that are looked up at a time; with 64 and 1024 the search was slower.
CHUNK_SIZE = 256


class ExactBuffers(nn.Module):
    """Keeps the numbers of its own buffers when a trainer converts the model to another precision."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "ExactBuffers":
        exact = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self


def embed(
    images: torch.Tensor,
    embedding: Callable[[torch.Tensor], torch.Tensor],
    tiler: "Tiler | None",
) -> torch.Tensor:
    """Patch embeddings of shape ``(B, h, w, d)``, in float32.

    Args:
        images: Normalised images, shape ``(B, 3, H, W)``.
        embedding: Gives ``(b, d, h, w)`` for some of them, or for their tiles.
        tiler: Cuts images into tiles, and puts their embeddings together.
    """
    # The length last: asking for it while a model is exported would fix the batch size.
    if not torch.compiler.is_compiling() and images.device.type == "cpu" and len(images) > 1:
        # The feature maps of a batch do not stay in a CPU's cache: one by one takes half the time.
        return torch.cat([embed(image, embedding, tiler) for image in images.split(1)])
    maps = tiler.untile(embedding(tiler.tile(images))) if tiler else embedding(images)
    return maps.permute(0, 2, 3, 1).float()


def check_learned(num_vectors: int, how_to_learn: str) -> None:
    """Refuse to score with an empty memory bank.

    Args:
        num_vectors: Number of vectors in the bank.
        how_to_learn: Methods that learn.

    Raises:
        RuntimeError: If there are no vectors.
    """
    if not num_vectors:
        msg = (
            f"The memory bank is empty, so nothing can be judged. Learn normal images first ({how_to_learn}), or load "
            "a checkpoint (--ckpt_path)."
        )
        raise RuntimeError(msg)


def search(patches: torch.Tensor, bank: torch.Tensor, squares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Look the patches of images up.

    Args:
        patches: Patch embeddings, shape ``(B, n, d)``.
        bank: Vectors, shape ``(m, d)``.
        squares: Their squared lengths, shape ``(m,)``; infinite for a row that is not used.

    Returns:
        Distance of each patch to its nearest vector, and the index of that vector, each of shape ``(B, n)``.

    Raises:
        ValueError: If an image gives scores that are not finite.
    """
    if torch.compiler.is_compiling():  # for export: one product, the batch dimension stays open
        return nearest_neighbors(patches, bank, squares)
    # Few patches at a time: the distances of a batch would take gigabytes, and those of an image leave a CPU's cache.
    found = [nearest_neighbors(chunk, bank, squares) for chunk in patches.flatten(0, 1).split(CHUNK_SIZE)]
    scores, locations = (torch.cat(part).reshape(patches.shape[:2]) for part in zip(*found, strict=True))
    if not torch.isfinite(scores).all():
        bad = (~torch.isfinite(scores).all(dim=1)).nonzero().flatten().tolist()
        msg = f"Images {bad} of the batch give scores that are not finite; look for NaN in them or the weights."
        raise ValueError(msg)
    return scores, locations


def nearest_neighbors(
    queries: torch.Tensor,
    bank: torch.Tensor,
    squares: torch.Tensor,
    count: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distances to the nearest vectors and their indices, each ``(..., count)``, squeezed for one.

    Args:
        queries: Shape ``(..., d)``.
        bank: Vectors, shape ``(m, d)``.
        squares: Their squared lengths, shape ``(m,)``; infinite for a row that is not used.
        count: Number of neighbors, at most the number of rows that are used.
    """
    bank = bank.float()
    with torch.autocast(queries.device.type, enabled=False):  # the nearest are too close for half precision
        # The square of the query is the same for all vectors.
        if queries.ndim == 2:
            ranking = torch.addmm(squares, queries, bank.T, alpha=-2)  # one pass over the products
        else:
            ranking = squares - 2 * (queries @ bank.T)
    if count == 1 and not torch.compiler.is_compiling():
        index = ranking.min(dim=-1, keepdim=True).indices  # `argmin` takes five times as long on a CPU
    else:
        # In an export OpenVINO would have to find the first of equal minima, which takes several times as long. It may
        # find any: equal vectors vote for one variant, see `bank_tables`.
        index = ranking.topk(count, dim=-1, largest=False).indices
    # Taken directly, the distance does not suffer from the difference of large squares.
    distances = torch.linalg.vector_norm(queries.unsqueeze(-2) - bank[index], dim=-1)
    return (distances.squeeze(-1), index.squeeze(-1)) if count == 1 else (distances, index)


def image_score(
    scores: torch.Tensor,
    locations: torch.Tensor,
    patches: torch.Tensor,
    bank: torch.Tensor,
    squares: torch.Tensor,
    num_neighbors: int,
) -> torch.Tensor:
    """PatchCore's image score, of shape ``(B,)``: the largest patch distance, weighed by its neighborhood.

    Args:
        scores: Distance of each patch to its nearest vector, shape ``(B, n)``.
        locations: Index of that vector, shape ``(B, n)``.
        patches: Patch embeddings, shape ``(B, n, d)``.
        bank: Vectors, shape ``(m, d)``.
        squares: Their squared lengths, shape ``(m,)``; infinite for a row that is not used.
        num_neighbors: Neighbors that weigh, at most the number of rows that are used; 1 takes the distance as it is.
    """
    largest, position = scores.max(dim=1, keepdim=True)
    if num_neighbors == 1:
        return largest.squeeze(1)
    bank = bank.float()
    patch = patches.gather(1, position.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
    _, support = nearest_neighbors(bank[locations.gather(1, position)], bank, squares, num_neighbors)
    distances = torch.linalg.vector_norm(patch.unsqueeze(2) - bank[support], dim=-1)
    return (largest * (1 - distances.softmax(dim=-1)[..., 0])).squeeze(1)


def anomaly_maps(scores: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Anomaly maps of shape ``(B, 1, H, W)`` from patch scores of shape ``(B, 1, h, w)``.

    Raises:
        ValueError: If the height and width are not known while a model is exported.
    """
    if not all(isinstance(side, int) for side in (*scores.shape[2:], *size)):  # symbols, while a model is exported
        msg = "An anomaly map needs images of known size: give input_size, or a pre-processor that resizes."
        raise ValueError(msg)
    rows, columns = (
        torch.from_numpy(map_matrix(patches, pixels)).to(scores.device)
        for patches, pixels in zip(scores.shape[2:], size, strict=True)
    )
    with torch.autocast(scores.device.type, enabled=False):
        return rows @ scores @ columns.T


class PatchCoreModule(InspectionModule):
    """Life in a trainer of a model that learns by looking once at each image. To be named before ``AnomalibModule``."""

    @staticmethod
    def configure_optimizers() -> None:
        """Nothing is optimised."""

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """One pass over the images on one device."""
        return {"gradient_clip_val": 0, "max_epochs": 1, "num_sanity_val_steps": 0, "devices": 1}

    def setup(self, stage: str) -> None:
        """Prepare a fit; in several processes, all begin with the same weights."""
        super().setup(stage)
        strategy = self.trainer.strategy
        if stage != TrainerFn.FITTING or not isinstance(strategy, DDPStrategy):
            return

        def share_weights() -> None:
            """Stand in for DDP, which refuses a model that needs no gradients."""
            del strategy.configure_ddp  # it is the class's again for what this trainer fits next
            for tensor in (*self.parameters(), *self.buffers()):
                torch.distributed.broadcast(tensor.data, src=0)

        setattr(strategy, "configure_ddp", share_weights)  # noqa: B010  # or mypy sees a method replaced

    def gathered(self, items: list[T]) -> list[T]:
        """Those of all processes that train together, alike on each; every process must call it equally often."""
        if self.trainer.world_size == 1:
            return items
        parts: list[list[T]] = [[] for _ in range(self.trainer.world_size)]
        torch.distributed.all_gather_object(parts, items)
        return list(chain.from_iterable(parts))

    def learn_batch(self, batch: ImageBatch) -> None:
        """Learn a batch of normal images, and what :meth:`gathered` gives of other processes."""
        raise NotImplementedError

    def training_step(self, batch: ImageBatch, *args, **kwargs) -> torch.Tensor:
        """Learn a batch of normal images, whose files are checked; Lightning wants a loss.

        Raises:
            ValueError: If the images cannot be learned.
        """
        del args, kwargs
        check_files(batch.image_path)
        self.learn_batch(batch)
        return torch.tensor(0.0, requires_grad=True, device=self.device)
