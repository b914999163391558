# SPDX-License-Identifier: Apache-2.0
"""Tests of Anomalib's own command with the model's config, and of the perturbations of test images."""

import sys
from pathlib import Path

import pytest
import torch
import yaml
from anomalib.cli.cli import main
from jsonargparse import ArgumentParser
from torchvision.transforms.v2 import Transform
from torchvision.tv_tensors import Image, Mask

CONFIGS = Path(__file__).parents[3] / "configs"
SMALL = """
model:
  class_path: HetNet
  init_args:
    backbone: resnet18
    pre_trained: false
    transformer: test_vit
    transformer_pre_trained: false
    visualizer: false
    pre_processor:
      class_path: anomalib.pre_processing.PreProcessor
      init_args:
        transform: {class_path: torchvision.transforms.v2.Resize, init_args: {size: [64, 64]}}
trainer: {max_epochs: 1, limit_train_batches: 1, accelerator: cpu}
"""


@pytest.mark.slow
def test_training_and_a_perturbed_test(
    products: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The config is filled up by the command line; the pass for the noise is shown; turned images are tested."""
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(SMALL, encoding="utf-8")
    args = ["train", "--config", str(CONFIGS / "model" / "het_net.yaml"), "--config", "small.yaml"]
    args += ["--data.root", str(products), "--data.category", "dots", "--data.num_workers", "0"]
    args += ["--data.test_augmentations", str(CONFIGS / "perturbations" / "rotation.yaml"), "--seed_everything", "0"]
    monkeypatch.setattr(sys, "argv", ["anomalib", *args])
    main()
    printed = "".join(capfd.readouterr())
    assert "Statistics of the noise: 100%" in printed
    assert "image_AUROC" in printed
    (path,) = tmp_path.glob("results/HetNet/**/model.ckpt")
    state = torch.load(path, weights_only=True)
    assert state["hyper_parameters"]["noise"] == "mgd"
    assert sum(value.numel() for value in state["state_dict"].values()) < 40e6, "the noise is no part of it"


@pytest.mark.parametrize("path", sorted((CONFIGS / "perturbations").glob("*.yaml")), ids=lambda path: path.stem)
def test_perturbations(path: Path) -> None:
    """Each changes the image, moves the mask with it, and is the same for the same seed."""
    parser = ArgumentParser()
    parser.add_argument("--transform", type=Transform)
    config = parser.parse_object({"transform": yaml.safe_load(path.read_text(encoding="utf-8"))})
    transform = parser.instantiate_classes(config).transform
    image = torch.rand(3, 1, 1) * 0.5 + torch.rand(1, 256, 256) * 0.2
    mask = torch.zeros(256, 256, dtype=torch.uint8)
    mask[40:80, 120:180] = 1
    image[:, mask.bool()] = 0.9

    def apply() -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(3)
        return transform(Image(image), Mask(mask))

    turned, moved = apply()
    assert turned.shape == image.shape
    assert moved.shape == mask.shape
    assert (turned - image).abs().mean() > 0.005
    assert set(moved.unique().tolist()) == {0, 1}
    inner = torch.nn.functional.avg_pool2d(moved[None].float(), 9, 1, 4)[0] == 1
    assert turned[:, inner].mean() > turned[:, ~moved.bool()].mean() + 0.1
    assert torch.equal(moved, mask) == (path.stem in {"blur", "brighter", "contrast", "darker"})
    assert all(torch.equal(a, b) for a, b in zip(apply(), (turned, moved), strict=True))
