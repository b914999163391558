# SPDX-License-Identifier: Apache-2.0
"""One stream, learned once by the command, for all tests of what it writes."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Stream:
    """A finished stream.

    Attributes:
        folder: Its results.
        names: Its variants, of which one looks like HTML and like a formula.
        printed: What the command said.
    """

    folder: Path
    names: tuple[str, str]
    printed: str


@pytest.fixture(scope="session")
def finished(
    products: Path,
    model_config: dict[str, Any],
    run_command: Callable[..., str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Stream:
    """Return a stream that took good images for bad ones, logged to TensorBoard."""
    names = ("stripes", "$x_1$ <b>&\"'y")
    root = tmp_path_factory.mktemp("named")
    for product, name in zip(("stripes", "dots"), names, strict=True):
        shutil.copytree(products / product, root / name)
    folder = tmp_path_factory.mktemp("run") / "line & <3>"
    post_processor = {
        "class_path": "anomalib_ext.models.continual_patchcore.post_processor.VariantPostProcessor",
        "init_args": {"image_sensitivity": 0.9},
    }
    options = {"root": str(root), "num_workers": 0}
    config = {
        "model": {**model_config, "init_args": {**model_config["init_args"], "post_processor": post_processor}},
        "data": {
            "datamodules": [
                {"class_path": "anomalib.data.MVTecAD", "init_args": {**options, "category": name}} for name in names
            ],
        },
        "results_dir": str(folder),
        "logger": {
            "class_path": "AnomalibTensorBoardLogger",
            "init_args": {"save_dir": str(folder / "tensorboard"), "name": "line 3"},
        },
    }
    (root / "config.yaml").write_text(json.dumps(config))
    printed = run_command(root, "stream", "--config", "config.yaml")
    return Stream(folder, names, printed)
