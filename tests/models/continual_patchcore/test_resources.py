# SPDX-License-Identifier: Apache-2.0
"""Tests of memory and of what is imported, each in a process of its own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

MEMORY = """
import sys
from anomalib_ext.models import ContinualPatchCore
assert not {"faiss", "openvino"} & set(sys.modules)
import psutil
import torch
from anomalib.data import ImageBatch
from anomalib.engine import Engine
from lightning.pytorch import Callback
from torch.utils.data import DataLoader, Dataset
from openvino_export.memory import update

update.SMALLEST_POOL = 2000

class Noise(Dataset):
    def __init__(self, count, seed):
        self.count, self.seed = count, seed

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(self.seed + index)
        return torch.rand(3, 64, 64, generator=generator)

class Peak(Callback):
    bytes = 0

    def on_train_batch_end(self, *args, **kwargs):
        self.bytes = max(self.bytes, psutil.Process().memory_info().rss)

def fit(count, seed):
    peak = Peak()
    pre_processor = ContinualPatchCore.configure_pre_processor((64, 64))
    model = ContinualPatchCore(
        "test_resnet", ["layer1"], pre_trained=False, memory_size=200, variant="noise", pre_processor=pre_processor
    )
    loader = DataLoader(Noise(count, seed), 8, collate_fn=lambda images: ImageBatch(image=torch.stack(images)))
    engine = Engine(default_root_dir=sys.argv[1], accelerator="cpu", enable_progress_bar=False, callbacks=[peak])
    engine.fit(model, loader)
    return peak.bytes

fit(40, 0)
print("RSS", fit(40, 10_000), fit(400, 20_000))
"""


@pytest.mark.slow
def test_ten_times_the_images_take_no_more_memory(tmp_path: Path) -> None:
    """The pool is full with a tenth of them already. Nor does the class load faiss or openvino."""
    run = subprocess.run([sys.executable, "-c", MEMORY, tmp_path], capture_output=True, text=True, check=False)
    numbers = re.search(r"RSS (\d+) (\d+)", run.stdout)
    assert numbers, run.stderr
    few, many = map(int, numbers.groups())
    assert many < few + 8 * 2**20  # the images would take 17 MiB more, and their patch embeddings 11


LAZY = """
import sys
import anomalib_ext, openvino_export, openvino_export.memory.memory_bank
loaded = {"torch", "anomalib", "faiss", "openvino", "lightning", "timm"} & set(sys.modules)
assert not loaded, loaded
"""


def test_imports_are_lazy() -> None:
    """The bank needs no torch."""
    run = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
