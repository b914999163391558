# SPDX-License-Identifier: Apache-2.0
"""Losses of the two stages of CRR."""

import torch
from anomalib.models.image.dinomaly.components import CosineHardMiningLoss
from anomalib.models.image.glass.loss import FocalLoss
from torch import nn
from torch.nn import functional as F  # noqa: N812

from .torch_model import MAP_SIDE, CrrModel


def repair_loss(model: CrrModel, clean: torch.Tensor, anomalous: torch.Tensor | None = None) -> torch.Tensor:
    """Loss of the first stage: both kinds of images are to be decoded to what the encoder makes of the clean ones.

    Args:
        model: Model, which is put into training mode.
        clean: Images, shape ``(B, 3, H, W)``.
        anomalous: The same images with anomalies, if there is repair.
    """
    model.train()
    images = clean if anomalous is None else torch.cat([clean, anomalous])
    encoded, decoded = ([level.float() for level in maps] for maps in model.reconstruct(images))
    target = [level[: len(clean)] for level in encoded]
    # One call for each term: the loss turns down the gradient of the places that are easy among those of a call.
    terms = zip(*(level.split(len(clean)) for level in decoded), strict=True)
    distance = CosineHardMiningLoss()
    return sum((distance(target, list(term), model.steps[0]) for term in terms), start=target[0].new_zeros(()))


def segment_loss(model: CrrModel, images: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Loss of the second stage: focal loss of the head, with all else as when scoring.

    Args:
        model: Model with a head, which is put into training mode, all else into evaluation mode.
        images: Images with anomalies, shape ``(B, 3, H, W)``.
        masks: Where these are, shape ``(B, H, W)``.
    """
    head = model.head
    assert head is not None
    model.eval()
    head.train()
    with torch.no_grad():
        encoded, decoded = model.reconstruct(images)
    target = F.interpolate(masks[:, None].float(), MAP_SIDE, mode="bilinear", align_corners=False) >= 0.5
    return FocalLoss(nn.Softmax(dim=1), gamma=2)(head(encoded, decoded).float(), target)
