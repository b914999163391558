# SPDX-License-Identifier: Apache-2.0
"""Loss of HetNet."""

from collections.abc import Sequence

import torch
from anomalib.models.image.reverse_distillation.loss import ReverseDistillationLoss
from torch import nn

Maps = Sequence[torch.Tensor]


class HetNetLoss(nn.Module):
    """Reconstruction of the teacher plus denoising towards the reconstruction, each with reverse distillation's loss.

    That both are trained, and towards what, is the paper's; their equal weights and the stop are ours.

    Args:
        stop_gradient: Whether the reconstruction learns from the teacher alone.
    """

    def __init__(self, stop_gradient: bool = True) -> None:
        super().__init__()
        self.distance = ReverseDistillationLoss()
        self.stop_gradient = stop_gradient

    def forward(self, teacher: Maps, reconstructed: Maps, denoised: Maps) -> torch.Tensor:
        """Sum both losses.

        Args:
            teacher: Three levels of maps of the CNN, each of shape ``(B, C, h, w)``.
            reconstructed: Those of the student that saw the clean features.
            denoised: Those of the student that saw the noisy ones.
        """
        teacher, reconstructed, denoised = ([level.float() for level in m] for m in (teacher, reconstructed, denoised))
        targets = [level.detach() for level in reconstructed] if self.stop_gradient else reconstructed
        return self.distance(teacher, reconstructed) + self.distance(targets, denoised)
