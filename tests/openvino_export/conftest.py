# SPDX-License-Identifier: Apache-2.0
"""Images of the small products, and the bundle of a model without a bank."""

from pathlib import Path

import pytest
import torch
from torch import nn


@pytest.fixture(scope="session")
def good(products: Path) -> dict[str, list[Path]]:
    """Return the images to learn by product."""
    return {folder.name: sorted((folder / "train" / "good").iterdir()) for folder in sorted(products.iterdir())}


@pytest.fixture(scope="session")
def tested(products: Path) -> list[Path]:
    """Return good and bad test images of all products."""
    return sorted(products.glob("*/test/*/*.png"))


class Brightness(nn.Module):
    """A graph of a model without a bank: what is brighter than 0.6 is anomalous."""

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:  # noqa: PLR6301
        """Judge images of shape ``(B, 3, H, W)``."""
        anomaly_map = nn.functional.avg_pool2d(images.mean(dim=1, keepdim=True), 3, stride=1, padding=1)
        score = anomaly_map.amax(dim=(1, 2, 3))
        return {
            "pred_score": score,
            "pred_label": score > 0.6,
            "anomaly_map": anomaly_map,
            "pred_mask": anomaly_map > 0.6,
        }


@pytest.fixture(scope="session")
def without_bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bundle of a model without a bank, which is not to be changed."""
    from anomalib.models import Padim

    from anomalib_ext.export import BundleContent, export_bundle

    model = Padim(pre_trained=False, visualizer=False)
    root = tmp_path_factory.mktemp("without_bank")
    return export_bundle(model, lambda *_: BundleContent(graph=Brightness()), root, input_size=(64, 64)).parent
