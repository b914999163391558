# SPDX-License-Identifier: Apache-2.0
"""Draws the picture of the operator's page in the README, from a station that judges parts of this package."""

import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.error import URLError
from urllib.request import Request, urlopen

import torch
from anomalib.engine import Engine
from PIL import Image
from playwright.sync_api import sync_playwright

from anomalib_ext.data import PhotoVariants
from anomalib_ext.models import ContinualPatchCore

TARGET = Path(__file__).parent / "images/station.png"
PRODUCTS = ("gravel", "brick")
LEARNED = 16  # of the images to train on; the others pass as good parts


def learn(folder: Path) -> tuple[Path, list[Path]]:
    """Learn the products; return the bundle, and images of parts in the order in which they pass."""
    torch.manual_seed(0)
    model = ContinualPatchCore(memory_size=2000, visualizer=False).eval()
    parts = []
    for name in PRODUCTS:
        data = PhotoVariants(folder / "data", name)
        data.prepare_data()
        images = sorted((folder / "data" / name / "train/good").iterdir())
        model.partial_fit(images[:LEARNED], variant=name)
        good = [*images[LEARNED:], *sorted((folder / "data" / name / "test/good").iterdir())]
        for round_, kind in enumerate(("stain", "swap", "scratch", "crack", "scratch")):
            order = good[round_ * 3 :] + good[: round_ * 3]
            parts += [*order, folder / "data" / name / "test" / kind / f"00{round_ % 4}.png"]
    return Path(Engine(logger=False).export(model, "openvino", folder / "export")).parent, parts


@contextmanager
def station(bundle: Path) -> Generator[str]:
    """The address of a station, while it runs."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [Path(sys.executable).with_name("anomalib-edge"), "serve", str(bundle), "--port", str(port)]
    with subprocess.Popen(command) as process:  # noqa: S603
        try:
            for _ in range(300):
                with suppress(URLError):
                    urlopen(f"http://localhost:{port}/mode").close()
                    break
                time.sleep(0.1)
            yield f"http://localhost:{port}"
        finally:
            process.terminate()


def judge(url: str, image: Path, part: str) -> dict:
    """Have a part judged."""
    with urlopen(Request(f"{url}/predict?part={part}", image.read_bytes())) as answer:  # noqa: S310
        return json.load(answer)


def main() -> None:
    """Let parts pass, and draw the page with the last of them, which is scratched."""
    with TemporaryDirectory() as folder:
        bundle, parts = learn(Path(folder))
        with station(bundle) as url, sync_playwright() as playwright:
            for number, image in enumerate(parts):
                judge(url, image, f"A-{1000 + number}")
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            page.goto(url)
            page.locator("#thumbs img[src]").nth(6).wait_for()
            picture = Image.open(BytesIO(page.screenshot()))
            browser.close()
    picture.convert("RGB").quantize(256).save(TARGET, optimize=True)


if __name__ == "__main__":
    main()
