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
