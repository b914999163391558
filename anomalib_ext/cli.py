# SPDX-License-Identifier: Apache-2.0
"""The command ``anomalib-ext``; what one model does on one data set is done by Anomalib's own ``anomalib``."""

import logging
import os
import warnings
from argparse import ArgumentParser
from importlib import import_module

# Where the function of each subcommand is, and what it does. Only the one that is asked for is imported.
COMMANDS = {
    "stream": ("anomalib_ext.stream:learn_stream", "Learn products one after another, and test all after each."),
    "report": ("anomalib_ext.report:report", "Write a page about a stream that was learned."),
    "finetune": ("anomalib_ext.finetune:finetune", "Fine-tune a backbone as a classifier."),
    "benchmark": ("anomalib_ext.benchmark:benchmark", "Compare learners on streams of products."),
    "parity": ("anomalib_ext.parity:parity", "Compare an edge bundle with the checkpoint that it was exported from."),
    "compare": ("anomalib_ext.benchmark:compare", "Print results of `anomalib benchmark` beside published figures."),
}
# Those whose required arguments are given by position, as in `anomalib-edge`.
POSITIONAL = {"report", "parity"}


def main() -> int:
    """Run a subcommand and return its exit code, 0 unless it gives one."""
    parser = ArgumentParser("anomalib-ext", epilog="What one model does on one data set is done by `anomalib`.")
    subcommands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, does) in COMMANDS.items():
        subcommands.add_parser(name, help=does, add_help=False)
    known, arguments = parser.parse_known_args()

    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it would report its use to its makers
    # Deprecations inside Anomalib and Lightning's hints do not concern the user.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("default", "(few_shot_views and one_shot|weighting) ha(ve|s) no effect", FutureWarning)
    warnings.filterwarnings("ignore", module="lightning")
    from jsonargparse import auto_cli

    module, _, function = COMMANDS[known.command][0].partition(":")
    try:
        command = getattr(import_module(module), function)
    except ImportError as error:
        msg = f"{error}. Learning with torch needs the extra: pip install 'anomalib-ext[train]'"
        raise SystemExit(msg) from error
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)
    by_position = known.command in POSITIONAL
    result = auto_cli(command, arguments, as_positional=by_position, prog=f"anomalib-ext {known.command}")
    return result if isinstance(result, int) else 0
