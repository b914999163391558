# SPDX-License-Identifier: Apache-2.0
"""A foreign plugin, and a Python process in which distributions are installed."""

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import anomalib_ext

REPOSITORY = Path(anomalib_ext.__file__).parents[1]

# The model imports the engine, which imports `anomalib.models`, which imports the model.
FOREIGN = {
    "foreign/__init__.py": "",
    "foreign/models/__init__.py": "from .lightning_model import ForeignModel",
    "foreign/models/lightning_model.py": """
        from anomalib import LearningType
        from anomalib.engine import Engine
        from anomalib.models.components import AnomalibModule

        class ForeignModel(AnomalibModule):
            learning_type = LearningType.ONE_CLASS
            trainer_arguments = {"max_epochs": 1}

            def __init__(self, size: int = 1) -> None:
                super().__init__(pre_processor=False, post_processor=False, evaluator=False, visualizer=False)
                self.size = size

            def configure_optimizers(self):
                pass

            def training_step(self, batch):
                pass

            def validation_step(self, batch):
                return batch

            test_step = validation_step
    """,
    "app.py": """
        from anomalib.engine import Engine
        from anomalib.models import ForeignModel
    """,
    "registered.py": """
        import sys
        from importlib.machinery import ModuleSpec

        def check():
            from anomalib.models import ForeignModel, AnomalibModule, list_models
            models = sys.modules["anomalib.models"]
            assert models.ForeignModel is ForeignModel is sys.modules["foreign.models"].ForeignModel
            assert models.__all__.count("ForeignModel") == 1
            assert "foreign.models" in models.ALLOWED_MODULES
            assert [model.__name__ for model in AnomalibModule.__subclasses__()].count("ForeignModel") == 1
            # Nothing of the mechanism stays behind on a module.
            for module in list(sys.modules.values()):
                if module is not None and module.__name__.startswith(("anomalib.", "foreign")) and module.__spec__:
                    assert type(module.__spec__) is ModuleSpec, module
                    assert "anomalib_ext" not in f"{module.__spec__.loader}{module.__loader__}", module
                    assert "_calls" not in vars(module.__spec__), module
    """,
}


def write(folder: Path, files: dict[str, str]) -> None:
    """Write files, given by relative path."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text), encoding="utf-8")


def declare(folder: Path, distribution: str, group: str, entry: str) -> None:
    """Install a distribution with one entry point."""
    info = f"{distribution.replace('-', '_')}-1.0.dist-info"
    write(
        folder,
        {
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n",
            f"{info}/entry_points.txt": f"[{group}]\n{entry}\n",
        },
    )


def run(folder: Path, *args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run Python where the packages in ``folder`` are installed; whatever fails there fails the test."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(REPOSITORY)]), "COLUMNS": "500", **environ}
    done = subprocess.run([sys.executable, *args], env=env, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done
