# SPDX-License-Identifier: Apache-2.0
"""Writes the files of this folder with the version of commit c2d8912, and what that version says about them.

In a checkout of that commit, with this folder and ``test_old_files.py`` copied to the same places:
``PYTHONPATH=. python tests/old_files/write.py``.
"""

import json
import lzma
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import timm
import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import Folder
from anomalib.models import ContinualPatchCore, Crr, RdAkf, SaCfaPatchCore
from lightning.pytorch import Callback
from PIL import Image
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file

from anomalib_ext.models.components.backbone import describe_origin
from openvino_export import EdgeDetector

OLD = Path(__file__).parent
sys.path.insert(0, str(OLD.parent))
import test_old_files as asked  # noqa: E402

SIDE = 64
BACKBONE = {"backbone": "test_byobnet", "layers": ["stages.0"], "pre_trained": False}
# Learned: six of `stripes`, three of `dots`. The other ones of `stripes` and those of `checks` are for the updates.
COUNTS = {"stripes/good": 10, "stripes/hole": 3, "dots/good": 3, "dots/hole": 2, "checks/good": 4, "checks/hole": 1}


def write_images() -> None:
    """Write images of three products, some with a noisy square."""
    rng = np.random.default_rng(0)
    wave = np.sin(np.arange(SIDE) * np.pi / 8)
    shapes = {"stripes": np.tile(wave, (SIDE, 1)), "dots": np.outer(wave, wave)}
    shapes["checks"] = np.sign(np.outer(np.roll(wave, 4) + 0.01, wave + 0.01))
    for folder, count in COUNTS.items():
        product, kind = folder.split("/")
        path = OLD / "images" / folder
        path.mkdir(parents=True)
        color = np.roll([70, 20, -40], list(shapes).index(product))
        for number in range(count):
            image = 128 + shapes[product][..., None] * color + rng.integers(-2, 3, (SIDE, SIDE, 3))
            if kind == "hole":
                row, column = rng.integers(8, SIDE - 24, 2)
                image[row : row + 16, column : column + 16] = rng.uniform(0, 255, (16, 16, 3))
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path / f"{number}.png")


def make_model(**kwargs: Any) -> ContinualPatchCore:  # noqa: ANN401
    """Return a small model with random weights."""
    torch.manual_seed(0)
    size = ContinualPatchCore.configure_pre_processor((SIDE, SIDE), "test_byobnet")
    defaults = {**BACKBONE, "memory_size": 60, "pre_processor": size, "visualizer": False}
    return ContinualPatchCore(**{**defaults, **kwargs})


def stripes(temporary: Path) -> Folder:
    """Return the datamodule of six good images, with three good and three bad ones to validate."""
    for kind, part in (("good", slice(6)), ("good_test", slice(6, 9))):
        (temporary / kind).mkdir()
        for path in asked.files("stripes/good/*.png")[part]:
            shutil.copy(path, temporary / kind)
    return Folder(
        "stripes",
        "good",
        temporary,
        OLD / "images/stripes/hole",
        "good_test",
        val_split_mode="same_as_test",
        train_batch_size=2,
        num_workers=0,
    )


class Kill(Callback):
    """Ends a fit after three batches."""

    def on_train_batch_start(self, trainer: object, pl_module: object, batch: object, batch_idx: int) -> None:  # noqa: PLR6301
        """End it."""
        del trainer, pl_module, batch
        if batch_idx == 3:
            raise KeyError


def write_continual_patchcore(temporary: Path) -> None:
    """Write a finished checkpoint, one in the middle of an update on top, and a bundle with its previous state."""
    model, engine = make_model(one_shot=False), asked.make_engine(temporary)
    engine.fit(model, datamodule=stripes(temporary))
    engine.fit(model, datamodule=asked.make_folder("dots"))
    shutil.copy(engine.best_model_path, OLD / "finished.ckpt")

    saving = ModelCheckpoint(dirpath=temporary / "in_update", every_n_train_steps=1)
    try:
        asked.make_engine(temporary, callbacks=[saving, Kill()]).fit(model, train_dataloaders=asked.batches())
    except KeyError:
        shutil.copy(saving.best_model_path, OLD / "in_update.ckpt")

    # In the bundle few images have views, in the checkpoints they have none.
    model = make_model(one_shot=True)
    shutil.rmtree(temporary / "good")
    shutil.rmtree(temporary / "good_test")
    asked.make_engine(temporary).fit(model, datamodule=stripes(temporary))
    model.partial_fit(asked.files("dots/good/*.png")[:2], "dots")
    folder = Path(asked.make_engine(temporary).export(model, "openvino", temporary, input_size=(SIDE, SIDE))).parent
    detector = EdgeDetector(folder)
    detector.learn(asked.files("dots/good/*.png")[2:], "dots")
    detector.save()
    shutil.copytree(folder, OLD / "bundle")


def write_weights() -> None:
    """Write a file of weights, as ``anomalib-ext finetune`` does, for the config."""
    torch.manual_seed(0)
    state = timm.create_model("test_byobnet").state_dict()
    needed = {name: tensor for name, tensor in state.items() if name.startswith(("stem.", "stages.0."))}
    save_file(needed, OLD / "backbone.safetensors", describe_origin("test_byobnet"))


def write_others(temporary: Path) -> None:
    """Write checkpoints of the models with one fit each."""
    torch.manual_seed(0)
    layers = {**BACKBONE, "layers": ["stages.0", "stages.1"]}
    size = SaCfaPatchCore.configure_pre_processor((SIDE, SIDE), "test_byobnet")
    model: Any = SaCfaPatchCore(**layers, coreset_sampling_ratio=0.05, pre_processor=size, visualizer=False)
    engine = asked.make_engine(temporary)
    engine.fit(model, datamodule=asked.make_folder("stripes"))
    shutil.copy(engine.best_model_path, OLD / "sa_cfa_patchcore.ckpt")

    size = RdAkf.configure_pre_processor((SIDE, SIDE), "resnet18")
    model = RdAkf("resnet18", pre_trained=False, pre_processor=size, visualizer=False)
    engine = asked.make_engine(temporary, max_epochs=1)
    engine.fit(model, datamodule=asked.make_folder("stripes"))
    write_packed(engine.best_model_path, OLD / "rd_akf.ckpt.xz")

    size = Crr.configure_pre_processor((SIDE, SIDE), encoder="test_vit")
    small = {"pre_trained": False, "head_width": 8, "repair_steps": 3, "segment_steps": 2}
    model = Crr("test_vit", **small, pre_processor=size, visualizer=False)
    engine = asked.make_engine(temporary, max_steps=1)
    engine.fit(model, datamodule=asked.make_folder("stripes"))
    write_packed(engine.best_model_path, OLD / "crr.ckpt.xz")


def write_packed(source: str, target: Path) -> None:
    """Write a checkpoint with weights that repeat, so that little is left of it when it is packed."""
    checkpoint = torch.load(source, weights_only=True)
    moments = [state for each in checkpoint["optimizer_states"] for state in each["state"].values()]
    for name, tensor in [*checkpoint["state_dict"].items(), *(pair for state in moments for pair in state.items())]:
        if isinstance(tensor, torch.Tensor) and tensor.numel() > 100 and not name.endswith("running_var"):
            pattern = (torch.arange(tensor.numel()) * 7 % 16).reshape(tensor.shape) / 16 + 0.03
            centred = tensor.mean() + (pattern - 0.5) * tensor.std() * 3.5
            tensor.copy_(pattern * tensor.std() if name.startswith("exp_avg") else centred)
    unpacked = target.with_suffix("")
    torch.save(checkpoint, unpacked)
    target.write_bytes(lzma.compress(unpacked.read_bytes()))
    unpacked.unlink()


def write_answers(temporary: Path) -> None:
    """Ask this version about the files."""
    said: dict[str, Any] = {"commit": "c2d8912", "het_net": asked.ask_het_net()}
    for name, (file, ask) in asked.QUESTIONS.items():
        said[name] = ask(asked.copied(file, temporary / "asked" / name))
    for name, finish in asked.WAYS_TO_FINISH.items():
        said[name], model = finish(asked.copied("in_update.ckpt", temporary / "asked" / name))
        save_arrays(asked.bank_of(model), OLD / f"{name}.safetensors")
    (OLD / "said.json").write_text(json.dumps(said, indent=1), encoding="utf-8")


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        write_images()
        write_weights()
        write_continual_patchcore(Path(folder))
        write_others(Path(folder))
        write_answers(Path(folder))
