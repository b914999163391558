# SPDX-License-Identifier: Apache-2.0
"""The command ``anomalib-edge``: inspection and learning on an edge PC without torch.

So that the help comes at once, modules that hold commands import nothing heavy at their top, not even under
``TYPE_CHECKING``: jsonargparse runs that.
"""

import os
import sys
from typing import Any

from openvino_export.cli.inspect import predict
from openvino_export.cli.learning import info, learn, set_decision, undo
from openvino_export.cli.measure import benchmark, parity
from openvino_export.cli.output import ERROR
from openvino_export.cli.serve import serve
from openvino_export.cli.variants import delete, list_variants, merge, rename
from openvino_export.cli.watch import watch

COMMANDS: dict[str, Any] = {
    "predict": predict,
    "learn": learn,
    "set": set_decision,
    "info": info,
    "benchmark": benchmark,
    "parity": parity,
    "watch": watch,
    "serve": serve,
    "undo": undo,
    "variants": {
        "_help": "List, rename, merge or delete the product variants of a bundle.",
        "list": list_variants,
        "rename": rename,
        "merge": merge,
        "delete": delete,
    },
}


def main(args: list[str] | None = None) -> int:
    """Run a subcommand and return its exit code: 0 good, 3 anomalous, 4 undecided, 1 error, 2 wrong arguments."""
    # Before NumPy is imported: its threads would keep OpenVINO's from the processor.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from jsonargparse import auto_cli

    description = (
        "Inspect with a bundle that the export to openvino has written, and go on learning. "
        "Exit codes: 0 good; 3 anomalous, held back or different; 4 not judged; 1 error; 2 wrong arguments."
    )
    try:
        return int(auto_cli(COMMANDS, args=args, as_positional=True, description=description))
    except (OSError, ValueError, MemoryError) as error:  # what the messages of this package are made for
        print(f"anomalib-edge: {error}", file=sys.stderr)
        return ERROR
    except KeyboardInterrupt:
        return 130
