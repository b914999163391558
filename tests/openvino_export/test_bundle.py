# SPDX-License-Identifier: Apache-2.0
"""Tests of the bundle folder: what is no whole bundle is refused, and a kill leaves the old one or the new one."""

import hashlib
import json
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
from openvino_export.bundle import ir
from openvino_export.bundle.folder import BundleError

FILES = ("bank.safetensors", "features.bin", "features.xml", "model.bin", "model.xml")
Change = Callable[[Path], Any]


def content(folder: Path) -> dict[str, bytes]:
    """Return the visible files."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def metadata(folder: Path, **changes: object) -> None:
    """Change entries of metadata.json."""
    path = folder / "metadata.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def flip(name: str) -> Change:
    """Change a byte of a file."""

    def change(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return change


def renamed(name: str) -> Change:
    """Have the metadata list the bank under another name."""

    def change(folder: Path) -> None:
        files = json.loads((folder / "metadata.json").read_text())["files"]
        metadata(folder, files={**files, name: files["bank.safetensors"]})

    return change


def link_outside(folder: Path) -> None:
    """Put a file elsewhere and link to it."""
    (folder / "bank.safetensors").rename(folder.parent / "elsewhere")
    (folder / "bank.safetensors").symlink_to(folder.parent / "elsewhere")


def other_bank(folder: Path) -> None:
    """Have a bank of another dimension, with a checksum that is right."""
    from safetensors.numpy import save

    from openvino_export.memory.memory_bank import MemoryBank

    bank = MemoryBank(10)
    bank.learn(np.ones((3, 5), np.float32), "foreign")
    bank.commit()
    arrays, plain = bank.to_arrays()
    replace(folder, "bank.safetensors", save(arrays, {"plain": json.dumps(plain)}))


def replace(folder: Path, name: str, data: bytes) -> None:
    """Replace a file, with a checksum that is right."""
    (folder / name).write_bytes(data)
    files = json.loads((folder / "metadata.json").read_text())["files"]
    entry = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    metadata(folder, files={**files, name: entry})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *((flip(name), f"{name} was changed or truncated") for name in FILES),
        (
            lambda folder: os.truncate(folder / "model.bin", 100),
            r"model.bin was changed or truncated: it has 100 bytes",
        ),
        (lambda folder: (folder / "features.bin").unlink(), "has no features.bin.*copy the whole folder"),
        (lambda folder: (folder / "metadata.json").unlink(), "has no metadata.json. It is no bundle"),
        (lambda folder: os.truncate(folder / "metadata.json", 100), "metadata.json is no JSON"),
        (lambda folder: (folder / "metadata.json").write_text("[1]"), "not written by anomalib-ext"),
        (lambda folder: metadata(folder, schema_version=2), "schema version 2, .* reads 1. Update anomalib-ext"),
        (lambda folder: metadata(folder, schema_version=0), "schema version 0, .* reads 1. Export the model again"),
        (lambda folder: metadata(folder, schema_version="1"), "has no schema_version"),
        (lambda folder: metadata(folder, files={}), "has no model.xml"),
        (lambda folder: metadata(folder, files={"model.xml": 1}), "lists its files in another way"),
        (lambda folder: metadata(folder, input_size=[64]), "input_size"),
        (lambda folder: metadata(folder, input_size=[64, -1]), "input_size"),
        (lambda folder: metadata(folder, mean=[0.5]), "mean"),
        (renamed("../bundle/bank.safetensors"), "leads out of the bundle"),
        (renamed("/etc/hostname"), "leads out of the bundle"),
        (renamed(".."), "leads out of the bundle"),
        (renamed("C:bank"), "leads out of the bundle"),
        (link_outside, "leads out of the bundle"),
        (other_bank, "of another backbone"),
        (lambda folder: replace(folder, "bank.safetensors", b"0" * 100), "bank.safetensors of .* cannot be read"),
        (lambda folder: replace(folder, "features.xml", b"<net>"), "features.xml of .* cannot be"),
    ],
)
def test_what_is_no_bundle_is_refused(change: Change, message: str, bundle: Path) -> None:
    """With what is wrong, and what to do."""
    EdgeDetector(bundle)
    change(bundle)
    with pytest.raises(BundleError, match=message):
        EdgeDetector(bundle)


def test_no_folder(tmp_path: Path) -> None:
    """It is named."""
    with pytest.raises(FileNotFoundError, match=r"no bundle folder .*gone"):
        EdgeDetector(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=r"no bundle folder .*gone"):
        bundles.undo(tmp_path / "gone")


def test_undo(bundle: Path, good: dict[str, list[Path]]) -> None:
    """It brings back the bundle, byte by byte; a second time, what was learned; a detector takes both up."""
    with pytest.raises(BundleError, match="no previous state"):
        bundles.undo(bundle)
    old = content(bundle)
    detector = EdgeDetector(bundle)
    detector.learn(good["dots"][:2], "dots")
    detector.save()
    new = content(bundle)
    changed = {name for name in old if old[name] != new[name]}
    assert changed == {"bank.safetensors", "metadata.json", "model.bin"}
    bundles.undo(bundle)
    assert content(bundle) == old
    assert detector.reload()
    assert list(detector.info()["variants"]) == ["stripes"]
    bundles.undo(bundle)
    assert content(bundle) == new
    flip("bank.safetensors")(bundle / ".previous")
    with pytest.raises(BundleError, match="bundle stays as it is"):
        bundles.undo(bundle)
    assert content(bundle) == new


def test_saving_twice(bundle: Path, good: dict[str, list[Path]]) -> None:
    """What is saved already is not written again, so that undo goes back by one learning."""
    detector = EdgeDetector(bundle)
    detector.save()
    assert not (bundle / ".previous").exists()
    for number in (2, 4):
        detector.learn(good["dots"][:number], "dots")
        detector.save()
        detector.save()
    bundles.undo(bundle)
    assert EdgeDetector(bundle).info()["variants"]["dots"]["images"] == 2


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


def test_interrupted_after_any_step(bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever step was the last, readers find the old or the new bundle, at once, read-only and after recovery."""
    new = {"model.bin": b"new weights", "bank.safetensors": b"new bank"}
    old = content(bundle)
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
        after = content(folder)
        assert (after == old) is not outcomes[-1]
        if outcomes[-1]:
            bundles.undo(folder)
            assert content(folder) == old
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


LEARN = """
import sys
from openvino_export import EdgeDetector
bundle, *images = sys.argv[1:]
detector = EdgeDetector(bundle)
print("ready", flush=True)
while True:
    for count in range(1, len(images) + 1):
        detector.learn(images[:count], "dots", force=True)
        detector.save()
        print("saved", flush=True)
    from openvino_export.bundle.folder import undo
    for _ in range(3):
        undo(bundle)
    detector.reload()
"""


def test_kills_at_random_points(bundle: Path, good: dict[str, list[Path]], tested: list[Path]) -> None:
    """A process that learns, saves and undoes is killed again and again; the bundle is whole each time."""
    rng = np.random.default_rng(0)
    image = next(path for path in tested if "dots" in path.parts)
    states: set[int] = set()
    kills = 0
    while kills < 12 or (len(states) < 2 and kills < 60):  # on a busy PC, few come after the first save
        kills += 1
        worker = subprocess.Popen(
            [sys.executable, "-c", LEARN, bundle, *good["dots"][:3]],
            stdout=subprocess.PIPE,
        )
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0, 0.05 * kills))
        worker.kill()
        worker.wait()
        detector = EdgeDetector(bundle)
        result = detector.predict(image)
        known = detector.info()["variants"]
        assert result.variant == ("dots" if "dots" in known else "stripes")
        expected = bundles.read(bundle).metadata["variants"]
        assert list(known) == expected
        states.add(known["dots"]["images"] if "dots" in known else 0)
    assert len(states) > 1, "some kills came before the first save, some after"


def test_constants_that_share_bytes_are_refused() -> None:
    """Changing one would change the other."""
    layer = '<layer id="0" name="{}" type="Const"><data element_type="f32" shape="2" offset="{}" size="8"/>'
    xml = (layer.format("bank.vectors", 0) + layer.format("other", 4)).encode()
    with pytest.raises(BundleError, match=r"bank.vectors and other of model.xml share"):
        ir.constants(xml, ["bank.vectors"])
    apart = (layer.format("bank.vectors", 0) + layer.format("other", 8)).encode()
    places = ir.constants(apart, ["bank.vectors"])
    assert ir.replaced(bytes(16), places, {"bank.vectors": np.ones(2)}) == np.float32([1, 1]).tobytes() + bytes(8)
    with pytest.raises(BundleError, match="not of one export"):
        ir.replaced(bytes(4), places, {"bank.vectors": np.ones(2)})
    with pytest.raises(BundleError, match="not of one export"):
        ir.replaced(bytes(16), places, {"bank.vectors": np.ones(3)})
    with pytest.raises(BundleError, match=r"no constant bank.owners"):
        ir.constants(apart, ["bank.owners"])


def test_a_folder_that_cannot_be_written(bundle: Path, good: dict[str, list[Path]]) -> None:
    """It is judged with, and saving says what to do."""
    detector = EdgeDetector(bundle)
    detector.learn(good["dots"][:2], "dots")
    (bundle / ".lock").unlink(missing_ok=True)
    (bundle / ".lock").mkdir()  # even root cannot open it as a file
    with pytest.raises(BundleError, match="Copy it to a folder that you may write to"):
        detector.save()
    assert detector.predict(good["dots"][0]).variant == "dots"
