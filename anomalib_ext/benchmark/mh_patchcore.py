# SPDX-License-Identifier: Apache-2.0
"""Anomalib's ``MHPatchcore`` as a learner of the benchmark."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from anomalib.data import InferenceBatch
from anomalib.models.image.mh_patchcore.anomaly_map import AnomalyMapGenerator
from anomalib.models.image.mh_patchcore.torch_model import MHPatchcoreModel
from torch import nn

from .learners import Learner

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from .learners import State
    from .tasks import Images, Task

    Array = NDArray[np.float32]


class MHPatchcoreLearner(Learner):
    """Anomalib's ``MHPatchcore``, fitted anew on all images so far, for once fitted it cannot learn.

    It gets the embeddings of all learners here in place of its own; PCA, whitening, bank and scores are its own.
    """

    title = "MHPatchcore, refitted"
    keeps_images = True

    def __init__(self, size: int, seed: int = 0) -> None:
        super().__init__(size, seed)
        self.model = _MHPatchcoreOnEmbeddings(size)

    def nbytes(self) -> int:
        """Bytes of projection, whitening and bank."""
        return sum(buffer.nbytes for part in self._parts() for buffer in part.buffers())

    def _parts(self) -> list[nn.Module]:
        return [self.model.pca, self.model.covariance, self.model.memory_bank]

    def learn(self, images: Sequence[Array], seen: Sequence[Array], task: Task | None) -> None:
        """Fit in three passes over batches of 32 images, as Anomalib does."""
        del images, task
        self.model = _MHPatchcoreOnEmbeddings(self.size)
        order = np.random.default_rng(self.seed).permutation(len(seen))
        batches = [order[start : start + 32] for start in range(0, len(order), 32)]
        passes: list[nn.Module] = []
        for part in self._parts():
            for batch in batches:
                patches = torch.from_numpy(np.concatenate([seen[i] for i in batch]))
                for fitted in passes:
                    patches = fitted(patches)
                part.update(patches)  # type: ignore[operator]
            part.finalize()  # type: ignore[operator]
            passes.append(part)

    def predict(self, images: Images, task: Task) -> InferenceBatch:
        """As the model does."""
        del task
        self.model.eval()
        self.model.anomaly_map_generator.image_size = images.size
        parts = [self.model(patches.permute(0, 3, 1, 2)) for patches in images.patches.split(1)]
        return InferenceBatch(
            pred_score=torch.cat([part.pred_score for part in parts]),
            anomaly_map=torch.cat([part.anomaly_map for part in parts]),
        )

    def state(self) -> State:  # noqa: PLR6301
        """Nothing: it begins anew."""
        return {}, {}

    def load(self, state: State) -> None:
        """Nothing."""


class _MHPatchcoreOnEmbeddings(MHPatchcoreModel):
    """The model of ``MHPatchcore`` for embeddings of shape ``(B, d, h, w)`` in place of images."""

    def __init__(self, size: int) -> None:
        super().__init__("resnet10t", ["layer1"], pre_trained=False, memory_bank_size=size)
        self.feature_extractor = _AsFeatures()
        self.anomaly_map_generator = _MapsOfImages()

    def generate_embedding(self, features: dict[str | int, torch.Tensor]) -> torch.Tensor:  # noqa: PLR6301
        """Embeddings of shape ``(B * h * w, d)``."""
        return features["layer1"].permute(0, 2, 3, 1).flatten(0, 2)


class _AsFeatures(nn.Module):
    def forward(self, embeddings: torch.Tensor) -> dict[str, torch.Tensor]:  # noqa: PLR6301
        return {"layer1": embeddings}


class _MapsOfImages(AnomalyMapGenerator):
    """Maps of the size of the images, for the model believes that the embeddings are its images."""

    image_size: torch.Size

    def forward(self, patch_scores: torch.Tensor, image_size: torch.Size) -> torch.Tensor:
        del image_size
        return super().forward(patch_scores, self.image_size)
