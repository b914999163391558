# SPDX-License-Identifier: Apache-2.0
"""How files of a bundle are replaced: by one atomic step, under a lock.

They are written to the folder `.staging` and flushed to the disk. Renaming that to `.next` is the step that counts:
before it the bundle is the old one, after it the new one. The files of `.next` then move to their places, which the
next to open the bundle does if a kill prevented it. What they replace is kept in `.previous`.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from .metadata import METADATA, BundleError

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

NEXT, PREVIOUS = ".next", ".previous"
_STAGING, _ASIDE, _LOCK = ".staging", ".previous-aside", ".lock"


def refuse_links(folder: Path) -> None:
    """Refuse working folders and a lock that are links: files elsewhere would be moved or overwritten."""
    for name in (_STAGING, NEXT, PREVIOUS, _LOCK, f"{NEXT}/{PREVIOUS}"):
        if (folder / name).is_symlink():
            msg = f"{folder / name} is a link, which no bundle has; it is not followed. Delete it, or copy the folder."
            raise BundleError(msg)


def _not_changed(folder: Path, error: OSError) -> BundleError:
    """What to say when the disk refuses a change of a bundle, which is as it was."""
    msg = f"The bundle {folder} cannot be changed: {error}. Copy it to a folder that you may write to."
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        msg = f"The bundle {folder} cannot be changed: {error}. The disk is full, or your share of it: make room."
    return BundleError(msg)


@contextmanager
def locked(folder: str | Path, timeout: float = 60.0) -> Generator[None, None, None]:
    """Keep other writers away, and finish the update of one that was killed.

    The operating system releases the lock of a process that ends in whatever way, so none is ever left behind. It is
    not re-entrant.

    Args:
        folder: The bundle's folder.
        timeout: Seconds to wait for another writer.

    Raises:
        TimeoutError: If another writer is still at work then.
        BundleError: If the folder cannot be written.
    """
    folder = Path(folder)
    refuse_links(folder)
    try:
        descriptor = _open_lock(folder / _LOCK)
    except OSError as error:
        raise _not_changed(folder, error) from error
    try:
        deadline = time.monotonic() + timeout
        while not try_lock(descriptor):
            if time.monotonic() >= deadline:
                msg = f"Another process is changing the bundle {folder}. Try again when it has finished."
                raise TimeoutError(msg)
            time.sleep(0.05)
        try:
            _recover(folder)
        except OSError as error:
            raise _not_changed(folder, error) from error
        yield
    finally:
        os.close(descriptor)  # which releases the lock


def _open_lock(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:  # another user has made it, whom it keeps away all the same
        if not path.is_file():
            raise
        return os.open(path, os.O_RDONLY)


def try_lock(descriptor: int) -> bool:
    """Lock an open file unless another process has; the operating system releases it when the file is closed."""
    try:
        _lock(descriptor)
    except OSError:
        return False
    return True


def _lock(descriptor: int) -> None:
    """Lock an open file, or raise if another process has."""
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _recover(folder: Path) -> None:
    """Tidy up after a writer that was killed, and finish what it had committed."""
    _discard(folder / _STAGING)
    _roll_forward(folder)
    if (folder / PREVIOUS).exists():
        _discard(folder / _ASIDE)
    elif (folder / _ASIDE).exists():
        (folder / _ASIDE).rename(folder / PREVIOUS)


def commit(folder: Path, files: Mapping[str, bytes], *, undoable: bool = True) -> None:
    """Write files beside, then make them the bundle's by one rename; what they replace is kept if that is undoable."""
    staging = folder / _STAGING
    try:
        _stage(folder, staging, files, undoable=undoable)
        if (folder / PREVIOUS).exists():  # see whether it can be replaced: another user's may be in the way
            (folder / PREVIOUS).rename(folder / _ASIDE)
            (folder / _ASIDE).rename(folder / PREVIOUS)
        staging.rename(folder / NEXT)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError):
            raise _not_changed(folder, error) from error
        raise
    try:
        _sync(folder)
        _roll_forward(folder)
    except OSError as error:
        if all((folder / NEXT / name).exists() for name in files):  # none could be moved
            (folder / NEXT).rename(staging)
            shutil.rmtree(staging, ignore_errors=True)
            raise _not_changed(folder, error) from error
        # Readers look for them in `.next`, so the bundle is the new one.
        msg = f"{folder} was saved, but {error}. The first to open it who may move files out of {NEXT} finishes that."
        warnings.warn(msg, stacklevel=2)


def _stage(folder: Path, staging: Path, files: Mapping[str, bytes], *, undoable: bool) -> None:
    """Write files to a new folder, with those that they replace beside them, and flush all to the disk."""
    previous = staging / PREVIOUS
    for made in (staging, previous):
        made.mkdir()
        shutil.copymode(folder, made)  # so that those who share the folder may move and delete what is in them
    for name, content in files.items():
        with (staging / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if undoable:
            _link_or_copy(folder / name, previous / name)
    _sync(previous)
    _sync(staging)


def _link_or_copy(source: Path, target: Path) -> None:
    """Have a file at a second path as well."""
    try:
        os.link(source, target)
    except OSError:  # a file system without links, such as that of a USB stick
        shutil.copyfile(source, target)
        with target.open("rb+") as file:
            os.fsync(file.fileno())


def _discard(path: Path) -> None:
    """Delete a working folder; what cannot be deleted of another user's gets a name by which nobody looks for it."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    if path.exists():
        left = path.with_name(f"{path.name}-{uuid4().hex}")
        path.rename(left)
        warnings.warn(f"{left} is not needed and cannot be deleted; ask its owner to do so.", stacklevel=2)


def _roll_forward(folder: Path) -> None:
    """Move the files of a committed update to their places; it may be interrupted and repeated at any point."""
    source = folder / NEXT
    if not source.is_dir():
        return
    names = sorted(path.name for path in source.iterdir() if path.name not in {METADATA, PREVIOUS})
    # The metadata last: as long as it is in its old place, readers look here first.
    for name in (*names, METADATA):
        if (source / name).exists():
            (source / name).replace(folder / name)
    _sync(folder)
    if (source / PREVIOUS).is_dir():
        _discard(folder / PREVIOUS)
        if any((source / PREVIOUS).iterdir()):
            (source / PREVIOUS).rename(folder / PREVIOUS)
        else:  # there is nothing to go back to
            (source / PREVIOUS).rmdir()
    _sync(folder)
    _discard(source)


def _sync(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    if os.name == "posix":  # elsewhere a folder cannot be synced
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
