# SPDX-License-Identifier: Apache-2.0
"""Tests of the bundle folder while it changes: a kill at any point leaves the old bundle or the new one."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openvino_export import EdgeDetector
from openvino_export.bundle import folder as bundles

FILES = ("bank.safetensors", "features.bin", "features.xml", "model.bin", "model.xml")
Read = Callable[[Path], dict[str, bytes]]


def interrupted(steps: int, monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any]) -> bool:
    """Stop `act` for good after so many changes of the disk; return whether it was stopped."""

    class Stopped(BaseException):
        pass

    left = [steps]
    originals = {(owner, name): getattr(owner, name) for owner, name in (
        (Path, "rename"), (Path, "replace"), (Path, "mkdir"), (Path, "rmdir"), (os, "fsync"), (os, "link"),
        (shutil, "rmtree"),
    )}  # fmt: skip

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: object, **kwargs: object) -> object:
            if left[0] <= 0:
                raise Stopped
            left[0] -= 1
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for (owner, name), original in originals.items():
            patch.setattr(owner, name, counted(original))
        try:
            act()
        except Stopped:
            return True
    return False


def test_interrupted_after_any_step(
    bundle: Path, visible_files: Read, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever step was the last, readers find the old or the new bundle, at once, read-only and after recovery."""
    new = {"model.bin": b"new weights", "bank.safetensors": b"new bank"}
    old = visible_files(bundle)
    outcomes = []
    for steps in range(100):
        folder = Path(shutil.copytree(bundle, tmp_path / f"{steps}"))

        def act(folder: Path = folder) -> None:
            with bundles.locked(folder):
                bundles.update(bundles.read(folder), new, {"variants": ["new"]})

        stopped = interrupted(steps, monkeypatch, act)
        overlaid = bundles._read_once(folder, FILES).contents
        recovered = bundles.read(folder, FILES)
        assert recovered.contents == overlaid
        outcomes.append(recovered.contents["model.bin"] == b"new weights")
        assert recovered.contents == ({**recovered.contents, **new} if outcomes[-1] else recovered.contents)
        assert recovered.metadata["variants"] == (["new"] if outcomes[-1] else ["stripes"])
        with bundles.locked(folder):
            pass
        assert not (folder / ".next").exists()
        assert not (folder / ".staging").exists()
        after = visible_files(folder)
        assert (after == old) is not outcomes[-1]
        if outcomes[-1]:
            bundles.undo(folder)
            assert visible_files(folder) == old
        shutil.rmtree(folder)
        if not stopped:
            break
    else:
        pytest.fail("the update never ended")
    assert outcomes == sorted(outcomes), "once new, it stays new"
    assert 5 < outcomes.index(True) < len(outcomes) - 5, "stopped before and after the step that counts"


def test_readers_while_it_changes(bundle: Path) -> None:
    """They are never kept waiting, nor shown a mixture."""
    stop = threading.Event()
    seen: list[tuple[bytes, list[str]]] = []
    errors: list[BaseException] = []

    def look() -> None:
        try:
            while not stop.is_set():
                read = bundles.read(bundle, ("model.bin",))
                seen.append((read.contents["model.bin"][:20], read.metadata["variants"]))
        except BaseException as error:  # noqa: BLE001  # shown below
            errors.append(error)

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(60):
        with bundles.locked(bundle):
            data = f"weights {number}".encode()
            bundles.update(
                bundles.read(bundle), {"model.bin": data, "bank.safetensors": data}, {"variants": [str(number)]}
            )
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors
    numbers = [(weights, variants) for weights, variants in seen if variants != ["stripes"]]
    assert len(set(map(str, numbers))) > 3
    assert all(weights == f"weights {variants[0]}".encode() for weights, variants in numbers)


HOLD = """
import sys, time
from openvino_export.bundle import folder as bundle
with bundle.locked(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_two_writers(bundle: Path) -> None:
    """The second waits, then says so; a killed one leaves no lock behind."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD, bundle], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(TimeoutError, match="Another process"), bundles.locked(bundle, timeout=0.2):
            pass
        assert bundles.read(bundle).metadata["variants"] == ["stripes"], "readers do not wait"
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    start = time.monotonic()
    with bundles.locked(bundle):
        assert time.monotonic() - start < 5


def test_saving_interrupted_after_any_step(
    bundle: Path,
    good: dict[str, list[Path]],
    visible_files: Read,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Whatever step was the last, graph, bank and description are of one state."""
    shutil.copytree(bundle, tmp_path / "before")
    detector = EdgeDetector(bundle)
    detector.learn(good["dots"][:2], "dots")
    detector.save()
    learned, old = visible_files(bundle), visible_files(tmp_path / "before")
    outcomes = []
    for steps in range(100):
        shutil.rmtree(bundle)
        shutil.copytree(tmp_path / "before", bundle)
        detector = EdgeDetector(bundle)
        detector.learn(good["dots"][:2], "dots")
        stopped = interrupted(steps, monkeypatch, detector.save)
        assert list(EdgeDetector(bundle).info()["variants"]) == bundles.read(bundle).metadata["variants"]
        after = visible_files(bundle)
        outcomes.append(after == learned)
        assert after == (learned if outcomes[-1] else old)
        if not stopped:
            break
    else:
        pytest.fail("it was never saved")
    assert outcomes == sorted(outcomes), "once new, it stays new"
    assert 5 < outcomes.index(True) < len(outcomes) - 5, "stopped before and after the step that counts"


WRITE = """
import sys
from openvino_export.bundle.folder import locked, read, undo, update
bundle = sys.argv[1]
print("ready", flush=True)
while True:
    for number in range(1, 4):
        with locked(bundle):
            data = f"state {number}".encode() * 1000
            update(read(bundle), {"model.bin": data, "bank.safetensors": data}, {"variants": [str(number)]})
        print("done", flush=True)
    for _ in range(3):
        undo(bundle)
        print("done", flush=True)
"""

LEARN = """
import sys
from openvino_export import EdgeDetector
from openvino_export.bundle.folder import undo
bundle, *images = sys.argv[1:]
detector = EdgeDetector(bundle)
print("ready", flush=True)
while True:
    for count in range(1, len(images) + 1):
        detector.learn(images[:count], "dots", force=True)
        detector.save()
        print("done", flush=True)
    for _ in range(3):
        undo(bundle)
        print("done", flush=True)
    detector.reload()
"""


def kill_at_random(rng: np.random.Generator, script: str, *arguments: object) -> None:
    """Run a script, and kill it somewhere in one of its first steps."""
    worker = subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], stdout=subprocess.PIPE)
    try:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"ready\n"
        duration = 0.01
        for _ in range(rng.integers(8)):
            start = time.monotonic()
            assert worker.stdout.readline() == b"done\n"
            duration = time.monotonic() - start
        time.sleep(rng.uniform(0, duration))
    finally:
        worker.kill()
        worker.wait()


@pytest.mark.slow
def test_kills_at_random_points(bundle: Path) -> None:
    """A process that writes and undoes is killed again and again; the bundle is whole each time."""
    rng = np.random.default_rng(0)
    states: set[str] = set()
    for _ in range(30):
        kill_at_random(rng, WRITE, bundle)
        found = bundles.read(bundle, ("model.bin", "bank.safetensors"))
        (state,) = found.metadata["variants"]
        states.add(state)
        if state != "stripes":
            assert found.contents == dict.fromkeys(found.contents, f"state {state}".encode() * 1000)
    assert len(states) > 1, "some kills came after one state was written, some after another"


@pytest.mark.slow
def test_kills_of_a_detector(bundle: Path, good: dict[str, list[Path]], tested: list[Path]) -> None:
    """So is one that learns, saves and undoes; what is left judges by what it knows."""
    rng = np.random.default_rng(0)
    image = next(path for path in tested if "dots" in path.parts)
    states: set[int] = set()
    for _ in range(12):
        kill_at_random(rng, LEARN, bundle, *good["dots"][:3])
        detector = EdgeDetector(bundle)
        result = detector.predict(image)
        known = detector.info()["variants"]
        assert result.variant == ("dots" if "dots" in known else "stripes")
        assert list(known) == bundles.read(bundle).metadata["variants"]
        states.add(known["dots"]["images"] if "dots" in known else 0)
    assert len(states) > 1, "some kills came after one save, some after another"
