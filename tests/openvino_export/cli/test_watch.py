# SPDX-License-Identifier: Apache-2.0
"""The command watch."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from openvino_export.cli import main

COMMAND = [sys.executable, "-c", "import sys; from openvino_export.cli import main; sys.exit(main(sys.argv[1:]))"]
Run = Callable[..., tuple[int, list[dict[str, Any]], str]]
SetClock = Callable[..., Any]


def test_watch(run: Run, set_clock: SetClock, bundle: Path, products: Path, tmp_path: Path) -> None:
    """Each new image is judged once, when it is complete; a broken one is reported; learning is taken up."""
    folder = tmp_path / "camera"
    folder.mkdir()
    shutil.copy(products / "stripes" / "test" / "good" / "000.png", folder / "a.png")
    (folder / "broken.png").write_text("no image")
    image = (products / "dots" / "test" / "good" / "000.png").read_bytes()

    def learn() -> None:
        main(["learn", str(bundle), str(products / "dots" / "train" / "good"), "--variant", "dots"])

    def write(part: bytes) -> None:
        with (folder / "b.png").open("ab") as file:
            file.write(part)

    step = len(image) // 8 + 1
    parts = [image[first : first + step] for first in range(0, len(image), step)]
    clock = set_clock(None, None, learn, *(partial(write, part) for part in parts))
    code, lines, _ = run("watch", bundle, folder, "--idle", "0.95", "--interval", "0.1")
    assert code == 4  # for the broken one
    assert not clock.events
    assert clock.now == pytest.approx(0.1 * (3 + len(parts) + 1 + 10))  # ten looks after the one that judges b.png
    lines = [line for line in lines if "source" in line]
    assert [Path(line["source"]).name for line in lines] == ["a.png", "broken.png", "b.png"]
    assert "cannot be read" in lines[1]["error"]
    assert [line.get("variant") for line in lines] == ["stripes", None, "dots"]


def test_it_is_interrupted(run: Run, set_clock: SetClock, exported: Path, tmp_path: Path) -> None:
    """Without a time to be idle, it goes on until the user interrupts it, with no traceback."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    set_clock(*[None] * 20, interrupt)
    assert run("watch", exported, tmp_path) == (130, [], "")


def test_it_goes_on_after_a_kill(run: Run, set_clock: SetClock, exported: Path, products: Path, tmp_path: Path) -> None:
    """Images that were judged are not judged again; those that came meanwhile, or have changed, are."""
    folder, images = tmp_path / "camera", sorted((products / "stripes" / "test").glob("*/*.png"))
    (folder / "deep").mkdir(parents=True)
    shutil.copy(images[0], folder / "a.png")
    arguments = ["watch", exported, folder, "--output", tmp_path / "maps", "--interval", "0.1"]
    record = tmp_path / "maps" / "predictions.jsonl"

    worker = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        assert worker.stdout is not None
        first = [json.loads(worker.stdout.readline())]
        shutil.copy(images[1], folder / "deep" / "a.png")
        first.append(json.loads(worker.stdout.readline()))
        deadline = time.monotonic() + 10
        while record.read_text().count("\n") < 2 and time.monotonic() < deadline:
            time.sleep(0.01)  # the line is printed before it is written down
    finally:
        worker.kill()
        worker.wait()
    with record.open("a") as file:
        file.write('{"source": "cut')  # as by a power failure
    shutil.copy(images[2], folder / "c.png")
    shutil.copy(images[-1], folder / "a.png")
    set_clock()
    code, second, _ = run(*arguments, "--idle", "1")
    names = [[str(Path(line["source"]).relative_to(folder)) for line in lines] for lines in (first, second)]
    assert names == [["a.png", "deep/a.png"], ["a.png", "c.png"]]
    assert second[0]["pred_label"] is True
    assert code == 3
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.glob("maps/**/*.png")} == {
        "maps/a.png",
        "maps/deep/a.png",
        "maps/c.png",
    }
    assert run(*arguments, "--idle", "0.5")[:2] == (0, [])


def test_only_one_holds_the_record(run: Run, exported: Path, products: Path, tmp_path: Path) -> None:
    """A second one says so and ends; the first ends cleanly when it is terminated, and another may begin."""
    folder = tmp_path / "camera"
    folder.mkdir()
    shutil.copy(products / "stripes" / "test" / "good" / "000.png", folder / "a.png")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    first: subprocess.Popen[str] = subprocess.Popen([*COMMAND, "watch", exported, folder], **pipes)  # type: ignore[call-overload]
    try:
        assert first.stdout is not None
        line = json.loads(first.stdout.readline())
        code, lines, errors = run("watch", exported, folder, "--idle", "0.1")
        assert (code, lines) == (1, [])
        assert f"Another watch holds the record {folder / 'predictions.jsonl'}" in errors
        first.send_signal(signal.SIGTERM)
        assert first.communicate(timeout=60) == ("", "")
        assert first.returncode == 130
    finally:
        first.kill()
    recorded = json.loads((folder / "predictions.jsonl").read_text())
    assert {key: value for key, value in recorded.items() if key != "state"} == line
    assert run("watch", exported, folder, "--idle", "0.5") == (0, [], "")


def test_it_ends_when_nobody_reads(exported: Path, products: Path, tmp_path: Path) -> None:
    """The reader of its lines has ended: so does it, and what is not printed was not judged but for one image."""
    image = products / "stripes" / "test" / "good" / "000.png"
    for number in range(2):
        shutil.copy(image, tmp_path / f"{number}.png")
    worker = subprocess.Popen([*COMMAND, "watch", exported, tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert worker.stdout is not None
        assert worker.stderr is not None
        worker.stdout.readline()
        worker.stdout.readline()
        worker.stdout.close()
        for number in range(2, 5):
            shutil.copy(image, tmp_path / f"{number}.png")
        assert b"Broken pipe" in worker.stderr.read()
        assert worker.wait(60) != 0
    finally:
        worker.kill()
    assert (tmp_path / "predictions.jsonl").read_bytes().count(b"\n") == 3
