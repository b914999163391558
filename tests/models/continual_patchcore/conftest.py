# SPDX-License-Identifier: Apache-2.0
"""What the tests of ContinualPatchCore share: images, models that have learned, and ways to compare models."""

import copy
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.engine import Engine
from PIL import Image

from anomalib_ext.models import ContinualPatchCore
from openvino_export.images import image_hash
from openvino_export.memory import state

Make = Callable[..., Any]
Trained = tuple[ContinualPatchCore, Path]


@pytest.fixture(scope="session")
def files(products: Path) -> Callable[..., list[Path]]:
    """Return a function that gives the files of a product."""

    def get(product: str, kind: str = "train/good") -> list[Path]:
        return sorted((products / product / kind).glob("*.png"))

    return get


@pytest.fixture(scope="session")
def tensors(files: Make) -> Callable[..., torch.Tensor]:
    """Return a function that gives the images of a product, in [0, 1]; who changes them must copy them."""

    @functools.cache
    def get(product: str, kind: str = "train/good") -> torch.Tensor:
        arrays = [np.asarray(Image.open(path)) for path in files(product, kind)]
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255

    return get


@pytest.fixture(scope="session")
def make_tiny(make_model: Make) -> Make:
    """Return a function that makes a model with a small backbone, of which the weights are always the same."""

    def make(**kwargs: Any) -> ContinualPatchCore:  # noqa: ANN401
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return make_model(**{"backbone": "test_resnet", "layers": ["layer2"], "pre_trained": False, **kwargs})

    return make


def train(model: ContinualPatchCore, make_data: Make, root: Path) -> Trained:
    """Have a model learn two products with the same engine; return it and its checkpoint."""
    engine = Engine(default_root_dir=root, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    for product in ("stripes", "dots"):
        engine.fit(model, datamodule=make_data(product))
    return model.eval(), Path(engine.best_model_path)


@pytest.fixture(scope="session")
def trained(make_tiny: Make, make_data: Make, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Return a small model that learned stripes and dots, and its checkpoint."""
    return train(make_tiny(), make_data, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def trained_default(make_model: Make, make_data: Make, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Return a model with the default backbone that learned stripes and dots, and its checkpoint."""
    return train(make_model(), make_data, tmp_path_factory.mktemp("trained_default"))


@pytest.fixture
def model(trained: Trained) -> ContinualPatchCore:
    """Return a copy of the small model that knows stripes and dots."""
    return copy.deepcopy(trained[0])


@pytest.fixture(scope="session")
def begin_update(tensors: Make) -> Callable[[ContinualPatchCore], None]:
    """Return a function that has a model learn checks in an update, which stays open."""

    def begin(model: ContinualPatchCore) -> None:
        images = model.pre_processor(tensors("checks")[:12])
        update = model.model.begin_update()
        for image in images.numpy():
            embedding = model.model.embed_arrays(image[None])[0]
            update.add(embedding, "checks", image_hash=image_hash(image), map_size=(64, 64))

    return begin


@pytest.fixture
def interrupted(model: ContinualPatchCore, begin_update: Make, make_tiny: Make) -> ContinualPatchCore:
    """Return a model that was loaded from a checkpoint in the middle of an update."""
    begin_update(model)
    other = make_tiny().eval()
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert other.model.interrupted is not None
    return other


@pytest.fixture(scope="session")
def state_of() -> Callable[[ContinualPatchCore], dict[str, Any]]:
    """Return a function that gives all that a checkpoint holds of a model, and what it judges by, to be compared."""

    def get(model: ContinualPatchCore) -> dict[str, Any]:
        tensors = model.state_dict()
        extra = tensors.pop("model._extra_state")
        arrays, plain = state.to_arrays(model.model.bank)
        tensors |= {f"saved {name}": tensor for name, tensor in extra["tensors"].items()}
        tensors |= {f"bank {name}": torch.from_numpy(array) for name, array in arrays.items()}
        tensors |= {f"judged by {name}": tensor for name, tensor in model.named_buffers()}
        digests = {
            name: (tensor.dtype, tensor.shape, hashlib.sha256(tensor.cpu().numpy().tobytes()).hexdigest())
            for name, tensor in tensors.items()
        }
        return {**digests, "plain": plain, "saved plain": extra["plain"]}

    return get


@pytest.fixture(scope="session")
def f1_of(tensors: Make) -> Callable[[ContinualPatchCore, str], float]:
    """Return a function that gives the F1 of a model's decisions on the test images of a product."""

    def get(model: ContinualPatchCore, product: str) -> float:
        good, bad = (model(tensors(product, f"test/{kind}")).pred_label for kind in ("good", "hole"))
        hits = float(bad.sum())
        return 2 * hits / (hits + float(good.sum()) + len(bad))

    return get
