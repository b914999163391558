# SPDX-License-Identifier: Apache-2.0
"""Tests of `strategy=ddp` with memory banks: in one process, as Anomalib's engine has it, and in two that learn."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from anomalib_ext.models import ContinualPatchCore, SaCfaPatchCore
from openvino_export.memory import state
from openvino_export.memory.memory_bank import MemoryBank

Make = Callable[..., Any]
Learned = tuple[dict[str, Any], torch.Tensor]

# Each process saves what it has learned of 19 images, which are not for two to share, and what it says of others. They
# begin with different weights.
SCRIPT = """
    import sys
    from pathlib import Path

    import torch
    from anomalib.data import Folder
    from anomalib.models import ContinualPatchCore, SaCfaPatchCore
    from lightning.pytorch import Trainer

    if __name__ == "__main__":
        name, root, processes = sys.argv[1:]
        kind, extra = {
            "ContinualPatchCore": (ContinualPatchCore, {"memory_size": 400}),
            "SaCfaPatchCore": (SaCfaPatchCore, {"coreset_sampling_ratio": 1.0}),
        }[name]
        trainer = Trainer(
            accelerator="cpu",
            devices=int(processes),
            strategy="ddp",
            max_epochs=1,
            num_sanity_val_steps=0,
            val_check_interval=2,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        torch.manual_seed(trainer.global_rank)
        pre_processor = kind.configure_pre_processor((64, 64), "test_resnet")
        kwargs = {"pre_trained": False, "visualizer": False, "pre_processor": pre_processor, **extra}
        model = kind("test_resnet", ["layer1", "layer2"], **kwargs)
        data = Folder(
            "stripes",
            root=root,
            normal_dir="good",
            normal_test_dir="test",
            abnormal_dir="bad",
            val_split_mode="same_as_test",
            train_batch_size=3,
            eval_batch_size=2,
            num_workers=0,
        )
        trainer.fit(model, datamodule=data)
        images = torch.cat([batch.image for batch in data.test_dataloader()])
        with torch.no_grad():
            scores = model.eval().model(pre_processor(images)).pred_score
        torch.save([model.state_dict(), scores], f"{processes}_{trainer.global_rank}.pt")
"""


def test_the_engine_s_one_process(make_data: Make, make_engine: Make) -> None:
    """Anomalib's engine has PatchCores learn in one process, whatever is asked for; `ddp` is no hindrance."""
    torch.manual_seed(0)
    kinds = (ContinualPatchCore, SaCfaPatchCore)
    with mock.patch.dict(os.environ):
        for kind in kinds:
            pre_processor = kind.configure_pre_processor((64, 64), "test_resnet")
            kwargs = {"pre_trained": False, "visualizer": False, "pre_processor": pre_processor}
            model = kind("test_resnet", ["layer1", "layer2"], **kwargs)
            engine = make_engine(strategy="ddp", devices=2, limit_val_batches=1)
            engine.fit(model, datamodule=make_data())
            assert len(model.model.memory_bank)
            assert "configure_ddp" not in vars(engine.trainer.strategy)  # which the next model may need
        torch.distributed.destroy_process_group()


@pytest.fixture
def learned(products: Path, tmp_path: Path) -> Callable[[type], list[Learned]]:
    """Return a function that gives the states and scores of one process that learned alone, and of two together."""
    (tmp_path / "script.py").write_text(dedent(SCRIPT), encoding="utf-8")
    shutil.copytree(products / "stripes/train/good", tmp_path / "good")
    shutil.copytree(products / "stripes/test/good", tmp_path / "test")
    shutil.copytree(products / "stripes/test/hole", tmp_path / "bad")
    (tmp_path / "good/000.png").unlink()
    (tmp_path / "test/000.png").unlink()  # nor are 11

    def run(kind: type) -> list[Learned]:
        for processes in ("1", "2"):
            command = [sys.executable, "script.py", kind.__name__, str(tmp_path), processes]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
            assert done.returncode == 0, done.stderr
        return [torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1_0", "2_0", "2_1")]

    return run


def bank_of(tensors: dict[str, Any]) -> MemoryBank:
    """The bank in the state of a ContinualPatchCore."""
    extra = tensors["model._extra_state"]
    return state.from_arrays({name: tensor.numpy() for name, tensor in extra["tensors"].items()}, extra["plain"]).bank


@pytest.mark.slow
def test_two_processes_know_the_images_of_all(learned: Make) -> None:
    """Both end with the same bank, thresholds and scores; within the certificate, they are those of one process."""
    (alone, expected), (first, scores), (second, other_scores) = learned(ContinualPatchCore)
    assert torch.equal(scores, other_scores)
    assert state.to_bytes(bank_of(first)) == state.to_bytes(bank_of(second))
    bank, reference = bank_of(first), bank_of(alone)
    assert set(bank.image_hashes) == set(reference.image_hashes)
    own, other = bank.variants["stripes"], reference.variants["stripes"]
    assert own.images == other.images == 19
    assert np.array_equal(np.sort(own.calibration.origins), np.sort(other.calibration.origins))
    bound = max(bank.radius_bound(), reference.radius_bound())
    assert bound < expected.max() / 5
    torch.testing.assert_close(scores, expected, atol=bound, rtol=0)


@pytest.mark.slow
def test_two_processes_select_from_the_images_of_all(learned: Make) -> None:
    """Both have the same vectors, those of one process; but an image that both had has them twice."""
    banks = [tensors["model.memory_bank"] for tensors, _ in learned(SaCfaPatchCore)]
    assert torch.equal(banks[1], banks[2])
    alone, together = (bank.unique(dim=0) for bank in banks[:2])
    torch.testing.assert_close(together, alone)
