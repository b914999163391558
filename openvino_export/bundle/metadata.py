# SPDX-License-Identifier: Apache-2.0
"""`metadata.json` of a bundle: what describes the model, and checksums of all other files and of itself."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from typing import TYPE_CHECKING, Any

from openvino_export.kinds import is_count, is_flag, is_list, is_number, is_text, wrong_kinds

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from openvino_export.kinds import Kinds

SCHEMA_VERSION = 2
# That of bundles without a checksum of their metadata.
UNCHECKED_VERSION = 1
CHECKSUM = "checksum"
METADATA = "metadata.json"
BANK = "bank.safetensors"

_REQUIRED = ("model", "input_size", "mean", "std", "variants", "files")
# By these it decides, with a memory bank by more. They were not asked of bundles of the first schema.
_DECISIVE = ("precision_hint", "last_values", "normalization", "thresholding", "image_sensitivity", "pixel_sensitivity")
_DECISIVE_OF_A_BANK = ("num_neighbors", "shown_defects", "variant_thresholds", "score")


def _is_entry(name: str, entry: object) -> bool:
    plain = re.fullmatch(r"\w[\w.-]{0,200}", name, re.ASCII) is not None  # leads nowhere else
    return plain and isinstance(entry, dict) and is_text(entry.get("sha256")) and type(entry.get("size")) is int


# What the entries that are used must be, and in which words.
_KINDS: Kinds = {
    "files": (
        lambda value: isinstance(value, dict) and all(_is_entry(*item) for item in value.items()),
        "plain names with checksum and size",
    ),
    "input_size": (
        lambda value: is_list(value, lambda side: is_count(side) and 0 < side < 2**16, 2),
        "a height and a width",
    ),
    "mean": (lambda value: is_list(value, is_number, 3), "one number for each color"),
    "std": (
        lambda value: is_list(value, lambda one: is_number(one) and one > 0, 3),
        "one number above 0 for each color",
    ),
    "variants": (lambda value: is_list(value, is_text), "names"),
    "last_values": (
        lambda value: (
            isinstance(value, dict)
            and value.keys() == {"image", "pixel"}
            and all(is_list(each, lambda one: one is None or is_number(one), 3) for each in value.values())
        ),
        "three numbers for image and pixel each",
    ),
    **dict.fromkeys(("model", "precision_hint"), (is_text, "a text")),
    **dict.fromkeys(
        ("normalization", "thresholding", "shown_defects", "variant_thresholds"), (is_flag, "true or false")
    ),
    **dict.fromkeys(("image_sensitivity", "pixel_sensitivity"), (is_number, "a number")),
    **dict.fromkeys(("num_neighbors", "variant_capacity"), (lambda value: is_count(value) and value > 0, "a count")),
    "score": (lambda value: is_text(value) and value in {"rate", "range"}, "rate or range"),
}


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
        checksum = _checksum(metadata) if isinstance(metadata, dict) else ""
    except (ValueError, RecursionError) as error:
        msg = f"{folder / METADATA} is no JSON ({error}). Copy the whole folder again."
        raise BundleError(msg) from error
    version = metadata.get("schema_version") if isinstance(metadata, dict) else None
    if type(version) is not int:
        msg = f"{folder / METADATA} has no schema_version: {folder} was not written by anomalib-ext. Export it again."
        raise BundleError(msg)
    if version not in {UNCHECKED_VERSION, SCHEMA_VERSION}:
        remedy = "Update anomalib-ext on this PC" if version > SCHEMA_VERSION else "Export the model again"
        msg = (
            f"The bundle {folder} has schema version {version!s:.20}, "
            f"this version of anomalib-ext reads {SCHEMA_VERSION}. {remedy}."
        )
        raise BundleError(msg)
    problem = _problem(metadata, checksum)
    if version == UNCHECKED_VERSION and not problem:
        advice = "was written by a former version, so a change of its metadata is not noticed. The next save mends it."
        warnings.warn(f"The bundle {folder} {advice}", stacklevel=2)
    if problem:
        msg = f"{folder / METADATA} {problem}. Copy the whole folder again, or export the model again."
        raise BundleError(msg)
    return metadata


def _problem(metadata: dict[str, Any], checksum: str) -> str:
    """What is wrong with metadata of this checksum; empty if nothing is."""
    is_checked = metadata["schema_version"] == SCHEMA_VERSION
    if is_checked != (CHECKSUM in metadata) or (is_checked and metadata[CHECKSUM] != checksum):
        return "was changed since it was written"
    if wrong := next(wrong_kinds(metadata, _KINDS), ""):
        return f"was not written by anomalib-ext: {wrong}"
    required = (*_REQUIRED, *(_DECISIVE if is_checked else ()))
    if BANK in metadata.get("files", ()):
        required += ("variant_capacity", *(_DECISIVE_OF_A_BANK if is_checked else ()))
    if missing := [key for key in required if key not in metadata]:
        return f"lacks {', '.join(missing)}"
    if metadata.get("score") == "rate" and not metadata.get("variant_thresholds", True):
        return "has scores by rate, but no thresholds by variant, which they need"
    return ""


def _checksum(metadata: Mapping[str, Any]) -> str:
    """Checksum of all entries but itself, however they are written."""
    content = {key: value for key, value in metadata.items() if key != CHECKSUM}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
