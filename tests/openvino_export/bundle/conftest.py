# SPDX-License-Identifier: Apache-2.0
"""The smallest bundle that learns: what it says matters less here than that its files are whole."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def exported(make_model: Callable[..., Any], products: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return its folder, which is not to be changed."""
    model = make_model(backbone="test_resnet", layers=["layer1"], pre_trained=False)
    model.partial_fit(sorted((products / "stripes" / "train" / "good").iterdir()), "stripes")
    return Path(model.to_openvino(tmp_path_factory.mktemp("export"))).parent


@pytest.fixture(scope="session")
def visible_files() -> Callable[[Path], dict[str, bytes]]:
    """Return a function that reads the files of a bundle, except those that only the atomic step uses."""

    def read(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}

    return read
