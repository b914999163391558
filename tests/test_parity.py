# SPDX-License-Identifier: Apache-2.0
"""The command ``anomalib-ext parity``, and how its exit code comes through."""

import json
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import ModuleType

import pytest
import torch
from lightning import Trainer

from anomalib_ext import cli
from anomalib_ext.models import ContinualPatchCore
from anomalib_ext.parity import checkpoint_model
from openvino_export import EdgeDetector

Run = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs the command and returns its exit code."""

    def call(*args: object) -> int:
        monkeypatch.setattr(sys, "argv", ["anomalib-ext", *map(str, args)])
        return cli.main()

    return call


def test_parity(
    run: Run,
    trained: ContinualPatchCore,
    bundle: Path,
    products: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Torch gives the same as the edge, until the edge has learned more."""
    trainer = Trainer(accelerator="cpu", logger=False)
    trainer.strategy.connect(deepcopy(trained))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    arguments = ["parity", bundle, products / "dots" / "test", "--reference", tmp_path / "model.ckpt"]
    capsys.readouterr()  # what the trainer says of this PC
    assert run(*arguments) == 0
    line = json.loads(capsys.readouterr().out)
    assert (line["same"], line["images"], line["different_labels"]) == (True, 12, 0)
    detector = EdgeDetector(bundle)
    detector.learn(sorted((products / "dots" / "train" / "good").iterdir()), "dots")
    detector.save()
    assert run(*arguments) == 3
    line = json.loads(capsys.readouterr().out)
    assert line["same"] is False
    assert line["different_labels"] > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["BUNDLE", "BUNDLE", "--reference", "gone.ckpt"], r"anomalib-ext parity: .*gone\.ckpt"),
        (["gone", "image.png", "--reference", "gone.ckpt"], "anomalib-ext parity: There is no bundle folder gone"),
    ],
)
def test_errors(run: Run, exported: Path, args: list[str], message: str) -> None:
    """They are one line, with which the program ends."""
    with pytest.raises(SystemExit, match=message):
        run("parity", *(arg.replace("BUNDLE", str(exported)) for arg in args))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "model.ckpt cannot be loaded as a checkpoint of ContinualPatchCore"),
        (b"no checkpoint", "model.ckpt cannot be loaded as a checkpoint of ContinualPatchCore"),
        ({"state_dict": {}}, "model.ckpt cannot be loaded as a checkpoint of ContinualPatchCore"),
        ([1], "model.ckpt cannot be loaded as a checkpoint of ContinualPatchCore"),
        (Path("in_update.ckpt"), "model.ckpt is damaged"),
        (Path("sa_cfa_patchcore.ckpt"), "model.ckpt cannot be loaded as a checkpoint of ContinualPatchCore"),
    ],
)
def test_damaged_checkpoints(run: Run, exported: Path, tmp_path: Path, content: object, message: str) -> None:
    """They are one line, too: of nothing, of other things, of another model, and with a bit flipped."""
    path = tmp_path / "model.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, Path):
        damaged = bytearray((Path(__file__).parent / "old_files" / content).read_bytes())
        damaged[len(damaged) // 2] ^= content.name == "in_update.ckpt"
        path.write_bytes(damaged)
    else:
        torch.save(content, path)
    with pytest.raises(SystemExit, match=message):
        run("parity", exported, exported, "--reference", path)


def test_a_model_that_is_not_there(bundle: Path) -> None:
    """Is named."""
    with pytest.raises(ValueError, match=r"is of the model AnomalibModul, which anomalib\.models does not have"):
        checkpoint_model(bundle / "model.ckpt", "AnomalibModul")


def test_the_checkpoint_must_be_named(run: Run, exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """There is no other that it could mean."""
    with pytest.raises(SystemExit) as end:
        run("parity", exported, exported)
    assert end.value.code == 2
    assert "reference" in capsys.readouterr().err


def test_results_of_other_commands(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are no exit codes."""
    module = ModuleType("a_command")
    module.learn = lambda: [{"step": 1}]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_command", module)
    monkeypatch.setitem(cli.COMMANDS, "stream", ("a_command:learn", ""))
    assert run("stream") == 0
