# SPDX-License-Identifier: Apache-2.0
"""Bundles of a small model, exported once and copied for each test."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
