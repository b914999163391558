# SPDX-License-Identifier: Apache-2.0
"""Files that the version of commit c2d8912 wrote are read, say what they said then, and are learned on top of.

``old_files/write.py`` made them with that version. It asked them with the functions below, whose answers are in
``old_files/said.json``.
"""

import json
import lzma
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import openvino as ov
import pytest
import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.cli.cli import main as anomalib
from anomalib.data import Folder, ImageBatch
from anomalib.engine import Engine
from anomalib.models import ContinualPatchCore, Crr, HetNet, RdAkf, SaCfaPatchCore
from PIL import Image
from safetensors.numpy import load_file
from torch.utils.data import DataLoader

from openvino_export import EdgeDetector
from openvino_export.bundle.folder import BundleError
from openvino_export.cli import main as anomalib_edge

OLD = Path(__file__).parent / "old_files"
Said = dict[str, Any]


# What both versions are asked


def files(pattern: str) -> list[Path]:
    """Return images such as ``stripes/hole/*.png``, in order."""
    return sorted((OLD / "images").glob(pattern))


def tensor_of(paths: list[Path]) -> torch.Tensor:
    """Return images of shape ``(B, 3, 64, 64)`` in [0, 1]."""
    return torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in paths])).permute(0, 3, 1, 2) / 255


def make_engine(folder: Path, **kwargs: Any) -> Engine:  # noqa: ANN401
    """Return a quiet engine."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return Engine(**{"default_root_dir": folder, "accelerator": "cpu", **quiet, **kwargs})


def make_folder(product: str, count: int = 6, **kwargs: Any) -> Folder:  # noqa: ANN401
    """Return the datamodule of a product without test images, of which all that are learned are one batch."""
    modes = {"test_split_mode": "none", "val_split_mode": "none", **kwargs}
    return Folder(product, "good", OLD / "images" / product, train_batch_size=count, num_workers=0, **modes)


def verdict(label: Any, score: Any, anomaly_map: Any, mask: Any) -> Said:  # noqa: ANN401
    """Return what is said about an image, as plain data."""
    pixels = np.asarray(anomaly_map, np.float64)
    summary = {"mean": float(pixels.mean()), "max": float(pixels.max()), "anomalous": float(np.asarray(mask).mean())}
    return {"label": bool(label), "score": float(score), "map": summary}


def judged(model: torch.nn.Module) -> list[Said]:
    """Return what a model says about all images."""
    with torch.no_grad():
        said = model.eval()(tensor_of(files("*/*/*.png")))
    columns = (said.pred_label.flatten(), said.pred_score.flatten(), said.anomaly_map, said.pred_mask)
    return [verdict(*row) for row in zip(*columns, strict=True)]


def judged_at_the_edge(detector: EdgeDetector) -> list[Said]:
    """Return what a detector says about all images."""
    results = detector.predict(files("*/*/*.png"))
    return [
        {**verdict(one.pred_label, one.pred_score, one.anomaly_map, one.pred_mask), "variant": one.variant}
        for one in results
    ]


def judged_by_the_graph(bundle: Path) -> list[Said]:
    """Return what a bundle's ``model.xml`` says about all images."""
    compiled = ov.Core().compile_model(bundle / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    said = []
    for path in files("*/*/*.png"):
        outputs = {next(iter(key.names)): value for key, value in compiled(tensor_of([path]).numpy()).items()}
        names = ("pred_label", "pred_score", "anomaly_map", "pred_mask")
        said.append(verdict(*(outputs[name].squeeze() for name in names)))
    return said


def reported(report: Any) -> Said:  # noqa: ANN401
    """Return what an update did, without what it took."""
    by_variant = {name: dict(getattr(report, name)) for name in ("variants", "added", "removed")}
    return {**by_variant, **{name: getattr(report, name) for name in ("known_images", "radius_bound", "num_vectors")}}


def known(model: ContinualPatchCore) -> Said:
    """Return what a model says about all images, and its thresholds by variant."""
    thresholds = {kind: getattr(model.post_processor, f"{kind}_values").tolist() for kind in ("image", "pixel")}
    return {"judged": judged(model), "thresholds": thresholds}


def ask_bundle(bundle: Path) -> Said:
    """Judge, learn few images of a new product, and save."""
    detector = EdgeDetector(bundle)
    info = {key: value for key, value in detector.info().items() if key not in {"bundle", "anomalib_ext", "bytes"}}
    said: Said = {"info": info, "judged": judged_at_the_edge(detector), "graph": judged_by_the_graph(bundle)}
    said["learned"] = reported(detector.learn(files("checks/good/*.png")[:2], "checks").report)
    detector.save()
    said["afterwards"] = {"judged": judged_at_the_edge(detector), "graph": judged_by_the_graph(bundle)}
    return said


def ask_undo(bundle: Path) -> Said:
    """Go back to what was before the last learning that the old version saved."""
    assert anomalib_edge(["undo", str(bundle)]) == 0
    return {"judged": judged_at_the_edge(EdgeDetector(bundle)), "graph": judged_by_the_graph(bundle)}


def ask_finished(path: Path) -> Said:
    """Judge, and learn few images of a new product, and one that is known."""
    model = ContinualPatchCore.load_from_checkpoint(path)
    said = known(model)
    learned = reported(model.partial_fit([*files("checks/good/*.png")[:2], files("stripes/good/*.png")[0]]))
    return {**said, "learned": learned, "afterwards": known(model)}


def batches() -> DataLoader:
    """Return batches of an image of each of two products; the update that was interrupted had learned three of four."""
    pairs = zip(files("stripes/good/*.png")[6:], files("checks/good/*.png"), strict=True)
    return DataLoader([ImageBatch(image=tensor_of(list(pair))) for pair in pairs], None)


def ask_in_update(path: Path) -> Said:
    """Judge by what was learned when the update was interrupted."""
    return known(ContinualPatchCore.load_from_checkpoint(path))


def finish_update(path: Path) -> tuple[Said, ContinualPatchCore]:
    """Go on with the rest of the images."""
    model = ContinualPatchCore.load_from_checkpoint(path)
    rest = torch.cat([batch.image for batch in list(batches())[3:]])
    return {"learned": reported(model.partial_fit(rest)), **known(model)}, model


def finish_fit(path: Path) -> tuple[Said, ContinualPatchCore]:
    """Have a trainer repeat the fit that was interrupted."""
    model = ContinualPatchCore.load_from_checkpoint(path)
    make_engine(path.parent).fit(model, train_dataloaders=batches(), ckpt_path=path)
    return {"learned": reported(model.last_report), **known(model)}, model


def bank_of(model: ContinualPatchCore) -> dict[str, np.ndarray]:
    """Return the bank as a checkpoint of the model holds it."""
    tensors = model.state_dict()["model._extra_state"]["tensors"]
    return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}


def ask_command(config: Path) -> Said:
    """Train by Anomalib's command with a config, where what it names is."""
    folder = config.parent
    shutil.copytree(OLD / "images", folder / "images")
    shutil.copy(OLD / "backbone.safetensors", folder)
    os.chdir(folder)
    with mock.patch.object(sys, "argv", ["anomalib", "train", "--config", config.name]):
        anomalib()
    (path,) = folder.glob("results/ContinualPatchCore/dots/v0/**/*.ckpt")
    return known(ContinualPatchCore.load_from_checkpoint(path))


def ask_sa_cfa_patchcore(path: Path) -> Said:
    """Judge; every fit learns anew."""
    return {"judged": judged(SaCfaPatchCore.load_from_checkpoint(path))}


def ask_rd_akf(path: Path) -> Said:
    """Judge, and train for two steps more, the second of which shows the optimizer's state."""
    model = RdAkf.load_from_checkpoint(path)
    said: Said = {"judged": judged(model)}
    # Without checkpoints, which would take most of the time.
    engine = make_engine(path.parent, max_epochs=3, callbacks=[ModelCheckpoint(save_top_k=0)])
    engine.fit(model.train(), datamodule=make_folder("stripes"), ckpt_path=path)
    return {**said, "train_loss": float(engine.trainer.callback_metrics["train_loss"])}


def ask_crr(path: Path) -> Said:
    """Judge, and train until both stages are over."""
    model = Crr.load_from_checkpoint(path)
    said: Said = {"judged": judged(model)}
    engine = make_engine(path.parent)
    engine.fit(model.train(), datamodule=make_folder("stripes"), ckpt_path=path)
    losses = {name: float(engine.trainer.callback_metrics[name]) for name in ("repair_loss", "segment_loss")}
    return {**said, **losses}


QUESTIONS: dict[str, tuple[str, Callable[[Path], Said]]] = {
    "bundle": ("bundle", ask_bundle),
    "undo": ("bundle", ask_undo),
    "finished": ("finished.ckpt", ask_finished),
    "in_update": ("in_update.ckpt", ask_in_update),
    "command": ("train.yaml", ask_command),
    "sa_cfa_patchcore": ("sa_cfa_patchcore.ckpt", ask_sa_cfa_patchcore),
    "rd_akf": ("rd_akf.ckpt.xz", ask_rd_akf),
    "crr": ("crr.ckpt.xz", ask_crr),
}
CONTINUAL = ("bundle", "undo", "finished", "in_update", "command")
WAYS_TO_FINISH = {"finished_update": finish_update, "finished_fit": finish_fit}


def ask_het_net() -> list[Any]:
    """Return the tensors of a checkpoint, which would be too large, and the number of each that is trained."""
    size = HetNet.configure_pre_processor((64, 64))
    teachers = {"backbone": "resnet18", "pre_trained": False, "transformer": "test_vit"}
    model = HetNet(**teachers, transformer_pre_trained=False, pre_processor=size, visualizer=False)
    (group,) = model.configure_optimizers().param_groups
    places = {id(parameter): place for place, parameter in enumerate(group["params"])}
    state = model.state_dict(keep_vars=True)
    return [[name, list(tensor.shape), places.get(id(tensor))] for name, tensor in state.items()]


# Answers


def copied(name: str, folder: Path) -> Path:
    """Return a copy of an old file or bundle in a new folder, unpacked; the copy may be changed."""
    folder.mkdir(parents=True)
    path = folder / name
    if path.suffix == ".xz":
        path = path.with_suffix("")
        path.write_bytes(lzma.decompress((OLD / name).read_bytes()))
    elif (OLD / name).is_dir():
        shutil.copytree(OLD / name, path)
    else:
        shutil.copy(OLD / name, path)
    return path


def said(name: str) -> Any:  # noqa: ANN401
    """Return what the old version answered."""
    return json.loads((OLD / "said.json").read_text(encoding="utf-8"))[name]


def assert_same(now: Any, then: Any, where: str = "") -> None:  # noqa: ANN401
    """Check that two answers are equal, numbers up to rounding: 1e-3 is what is left of a distance that should be 0."""
    if isinstance(then, dict):
        assert list(now) == list(then), where
        for key, value in then.items():
            assert_same(now[key], value, f"{where}/{key}")
    elif isinstance(then, list):
        assert len(now) == len(then), where
        for place, value in enumerate(then):
            assert_same(now[place], value, f"{where}/{place}")
    elif isinstance(then, float):
        assert now == pytest.approx(then, rel=1e-3, abs=1e-3, nan_ok=True), where
    else:
        assert now == then, where


# Shares and scores of ContinualPatchCore follow other rules now; what must not change is by these keys.
LASTING = {"label", "variant", "variants", "images", "known_images", "model", "backbone", "layers", "memory_size"}


def lasting(answer: Any) -> Any:  # noqa: ANN401
    """Return the part of an answer of ContinualPatchCore that other rules do not change."""
    if isinstance(answer, dict):
        parts = {key: value if key in LASTING - {"variants"} else lasting(value) for key, value in answer.items()}
        counts = answer.get("variants", {})
        if all(isinstance(count, int) for count in counts.values()):
            parts["variants"] = counts
        return {key: value for key, value in sorted(parts.items()) if key in LASTING or value not in ({}, [])}
    if isinstance(answer, list):
        images = files("*/*/*.png")
        if len(answer) == len(images):  # of few images learned, the threshold is a guess, which may miss the defect
            answer = [one for one, path in zip(answer, images, strict=True) if path.parts[-3:-1] != ("checks", "hole")]
        return [part for part in map(lasting, answer) if part not in ({}, [])]
    return {}


@pytest.mark.parametrize("name", QUESTIONS)
def test_is_read_and_learned_on_top_of(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read without code, and the answers are those of the version that wrote it."""
    monkeypatch.chdir(tmp_path)  # and back, wherever the command goes
    file, ask = QUESTIONS[name]
    now, then = ask(copied(file, tmp_path / name)), said(name)
    if name in CONTINUAL:
        now, then = lasting(now), lasting(then)
        assert sum("label" in each for each in then["judged"]) == len(files("*/*/*.png")) - 1
    if name == "in_update":  # that version called good parts of a product bad that it was about to learn
        paths = [path for path in files("*/*/*.png") if path.parts[-3:-1] != ("checks", "hole")]
        place = [path.parts[-3:-1] == ("checks", "good") for path in paths]
        assert not any(each["label"] for each, is_it in zip(now["judged"], place, strict=True) if is_it)
        now, then = (
            [each for each, is_it in zip(answer["judged"], place, strict=True) if not is_it] for answer in (now, then)
        )
    assert_same(now, then)


@pytest.mark.parametrize("name", WAYS_TO_FINISH)
def test_an_update_that_was_interrupted_is_finished(name: str, tmp_path: Path) -> None:
    """All images are known that the version knew that began the update."""
    answers, model = WAYS_TO_FINISH[name](copied("in_update.ckpt", tmp_path / name))
    assert lasting(answers["learned"]) == lasting(said(name)["learned"])
    expected = load_file(OLD / f"{name}.safetensors")
    assert sorted(bank_of(model)["image_hashes"]) == sorted(expected["image_hashes"])
    for path, each in zip(files("*/*/*.png"), answers["judged"], strict=True):
        if path.parts[-3:-1] != ("checks", "hole"):  # of few images learned, the threshold is a guess
            assert each["label"] == (path.parts[-2] != "good"), path


def test_tensors_of_het_net() -> None:
    """They have their old names, shapes and places in the optimizer, so that checkpoints fit."""
    assert ask_het_net() == said("het_net")


def test_an_old_bundle_takes_no_defects(tmp_path: Path) -> None:
    """Its graph has no room for them; it says so before anything is learned."""
    detector = EdgeDetector(copied("bundle", tmp_path / "copy"))
    image = files("*/*/*.png")[0]
    with pytest.raises(BundleError, match="takes no defects: a former version wrote it"):
        detector.learn(image, defective=True)
    assert detector.info()["saved"]
