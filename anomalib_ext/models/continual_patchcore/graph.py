# SPDX-License-Identifier: Apache-2.0
"""ContinualPatchCore as it is exported: features and a head, in which the bank is constants to be replaced."""

import torch
from torch import nn

from anomalib_ext.export import EMBEDDING, OUTPUTS, BundleContent
from openvino_export.bundle.constants import graph_tables, variant_capacity
from openvino_export.bundle.folder import BANK
from openvino_export.memory import state

from .post_processor import VariantPostProcessor
from .torch_model import BUFFERS, ContinualPatchCoreModel


class Features(nn.Module):
    """From images to the embedding, which never changes."""

    def __init__(self, model: ContinualPatchCoreModel, pre_processor: nn.Module | None) -> None:
        super().__init__()
        self.model = model
        self.pre_processor = pre_processor

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Embed images of shape ``(B, 3, H, W)`` in [0, 1] as ``(B, h, w, d)``."""
        return {EMBEDDING: self.model.embed(self.prepare(images))}

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """Resize and normalise."""
        return self.pre_processor(images) if self.pre_processor else images


class Head(nn.Module):
    """From the embedding to decisions on images of a height and width."""

    def __init__(self, model: ContinualPatchCoreModel, post_processor: nn.Module | None, size: torch.Size) -> None:
        super().__init__()
        self.model = model
        self.post_processor = post_processor
        self.size = size

    def forward(self, embedding: torch.Tensor) -> dict[str, torch.Tensor]:
        """Decide on an embedding of shape ``(B, h, w, d)``."""
        predictions = self.model.score(embedding, *self.model.search(embedding), self.size)
        if self.post_processor:
            predictions = self.post_processor(predictions)
        outputs = {name: getattr(predictions, name) for name in OUTPUTS}
        return {name: value for name, value in outputs.items() if value is not None}


def bundle_content(
    model: ContinualPatchCoreModel,
    pre_processor: nn.Module | None,
    post_processor: nn.Module | None,
    size: tuple[int, int],
) -> BundleContent:
    """What a model brings to its bundle, for images of a height and width."""
    features = Features(model, pre_processor)
    images = torch.zeros(1, 3, *size, device=model.memory_bank.device)
    capacity = variant_capacity(len(model.bank.variants))
    buffers = {f"bank.{table}": f"model.{buffer}" for table, buffer in BUFFERS.items()}
    by_variant = isinstance(post_processor, VariantPostProcessor)
    if by_variant:
        buffers |= {f"bank.{kind}_values": f"post_processor.{kind}_values" for kind in ("image", "pixel")}
    tables = graph_tables(model.bank, model.memory_bank.shape[1], capacity)
    return BundleContent(
        graph=Head(model, post_processor, features.prepare(images).shape[-2:]),
        features=features,
        tables={name: (buffer, tables[name]) for name, buffer in buffers.items()},
        files={BANK: state.to_bytes(model.bank)},
        metadata={
            "backbone": model.backbone,
            "layers": model.layers,
            "num_neighbors": model.num_neighbors,
            "variants": list(model.bank.variants),
            "variant_capacity": capacity,
            "shown_defects": True,  # whether the graph takes them
            "variant_thresholds": by_variant,
            "score": "rate" if by_variant else "range",  # how it is normalised
        },
    )
