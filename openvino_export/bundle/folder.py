# SPDX-License-Identifier: Apache-2.0
"""The bundle folder: verified when it is read, and changed by one atomic step, so that a kill leaves no mixture.

An update is written to the folder `.staging` and flushed to the disk. Renaming that to `.next` is the step that counts:
before it the bundle is the old one, after it the new one. The files of `.next` then move to their places, which the
next to open the bundle does if a kill prevented it. Readers need no lock: they take a file from `.next` while it is
there, and read again if what they read does not match its checksums because it was being moved.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .metadata import METADATA, BundleError, parse, to_json

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Generator, Mapping

    FileNames = Collection[str] | Callable[[Mapping[str, Any]], Collection[str]]

BANK = "bank.safetensors"
FEATURES = ("features.xml", "features.bin")
WHOLE = ("model.xml", "model.bin")

_STAGING, _NEXT, _PREVIOUS, _LOCK = ".staging", ".next", ".previous", ".lock"
# Seconds for which a reader that meets moving files tries again; they move within milliseconds.
_PATIENCE = 30.0


@dataclass(frozen=True)
class Bundle:
    """A bundle as it was read and verified.

    Attributes:
        folder: The bundle's folder.
        metadata: Content of `metadata.json`.
        contents: The files that were asked for.
        version: Checksum of `metadata.json`, which lists the checksums of all other files.
    """

    folder: Path
    metadata: dict[str, Any]
    contents: dict[str, bytes]
    version: str


def running_files(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """Files that :class:`EdgeDetector` runs: features and bank, or the whole graph of a model without a bank."""
    return (*FEATURES, BANK) if BANK in metadata["files"] else WHOLE


def read(
    folder: str | Path,
    names: FileNames = (),
) -> Bundle:
    """Read and verify a bundle, finishing an update that was interrupted.

    Args:
        folder: The bundle's folder.
        names: Files whose contents are returned, or a function that gives them for the content of `metadata.json`;
            all files are verified.

    Raises:
        FileNotFoundError: If there is no such folder.
        BundleError: If it is no bundle, of a newer version, or changed since it was written.
    """
    folder = Path(folder)
    if not folder.is_dir():
        msg = f"There is no bundle folder {folder}. Give the folder that an export to openvino wrote (with {METADATA})."
        raise FileNotFoundError(msg)
    _refuse_links(folder)
    if (folder / _NEXT).exists():
        try:
            with locked(folder, timeout=0):
                pass  # which finishes it
        except (TimeoutError, BundleError):  # someone is at it, or the folder cannot be written
            pass
    deadline = time.monotonic() + _PATIENCE
    while True:
        before = _fingerprint(folder)
        try:
            return _read_once(folder, names)
        except BundleError:
            # Only a bundle that was changing meanwhile is worth another look.
            if _fingerprint(folder) == before or time.monotonic() > deadline:
                raise


def _fingerprint(folder: Path) -> tuple[Any, ...]:
    """What changes when an update moves to its place."""
    found: list[Any] = []
    for path in (folder / _NEXT, folder / METADATA, folder / "model.bin", folder / BANK):
        try:
            status = path.stat()
            found.append((status.st_ino, status.st_mtime_ns, status.st_size))
        except FileNotFoundError:  # noqa: PERF203
            found.append(None)
    return tuple(found)


def current_version(folder: str | Path) -> str:
    """Checksum of `metadata.json`, which changes with every update; empty if it cannot be read right now."""
    try:
        return hashlib.sha256(_read_newest(Path(folder), METADATA)).hexdigest()
    except BundleError:
        return ""


def _read_newest(folder: Path, name: str) -> bytes:
    """Content of a file: of the committed update while that is being moved, else in its place."""
    for path in (folder / _NEXT / name, folder / name):
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):  # noqa: PERF203
            continue
        except OSError as error:
            msg = f"{path} cannot be read: {error}."
            raise BundleError(msg) from error
    msg = f"{folder} has no {name}. It is no bundle, or an incomplete copy: copy the whole folder again."
    raise BundleError(msg)


def _read_once(folder: Path, names: FileNames) -> Bundle:
    """Read and verify a bundle as it is on disk right now."""
    text = _read_newest(folder, METADATA)
    metadata = parse(folder, text)
    wanted = names(metadata) if callable(names) else names
    contents = {}
    for name, entry in metadata["files"].items():
        _refuse_outside(folder, name)
        content = _read_newest(folder, name)
        if len(content) != entry["size"] or hashlib.sha256(content).hexdigest() != entry["sha256"]:
            msg = (
                f"{folder / name} was changed or truncated: it has {len(content)} bytes, the bundle was written with "
                f"{entry['size']}{' others' if len(content) == entry['size'] else ''}. Copy the whole folder again, "
                "or restore the state before the last learning: anomalib-edge undo."
            )
            raise BundleError(msg)
        if name in wanted:
            contents[name] = content
    missing = [name for name in wanted if name not in contents]
    if missing:
        msg = f"The bundle {folder} of {metadata['model']} has no {', '.join(missing)}; export the model again."
        raise BundleError(msg)
    return Bundle(folder, metadata, contents, hashlib.sha256(text).hexdigest())


def _refuse_outside(folder: Path, name: str) -> None:
    """Refuse names and links that lead out of the folder."""
    plain = name not in {"", ".", ".."} and not re.search(r"[/\\:\0]", name)
    if plain:
        root = folder.resolve()
        plain = all((place / name).resolve().is_relative_to(root) for place in (folder, folder / _NEXT))
    if not plain:
        msg = f"{folder / METADATA} names the file {name!r}, which leads out of the bundle's folder; it is not opened."
        raise BundleError(msg)


def _refuse_links(folder: Path) -> None:
    """Refuse working folders and a lock that are links: files elsewhere would be moved or overwritten."""
    for name in (_STAGING, _NEXT, _PREVIOUS, _LOCK):
        if (folder / name).is_symlink():
            msg = f"{folder / name} is a link, which no bundle has; it is not followed. Delete it, or copy the folder."
            raise BundleError(msg)


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
    _refuse_links(folder)
    try:
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        msg = f"The bundle {folder} cannot be changed: {error}. Copy it to a folder that you may write to."
        raise BundleError(msg) from error
    try:
        deadline = time.monotonic() + timeout
        while not _try_lock(descriptor):
            if time.monotonic() >= deadline:
                msg = f"Another process is changing the bundle {folder}. Try again when it has finished."
                raise TimeoutError(msg)
            time.sleep(0.05)
        shutil.rmtree(folder / _STAGING, ignore_errors=True)
        _roll_forward(folder)
        yield
    finally:
        os.close(descriptor)  # which releases the lock


def _try_lock(descriptor: int) -> bool:
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


def update(bundle: Bundle, files: Mapping[str, bytes], changes: Mapping[str, Any]) -> Bundle:
    """Replace files of a bundle at once; call it under :func:`locked`.

    Args:
        bundle: The bundle as it was read.
        files: New contents.
        changes: Entries of `metadata.json` that change, besides the checksums.

    Returns:
        The new bundle, with the contents that were kept before.

    Raises:
        BundleError: If the bundle was changed since it was read. Nothing was changed then.
    """
    if current_version(bundle.folder) != bundle.version:
        msg = (
            f"The bundle {bundle.folder} was changed by another process since it was read, so nothing was saved. "
            "Call reload(discard=True) of the detector, or start the command again, and repeat the learning."
        )
        raise BundleError(msg)
    text = to_json({**bundle.metadata, **changes}, files)
    _commit(bundle.folder, {**files, METADATA: text})
    contents = {name: files.get(name, content) for name, content in bundle.contents.items()}
    return Bundle(bundle.folder, json.loads(text), contents, hashlib.sha256(text).hexdigest())


def create(folder: str | Path, files: Mapping[str, bytes], metadata: Mapping[str, Any]) -> None:
    """Write a bundle, in place of whatever bundle is in the folder; a kill leaves one of the two.

    Args:
        folder: Folder of the bundle, made if need be.
        files: Contents by name.
        metadata: Entries of `metadata.json`, which gains the checksums.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        # What an older model had learned is nothing to go back to from this one.
        _commit(folder, {**files, METADATA: to_json(metadata, files)}, undoable=False)


def undo(folder: str | Path) -> None:
    """Bring back the bundle as it was before the last update; a second call brings the update back.

    Raises:
        BundleError: If there is nothing to go back to, or it is damaged. Nothing was changed then.
        TimeoutError: If another process is changing the bundle.
    """
    folder = Path(folder)
    if not folder.is_dir():
        msg = f"There is no bundle folder {folder}."
        raise FileNotFoundError(msg)
    with locked(folder):
        previous = folder / _PREVIOUS
        if not (previous / METADATA).is_file():
            msg = f"The bundle {folder} has no previous state: nothing was learned since it was copied here."
            raise BundleError(msg)
        files = {path.name: path.read_bytes() for path in previous.iterdir()}
        metadata = parse(previous, files[METADATA])
        for name, content in files.items():
            entry = metadata["files"].get(name)
            if name != METADATA and (entry is None or hashlib.sha256(content).hexdigest() != entry["sha256"]):
                msg = f"{previous / name} was changed, so the bundle stays as it is. Copy the whole folder again."
                raise BundleError(msg)
        _commit(folder, files)


def _commit(folder: Path, files: Mapping[str, bytes], *, undoable: bool = True) -> None:
    """Write files beside, then make them the bundle's by one rename; what they replace is kept if that is undoable."""
    staging = folder / _STAGING
    try:
        _stage(folder, staging, files, undoable=undoable)
        staging.rename(folder / _NEXT)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    _sync(folder)
    _roll_forward(folder)


def _stage(folder: Path, staging: Path, files: Mapping[str, bytes], *, undoable: bool) -> None:
    """Write files to a new folder, with those that they replace beside them, and flush all to the disk."""
    previous = staging / _PREVIOUS
    previous.mkdir(parents=True)
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


def _roll_forward(folder: Path) -> None:
    """Move the files of a committed update to their places; it may be interrupted and repeated at any point."""
    source = folder / _NEXT
    if not source.is_dir():
        return
    names = sorted(path.name for path in source.iterdir() if path.name not in {METADATA, _PREVIOUS})
    # The metadata last: as long as it is in its old place, readers look here first.
    for name in (*names, METADATA):
        if (source / name).exists():
            (source / name).replace(folder / name)
    _sync(folder)
    if (source / _PREVIOUS).is_dir():
        shutil.rmtree(folder / _PREVIOUS, ignore_errors=True)
        if any((source / _PREVIOUS).iterdir()):
            (source / _PREVIOUS).rename(folder / _PREVIOUS)
        else:  # there is nothing to go back to
            (source / _PREVIOUS).rmdir()
    _sync(folder)
    source.rmdir()


def _sync(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    if os.name == "posix":  # elsewhere a folder cannot be synced
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
