# SPDX-License-Identifier: Apache-2.0
"""`metadata.json` of a bundle: what describes the model, and checksums of all other files and of itself."""

from __future__ import annotations

import hashlib
import json
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SCHEMA_VERSION = 2
# That of bundles without a checksum of their metadata.
UNCHECKED_VERSION = 1
CHECKSUM = "checksum"
METADATA = "metadata.json"

_REQUIRED = ("model", "input_size", "mean", "std", "variants", "files")
# By these it decides. They were not asked of bundles of the first schema.
_DECISIVE = ("precision_hint", "last_values", "normalization", "thresholding", "image_sensitivity", "pixel_sensitivity")


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
    content = {
        **metadata,
        "schema_version": SCHEMA_VERSION,
        "files": {**metadata.get("files", {}), **checksums},
    }
    content[CHECKSUM] = _checksum(content)
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
    except (ValueError, RecursionError) as error:
        msg = f"{folder / METADATA} is no JSON ({error}). Copy the whole folder again."
        raise BundleError(msg) from error
    version = metadata.get("schema_version") if isinstance(metadata, dict) else None
    if type(version) is not int:
        msg = f"{folder / METADATA} has no schema_version: {folder} was not written by anomalib-ext. Export it again."
        raise BundleError(msg)
    if version not in {UNCHECKED_VERSION, SCHEMA_VERSION}:
        msg = (
            f"The bundle {folder} has schema version {version}, this version of anomalib-ext reads {SCHEMA_VERSION}. "
            f"{'Update anomalib-ext on this PC' if version > SCHEMA_VERSION else 'Export the model again'}."
        )
        raise BundleError(msg)
    problem = _problem(metadata)
    if version == UNCHECKED_VERSION and not problem:
        advice = "was written by a former version, so a change of its metadata is not noticed. The next save mends it."
        warnings.warn(f"The bundle {folder} {advice}", stacklevel=2)
    if problem:
        msg = f"{folder / METADATA} {problem}. Copy the whole folder again, or export the model again."
        raise BundleError(msg)
    return metadata


def _problem(metadata: dict[str, Any]) -> str:
    """What is wrong with metadata; empty if nothing is."""
    is_checked = metadata["schema_version"] == SCHEMA_VERSION
    if is_checked != (CHECKSUM in metadata) or (is_checked and metadata[CHECKSUM] != _checksum(metadata)):
        return "was changed since it was written"
    missing = [key for key in (*_REQUIRED, *(_DECISIVE if is_checked else ())) if key not in metadata]
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


def _checksum(metadata: Mapping[str, Any]) -> str:
    """Checksum of all entries but itself, however they are written."""
    content = {key: value for key, value in metadata.items() if key != CHECKSUM}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _is_entry(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and type(entry.get("size")) is int
