# SPDX-License-Identifier: Apache-2.0
"""Patch embeddings, search in the memory bank, and anomaly maps of ContinualPatchCore."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from numpy.typing import NDArray
from torch import nn

from anomalib_ext.models.components import patchcore
from anomalib_ext.models.components.backbone import load_backbone
from openvino_export.bundle.constants import bank_tables, defect_tables
from openvino_export.memory import state
from openvino_export.memory.defects import LARGEST_RAISE
from openvino_export.memory.memory_bank import MEMORY_SIZE, MemoryBank
from openvino_export.memory.thresholds import FALSE_ALARM_RATE
from openvino_export.memory.update import Update, validated
from openvino_export.memory.variant import Calibration

if TYPE_CHECKING:
    from anomalib.data.utils.tiler import Tiler

logger = logging.getLogger(__name__)

# Buffers that hold the tables of a bank, by the names of these.
BUFFERS = {
    "vectors": "memory_bank",
    **{name: name for name in ("squares", "owners", "positions")},
    **{name: name for name in ("defects", "defect_squares", "defect_scales", "defect_owners")},
}


class ContinualInferenceBatch(NamedTuple):
    """Anomalib's ``InferenceBatch`` and, for every image, the position of its variant in the bank."""

    pred_score: torch.Tensor | None = None
    pred_label: torch.Tensor | None = None
    anomaly_map: torch.Tensor | None = None
    pred_mask: torch.Tensor | None = None
    variant: torch.Tensor | None = None


class ContinualPatchCoreModel(patchcore.ExactBuffers):
    """PatchCore's embedding and score over a memory bank of static size.

    Args:
        backbone: Name of a timm model.
        layers: Names of the layers whose features are concatenated.
        pre_trained: Whether the backbone is pretrained.
        backbone_weights: File with the backbone's weights.
        memory_size: Largest number of vectors in the memory bank; without it that of a state that is loaded.
        num_neighbors: Neighbors that weigh the image score; 1 takes the largest patch distance as it is.
        precision: ``float32`` or ``float16``, in which the bank is kept.
        false_alarm_rate: Share of good images that may be called anomalous; without it that of a state that is loaded.

    Attributes:
        bank: What was learned; all other state is derived from it.
        update: The update that is under way, if there is one; setting it to None forgets it.
        interrupted: An update in the middle of which a checkpoint was saved, once that is loaded, or another update
            was begun. The next one goes on with it, as if there had been no interruption.
        searched: The bank that images are judged by since :meth:`refresh`.
    """

    memory_bank: torch.Tensor
    squares: torch.Tensor
    owners: torch.Tensor
    positions: torch.Tensor
    defects: torch.Tensor
    defect_squares: torch.Tensor
    defect_scales: torch.Tensor
    defect_owners: torch.Tensor

    def __init__(
        self,
        backbone: str,
        layers: Sequence[str],
        pre_trained: bool = True,
        backbone_weights: str | Path | None = None,
        memory_size: int | None = None,
        num_neighbors: int = 1,
        precision: str = "float32",
        false_alarm_rate: float | None = None,
    ) -> None:
        super().__init__()
        if num_neighbors < 1:
            msg = f"num_neighbors must be at least 1, got {num_neighbors}."
            raise ValueError(msg)
        self.false_alarm_rate = false_alarm_rate
        rate = FALSE_ALARM_RATE if false_alarm_rate is None else false_alarm_rate
        self.memory_size = memory_size
        size = MEMORY_SIZE if memory_size is None else memory_size
        self.bank = MemoryBank(size, precision, false_alarm_rate=rate)
        self.update: Update | None = None
        self.interrupted: Update | None = None
        self.backbone = backbone
        self.num_neighbors = num_neighbors
        self.tiler: Tiler | None = None
        self.feature_extractor = load_backbone(backbone, layers, pre_trained, backbone_weights).eval()
        self.layers = list(self.feature_extractor.layers)
        self.feature_pooler = nn.AvgPool2d(3, 1, 1)
        for name in BUFFERS.values():
            self.register_buffer(name, torch.empty(0), persistent=False)
        self.refresh()

    # Anomalib's own, which reads the layers.
    generate_embedding = PatchcoreModel.generate_embedding

    def forward(self, images: torch.Tensor) -> ContinualInferenceBatch:
        """Score normalised images of shape ``(B, 3, H, W)``, see :meth:`score`."""
        embedding = self.embed(images)
        return self.score(embedding, *self.search(embedding), images.shape[-2:])

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
        patchcore.check_learned(len(self.searched), "Engine.fit or partial_fit")
        return patchcore.search(embedding.flatten(1, 2), self.memory_bank, self.squares)

    def score(
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
        variant = votes.sum(dim=1).argmax(dim=-1)
        scores = self._raised(embedding.flatten(1, 2), scores, variant)
        return ContinualInferenceBatch(
            pred_score=patchcore.image_score(
                scores,
                locations,
                embedding.flatten(1, 2),
                self.memory_bank,
                self.squares,
                min(self.num_neighbors, len(self.searched)),
            ),
            anomaly_map=patchcore.anomaly_maps(scores.reshape(batch, 1, height, width), size),
            variant=variant,
        )

    def _raised(self, patches: torch.Tensor, scores: torch.Tensor, variant: torch.Tensor) -> torch.Tensor:
        """Distances of patches ``(B, n, d)``, raised near defects that were shown; as `raised` in `defects.py`."""
        with torch.autocast(patches.device.type, enabled=False):
            squares = self.defect_squares - 2 * (patches.float() @ self.defects.T)
            squares = (squares + patches.float().square().sum(dim=-1, keepdim=True)).clamp(min=1e-12)
            own = (self.defect_owners == variant.unsqueeze(-1)).unsqueeze(1)
            within = (squares * self.defect_scales).masked_fill(~own, torch.inf).amin(dim=-1)
            nearest = squares.masked_fill(~own, torch.inf).amin(dim=-1)
            ratios = torch.minimum(scores.square() / nearest, 1 / within)
            return scores * ratios.clamp(1.0, LARGEST_RAISE**2).sqrt()

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Patch embeddings of shape ``(B, h, w, d)``, in float32, for images of shape ``(B, 3, H, W)``."""
        return patchcore.embed(images, self._pooled_features, self.tiler)

    def _pooled_features(self, images: torch.Tensor) -> torch.Tensor:
        features = self.feature_extractor(images)
        return self.generate_embedding({layer: self.feature_pooler(value) for layer, value in features.items()})

    def nearest_neighbors(self, embedding: torch.Tensor, n_neighbors: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Distances to the nearest vectors and their indices, each ``(..., n_neighbors)``, squeezed for one."""
        return patchcore.nearest_neighbors(
            embedding, self.memory_bank, self.squares, min(n_neighbors, len(self.searched))
        )

    @torch.no_grad()
    def embed_arrays(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Patch embeddings ``(B, h, w, d)`` of normalised images ``(B, 3, H, W)``, as :class:`Update` wants them."""
        return self.embed(torch.from_numpy(images).to(next(self.feature_extractor.parameters()))).cpu().numpy()

    # Learning

    def begin_update(self) -> Update:
        """Begin an update, or go on with one that was interrupted; it is :attr:`update` until :meth:`end_update`."""
        self.interrupted = self.update or self.interrupted
        self.update = Update(self.bank) if self.interrupted is None else self.interrupted.continued()
        return self.update

    def end_update(self) -> None:
        """Make what the update has committed the model's own."""
        assert self.update is not None
        self.bank, self.update, self.interrupted = self.update.bank, None, None

    def validate(self, variant: str, images: Calibration) -> None:
        """Let images that are not learned set the thresholds of a variant, too; see :meth:`Update.validate`."""
        if self.update is not None:
            self.update.validate(variant, images)
            return
        self.bank = validated(self.bank, variant, images)
        if self.interrupted is not None and variant in self.interrupted.bank.variants:
            self.interrupted.validate(variant, images)

    def edit_bank(self, change: Callable[[MemoryBank], MemoryBank]) -> None:
        """Replace the bank by what a function makes of it; an update that was interrupted ends in it as it is."""
        self.bank, self.interrupted = change(self.bank), None

    def refresh(self) -> None:
        """Judge from now on by the bank as it is, during an update by that of the update."""
        self.searched = self.bank if self.update is None else self.update.bank
        dimension, device = sum(self.feature_extractor.out_dims), self.memory_bank.device
        tables = bank_tables(self.searched, dimension, len(self.searched.variants))
        for name, table in {**tables, **defect_tables(self.searched, dimension)}.items():
            setattr(self, BUFFERS[name], torch.from_numpy(table).to(device))

    # State

    def get_extra_state(self) -> dict[str, Any]:
        """The bank, in the middle of an update all of that, and what it depends on, as tensors and plain data."""
        arrays, plain = state.to_arrays(self.update or self.interrupted or self.bank)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        asked = {key: getattr(self, key) for key in ("backbone", "layers", "false_alarm_rate", "memory_size")}
        return {**asked, "tensors": tensors, "plain": plain}

    def set_extra_state(self, saved: dict[str, Any]) -> None:
        """Load what :meth:`get_extra_state` gave; see :meth:`read_state` for errors."""
        own, loaded = self.bank, self.read_state(saved)
        asked, before = self.false_alarm_rate, saved.get("false_alarm_rate")
        if asked is not None and asked != before:  # else what was set since the state was made would be lost
            loaded.bank = loaded.bank.with_decision(false_alarm_rate=asked)
        asked, size = self.memory_size, loaded.bank.size
        if asked is not None and "memory_size" in saved and asked != saved["memory_size"]:
            loaded.resize(asked)
        if asked not in {None, loaded.bank.size} or loaded.bank.size < size:
            logger.warning(
                "The memory holds up to %d vectors; that of the checkpoint held up to %d, and %s were asked for.",
                loaded.bank.size,
                size,
                asked,
            )
        self.bank, self.update, self.interrupted = loaded.bank, None, None
        if loaded.pools:
            self.interrupted = loaded
            judged_by = loaded.continued()
            judged_by.flush()
            self.bank = judged_by.bank
        if self.bank.dtype != own.dtype:
            logger.warning("The checkpoint's precision %s is used, not %s.", self.bank.dtype, own.dtype)
        self.refresh()

    def read_state(self, saved: dict[str, Any]) -> Update:
        """What is known, and maybe on its way, of a state that :meth:`get_extra_state` gave.

        Raises:
            ValueError: If the state is of another backbone or other layers, or damaged.
        """
        for key, own in (("backbone", self.backbone), ("layers", self.layers)):
            if saved[key] != own:
                msg = (
                    f"The checkpoint has {key} {saved[key]!r}, this model has {own!r}. Their memories do not mix: "
                    f"make the model with {key}={saved[key]!r}, or learn anew."
                )
                raise ValueError(msg)
        arrays = {name: tensor.cpu().numpy() for name, tensor in saved["tensors"].items()}
        return state.from_arrays(arrays, saved["plain"])
