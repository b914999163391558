# SPDX-License-Identifier: Apache-2.0
"""A small SaCfaPatchCore, and one that has learned, for the tests of the model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from anomalib_ext.models import SaCfaPatchCore

Make = Callable[..., Any]


@pytest.fixture(scope="session")
def new_model() -> Make:
    """Return a function that makes a model for the small images of the tests, with the same random weights for a seed.

    The features of a random network tell the products' good images from bad ones.
    """

    def make(seed: int = 1, **kwargs: Any) -> SaCfaPatchCore:  # noqa: ANN401
        torch.manual_seed(seed)
        small = {"backbone": "test_resnet", "layers": ["layer1", "layer2"], "coreset_sampling_ratio": 0.05}
        kwargs = {**small, "pre_trained": False, "visualizer": False, **kwargs}
        pre_processor = SaCfaPatchCore.configure_pre_processor((64, 64), kwargs["backbone"])
        return SaCfaPatchCore(**{"pre_processor": pre_processor, **kwargs})

    return make


@pytest.fixture(scope="session")
def fitted(
    new_model: Make, make_data: Make, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SaCfaPatchCore, Path, float]:
    """Return a model that has learned stripes, its checkpoint and its image AUROC; they are not to be changed."""
    from anomalib.engine import Engine

    model = new_model()
    engine = Engine(default_root_dir=tmp_path_factory.mktemp("fit"), accelerator="cpu", enable_progress_bar=False)
    engine.fit(model, datamodule=make_data("stripes"))
    auroc = engine.test(model, datamodule=make_data("stripes"), verbose=False)[0]["image_AUROC"]
    return model.eval(), Path(engine.best_model_path), auroc
