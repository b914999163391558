# SPDX-License-Identifier: Apache-2.0
"""The command ``anomalib-ext``; what one model does on one data set is done by Anomalib's own ``anomalib``."""

import logging
import os
import warnings
from collections.abc import Callable
from typing import Any


def main() -> None:
    """Run a subcommand."""
    from jsonargparse import ArgumentParser, auto_cli

    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it would report its use to its makers
    # Deprecations inside Anomalib and Lightning's hints do not concern the user.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", module="lightning")
    try:
        from anomalib_ext.benchmark import benchmark, compare
        from anomalib_ext.finetune import finetune
        from anomalib_ext.report import report
        from anomalib_ext.stream import learn_stream
    except ImportError as error:
        msg = f"{error}. Learning with torch needs the extra: pip install 'anomalib-ext[train]'"
        raise SystemExit(msg) from error
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)

    class Parser(ArgumentParser):
        def add_function_arguments(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[str]:  # noqa: ANN401
            kwargs["as_positional"] = function is report  # which has one argument and no configuration
            return super().add_function_arguments(function, *args, **kwargs)

    commands: dict[str, Any] = {
        "stream": learn_stream,
        "report": report,
        "finetune": finetune,
        "benchmark": benchmark,
        "compare": compare,
    }
    auto_cli(commands, parser_class=Parser)
