# SPDX-License-Identifier: Apache-2.0
"""Tests of the bundle folder: what is no whole bundle is refused, and a kill leaves the old one or the new one."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from openvino_export import EdgeDetector
from openvino_export.bundle import folder as bundles
from openvino_export.bundle.folder import BundleError
from openvino_export.bundle.metadata import _checksum, parse

FILES = ("bank.safetensors", "features.bin", "features.xml", "model.bin", "model.xml")
Change = Callable[[Path], Any]
Read = Callable[[Path], dict[str, bytes]]


def metadata(folder: Path, **changes: object) -> None:
    """Change entries of metadata.json, with a checksum that is right."""
    path = folder / "metadata.json"
    content = {**json.loads(path.read_text()), **changes}
    content = {key: value for key, value in content.items() if value is not None}
    path.write_text(json.dumps({**content, "checksum": _checksum(content)}))


def edited(folder: Path, before: str, after: str) -> None:
    """Replace a part of metadata.json."""
    path = folder / "metadata.json"
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))


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


def other_bank(folder: Path) -> None:
    """Have a bank of another dimension, with a checksum that is right."""
    from safetensors import safe_open
    from safetensors.numpy import save

    with safe_open(folder / "bank.safetensors", "numpy") as file:
        plain = file.metadata()
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dictionary
    dimension = arrays["vectors"].shape[1]
    cut = {name: array[..., :5] if array.shape[-1:] == (dimension,) else array for name, array in arrays.items()}
    replace(folder, "bank.safetensors", save({name: np.ascontiguousarray(array) for name, array in cut.items()}, plain))


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
        (lambda folder: metadata(folder, schema_version=3), "schema version 3, .* reads 2. Update anomalib-ext"),
        (lambda folder: metadata(folder, schema_version=0), "schema version 0, .* reads 2. Export the model again"),
        (lambda folder: metadata(folder, schema_version="1"), "has no schema_version"),
        (lambda folder: metadata(folder, schema_version=1), "metadata.json was changed since it was written"),
        (lambda folder: metadata(folder, thresholding=None), "metadata.json lacks thresholding"),
        (lambda folder: edited(folder, "checksum", "chacksum"), "metadata.json was changed since it was written"),
        (
            lambda folder: edited(folder, '"thresholding": true', '"thresholding": false'),
            "changed since it was written",
        ),
        (lambda folder: edited(folder, "thresholding", "thrusholding"), "metadata.json was changed since"),
        (lambda folder: (folder / "metadata.json").write_text("[" * 100_000), "metadata.json is no JSON"),
        (lambda folder: metadata(folder, files={}), "has no model.xml"),
        (lambda folder: metadata(folder, variant_thresholds=False), "scores by rate, but no thresholds by variant"),
        (lambda folder: metadata(folder, num_neighbors=None), "metadata.json lacks num_neighbors"),
        (lambda folder: metadata(folder, std=[0.5, 0.5, 0]), "std is .*, not one number above 0 for each color"),
        (lambda folder: metadata(folder, files={"model.xml": 1}), "files is .*, not plain names with"),
        (lambda folder: metadata(folder, input_size=[64]), "input_size"),
        (lambda folder: metadata(folder, input_size=[64, -1]), "input_size"),
        (lambda folder: metadata(folder, mean=[0.5]), "mean"),
        (renamed("../bundle/bank.safetensors"), "files is .*, not plain names with"),
        (renamed("/etc/hostname"), "files is .*, not plain names with"),
        (renamed(".."), "files is .*, not plain names with"),
        (renamed("C:bank"), "files is .*, not plain names with"),
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


def test_undo(bundle: Path, good: dict[str, list[Path]], visible_files: Read) -> None:
    """It brings back the bundle, byte by byte; a second time, what was learned; a detector takes both up."""
    with pytest.raises(BundleError, match="no previous state"):
        bundles.undo(bundle)
    old = visible_files(bundle)
    detector = EdgeDetector(bundle)
    detector.learn(good["dots"][:2], "dots")
    detector.save()
    new = visible_files(bundle)
    changed = {name for name in old if old[name] != new[name]}
    assert changed == {"bank.safetensors", "metadata.json", "model.bin"}
    bundles.undo(bundle)
    assert visible_files(bundle) == old
    assert detector.reload()
    assert list(detector.info()["variants"]) == ["stripes"]
    bundles.undo(bundle)
    assert visible_files(bundle) == new
    flip("bank.safetensors")(bundle / ".previous")
    with pytest.raises(BundleError, match="bundle stays as it is"):
        bundles.undo(bundle)
    assert visible_files(bundle) == new


def test_a_reload_waits_for_no_slow_copy(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While files go on changing, it gives up after seconds; opening the bundle goes on for longer."""
    detector, seconds = EdgeDetector(bundle), count()
    (bundle / "metadata.json").write_text("the beginning of another")
    monkeypatch.setattr(bundles, "_fingerprint", lambda _: object())
    monkeypatch.setattr(bundles, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    with pytest.raises(BundleError, match="is no JSON"):
        detector.reload()
    assert next(seconds) < 10
    with pytest.raises(BundleError, match="is no JSON"):
        EdgeDetector(bundle)
    assert next(seconds) > 30


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


def test_a_folder_that_cannot_be_written(bundle: Path, good: dict[str, list[Path]]) -> None:
    """It is judged with, and saving says what to do."""
    detector = EdgeDetector(bundle)
    detector.learn(good["dots"][:2], "dots")
    (bundle / ".lock").unlink(missing_ok=True)
    (bundle / ".lock").mkdir()  # even root cannot open it as a file
    with pytest.raises(BundleError, match="Copy it to a folder that you may write to"):
        detector.save()
    assert detector.predict(good["dots"][0]).variant == "dots"


@pytest.mark.parametrize("name", [*FILES, "metadata.json"])
@pytest.mark.parametrize(
    "put",
    [
        lambda path, moved: path.symlink_to(moved),
        lambda path, moved: path.symlink_to(Path(moved.rename(path.with_name("beside"))).name),
        lambda path, _: os.mkfifo(path),
        lambda path, _: path.mkdir(),
    ],
    ids=["link", "link inside", "pipe", "folder"],
)
def test_only_plain_files_are_opened(put: Callable[[Path, Path], object], name: str, bundle: Path) -> None:
    """Others are refused at once, in the previous state too; a pipe is not waited for."""
    moved = (bundle / name).rename(bundle.parent / "moved")
    put(bundle / name, moved)
    for touch in (EdgeDetector, bundles.read):
        with pytest.raises(BundleError, match=f"{name} is a link, or no file"):
            touch(bundle)
    previous = bundle / ".previous"
    previous.mkdir()
    (bundle / name).rename(previous / name)
    with pytest.raises(BundleError, match=f"{name} is a link, or no file"):
        bundles.undo(bundle)


@pytest.mark.parametrize("name", [".next", ".staging", ".previous", ".lock"])
def test_links_are_not_followed(name: str, bundle: Path, tmp_path: Path) -> None:
    """Reading and changing refuse a working folder, or a lock, that is a link; what it leads to stays as it is."""
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "model.bin").write_text("of another model")
    shutil.rmtree(bundle / name, ignore_errors=True)
    (bundle / name).unlink(missing_ok=True)
    (bundle / name).symlink_to(victim / "model.bin" if name == ".lock" else victim)
    for touch in (lambda: bundles.read(bundle), lambda: bundles.undo(bundle), lambda: EdgeDetector(bundle)):
        with pytest.raises(BundleError, match="is a link, which no bundle has; it is not followed"):
            touch()
    assert (victim / "model.bin").read_text() == "of another model"
    assert [path.name for path in victim.iterdir()] == ["model.bin"]


def test_no_bit_of_the_metadata_can_change_unnoticed(bundle: Path) -> None:
    """Each is flipped in turn: the bundle is refused, or all that it says is as it was."""
    path = bundle / "metadata.json"
    whole = path.read_bytes()
    said = json.loads(whole)
    for position in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        try:
            found = parse(bundle, bytes(damaged))
        except BundleError:
            continue
        assert found == said


def test_a_bundle_of_the_first_schema(bundle: Path) -> None:
    """Loads with a warning, and has a checksum once something was saved."""
    path = bundle / "metadata.json"
    content = json.loads(path.read_text())
    del content["checksum"]
    path.write_text(json.dumps({**content, "schema_version": 1}))
    with pytest.warns(UserWarning, match="written by a former version"):
        detector = EdgeDetector(bundle)
    detector.set_decision(false_alarm_rate=0.1)
    with pytest.warns(UserWarning, match="written by a former version"):
        detector.save()
    content = json.loads(path.read_text())
    assert content["schema_version"] == 2
    assert content["checksum"] == _checksum(content)
    EdgeDetector(bundle)
