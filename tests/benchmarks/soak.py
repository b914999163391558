# SPDX-License-Identifier: Apache-2.0
"""Whether `watch` judges each image exactly once, and keeps its memory and its descriptors, over many images.

    python tests/benchmarks/soak.py --bundle weights/openvino --results results/soak.csv

Three runs, each with a copy of the bundle. `killed`: images come one after another, some that were judged are written
anew, another process learns and undoes in turn, and `watch` is killed every few seconds. `steady`: the same without a
kill. `burst`: all images are there at once, and `predict` and `watch` judge them in turn. It fails if an image is
missing in the record or is there twice in the same state, if a line is damaged or an error, or if `watch` ends by
itself.
"""

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from jsonargparse import auto_cli
from PIL import Image
from products import write

COMMAND = [sys.executable, "-c", "import sys; from openvino_export.cli import main; sys.exit(main(sys.argv[1:]))"]
COLUMNS = (
    "run",
    "seconds",
    "images",
    "recorded",
    "printed",
    "starts",
    "learned",
    "undone",
    "mib",
    "descriptors",
    "processor",
)
SIDE = 64
# When so many images have come, one is written anew.
CHANGES = 50


def put(path: Path, seed: int) -> None:
    """Write an image of noise, at once as a camera would not."""
    pixels = np.random.default_rng(seed).integers(100, 156, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


class Soak:
    """A bundle, a watched folder, and those who fill it and who learn.

    Args:
        bundle: The bundle, which is copied.
        root: Folder for everything.
        images: Number of images.
    """

    def __init__(self, bundle: Path, root: Path, images: int) -> None:
        self.bundle = Path(shutil.copytree(bundle, root / "bundle"))
        self.folder, self.printed, self.said = root / "camera", root / "printed.jsonl", root / "said.txt"
        self.record = self.folder / "predictions.jsonl"
        self.images, self.put, self.learned, self.undone, self.starts = images, 0, 0, 0, 0
        self.folder.mkdir()
        (root / "new").mkdir()
        for number in range(4):
            put(root / "new" / f"{number}.png", 10**6 + number)
        self._new, self._end, self._start = root / "new", threading.Event(), time.monotonic()

    def fill(self) -> None:
        """Let images come, in folders of a thousand; now and then the last that was judged is written anew."""
        for number in range(self.images):
            path = self.folder / f"{number // 1000}" / f"{number:06}.png"
            path.parent.mkdir(exist_ok=True)
            put(path, number)
            if number % CHANGES == 0:
                for source, _ in self.lines()[-1:]:
                    put(Path(source), 10**7 + number)
            self.put += 1
            time.sleep(0.002)

    def learn(self) -> None:
        """Learn and undo in turn, until the end."""
        while not self._end.wait(1):
            subprocess.run(
                [*COMMAND, "learn", self.bundle, self._new, "--variant", "new", "--force", "true"],
                check=True,
                capture_output=True,
            )
            self.learned += 1
            if not self._end.wait(1):
                subprocess.run([*COMMAND, "undo", self.bundle], check=True, capture_output=True)
                self.undone += 1

    def watch(self) -> "subprocess.Popen[bytes]":
        """Begin to watch."""
        self.starts += 1
        with self.printed.open("ab") as printed, self.said.open("ab") as said:
            return subprocess.Popen([*COMMAND, "watch", self.bundle, self.folder], stdout=printed, stderr=said)

    def is_done(self) -> bool:
        """Whether all images have come, and the record has each in the state in which it is."""
        if self.put < self.images:
            return False
        known = dict(self.lines())
        paths = list(self.folder.glob("*/*.png"))
        return all(known.get(str(path)) == _state(path) for path in paths)

    def lines(self) -> list[tuple[str, tuple[int, int]]]:
        """Image and state of each line of the record.

        Raises:
            ValueError: If a line is damaged.
        """
        text = self.record.read_bytes() if self.record.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]  # a last one may be in the middle of being written
        found = [json.loads(line) for line in whole.splitlines()]
        return [(line["source"], (line["state"][0], line["state"][1])) for line in found]

    def sample(self, name: str, process: psutil.Process | None = None) -> dict[str, Any]:
        """What is to be seen now."""
        printed = self.printed.read_bytes().count(b"\n") if self.printed.exists() else 0
        counts = {"images": self.put, "recorded": len(self.lines()), "printed": printed}
        own = {} if process is None else {"mib": process.memory_info().rss / 2**20, "descriptors": process.num_fds()}
        seconds = time.monotonic() - self._start
        turns = {"starts": self.starts, "learned": self.learned, "undone": self.undone}
        return {"run": name, "seconds": seconds, **counts, **turns, **own}

    def check(self) -> None:
        """See that each image is in the record in its last state, and in no state twice.

        Raises:
            RuntimeError: If it is not so.
        """
        twice = [line for line, count in Counter(self.lines()).items() if count > 1]
        errors = self.record.read_bytes().count(b'"error"')
        if twice or errors or not self.is_done():
            msg = f"{len(twice)} states are there twice, such as {twice[:1]}; {errors} errors; done: {self.is_done()}."
            raise RuntimeError(msg)

    def run(self, name: str, seconds: float | None) -> Iterator[dict[str, Any]]:
        """Watch until all images are judged, and yield samples.

        Args:
            name: Name of the run.
            seconds: Mean time after the first verdicts until it is killed; without it, it is not.

        Raises:
            RuntimeError: If an image is missing or there twice, or it ended by itself.
        """
        pool = ThreadPoolExecutor()
        others = [pool.submit(each) for each in (self.fill, self.learn)]
        rng = np.random.default_rng(0)
        code = None
        while not self.is_done():
            worker, before, end = self.watch(), len(self.lines()), float("inf")
            process = psutil.Process(worker.pid)
            while time.monotonic() < end and not self.is_done():
                time.sleep(min(1, max(0, end - time.monotonic())))
                if worker.poll() is not None:
                    break
                yield self.sample(name, process if seconds is None else None)
                if seconds is not None and end == float("inf") and len(self.lines()) > before:
                    end = time.monotonic() + rng.uniform(0, 2) * seconds
            (worker.terminate if seconds is None else worker.kill)()
            code = worker.wait()
        self._end.set()
        for each in others:
            each.result()
        if code not in {130, -9}:
            msg = f"watch ended with {code}: {self.said.read_text(encoding='utf-8')[-500:]}"
            raise RuntimeError(msg)
        self.check()
        yield self.sample(name)


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def times(act: Callable[[], object]) -> dict[str, float]:
    """Seconds that something takes, and seconds of processor time of the processes that it starts."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    act()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.monotonic() - start, "processor": processor}


def burst(bundle: Path, root: Path, images: int) -> Iterator[dict[str, Any]]:
    """Yield how long `predict` and `watch` take in turn for a folder of images that are all there."""
    soak = Soak(bundle, root, images)
    soak.fill()

    def predict() -> None:
        subprocess.run([*COMMAND, "predict", soak.bundle, soak.folder], check=False, capture_output=True)

    def watch() -> None:
        soak.record.unlink(missing_ok=True)
        worker = soak.watch()
        while not soak.record.exists() or soak.record.read_bytes().count(b"\n") < images:
            time.sleep(0.02)
        worker.terminate()
        worker.wait()

    for act in (predict, watch) * 3:
        yield {"run": f"burst {act.__name__}", "images": images, **times(act)}


def growth(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Memory in MiB and descriptors that a process had more at its end than after a tenth of the images."""
    seen = [row for row in rows if "mib" in row]
    first = next(row for row in seen if row["recorded"] >= seen[-1]["recorded"] / 10)
    return {key: seen[-1][key] - first[key] for key in ("mib", "descriptors")}


def main(
    bundle: Path,
    results: Path = Path("results/soak.csv"),
    images: int = 10_000,
    burst_images: int = 1500,
    seconds: float = 4.0,
) -> None:
    """Run the benchmark.

    Args:
        bundle: Folder of a bundle that learns.
        results: File that is written.
        images: Number of images of the runs `killed` and `steady`.
        burst_images: Number of images of the run `burst`.
        seconds: Mean time from the first verdicts to a kill.
    """
    done: list[dict[str, Any]] = []

    def rows() -> Iterator[dict[str, Any]]:
        with tempfile.TemporaryDirectory() as folder:
            for name in ("killed", "steady", "burst"):
                root = Path(folder, name)
                root.mkdir()
                if name == "burst":
                    yield from burst(bundle, root, burst_images)
                else:
                    yield from Soak(bundle, root, images).run(name, seconds if name == "killed" else None)

    write(results, COLUMNS, (done.append(row) or row for row in rows()))
    for name in ("killed", "steady"):
        print([row for row in done if row["run"] == name][-1])
    print(growth(done))
    for row in done:
        if row["run"].startswith("burst"):
            print(row)


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
