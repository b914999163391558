# SPDX-License-Identifier: Apache-2.0
"""What a step of the distillation models costs, and an image that the exported model judges, beside Anomalib's.

python tests/benchmarks/distillation_cost.py --settings.steps 15
"""

import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from anomalib.models import HetNet
from distillation import DEVICE, MODELS, Settings, maps_of, network_of, optimizer_of, rd_akf
from jsonargparse import auto_cli

WARM_UP = 5  # steps that are not timed


def _cost(settings: Settings, name: str) -> list[str]:
    """Measure a model, in a process of its own for its memory."""
    model = MODELS[name][0](settings)
    teachers = (model if isinstance(model, HetNet) else rd_akf(settings)).model.to(DEVICE)
    network = network_of(model).to(DEVICE).train()
    optimizer = optimizer_of(settings, name, model, network)
    images = torch.rand(settings.batch, 3, settings.size, settings.size, device=DEVICE)
    if isinstance(model, HetNet):
        model.model.noise.fit([maps_of(teachers, images)], settings.batch)
    seconds = []
    for _ in range(WARM_UP + settings.steps):
        times = [time.perf_counter()]
        maps = maps_of(teachers, images)
        float(maps[0].sum())  # which waits for the device
        times.append(time.perf_counter())
        loss = network.loss(maps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        float(loss)
        seconds.append(np.diff([*times, time.perf_counter()]))
    ahead, behind = np.median(seconds[WARM_UP:], axis=0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    if DEVICE == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    with TemporaryDirectory() as folder:
        path = model.cpu().to_openvino(Path(folder), input_size=(settings.size, settings.size))
        # In a process of its own: in this one, the same file may run at a third of its speed.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            throughput = pool.submit(_throughput, path, settings.size).result()
    return [name, f"{ahead + behind:.3f}", f"{behind:.3f}", f"{peak:.0f}", f"{throughput:.1f}"]


def _throughput(path: Path, size: int) -> float:
    """Return images a second, one by one, as median of repeated inferences."""
    import openvino as ov

    compiled = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
    image = np.random.default_rng(0).random((1, 3, size, size), dtype=np.float32)
    seconds = []
    for _ in range(25):
        started = time.perf_counter()
        compiled(image)
        seconds.append(time.perf_counter() - started)
    return 1 / statistics.median(seconds[5:])


def main(settings: Settings, models: list[str] = ["ReverseDistillation", "RdAkf", "HetNet"]) -> None:  # noqa: B006
    """Print what a step and an image cost.

    Args:
        settings: Of these, the steps are so many that are timed.
        models: Names in `MODELS`.
    """
    print("| model | seconds a step | of which without teachers | peak MiB | images a second, exported |")
    print("| --- | --- | --- | --- | --- |")
    for name in models:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            print(f"| {' | '.join(pool.submit(_cost, settings, name).result())} |", flush=True)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
