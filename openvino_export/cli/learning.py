# SPDX-License-Identifier: Apache-2.0
"""Commands about what a bundle knows: ``learn``, ``set``, ``info`` and ``undo``."""

import json
import sys
from pathlib import Path

from openvino_export.cli.output import ANOMALOUS, GOOD, print_line, progress


def learn(
    bundle: str,
    source: str,
    variant: str | None = None,
    force: bool = False,
    defective: bool = False,
    mask: str | None = None,
    box: tuple[int, int, int, int] | None = None,
    device: str = "CPU",
) -> int:
    """Learn good images, or what a defect looks like, and save what was learned in the bundle.

    A kill at any moment leaves the bundle as it was or as it is to be. Good images that look anomalous are held back
    and named. Exits with 0 if all were learned, with 3 if some were held back or defects that were shown are still
    called good, with 1 on errors, when nothing was learned.

    Args:
        bundle: Folder that the export to openvino has written.
        source: Image, or folder of images.
        variant: Name of the product variant that they show; found for each image if not given.
        force: Learn images that look anomalous as well, and as a variant whose name differs from a known one by case or
            blanks alone.
        defective: The images are defective: what is like their defects is called anomalous from now on.
        mask: Where the defect is: an image of the same size, white where it is; or a folder with one for each image, at
            the same place below it and of the same name, with or without _mask.
        box: Where the defect is in a single image: left, top, right and bottom in pixels, such as '[20,30,60,50]'.
        device: Device of OpenVINO.
    """
    from openvino_export.cli.sources import image_paths
    from openvino_export.detector import EdgeDetector

    detector = EdgeDetector(bundle, device)
    paths = image_paths(Path(source))
    if not defective and (mask or box):
        msg = "A mask or box tells where a defect is; give it with --defective true."
        raise ValueError(msg)
    if mask and box:
        msg = "Give a mask or a box, not both."
        raise ValueError(msg)
    regions = _masks(Path(mask), paths, Path(source)) if mask else box
    with progress("looked at", len(paths)) as show:
        learned = detector.learn(paths, variant, force=force, defective=defective, regions=regions, progress=show)
    detector.save()
    report = learned.report
    print_line({
        "learned": dict(report.variants),
        "shown_defects": dict(report.shown),
        "still_good": report.still_good,
        "known_images": report.known_images,
        "known_as": [{"known": known, "given": given, "images": n} for (known, given), n in report.known_as.items()],
        "held_back": learned.held_back,
        "vectors": report.num_vectors,
        "radius_bound": report.radius_bound,
    })
    for name, excess in learned.held_back.items():
        text = f"{name} was not learned: it scores {excess:.1f} times the threshold. If it is good, add --force true."
        print(text, file=sys.stderr)
    for sentence in report.advice:
        print(sentence, file=sys.stderr)
    return ANOMALOUS if learned.held_back or report.still_good else GOOD


def _masks(mask: Path, images: list[Path], source: Path) -> list[Path]:
    """Mask of each image: at the same place below the folder of masks, whatever its ending, `_mask` added or not.

    Raises:
        FileNotFoundError: If an image has none.
    """
    from openvino_export.cli.sources import image_paths

    if not mask.is_dir():
        return [mask]
    masks = {path.relative_to(mask).with_name(path.stem.removesuffix("_mask")): path for path in image_paths(mask)}
    places = [path.relative_to(source if source.is_dir() else path.parent).with_suffix("") for path in images]
    missing = [str(place) for place in places if place not in masks]
    if missing:
        msg = f"The folder {mask} has no mask of {', '.join(missing[:5])}. Call it as the image, or add _mask."
        raise FileNotFoundError(msg)
    return [masks[place] for place in places]


def set_decision(
    bundle: str,
    variant: str | None = None,
    false_alarm_rate: float | None = None,
    threshold: float | None = None,
    automatic: bool = False,
    memory_size: int | None = None,
) -> int:
    """Set the false-alarm rate, a threshold or the size of the memory, in the bundle and its model.xml; see info.

    Args:
        bundle: Folder that the export to openvino has written.
        variant: Name of the product variant that it is for; all by default.
        false_alarm_rate: Share of good images that may be called anomalous, such as 0.005.
        threshold: Raw image score above which an image is anomalous, set by hand.
        automatic: Let thresholds follow from good images again, at the rate of the bundle.
        memory_size: Largest number of vectors, for all variants. What is learned from now on fills a larger memory; a
            smaller one forgets at once.
    """
    given = [false_alarm_rate is not None, threshold is not None, automatic, memory_size is not None]
    if given.count(True) != 1 or (variant is not None and memory_size is not None):
        msg = "Give one of --false_alarm_rate, --threshold, --automatic true and --memory_size, this for all variants."
        raise ValueError(msg)
    from openvino_export.detector import EdgeDetector

    detector = EdgeDetector(bundle)
    if memory_size is not None:
        detector.set_memory_size(memory_size)
        detector.save()
        known = detector.info()
        print_line({key: known[key] for key in ("memory_size", "vectors", "bytes")})
        return GOOD
    detector.set_decision(variant, false_alarm_rate=false_alarm_rate, threshold=threshold)
    detector.save()
    keys = ("false_alarm_rate", "smallest_rate", "rests_on_images", "threshold", "by_hand")
    for name, known in detector.info()["variants"].items():
        if variant in {None, name}:
            print_line({"variant": name, **{key: known[key] for key in keys}})
            if not known["by_hand"] and known["false_alarm_rate"] < known["smallest_rate"]:
                text = (
                    f"{name}: {known['rests_on_images']} good images support rates down to "
                    f"{known['smallest_rate']:.3f}; the threshold is extrapolated."
                )
                print(text, file=sys.stderr)
    return GOOD


def info(bundle: str) -> int:
    """Show what a bundle is and knows, as JSON.

    Args:
        bundle: Folder that the export to openvino has written.
    """
    from openvino_export.detector import EdgeDetector

    print(json.dumps(EdgeDetector(bundle).info(), indent=2))
    return GOOD


def undo(bundle: str) -> int:
    """Bring back the bundle as it was before the last learn, set or change of variants; a second time, bring that back.

    Args:
        bundle: Folder that the export to openvino has written.
    """
    from openvino_export.bundle import folder

    folder.undo(bundle)
    print_line({"variants": folder.read(bundle).metadata["variants"]})
    return GOOD
