# SPDX-License-Identifier: Apache-2.0
"""Patch embeddings, search in the memory bank, and anomaly maps of ContinualPatchCore."""

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from torch import nn

from anomalib_ext.models.components import patchcore
from anomalib_ext.models.components.backbone import load_backbone
from openvino_export.bundle.constants import bank_tables
from openvino_export.memory.augment import NUM_VIEWS, augmented_views, image_hash
from openvino_export.memory.memory_bank import MemoryBank

if TYPE_CHECKING:
    from anomalib.data.utils.tiler import Tiler

logger = logging.getLogger(__name__)


class ContinualInferenceBatch(NamedTuple):
    """Anomalib's ``InferenceBatch`` and, for every image, the position of its variant in the bank."""

    pred_score: torch.Tensor | None = None
    pred_label: torch.Tensor | None = None
    anomaly_map: torch.Tensor | None = None
    pred_mask: torch.Tensor | None = None
    variant: torch.Tensor | None = None


class ContinualPatchCoreModel(nn.Module):
    """PatchCore's embedding and score over a memory bank of static size.

    Args:
        backbone: Name of a timm model.
        layers: Names of the layers whose features are concatenated.
        pre_trained: Whether the backbone is pretrained.
        backbone_weights: File with the backbone's weights.
        memory_size: Largest number of vectors in the memory bank.
        num_neighbors: Neighbors that weigh the image score; 1 takes the largest patch distance as it is.
        precision: ``float32`` or ``float16``, in which the bank is kept.

    Attributes:
        bank: What was learned; all other state is derived from it.
        interrupted: The same bank in the middle of an update, if a checkpoint of one was loaded. The next update goes
            on with it, as if there had been no interruption.
    """

    memory_bank: torch.Tensor
    squares: torch.Tensor
    owners: torch.Tensor
    positions: torch.Tensor

    def __init__(
        self,
        backbone: str,
        layers: Sequence[str],
        pre_trained: bool = True,
        backbone_weights: str | Path | None = None,
        memory_size: int = 10_000,
        num_neighbors: int = 1,
        precision: str = "float32",
    ) -> None:
        super().__init__()
        if num_neighbors < 1:
            msg = f"num_neighbors must be at least 1, got {num_neighbors}."
            raise ValueError(msg)
        self.bank = MemoryBank(memory_size, precision)
        self.interrupted: MemoryBank | None = None
        self.backbone = backbone
        self.num_neighbors = num_neighbors
        self.tiler: Tiler | None = None
        self.feature_extractor = load_backbone(backbone, layers, pre_trained, backbone_weights).eval()
        self.layers = list(self.feature_extractor.layers)
        self.feature_pooler = nn.AvgPool2d(3, 1, 1)
        for name in ("memory_bank", "squares", "owners", "positions"):
            self.register_buffer(name, torch.empty(0), persistent=False)
        self.refresh()

    # Anomalib's own, which reads the layers.
    generate_embedding = PatchcoreModel.generate_embedding

    def forward(self, images: torch.Tensor) -> ContinualInferenceBatch:
        """Score normalised images of shape ``(B, 3, H, W)``, see :meth:`judge`."""
        embedding = self.embed(images)
        return self.judge(embedding, *self.search(embedding), images.shape[-2:])

    def search(self, embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Look patches up in the bank.

        Args:
            embedding: Patch embeddings, shape ``(B, h, w, d)``.

        Returns:
            Distance of each patch to its nearest vector, and the index of that vector, each of shape ``(B, h * w)``.

        Raises:
            RuntimeError: If nothing was learned yet.
            ValueError: If an image gives scores that are not finite.
        """
        patchcore.check_learned(len(self.bank), "Engine.fit or partial_fit")
        return patchcore.search(embedding.flatten(1, 2), self.memory_bank, self.squares)

    def judge(
        self,
        embedding: torch.Tensor,
        scores: torch.Tensor,
        locations: torch.Tensor,
        size: torch.Size,
    ) -> ContinualInferenceBatch:
        """Score images by what :meth:`search` found.

        Args:
            embedding: Patch embeddings, shape ``(B, h, w, d)``.
            scores: Distances of the patches, shape ``(B, h * w)``.
            locations: Indices of the nearest vectors, shape ``(B, h * w)``.
            size: Height and width of the images.

        Returns:
            Raw scores of shape ``(B,)``, anomaly maps ``(B, 1, H, W)`` and variants ``(B,)``.
        """
        batch, height, width, _ = embedding.shape
        votes = self.owners[locations].unsqueeze(-1) == self.positions
        return ContinualInferenceBatch(
            pred_score=patchcore.image_score(
                scores,
                locations,
                embedding.flatten(1, 2),
                self.memory_bank,
                self.squares,
                min(self.num_neighbors, len(self.bank)),
            ),
            anomaly_map=patchcore.anomaly_maps(scores.reshape(batch, 1, height, width), size),
            variant=votes.sum(dim=1).argmax(dim=-1),
        )

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Patch embeddings of shape ``(B, h, w, d)``, in float32, for images of shape ``(B, 3, H, W)``."""
        return patchcore.embed(images, self._pooled_features, self.tiler)

    def _pooled_features(self, images: torch.Tensor) -> torch.Tensor:
        features = self.feature_extractor(images)
        return self.generate_embedding({layer: self.feature_pooler(value) for layer, value in features.items()})

    def nearest_neighbors(self, embedding: torch.Tensor, n_neighbors: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Distances to the nearest vectors and their indices, each ``(..., n_neighbors)``, squeezed for one."""
        return patchcore.nearest_neighbors(embedding, self.memory_bank, self.squares, min(n_neighbors, len(self.bank)))

    @torch.no_grad()
    def learn(self, images: torch.Tensor, variant: str | None, augment: bool = False) -> list[str | None]:
        """Take images into the bank's stream.

        Args:
            images: Normalised images, shape ``(B, 3, H, W)``.
            variant: Name of their variant; found for each image if not given.
            augment: Whether to learn augmented views of each image too.

        Returns:
            The variant of each image, None where the image was known before the update.
        """
        names: list[str | None] = [None] * len(images)
        arrays = images.detach().float().cpu().numpy()
        hashes = [image_hash(image) for image in arrays]
        new = [i for i, value in enumerate(hashes) if not self.bank.knows(value)]
        if len(new) < len(images):
            self.bank.count_known(len(images) - len(new))
            names = [self.bank.resumed(value) for value in hashes]
        for i, embedding in zip(new, self.embed(images[new]) if new else [], strict=True):
            views = None
            if augment:
                augmented = torch.from_numpy(augmented_views(arrays[i], NUM_VIEWS, seed=hashes[i]))
                views = self.embed(augmented.to(images)).flatten(0, 2).cpu().numpy()
            names[i] = self.bank.learn(embedding.flatten(0, 1).cpu().numpy(), variant, hashes[i], views)
        return names

    def refresh(self) -> None:
        """Bring the bank into the tensors that are searched."""
        tables = bank_tables(self.bank, sum(self.feature_extractor.out_dims), len(self.bank.variants))
        device = self.memory_bank.device
        tensors = (torch.from_numpy(table).to(device) for table in tables.values())
        self.memory_bank, self.squares, self.owners, self.positions = tensors

    def get_extra_state(self) -> dict[str, Any]:
        """The bank, with the open stream, and what it depends on, as tensors and plain data."""
        arrays, plain = (self.bank if self.interrupted is None else self.interrupted).to_arrays()
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return {"backbone": self.backbone, "layers": self.layers, "tensors": tensors, "plain": plain}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Load what :meth:`get_extra_state` gave; see :meth:`read_bank` for errors."""
        own, self.bank, self.interrupted = self.bank, self.read_bank(state), None
        if (self.bank.size, self.bank.dtype) != (own.size, own.dtype):
            logger.warning(
                "The checkpoint's memory_size %d and precision %s are used, not %d and %s.",
                *(self.bank.size, self.bank.dtype, own.size, own.dtype),
            )
        if self.bank.is_learning:
            self.interrupted = copy.deepcopy(self.bank)
            self.bank.commit()
        self.refresh()

    def read_bank(self, state: dict[str, Any]) -> MemoryBank:
        """Bank of a state that :meth:`get_extra_state` gave.

        Raises:
            ValueError: If the state is of another backbone or other layers, or damaged.
        """
        for key, own in (("backbone", self.backbone), ("layers", self.layers)):
            if state[key] != own:
                msg = (
                    f"The checkpoint has {key} {state[key]!r}, this model has {own!r}. Their memories do not mix: "
                    f"make the model with {key}={state[key]!r}, or learn anew."
                )
                raise ValueError(msg)
        arrays = {name: tensor.cpu().numpy() for name, tensor in state["tensors"].items()}
        return MemoryBank.from_arrays(arrays, state["plain"])
