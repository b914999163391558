# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a saved memory bank: each part has the right form, and no two contradict each other."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from openvino_export.kinds import is_count, is_list, is_number, is_text, wrong_kinds

from .leave_one_out import CALIBRATION_PATCHES, NOT_LEARNED, SHOWN
from .memory_bank import LARGEST_VALUE
from .patch_pool import LISTS
from .thresholds import check_rate

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from openvino_export.kinds import Kinds

# Under these keys the arrays of all variants follow each other, by the attribute of a variant, or of its calibration.
VECTORS = {
    "vectors": "vectors",
    "radii": "radii",
    "covers": "cover_radii",
    "origins": "origins",
    "stand_ins": "stand_ins",
    "gains": "gains",
}
CALIBRATION = {f"calibration_{key}": key for key in ("patches", "origins", "labels", "factors", "scores")}

# Types that the values of each array may have, and its number of dimensions.
_ANY, _FLOAT = ("float16", "float32"), ("float32",)
_ARRAYS = {
    **dict.fromkeys(("vectors", "sample"), (_ANY, 2)),
    "calibration_patches": (_ANY, 3),
    **dict.fromkeys(("points", "calibration_factors", "defects", "prototypes"), (_FLOAT, 2)),
    **dict.fromkeys(("radii", "covers", "stand_ins", "gains", "calibration_scores", "prototype"), (_FLOAT, 1)),
    **dict.fromkeys(("defect_reaches", "novelties"), (_FLOAT, 1)),
    "calibration_pixels": (("float64",), 2),
    "calibration_margins": (("float64",), 1),
    **dict.fromkeys(("origins", "calibration_origins", "image_owners"), (("int32",), 1)),
    **dict.fromkeys(("image_hashes", "hashes"), (("int64",), 1)),
    "calibration_labels": (("bool",), 1),
}


def _or_none(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or is_right(value)


def _is_positive(value: object) -> bool:
    return is_number(value) and value >= 0  # type: ignore[operator]


def _is_sample(value: object) -> bool:
    return is_list(value, is_count, 5) and all(side < 2**16 for side in value[1:])  # type: ignore[index]


def _thresholds(count: int) -> tuple[Callable[[Any], bool], str]:
    return _or_none(lambda value: is_list(value, _or_none(_is_positive), count)), f"{count} numbers from 0 on"


_COUNT, _POSITIVE = (is_count, "a count"), (_is_positive, "a number from 0 on")
_NAME = (lambda value: is_text(value) and value != "", "a name")
_ENTRIES = (lambda value: is_list(value, lambda each: isinstance(each, dict)), "a list of descriptions")
_NUMBER = (_or_none(is_number), "a number")
_STATE: Kinds = {
    "size": _COUNT,
    "dtype": (is_text, "a text"),
    "false_alarm_rate": (is_number, "a number"),
    "variants": _ENTRIES,
    "streams": _ENTRIES,
}
_VARIANT: Kinds = {
    "name": _NAME,
    **dict.fromkeys(("vectors", "images", "wanted", "calibration_images", "defects", "shown", "novelties"), _COUNT),
    **dict.fromkeys(("resolution", "spread"), _POSITIVE),
    **dict.fromkeys(("floor", "false_alarm_rate"), _NUMBER),
    "by_hand": _thresholds(2),
    "former": _thresholds(3),
}
_POOL: Kinds = {
    "name": _NAME,
    **dict.fromkeys(("images", "divided_at"), _COUNT),
    **dict.fromkeys(("resolution", "spread"), _POSITIVE),
    "samples": (lambda value: is_list(value, _is_sample), "five counts for each image"),
}


def wrong_forms(arrays: Mapping[str, NDArray[Any]], plain: Mapping[str, Any]) -> list[str]:
    """What of a state that was loaded, of whatever schema, is of another kind than it must be."""
    if problems := list(wrong_kinds(plain, _STATE)):
        return problems
    for key, kinds in (("variants", _VARIANT), ("streams", _POOL)):
        for entry in plain.get(key, ()):
            problems += (f"{entry.get('name')!s:.50}: {problem}" for problem in wrong_kinds(entry, kinds))
    for key, array in arrays.items():
        form = _ARRAYS.get(re.sub(r"^stream_\d+_|(?<=sample)_\d+$", "", key))
        if form is not None and array.ndim != form[1]:
            problems.append(f"{key} has the shape {array.shape}, not {form[1]} dimensions")
        elif form is not None and array.dtype.name not in form[0]:
            problems.append(f"{key} is of {array.dtype}, not {' or '.join(form[0])}")
    return problems


def contradictions(arrays: Mapping[str, NDArray[Any]], plain: Mapping[str, Any]) -> list[str]:
    """What is wrong with a state that was loaded.

    Raises:
        KeyError: If something is missing.
    """
    entries = plain["variants"]
    for described, kinds in ((entries, _VARIANT), (plain["streams"], _POOL)):
        # Only those of a former schema had novelties.
        missing = {key for entry in described for key in kinds.keys() - entry.keys()} - {"novelties"}
        if missing:
            raise KeyError(min(missing))
    counts = [entry["vectors"] for entry in entries]
    images = sum(entry["calibration_images"] for entry in entries)
    defects = sum(entry["defects"] for entry in entries)
    dimension = arrays["vectors"].shape[-1]
    shapes = {
        **dict.fromkeys(VECTORS, (sum(counts),)),
        "vectors": (sum(counts), dimension),
        **dict.fromkeys(CALIBRATION, (images,)),
        "calibration_patches": (images, CALIBRATION_PATCHES, dimension),
        "calibration_factors": (images, 2),
        "defects": (defects, dimension),
        "defect_reaches": (defects,),
        "prototypes": (len(entries), dimension),
        **dict.fromkeys(("image_hashes", "image_owners"), (arrays["image_hashes"].size,)),
    }
    finite, embeddings = ["covers", "calibration_factors"], ["vectors", "defects", "prototypes", "calibration_patches"]
    for position, stream in enumerate(plain["streams"]):
        prefix = f"stream_{position}_"
        count = len(arrays[f"{prefix}points"])
        dimension = dimension or arrays[f"{prefix}points"].shape[-1]
        shapes |= {
            f"{prefix}points": (count, dimension),
            **{f"{prefix}{key}": (count,) for key in ("radii", "covers", "origins", "stand_ins")},
            f"{prefix}prototype": (dimension,),
            f"{prefix}hashes": (arrays[f"{prefix}hashes"].size,),
        }
        finite.append(f"{prefix}covers")
        embeddings += [f"{prefix}{key}" for key in ("points", "prototype")]
        for number in range(len(stream["samples"])):
            key = f"{prefix}sample_{number}"
            shapes[key] = (len(arrays[key]), dimension)
            embeddings.append(key)
    problems = [
        f"{key} has the shape {arrays[key].shape} in place of {shape}"
        for key, shape in shapes.items()
        if arrays[key].shape != shape
    ]
    if problems:
        return problems
    if sum(counts) > plain["size"]:
        problems.append(f"there are {sum(counts)} vectors, but at most {plain['size']} are allowed")
    if arrays["vectors"].dtype != plain["dtype"]:
        problems.append(f"vectors are of {arrays['vectors'].dtype} in place of {plain['dtype']}")
    problems += [f"{key} holds values that are not finite" for key in finite if not np.isfinite(arrays[key]).all()]
    problems += [
        f"{key} holds values that are too large or not finite"
        for key in embeddings
        if not float(np.abs(arrays[key]).max(initial=0)) <= LARGEST_VALUE  # NaN as well
    ]
    if np.isnan(arrays["calibration_scores"]).any():
        problems.append("calibration_scores holds NaN")
    problems += [f"{key} holds negative values" for key in ("covers", "calibration_scores") if (arrays[key] < 0).any()]
    problems += [
        f"{key} are not above 0" for key in ("calibration_factors", "defect_reaches") if not (arrays[key] > 0).all()
    ]
    if not np.isin(arrays["image_owners"], range(-1, len(entries))).all():
        problems.append("image_owners names variants that are not there")
    if len({entry["name"] for entry in entries}) < len(entries):
        problems.append("a variant is there twice")
    if len({stream["name"] for stream in plain["streams"]}) < len(plain["streams"]):
        problems.append("a pool is there twice")
    problems += _problems_of_pools(arrays, plain)
    first = image = 0
    for entry, count in zip(entries, counts, strict=True):
        part, images_of = slice(first, first + count), slice(image, image + entry["calibration_images"])
        first, image = part.stop, images_of.stop
        for key, some, least in (("origins", part, NOT_LEARNED), ("calibration_origins", images_of, SHOWN)):
            numbers = arrays[key][some]
            if not ((least <= numbers) & (numbers < entry["images"])).all():
                problems.append(f"{key} of {entry['name']} are no numbers of its images")
        problems += _problems_of_variant(entry, arrays["radii"][part], arrays["gains"][part], arrays["stand_ins"][part])
    return problems


def _problems_of_variant(
    entry: Mapping[str, Any], radii: NDArray[Any], worth: NDArray[Any], stand_ins: NDArray[Any]
) -> list[str]:
    """What is wrong with a variant whose arrays have the right shapes."""
    problems = []
    name = entry["name"]
    if not len(radii) or radii[0] != np.inf or not (np.diff(radii) <= 0).all():
        problems.append(f"radii of {name} do not fall from infinity")
    if not (np.isnan(worth).all() or (worth[0] == np.inf and (worth[1:] <= worth[:-1]).all() and (worth >= 0).all())):
        problems.append(f"gains of {name} do not fall from infinity")
    if not (stand_ins >= 0).all():
        problems.append(f"stand_ins of {name} are negative or NaN")
    if entry["defects"] and not entry["shown"]:
        problems.append(f"{name} holds defects of no image")
    rate = entry["false_alarm_rate"]
    try:
        if rate is not None:
            check_rate(rate)
    except ValueError as error:
        problems.append(f"{name}: {error}")
    return problems


def _problems_of_pools(arrays: Mapping[str, NDArray[Any]], plain: Mapping[str, Any]) -> list[str]:
    """What is wrong with pools whose arrays have the right shapes."""
    problems = []
    for position, stream in enumerate(plain["streams"]):
        points, radii, stand_ins = (arrays[f"stream_{position}_{key}"] for key in ("points", "radii", "stand_ins"))
        for key, values in (("radii", radii), ("stand_ins", stand_ins)):
            if not (values >= 0).all():
                problems.append(f"stream_{position}_{key} holds negative values or NaN")
        if stream["divided_at"] not in {0, *range(LISTS, len(points) + 1)}:
            problems.append(f"divided_at of pool {position} is out of range")
        for number, described in enumerate(stream["samples"]):
            _, rows, columns, height, width = described
            patches = len(arrays[f"stream_{position}_sample_{number}"])
            if (rows or columns) and (rows * columns != patches or not (height > 0 and width > 0)):
                problems.append(f"image {number} of pool {position} has {patches} patches, not {rows} x {columns}")
    return problems
