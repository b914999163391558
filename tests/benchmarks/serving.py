# SPDX-License-Identifier: Apache-2.0
"""What a station costs beside `EdgeDetector.predict`: latency, many clients at once, judging while learning, memory.

The server runs in a process of its own, the clients in this one, on the same PC.

python tests/benchmarks/serving.py weights/openvino datasets/bottle/test/good
"""

from __future__ import annotations

import csv
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import numpy as np
import psutil
from jsonargparse import auto_cli
from PIL import Image

from openvino_export import EdgeDetector


def main(bundle: str, images: str, seconds: float = 600, clients: int = 8, output: str = "serving.csv") -> None:
    """Measure, and write a CSV file of one row for each measurement.

    Args:
        bundle: Folder of a bundle; it is not changed, a copy learns.
        images: Folder of images of a product that it knows.
        seconds: How long many clients ask.
        clients: Number of clients.
        output: File to write.
    """
    files = [path.read_bytes() for path in sorted(Path(images).rglob("*.png"))[:64]]
    rows: list[dict[str, object]] = []
    with TemporaryDirectory() as folder:
        copy = Path(folder) / "bundle"
        shutil.copytree(bundle, copy)
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        options = ["--port", str(port), "--folder", f"{folder}/station"]
        server = subprocess.Popen(["anomalib-edge", "serve", str(copy), *options])
        url = f"http://localhost:{port}"
        try:
            wait_for(url)
            process = psutil.Process(server.pid)
            rows.append({"what": "one client", **one_client(copy, url, files, Path(folder) / "part.png")})
            before = process.memory_info().rss
            rows.append({"what": f"{clients} clients", **many_clients(url, files, clients, seconds)})
            rows[-1]["memory_growth_mb"] = (process.memory_info().rss - before) / 1e6
            rows.append({"what": "while learning", **while_learning(url, files)})
        finally:
            server.terminate()
            server.wait()
    keys = dict.fromkeys(key for row in rows for key in row)
    with Path(output).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*keys])
        writer.writeheader()
        writer.writerows({key: f"{v:.2f}" if isinstance(v, float) else v for key, v in row.items()} for row in rows)
    print(Path(output).read_text(encoding="utf-8"))


def wait_for(url: str) -> None:
    """Wait until a server answers."""
    for _ in range(600):
        with suppress(httpx.TransportError):
            httpx.get(f"{url}/v2/health/live")
            return
        time.sleep(0.1)
    sys.exit(f"{url} does not answer.")


def one_client(bundle: Path, url: str, files: list[bytes], path: Path) -> dict[str, float]:
    """Milliseconds of an upload, and of `EdgeDetector.predict` of the same file, in turn."""
    detector, own, uploads = EdgeDetector(bundle), [], []
    with httpx.Client() as client:
        for number in range(300):
            path.write_bytes(files[number % len(files)])
            start = time.perf_counter()
            detector.predict(path)
            middle = time.perf_counter()
            client.post(f"{url}/predict", content=files[number % len(files)]).raise_for_status()
            own.append(1e3 * (middle - start))
            uploads.append(1e3 * (time.perf_counter() - middle))
    predict, upload = (float(np.median(values[20:])) for values in (own, uploads))
    return {"predict_p50_ms": predict, "upload_p50_ms": upload, "difference_ms": upload - predict}


def many_clients(url: str, files: list[bytes], clients: int, seconds: float) -> dict[str, object]:
    """Answers by status, and their latency, of clients that ask without a pause."""
    end = time.monotonic() + seconds
    statuses: Counter[int] = Counter()
    latencies: list[float] = []

    def ask(number: int) -> None:
        with httpx.Client(timeout=60) as client:
            while time.monotonic() < end:
                start = time.perf_counter()
                status = client.post(f"{url}/predict", content=files[number % len(files)]).status_code
                statuses[status] += 1
                latencies.append(1e3 * (time.perf_counter() - start))
                number += clients

    run_together([threading.Thread(target=ask, args=(first,)) for first in range(clients)])
    return {
        "seconds": seconds,
        "answers": len(latencies),
        "status_429": statuses[429],
        "errors": len(latencies) - statuses[200] - statuses[429],
        "upload_p50_ms": float(np.median(latencies)),
        "upload_p99_ms": float(np.quantile(latencies, 0.99)),
    }


def while_learning(url: str, files: list[bytes]) -> dict[str, float]:
    """Milliseconds of an upload while another client has images learned, and while it does not, in turn."""
    is_learning, end = threading.Event(), threading.Event()
    taken: dict[bool, list[float]] = {True: [], False: []}

    def learn() -> None:
        number = 0
        with httpx.Client(timeout=300) as client:
            while not end.is_set():
                if is_learning.wait(0.01):
                    number += 1
                    batch = [("files", (f"{i}.png", changed(content, number))) for i, content in enumerate(files[:8])]
                    client.post(f"{url}/learn", files=batch, data={"force": "true"}).raise_for_status()

    def judge() -> None:
        with httpx.Client(timeout=60) as client:
            for number in range(20):
                learns = number % 2 == 0
                (is_learning.set if learns else is_learning.clear)()
                time.sleep(0.2 if learns else 3.0)  # until it has begun, or what is being learned is saved
                for content in files[:20]:
                    start = time.perf_counter()
                    client.post(f"{url}/predict", content=content).raise_for_status()
                    taken[learns].append(1e3 * (time.perf_counter() - start))
        is_learning.clear()
        end.set()

    run_together([threading.Thread(target=each) for each in (learn, judge)])
    quiet, busy = (float(np.median(taken[learns])) for learns in (False, True))
    return {"upload_p50_ms": quiet, "upload_p50_ms_learning": busy, "ratio": busy / quiet}


def run_together(threads: list[threading.Thread]) -> None:
    """Run threads to their end."""
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def changed(content: bytes, seed: int) -> bytes:
    """An image with noise, which is not known yet."""
    with Image.open(BytesIO(content)) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    pixels += np.random.default_rng(seed).integers(-2, 3, pixels.shape)
    buffer = BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


if __name__ == "__main__":
    auto_cli(main)
