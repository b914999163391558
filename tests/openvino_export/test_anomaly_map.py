# SPDX-License-Identifier: Apache-2.0
"""Tests of the maps, which are those of Anomalib's generator."""

import numpy as np
import pytest
import torch
from anomalib.models.image.patchcore.anomaly_map import AnomalyMapGenerator

from openvino_export.anomaly_map import anomaly_maps, map_matrix


@pytest.mark.parametrize(
    ("patches", "pixels"),
    [
        ((32, 32), (256, 256)),
        ((8, 20), (64, 160)),
        ((28, 28), (224, 250)),  # some patches have more pixels than others
        ((37, 11), (293, 97)),
        ((3, 5), (17, 24)),  # sides shorter than the kernel
        ((40, 40), (20, 33)),  # more patches than pixels
        ((1, 1), (32, 32)),
    ],
)
def test_equals_anomalibs(patches: tuple[int, int], pixels: tuple[int, int]) -> None:
    """To float32's precision, for any ratio of sizes."""
    scores = torch.rand(2, 1, *patches)
    expected = AnomalyMapGenerator()(scores, pixels).numpy()
    assert anomaly_maps(scores.numpy(), *pixels) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("pixels", [1, 2, 9, 16])
def test_sides_that_cannot_be_mirrored_once(pixels: int) -> None:
    """Anomalib's generator fails there; equal scores still give an equal map."""
    with pytest.raises(RuntimeError, match="Padding size"):
        AnomalyMapGenerator()(torch.rand(1, 1, 2, 2), (pixels, pixels))
    assert map_matrix(2, pixels).sum(axis=1) == pytest.approx(1)
    assert anomaly_maps(np.full((1, 2, 2), 3, np.float32), pixels, pixels) == pytest.approx(3)
