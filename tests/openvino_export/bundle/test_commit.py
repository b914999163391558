# SPDX-License-Identifier: Apache-2.0
"""Tests of a bundle folder in which the system refuses something: it is changed, or stays whole as it was."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from openvino_export.bundle import folder as bundles
from openvino_export.bundle.folder import BundleError

METADATA = {
    "model": "M",
    "input_size": [8, 8],
    "mean": [0, 0, 0],
    "std": [1, 1, 1],
    "variants": ["old"],
    "normalization": True,
    "thresholding": True,
    "image_sensitivity": 0.5,
    "pixel_sensitivity": 0.5,
    "precision_hint": "f32",
    "last_values": {"image": [None] * 3, "pixel": [None] * 3},
}
NOBODY = 65534
# Does something with a bundle, as a user without rights where there is a root; prints what came of it.
AS_ANOTHER = """
import fcntl, os, sys  # all that is needed, as the user may not read where Python is
from openvino_export.bundle import folder as bundles
os.chdir(sys.argv[1])
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    if sys.argv[2] == "undo":
        bundles.undo(".")
    elif sys.argv[2] == "save":
        with bundles.locked("."):
            new = {"model.xml": b"new graph", "model.bin": b"new weights"}
            bundles.update(bundles.read("."), new, {"variants": ["new"]})
    read = bundles.read(".", bundles.WHOLE)
    print(*read.metadata["variants"], *read.contents.values())
except bundles.BundleError as error:
    print(error)
"""
OLD, NEW = "old b'graph' b'weights'", "new b'new graph' b'new weights'"


def save(folder: Path) -> None:
    """Save something new."""
    with bundles.locked(folder):
        new = {"model.xml": b"new graph", "model.bin": b"new weights"}
        bundles.update(bundles.read(folder), new, {"variants": ["new"]})


def as_another(folder: Path, act: str) -> str:
    """Do something with a bundle as another user."""
    command = [sys.executable, "-W", "ignore", "-c", AS_ANOTHER, str(folder), act]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def give(*paths: Path) -> None:
    """Make the other user the owner."""
    for path in paths:
        if os.geteuid() == 0:
            os.chown(path, NOBODY, NOBODY)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a small bundle without anything that runs, which belongs to the other user."""
    folder = tmp_path / "bundle"
    bundles.create(folder, {"model.xml": b"graph", "model.bin": b"weights"}, METADATA)
    give(folder, *folder.iterdir())
    return folder


def previous(mode: int) -> Callable[[Path], None]:
    """Leave a previous state that others may only use in a way."""

    def leave(folder: Path) -> None:
        (folder / ".previous").mkdir()
        for name in ("metadata.json", "model.bin"):
            shutil.copy(folder / name, folder / ".previous")
        (folder / ".previous").chmod(mode)

    return leave


def staging(folder: Path) -> None:
    """Leave what another user was writing when it was killed."""
    (folder / ".staging" / ".previous").mkdir(parents=True)
    (folder / ".staging").chmod(0o500)


@pytest.mark.parametrize(
    "leave",
    [
        previous(0),
        previous(0o500),
        lambda folder: (folder / ".previous").write_text("a file"),
        lambda folder: os.mkfifo(folder / ".previous"),
        staging,
        lambda folder: os.chown(folder / ".lock", os.getuid(), os.getgid()),
    ],
    ids=["mode 000", "mode 500", "file", "pipe", "staging", "lock"],
)
def test_what_another_user_has_left_is_in_nobodys_way(leave: Callable[[Path], None], folder: Path) -> None:
    """What cannot be deleted gets another name; saving and undoing go on."""
    leave(folder)
    for act, expected in (("read", OLD), ("save", NEW), ("undo", OLD), ("undo", NEW), ("undo", OLD)):
        assert as_another(folder, act) == expected
    assert not (folder / ".next").exists()


def test_a_previous_state_that_cannot_be_read(folder: Path) -> None:
    """Is not gone back to; its owner is asked."""
    previous(0)(folder)
    assert "cannot be read: " in as_another(folder, "undo")
    assert as_another(folder, "read") == OLD


def test_what_cannot_be_deleted_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that someone can."""
    previous(0)(folder)
    delete = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path, **how: path.name == ".previous" or delete(path, **how))
    with pytest.warns(UserWarning, match=r"\.previous-\w+ is not needed and cannot be deleted; ask its owner"):
        save(folder)


def test_those_who_share_a_folder_leave_nothing_behind(folder: Path) -> None:
    """Each may delete what the other has saved."""
    folder.chmod(0o777)
    save(folder)
    assert as_another(folder, "undo") == OLD
    assert as_another(folder, "save") == NEW
    bundles.undo(folder)
    assert as_another(folder, "read") == OLD
    assert not [path.name for path in folder.iterdir() if path.name.startswith((".previous-", ".next"))]


def only_the_owner(folder: Path) -> None:
    """Have all that is in the folder belong to root, who alone may move it."""
    for path in (folder, *folder.iterdir()):
        os.chown(path, 0, 0)
    folder.chmod(0o1777)


def only_the_previous_state(folder: Path) -> None:
    """The same for the previous state."""
    previous(0o755)(folder)
    os.chown(folder, 0, 0)
    folder.chmod(0o1777)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("leave", [only_the_owner, only_the_previous_state])
def test_what_cannot_be_replaced_is_known_before(leave: Callable[[Path], None], folder: Path) -> None:
    """The bundle stays as it was, for all."""
    leave(folder)
    names = sorted(path.name for path in folder.rglob("*"))
    assert "cannot be changed: [Errno 1] Operation not permitted" in as_another(folder, "save")
    assert sorted(path.name for path in folder.rglob("*")) == names
    assert as_another(folder, "read") == OLD
    save(folder)
    assert as_another(folder, "read") == NEW


@pytest.mark.parametrize("mode", [0o555, 0o755])
def test_a_reader_of_a_folder_that_was_being_changed(mode: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finds the new state, whether or not it may finish the change; who may not is told so."""

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            save(folder)
    folder.chmod(mode)
    assert (folder / ".next").is_dir()
    assert as_another(folder, "read") == NEW
    for act in ("save", "undo"):
        assert "cannot be changed: [Errno 13]" in as_another(folder, act)
    assert (folder / ".next").is_dir()
    folder.chmod(0o755)
    bundles.undo(folder)
    assert as_another(folder, "read") == OLD


def test_a_file_that_cannot_be_moved_after_others_were(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundle is the new one, nobody saves on top of it, and the next who may move the file does."""
    move = Path.replace

    def replace(path: Path, target: Path) -> object:
        if path.name == "model.xml":
            raise PermissionError(errno.EPERM, "Operation not permitted", str(target))
        return move(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        with pytest.warns(UserWarning, match=r"was saved, but .*Operation not permitted: '.*model.xml'"):
            save(folder)
        assert bundles.read(folder).metadata["variants"] == ["new"]
        with pytest.raises(BundleError, match=r"cannot be changed: .*model.xml"):
            bundles.undo(folder)
    assert bundles.read(folder).metadata["variants"] == ["new"]
    assert not (folder / ".next").exists()
    bundles.undo(folder)
    assert bundles.read(folder).metadata["variants"] == ["old"]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk(error: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is called so, and the bundle stays as it was."""

    def fail(_: int) -> None:
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(BundleError, match=r"cannot be changed: .*The disk is full, or your share of it: make room"):
            save(folder)
    assert bundles.read(folder).metadata["variants"] == ["old"]
    assert not (folder / ".staging").exists()
    save(folder)


def test_a_kill_while_the_previous_state_is_aside(folder: Path) -> None:
    """It comes back."""
    save(folder)
    (folder / ".previous").rename(folder / ".previous-aside")
    bundles.undo(folder)
    assert bundles.read(folder).metadata["variants"] == ["old"]
    shutil.copytree(folder / ".previous", folder / ".previous-aside")
    bundles.undo(folder)
    assert not (folder / ".previous-aside").exists()
