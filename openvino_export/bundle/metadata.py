# SPDX-License-Identifier: Apache-2.0
"""`metadata.json` of a bundle: what describes the model and lists the checksums of all other files."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SCHEMA_VERSION = 1
METADATA = "metadata.json"

_REQUIRED = ("model", "input_size", "mean", "std", "variants", "files")


class BundleError(ValueError):
    """A folder is not a bundle that this version can use; the message says why and what to do."""


def to_json(metadata: Mapping[str, Any], files: Mapping[str, bytes]) -> bytes:
    """Content of `metadata.json`.

    Args:
        metadata: Its entries, which may hold checksums of files already.
        files: Contents by name of the files that are new, whose checksums it gains.
    """
    checksums = {
        name: {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)} for name, content in files.items()
    }
    content = {**metadata, "files": {**metadata.get("files", {}), **checksums}}
    return json.dumps(content, indent=2, allow_nan=False).encode()


def parse(folder: Path, text: bytes) -> dict[str, Any]:
    """Entries of `metadata.json`.

    Args:
        folder: Folder that it lies in, for the messages.
        text: Its content.

    Raises:
        BundleError: If it is not that of a bundle that this version reads.
    """
    try:
        metadata = json.loads(text)
    except ValueError as error:
        msg = f"{folder / METADATA} is no JSON ({error}). Copy the whole folder again."
        raise BundleError(msg) from error
    version = metadata.get("schema_version") if isinstance(metadata, dict) else None
    if type(version) is not int:
        msg = f"{folder / METADATA} has no schema_version: {folder} was not written by anomalib-ext. Export it again."
        raise BundleError(msg)
    if version != SCHEMA_VERSION:
        msg = (
            f"The bundle {folder} has schema version {version}, this version of anomalib-ext reads {SCHEMA_VERSION}. "
            f"{'Update anomalib-ext on this PC' if version > SCHEMA_VERSION else 'Export the model again'}."
        )
        raise BundleError(msg)
    problem = _problem(metadata)
    if problem:
        msg = f"{folder / METADATA} {problem}. Copy the whole folder again, or export the model again."
        raise BundleError(msg)
    return metadata


def _problem(metadata: dict[str, Any]) -> str:
    """What is wrong with metadata; empty if nothing is."""
    missing = [key for key in _REQUIRED if key not in metadata]
    if missing:
        return f"lacks {', '.join(missing)}"
    files = metadata["files"]
    if not isinstance(files, dict) or not all(_is_entry(entry) for entry in files.values()):
        return "lists its files in another way"
    size = metadata["input_size"]
    if not isinstance(size, list) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        return f"has the input_size {size}, not a height and a width"
    for key in ("mean", "std"):
        value = metadata[key]
        if not isinstance(value, list) or len(value) != 3 or not all(isinstance(one, (int, float)) for one in value):
            return f"has the {key} {value}, not one number for each color"
    return ""


def _is_entry(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and type(entry.get("size")) is int
