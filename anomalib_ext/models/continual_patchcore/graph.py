# SPDX-License-Identifier: Apache-2.0
"""ContinualPatchCore as it is exported: features and a head, in which the bank is constants to be replaced."""

import json
from typing import TYPE_CHECKING

import torch
from safetensors.numpy import save
from torch import nn

from anomalib_ext.export import EMBEDDING, OUTPUTS, BundleContent
from openvino_export.bundle.constants import graph_tables, variant_capacity

from .post_processor import VariantPostProcessor

if TYPE_CHECKING:
    from .lightning_model import ContinualPatchCore


class Features(nn.Module):
    """From images to the embedding, which never changes."""

    def __init__(self, owner: "ContinualPatchCore") -> None:
        super().__init__()
        self.owner = owner

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Embed images of shape ``(B, 3, H, W)`` in [0, 1] as ``(B, h, w, d)``."""
        return {EMBEDDING: self.owner.model.embed(self.prepare(images))}

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """Resize and normalise."""
        return self.owner.pre_processor(images) if self.owner.pre_processor else images


class Head(nn.Module):
    """From the embedding to decisions on images of a height and width."""

    def __init__(self, owner: "ContinualPatchCore", size: torch.Size) -> None:
        super().__init__()
        self.owner = owner
        self.size = size

    def forward(self, embedding: torch.Tensor) -> dict[str, torch.Tensor]:
        """Judge an embedding of shape ``(B, h, w, d)``."""
        owner = self.owner
        predictions = owner.model.judge(embedding, *owner.model.search(embedding), self.size)
        if owner.post_processor:
            predictions = owner.post_processor(predictions)
        outputs = {name: getattr(predictions, name) for name in OUTPUTS}
        return {name: value for name, value in outputs.items() if value is not None}


def bundle_of(model: "ContinualPatchCore", size: tuple[int, int]) -> BundleContent:
    """What a model brings to its bundle, for images of a height and width."""
    features = Features(model)
    bank = model.model.bank
    capacity = variant_capacity(len(bank.variants))
    buffers = {
        "bank.vectors": "owner.model.memory_bank",
        "bank.squares": "owner.model.squares",
        "bank.owners": "owner.model.owners",
        "bank.positions": "owner.model.positions",
    }
    by_variant = isinstance(model.post_processor, VariantPostProcessor)
    if by_variant:
        buffers |= {f"bank.{kind}_values": f"owner.post_processor.{kind}_values" for kind in ("image", "pixel")}
    tables = graph_tables(bank, model.model.memory_bank.shape[1], capacity)
    arrays, plain = bank.to_arrays()
    return BundleContent(
        graph=Head(model, features.prepare(torch.zeros(1, 3, *size, device=model.device)).shape[-2:]),
        features=features,
        tables={name: (buffer, tables[name]) for name, buffer in buffers.items()},
        files={"bank.safetensors": save(arrays, {"plain": json.dumps(plain, allow_nan=False)})},
        metadata={
            "backbone": model.model.backbone,
            "layers": model.model.layers,
            "num_neighbors": model.model.num_neighbors,
            "one_shot": model.one_shot,
            "variants": list(bank.variants),
            "variant_capacity": capacity,
            "variant_thresholds": by_variant,
        },
    )
