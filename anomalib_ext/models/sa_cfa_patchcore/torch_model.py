# SPDX-License-Identifier: Apache-2.0
"""SA+CFA PatchCore: PatchCore with self-attention over deep features and channel aggregation.

Equations are those of Li Bing et al., "Surface defect detection algorithm for memory heat sink based on improved
PatchCore", DOI 10.19651/j.cnki.emt.2518329.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from anomalib.data import InferenceBatch
from anomalib.models.components import DynamicBufferMixin
from torch.nn import functional as F  # noqa: N812

from anomalib_ext.models.components import patchcore
from anomalib_ext.models.components.backbone import load_backbone
from openvino_export.memory.k_center import farthest_first

if TYPE_CHECKING:
    from anomalib.data.utils.tiler import Tiler

logger = logging.getLogger(__name__)


def attend(features: torch.Tensor, channels: int) -> torch.Tensor:
    """Self-attention over the first channels of a feature map, average pooling of the others (SA, eq. 2).

    The max-pooled positions are queries, keys and values alike, without a learned projection.

    Args:
        features: Shape ``(B, C, H, W)``.
        channels: Number of channels with attention.

    Returns:
        Shape ``(B, C, H, W)``, the channels in their order.
    """
    tokens = F.max_pool2d(features[:, :channels], 3, 1, 1).flatten(2).transpose(1, 2)
    # One head, and the channels last in memory: only so has torch a kernel that keeps no (H * W)^2 weights.
    tokens = tokens.unsqueeze(1).contiguous()
    attended = F.scaled_dot_product_attention(tokens, tokens, tokens).squeeze(1).transpose(1, 2)
    attended = attended.unflatten(2, features.shape[2:])
    if channels == features.shape[1]:  # torch pools no empty maps
        return attended
    return torch.cat([attended, F.avg_pool2d(features[:, channels:], 3, 1, 1)], dim=1)


def channel_groups(channels: int, groups: int, seed: int | None = None) -> torch.Tensor:
    """Divide channels into groups whose sizes differ by at most one (CFA, eq. 4).

    Args:
        channels: Number of channels, ``D``.
        groups: Number of groups, ``D_r``, at most ``D``.
        seed: Groups are consecutive channels, as in the equation; with a seed, channels in a random order.

    Returns:
        Group of each channel, shape ``(D,)``; consecutive ones are ``floor(c / (D / D_r))``.
    """
    index = torch.arange(channels) * groups // channels
    if seed is not None:
        index = index[torch.randperm(channels, generator=torch.Generator().manual_seed(seed))]
    return index


class PatchEmbedding(patchcore.ExactBuffers):
    """Reduced patch embeddings: features of several layers with self-attention, their channels aggregated.

    Args:
        backbone: Name of a timm model.
        layers: Names of the layers; the deepest one has attention.
        pre_trained: Whether the backbone is pretrained.
        backbone_weights: File with the backbone's weights.
        attention_ratio: Share of the deepest layer's channels with attention; 0 is plain average pooling.
        reduction_ratio: Number of groups of channels / number of channels; 1 leaves the channels as they are.
        channel_seed: Seed of the order in which channels are grouped; consecutive without one.

    Attributes:
        groups: Group of each channel, shape ``(D,)``. Part of the state, like what is described by ``origin``.
        dimension: Number of groups, ``D_r``, the length of an embedding.

    Raises:
        ValueError: If a ratio leaves no channel, or there is only one layer and attention.
    """

    groups: torch.Tensor
    aggregation: torch.Tensor

    def __init__(
        self,
        backbone: str,
        layers: Sequence[str],
        pre_trained: bool = True,
        backbone_weights: str | Path | None = None,
        attention_ratio: float = 0.5,
        reduction_ratio: float = 0.1,
        channel_seed: int | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= attention_ratio <= 1:
            msg = f"attention_ratio must lie in [0, 1], 0 being no attention, got {attention_ratio}."
            raise ValueError(msg)
        if not 0 < reduction_ratio <= 1:
            msg = (
                f"reduction_ratio must lie in (0, 1], got {reduction_ratio}: above 1 a group would have less than one "
                "channel; 1 is no reduction."
            )
            raise ValueError(msg)
        if attention_ratio and len(layers) < 2:
            msg = (
                f"Attention is for the deepest of two or more layers, got {list(layers)}. Name a shallower layer too, "
                "or set attention_ratio=0."
            )
            raise ValueError(msg)
        self.feature_extractor = load_backbone(backbone, layers, pre_trained, backbone_weights).eval()
        self.out_dims = list(self.feature_extractor.out_dims)
        total, deepest = sum(self.out_dims), self.out_dims[-1]
        groups = round(total * reduction_ratio)
        if not groups:
            msg = f"reduction_ratio={reduction_ratio} leaves none of {total} channels; take at least {1 / total:.2g}."
            raise ValueError(msg)
        if attention_ratio and not round(deepest * attention_ratio):
            msg = (
                f"attention_ratio={attention_ratio} leaves none of {deepest} channels with attention; take at least "
                f"{1 / deepest:.2g}, or 0 for no attention."
            )
            raise ValueError(msg)
        self.attention_ratio = float(attention_ratio)
        self.origin = {"backbone": backbone, "layers": list(self.feature_extractor.layers)}
        self.register_buffer("aggregation", torch.empty(0), persistent=False)
        self._set_groups(channel_groups(total, groups, channel_seed))

    @property
    def dimension(self) -> int:
        """Length of an embedding."""
        return len(self.aggregation)

    def _set_groups(self, groups: torch.Tensor) -> None:
        self.groups = groups
        members = F.one_hot(groups).T.float()
        self.aggregation = (members / members.sum(dim=1, keepdim=True)).to(self.aggregation.device)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Embed normalised images of shape ``(B, 3, H, W)`` as ``(B, D_r, h, w)``."""
        *shallow, deepest = (features.float() for features in self.feature_extractor(images).values())
        channels = round(self.out_dims[-1] * self.attention_ratio)
        maps = [F.avg_pool2d(features, 3, 1, 1) for features in shallow]
        maps.append(attend(deepest, channels) if channels else F.avg_pool2d(deepest, 3, 1, 1))
        if self.dimension == sum(self.out_dims):
            return torch.cat([_resized(features, maps[0]) for features in maps], dim=1)
        # The mean over a group, eq. 5, is linear, and so is resizing: taken before it, there is less to resize.
        parts = self.aggregation.split(self.out_dims, dim=1)
        reduced = [F.conv2d(features, part[..., None, None]) for features, part in zip(maps, parts, strict=True)]
        return torch.stack([_resized(features, maps[0]) for features in reduced]).sum(dim=0)

    def get_extra_state(self) -> dict[str, Any]:
        """What an embedding depends on, as tensors and plain data."""
        return {**self.origin, "attention_ratio": self.attention_ratio, "groups": self.groups}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over attention and groups, for a memory bank of other ones would mean nothing."""
        self.check_state(state)
        if state["attention_ratio"] != self.attention_ratio or not torch.equal(state["groups"].cpu(), self.groups):
            logger.warning(
                "The checkpoint's attention_ratio %g and %d groups of channels are used, not %g and %d of this model.",
                *(state["attention_ratio"], int(state["groups"].max()) + 1, self.attention_ratio, self.dimension),
            )
        self.attention_ratio = state["attention_ratio"]
        self._set_groups(state["groups"].cpu())

    def check_state(self, state: dict[str, Any]) -> None:
        """Refuse a state of another backbone or other layers.

        Raises:
            ValueError: If it is one.
        """
        for key, own in self.origin.items():
            if state[key] != own:
                msg = (
                    f"The checkpoint has {key} {state[key]!r}, this model has {own!r}. Make the model with "
                    f"{key}={state[key]!r}, or learn anew."
                )
                raise ValueError(msg)


def _resized(features: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Features with the height and width of others."""
    if features.shape[2:] == like.shape[2:]:
        return features
    return F.interpolate(features, size=like.shape[2:], mode="bilinear")


class SaCfaPatchCoreModel(DynamicBufferMixin, patchcore.ExactBuffers):
    """PatchCore over :class:`PatchEmbedding`; takes the same arguments, and the following.

    With ``attention_ratio=0`` and ``reduction_ratio=1`` and the same memory bank it is Anomalib's ``PatchcoreModel``.

    Args:
        num_neighbors: Neighbors that weigh the image score; 1 takes the largest patch distance as it is.

    Attributes:
        memory_bank: Selected patch embeddings, shape ``(m, D_r)``.
        embedding_store: Embeddings of the images seen in training, each of shape ``(n, D_r)``. They take ``4 * D_r``
            bytes a patch, and twice that for a moment before the selection.
        is_selected: Whether the memory bank is selected from all of the store.
    """

    memory_bank: torch.Tensor
    squares: torch.Tensor

    def __init__(
        self,
        backbone: str,
        layers: Sequence[str],
        num_neighbors: int = 9,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__()
        if num_neighbors < 1:
            msg = f"num_neighbors must be at least 1, got {num_neighbors}."
            raise ValueError(msg)
        self.num_neighbors = num_neighbors
        self.tiler: Tiler | None = None
        self.backbone = backbone  # which Anomalib Studio shows
        self.embedding = PatchEmbedding(backbone, layers, **kwargs)
        self.embedding_store: list[torch.Tensor] = []
        self.is_selected = True
        self.register_buffer("memory_bank", torch.empty(0, self.embedding.dimension))
        self.register_buffer("squares", torch.empty(0), persistent=False)

    def forward(self, images: torch.Tensor) -> InferenceBatch:
        """Score normalised images of shape ``(B, 3, H, W)``.

        Returns:
            Raw scores of shape ``(B,)`` and anomaly maps ``(B, 1, H, W)``.

        Raises:
            RuntimeError: If nothing was learned yet.
            ValueError: If an image gives scores that are not finite.
        """
        patchcore.check_learned(len(self.memory_bank), "Engine.fit")
        embedding = self.embed(images)
        height, width = embedding.shape[1:3]
        patches = embedding.flatten(1, 2)
        scores, locations = patchcore.search(patches, self.memory_bank, self.squares)
        neighbors = min(self.num_neighbors, len(self.memory_bank))
        return InferenceBatch(
            pred_score=patchcore.image_score(scores, locations, patches, self.memory_bank, self.squares, neighbors),
            anomaly_map=patchcore.anomaly_maps(scores.unflatten(1, (height, width)).unsqueeze(1), images.shape[-2:]),
        )

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Patch embeddings of shape ``(B, h, w, D_r)``, in float32, for images of shape ``(B, 3, H, W)``."""
        return patchcore.embed(images, self.embedding, self.tiler).contiguous()  # norms are taken faster

    @torch.no_grad()
    def collect(self, images: torch.Tensor) -> None:
        """Store the embeddings of normal images for the selection.

        Args:
            images: Normalised images, shape ``(B, 3, H, W)``.

        Raises:
            ValueError: If an image gives embeddings that are not finite.
        """
        embedding = self.embed(images)
        bad = (~torch.isfinite(embedding).flatten(1).all(dim=1)).nonzero().flatten().tolist()
        if bad:
            msg = (
                f"Images {bad} of the batch give embeddings that are not finite, so the batch was not learned. Look "
                "for NaN in the images, or for damaged backbone weights."
            )
            raise ValueError(msg)
        self.embedding_store.append(embedding.flatten(0, 2).cpu())
        self.is_selected = False

    def subsample_embedding(self, sampling_ratio: float) -> None:
        """Replace the memory bank by a coreset of what was collected, selected by farthest-first traversal.

        Args:
            sampling_ratio: Share of the embeddings that is kept, at least one.
        """
        points = torch.cat(self.embedding_store)
        self.embedding_store = [points]  # more may follow
        index, _ = farthest_first(points.numpy(), max(1, int(len(points) * sampling_ratio)))
        self._set_bank(points[torch.from_numpy(index)].to(self.memory_bank.device))
        self.is_selected = True

    def _set_bank(self, bank: torch.Tensor) -> None:
        self.memory_bank, self.squares = bank, bank.square().sum(dim=1)

    def _load_from_state_dict(self, *args: Any) -> None:  # noqa: ANN401  # torch's
        super()._load_from_state_dict(*args)
        self._set_bank(self.memory_bank)
