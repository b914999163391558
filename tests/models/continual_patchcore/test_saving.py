# SPDX-License-Identifier: Apache-2.0
"""Tests of how checkpoints are written: a full disk and a kill leave a whole file."""

import errno
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.engine.plugins import AnomalibCheckpointIO
from lightning.pytorch import Trainer

from anomalib_ext.models import ContinualPatchCore
from anomalib_ext.models.components.training import AtomicCheckpointIO

Make = Callable[..., Any]


def test_a_full_disk_leaves_the_old_file(
    model: ContinualPatchCore,
    make_data: Make,
    make_engine: Make,
    files: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And what was learned stays in memory."""
    engine = make_engine()
    engine.fit(model, datamodule=make_data("checks"))
    assert type(engine.trainer.strategy.checkpoint_io) is AtomicCheckpointIO
    path = Path(engine.best_model_path)
    before = path.read_bytes()
    model.partial_fit(files("checks", "test/good"), variant="checks")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            engine.trainer.save_checkpoint(path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    engine.trainer.save_checkpoint(path)
    assert path.read_bytes() != before
    assert ContinualPatchCore.load_from_checkpoint(path).model.bank.variants["checks"].images == 26


def save_and_die(path: Path, moment: str) -> None:
    """Save a checkpoint, and be killed by a signal while it is written, before it is synced, or once it is."""
    if moment == "writing":
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
    else:
        sync = os.fsync

        def die(descriptor: int) -> None:
            if moment == "synced":
                sync(descriptor)
            os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = die
    AtomicCheckpointIO().save_checkpoint({"tensor": torch.ones(500_000)}, path)


@pytest.mark.parametrize("moment", ["writing", "written", "synced"])
def test_a_kill_while_saving_leaves_a_whole_file(moment: str, tmp_path: Path) -> None:
    """It is the one before, and the next save removes what the killed one left."""
    path = tmp_path / "model.ckpt"
    AtomicCheckpointIO().save_checkpoint({"tensor": torch.zeros(500_000)}, path)
    before = path.read_bytes()
    process = multiprocessing.get_context("fork").Process(target=save_and_die, args=(path, moment))
    process.start()
    process.join()
    assert process.exitcode == -(signal.SIGXFSZ if moment == "writing" else signal.SIGKILL)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2
    AtomicCheckpointIO().save_checkpoint({"tensor": torch.ones(500_000)}, path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert torch.load(path, weights_only=True)["tensor"].min() == 1


def test_other_checkpoint_plugins_are_left_alone(model: ContinualPatchCore, make_data: Make, make_engine: Make) -> None:
    """A user's own way of saving is not replaced."""

    class Mine(AnomalibCheckpointIO):
        pass

    engine = make_engine(plugins=[Mine()])
    engine.fit(model, datamodule=make_data("checks"))
    assert type(engine.trainer.strategy.checkpoint_io) is Mine


def test_a_changed_checkpoint_is_refused(
    trained: tuple[ContinualPatchCore, Path], make_data: Make, make_engine: Make, tmp_path: Path
) -> None:
    """One flipped bit of the bank is enough, however it is loaded; torch itself would not tell."""
    content = bytearray(trained[1].read_bytes())
    vectors = trained[0].model.bank.variants["dots"].vectors[:4].tobytes()
    content[content.index(vectors) + 5] ^= 1
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    torch.load(path, weights_only=True)
    with pytest.raises(ValueError, match=r"model.ckpt is damaged"):
        ContinualPatchCore.load_from_checkpoint(path)
    for act in ("test", "fit"):
        with pytest.raises(ValueError, match=r"model.ckpt is damaged"):
            getattr(make_engine(), act)(trained[0], datamodule=make_data("dots"), ckpt_path=path)


@pytest.mark.parametrize("stage", ["fit", "test", "predict"])
def test_any_trainer_saves_safely(stage: str, model: ContinualPatchCore) -> None:
    """That of Lightning as well, which would write by way of the temporary folder, and whatever it was asked to do."""
    trainer = Trainer(accelerator="cpu", logger=False)
    model.trainer = trainer
    model.setup(stage)
    assert type(trainer.strategy.checkpoint_io) is AtomicCheckpointIO
