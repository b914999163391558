# SPDX-License-Identifier: Apache-2.0
"""Commands about the product variants of a bundle: ``variants list``, ``rename``, ``merge`` and ``delete``."""

from openvino_export.cli.output import GOOD, print_line


def list_variants(bundle: str) -> int:
    """List the product variants, a JSON line for each; info shows more.

    Args:
        bundle: Folder that the export to openvino has written.
    """
    from openvino_export.bundle.folder import BundleError
    from openvino_export.detector import EdgeDetector

    known = EdgeDetector(bundle).info()
    if "variants" not in known:
        msg = f"The bundle {bundle} of {known['model']} has no memory bank, so it knows no variants."
        raise BundleError(msg)
    for name, about in known["variants"].items():
        print_line({"variant": name, "images": about["images"], "vectors": about["vectors"]})
    return GOOD


def rename(bundle: str, variant: str, new: str, force: bool = False) -> int:
    """Give a product variant another name.

    Args:
        bundle: Folder that the export to openvino has written.
        variant: Its name.
        new: Its new name.
        force: Allow a name that differs from that of another variant by case or blanks alone.
    """
    from openvino_export.detector import EdgeDetector

    detector = EdgeDetector(bundle)
    detector.rename_variant(variant, new, force=force)
    detector.save()
    return list_variants(bundle)


def merge(bundle: str, variant: str, into: str) -> int:
    """Let a product variant become a part of another, as if all its images had been learned as that one.

    Args:
        bundle: Folder that the export to openvino has written.
        variant: Name of the variant that ends.
        into: Name of the one that knows the images of both, and keeps its rate, or its threshold set by hand.
    """
    from openvino_export.detector import EdgeDetector

    detector = EdgeDetector(bundle)
    detector.merge_variants(variant, into)
    detector.save()
    return list_variants(bundle)


def delete(bundle: str, variant: str) -> int:
    """Forget a product variant. Its images can be learned again; the last variant cannot be deleted.

    Args:
        bundle: Folder that the export to openvino has written.
        variant: Its name.
    """
    from openvino_export.detector import EdgeDetector

    detector = EdgeDetector(bundle)
    detector.delete_variant(variant)
    detector.save()
    return list_variants(bundle)
