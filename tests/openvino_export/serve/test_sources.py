# SPDX-License-Identifier: Apache-2.0
"""What a station judges by itself."""

import shutil
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openvino_export.serve import sources
from openvino_export.serve.sources import BASLER, Feeder
from openvino_export.serve.station import PausedError, Station


class Judge:
    """Stands in for a station: notes what it is given, and fails where it is told to."""

    def __init__(self) -> None:
        self.images: dict[str, Any] = {}
        self.names: list[str] = []
        self.paused = False
        self.fails: dict[str, Exception] = {}

    def judge(self, image: Any, part: str, name: str) -> None:  # noqa: ANN401
        """Note an image."""
        assert part == name
        if self.paused:
            raise PausedError
        if name in self.fails:
            raise self.fails[name]
        self.images[name] = image
        self.names.append(name)


def wait(condition: Callable[[], object]) -> None:
    """Wait until something is so."""
    for _ in range(200):
        if condition():
            return
        time.sleep(0.02)
    pytest.fail("It does not come so.")


def calm() -> None:
    """Let a feeder look a few times."""
    time.sleep(0.3)


@pytest.fixture
def judge() -> Judge:
    """Return what judges."""
    return Judge()


@pytest.fixture
def feed(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> Generator[Callable[..., Feeder], None, None]:
    """Return a function that feeds a source to it, and looks often."""
    monkeypatch.setattr(sources, "_PAUSE", 0.1)
    feeders: list[Feeder] = []

    def start(source: object, interval: float = 0.05) -> Feeder:
        feeders.append(Feeder(judge, str(source), interval))  # type: ignore[arg-type]
        return feeders[-1]

    yield start
    for feeder in feeders:
        feeder.close()


@pytest.fixture
def folder(tmp_path: Path, products: Path) -> Path:
    """Return a folder with an image."""
    folder = tmp_path / "camera"
    (folder / "left").mkdir(parents=True)
    shutil.copy(products / "stripes" / "test" / "good" / "000.png", folder / "before.png")
    return folder


def test_folder(judge: Judge, feed: Callable[[object], Feeder], folder: Path) -> None:
    """New and changed images are judged once, also below it; not those that are there at the start."""
    content = (folder / "before.png").read_bytes()
    feed(folder)
    for name in ("a.png", "left/b.png", "left/notes.txt"):
        (folder / name).write_bytes(content)
    wait(lambda: len(judge.names) == 2)
    (folder / "a.png").write_bytes(content + b"\0")
    wait(lambda: len(judge.names) == 3)
    calm()
    assert judge.names == ["a.png", "left/b.png", "a.png"]
    assert judge.images == {"a.png": content + b"\0", "left/b.png": content}


def test_half_written(judge: Judge, feed: Callable[..., Feeder], folder: Path) -> None:
    """An image is left while it is written; if that takes a break, it is judged again when it is whole."""
    content = (folder / "before.png").read_bytes()
    feed(folder, 0.4)
    with (folder / "a.png").open("wb", buffering=0) as file:
        for start in range(0, 600, 6):
            file.write(content[start : start + 6])
            time.sleep(0.01)
        assert not judge.names
        wait(lambda: judge.images == {"a.png": content[:600]})
        file.write(content[600:])
    wait(lambda: judge.images == {"a.png": content})
    assert judge.names == ["a.png", "a.png"]


def test_taken_away(judge: Judge, feed: Callable[[object], Feeder], folder: Path) -> None:
    """An image that is gone is no fault; one that comes anew under its name is a new one."""
    content = (folder / "before.png").read_bytes()
    feed(folder)
    for _ in range(20):
        (folder / "a.png").write_bytes(content)
        time.sleep(0.01)
        (folder / "a.png").unlink()
    (folder / "before.png").unlink()
    calm()
    number = len(judge.names)
    (folder / "before.png").write_bytes(content)
    wait(lambda: judge.names[number:] == ["before.png"])


def test_folder_returns(
    judge: Judge, feed: Callable[[object], Feeder], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder that is gone for a time is said once, and what was in it is not judged again."""
    content = (folder / "before.png").read_bytes()
    feed(folder)
    folder.rename(folder.with_name("gone"))
    calm()
    assert capsys.readouterr().err.count("it is tried again") == 1
    folder.with_name("gone").rename(folder)
    (folder / "a.png").write_bytes(content)
    wait(lambda: judge.names)
    calm()
    assert judge.names == ["a.png"]


def test_faults(
    judge: Judge, feed: Callable[[object], Feeder], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An image that cannot be judged is said once; one that cannot be kept is tried again; others are not held up."""
    content = (folder / "before.png").read_bytes()
    judge.fails = {"a.png": ValueError("a.png is no image"), "b.png": OSError("The disk is full")}
    feed(folder)
    for name in ("a.png", "b.png", "c.png"):
        (folder / name).write_bytes(content)
    wait(lambda: judge.names == ["c.png"])
    calm()
    judge.fails = {}
    wait(lambda: judge.names == ["c.png", "b.png"])
    calm()
    assert judge.names == ["c.png", "b.png"]
    said = capsys.readouterr().err
    assert said.count("a.png is no image") == 1
    assert said.count("The disk is full") == 1


def test_pause(judge: Judge, feed: Callable[[object], Feeder], folder: Path) -> None:
    """Images that come in a pause are judged after it, and a feeder ends in one."""
    content = (folder / "before.png").read_bytes()
    judge.paused = True
    feeder = feed(folder)
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(content)
    calm()
    judge.paused = False
    wait(lambda: judge.names == ["a.png", "b.png"])
    judge.paused = True
    (folder / "c.png").write_bytes(content)
    calm()
    feeder.close()
    assert judge.names == ["a.png", "b.png"]


def test_video(station: Station, products: Path, tmp_path: Path) -> None:
    """Its frames are judged in order, once, as the pictures are that it is made of."""
    cv2 = pytest.importorskip("cv2")
    images = sorted((products / "stripes" / "test").glob("*/00[01].png"))
    writer = cv2.VideoWriter(str(tmp_path / "line.avi"), cv2.VideoWriter_fourcc(*"FFV1"), 10, (64, 64))  # without loss
    for path in images:
        writer.write(cv2.imread(str(path)))
    writer.release()
    expected = [station.judge(path.read_bytes())["pred_score"] for path in images]
    feeder = Feeder(station, str(tmp_path / "line.avi"))
    wait(lambda: not feeder._thread.is_alive())
    verdicts = station.parts.latest(20)[::-1][len(images) :]
    assert [verdict["part"] for verdict in verdicts] == [f"line_{number:06}" for number in range(len(images))]
    assert [verdict["pred_score"] for verdict in verdicts] == pytest.approx(expected, abs=1e-3)


def test_video_returns(
    judge: Judge, feed: Callable[[object], Feeder], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is no video is tried again until it is one."""
    cv2 = pytest.importorskip("cv2")
    (tmp_path / "line.avi").write_bytes(b"nothing")
    feed(tmp_path / "line.avi")
    calm()
    assert capsys.readouterr().err.count("No frame can be read") == 1
    writer = cv2.VideoWriter(str(tmp_path / "new.avi"), cv2.VideoWriter_fourcc(*"FFV1"), 10, (64, 64))
    writer.write(np.zeros((64, 64, 3), np.uint8))
    writer.release()
    (tmp_path / "new.avi").rename(tmp_path / "line.avi")
    wait(lambda: judge.names == ["line_000000"])


def test_no_source(judge: Judge, folder: Path) -> None:
    """One that is not there, and a single image, are refused at once."""
    with pytest.raises(FileNotFoundError, match="no folder, video or camera"):
        Feeder(judge, str(folder / "missing"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"before\.png is a single image"):
        Feeder(judge, str(folder / "before.png"))  # type: ignore[arg-type]


def test_basler(
    judge: Judge, feed: Callable[[object], Feeder], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A camera is waited for, gives frames, and is found again after it has failed; here pylon's own emulator."""
    pylon = pytest.importorskip("pypylon.pylon", reason="needs the extra basler")
    monkeypatch.delenv("PYLON_CAMEMU", raising=False)
    feed(BASLER)
    wait(lambda: "The camera fails: No device" in capsys.readouterr().err)
    monkeypatch.setenv("PYLON_CAMEMU", "1")
    wait(lambda: len(judge.names) > 2)
    assert judge.names[:3] == ["frame_000000", "frame_000001", "frame_000002"]
    frame = judge.images["frame_000000"]
    assert (frame.shape, frame.dtype) == ((1040, 1024, 3), np.uint8)
    assert np.ptp(frame) > 100  # its test picture is no plain area
    with monkeypatch.context() as patch:
        patch.setattr(pylon.InstantCamera, "RetrieveResult", lambda *_: pylon.InstantCamera().Open())
        wait(lambda: "it is tried again: The camera fails" in capsys.readouterr().err)
    number = len(judge.names)
    wait(lambda: len(judge.names) > number)


def test_no_pypylon(
    feed: Callable[[object], Feeder], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The extra is named."""
    monkeypatch.setitem(sys.modules, "pypylon", None)
    feed(BASLER)
    wait(lambda: "pip install 'anomalib-ext[basler]'" in capsys.readouterr().err)
