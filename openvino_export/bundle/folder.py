# SPDX-License-Identifier: Apache-2.0
"""The bundle folder: verified when it is read, and changed by the one step of `commit.py`.

Readers need no lock: they take a file from `.next` while it is there, and read again if what they read does not match
its checksums because it was being moved.
"""

from __future__ import annotations

import hashlib
import json
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .commit import NEXT, PREVIOUS, commit, locked, refuse_links
from .metadata import BANK, METADATA, BundleError, parse, to_json

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    FileNames = Collection[str] | Callable[[Mapping[str, Any]], Collection[str]]

FEATURES = ("features.xml", "features.bin")
WHOLE = ("model.xml", "model.bin")

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
    patience: float = _PATIENCE,
) -> Bundle:
    """Read and verify a bundle, finishing an update that was interrupted.

    Args:
        folder: The bundle's folder.
        names: Files whose contents are returned, or a function that gives them for the content of `metadata.json`;
            all files are verified.
        patience: Seconds for which files that are moving are read again.

    Raises:
        FileNotFoundError: If there is no such folder.
        BundleError: If it is no bundle, of a newer version, or changed since it was written.
    """
    folder = Path(folder)
    if not folder.is_dir():
        msg = f"There is no bundle folder {folder}. Give the folder that an export to openvino wrote (with {METADATA})."
        raise FileNotFoundError(msg)
    refuse_links(folder)
    if (folder / NEXT).exists():
        try:
            with locked(folder, timeout=0):
                pass  # which finishes it
        except (TimeoutError, BundleError):  # someone is at it, or the folder cannot be written
            pass
    deadline = time.monotonic() + patience
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
    for path in (folder / NEXT, folder / METADATA, folder / "model.bin", folder / BANK):
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
    for path in (folder / NEXT / name, folder / name):
        try:
            return _content(path)
        except (FileNotFoundError, NotADirectoryError):  # noqa: PERF203
            continue
        except OSError as error:
            msg = f"{path} cannot be read: {error}."
            raise BundleError(msg) from error
    msg = f"{folder} has no {name}. It is no bundle, or an incomplete copy: copy the whole folder again."
    raise BundleError(msg)


def _content(path: Path) -> bytes:
    """Content of a plain file. A link may lead anywhere, and a pipe would be waited for."""
    if not stat.S_ISREG(path.lstat().st_mode):
        msg = f"{path} is a link, or no file, where a bundle has a file; it is not opened. Copy the whole folder again."
        raise BundleError(msg)
    return path.read_bytes()


def _read_once(folder: Path, names: FileNames) -> Bundle:
    """Read and verify a bundle as it is on disk right now."""
    text = _read_newest(folder, METADATA)
    metadata = parse(folder, text)
    wanted = names(metadata) if callable(names) else names
    contents = {}
    for name, entry in metadata["files"].items():
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
    commit(bundle.folder, {**files, METADATA: text})
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
        commit(folder, {**files, METADATA: to_json(metadata, files)}, undoable=False)


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
        previous = folder / PREVIOUS
        try:
            files = {path.name: _content(path) for path in previous.iterdir()} if previous.is_dir() else {}
        except OSError as error:
            msg = f"The previous state of {folder} cannot be read: {error}. Ask who saved it for the right to read it."
            raise BundleError(msg) from error
        if METADATA not in files:
            msg = f"The bundle {folder} has no previous state: nothing was learned since it was copied here."
            raise BundleError(msg)
        metadata = parse(previous, files[METADATA])
        for name, content in files.items():
            entry = metadata["files"].get(name)
            if name != METADATA and (entry is None or hashlib.sha256(content).hexdigest() != entry["sha256"]):
                msg = f"{previous / name} was changed, so the bundle stays as it is. Copy the whole folder again."
                raise BundleError(msg)
        commit(folder, files)
