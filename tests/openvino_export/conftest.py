# SPDX-License-Identifier: Apache-2.0
"""Bundles of a small model, exported once and copied for each test."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from anomalib_ext.models import ContinualPatchCore

Make = Callable[..., Any]


@pytest.fixture(scope="session")
def trained(make_model: Make, products: Path) -> ContinualPatchCore:
    """Return a model of one product; tests that change it take a copy."""
    model = make_model()
    model.partial_fit(sorted((products / "stripes" / "train" / "good").iterdir()), "stripes")
    return model.eval()


@pytest.fixture(scope="session")
def exported(trained: ContinualPatchCore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return its bundle, which is not to be changed."""
    from anomalib.engine import Engine

    return Path(Engine(logger=False).export(trained, "openvino", tmp_path_factory.mktemp("export"))).parent


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    """Return a copy of the bundle."""
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


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
