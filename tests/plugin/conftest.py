# SPDX-License-Identifier: Apache-2.0
"""What the tests of the plugin mechanism share: folders of installed packages, and a foreign plugin in them."""

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

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


class Site:
    """A folder of installed packages, and Python that finds them.

    Args:
        folder: The folder.
        files: The packages, as texts by relative path.
    """

    def __init__(self, folder: Path, files: dict[str, str]) -> None:
        self.folder = folder
        self.write(files)

    def write(self, files: dict[str, str]) -> None:
        """Write files, given by relative path."""
        for name, text in files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(dedent(text), encoding="utf-8")

    def declare(self, distribution: str, group: str, entry: str) -> None:
        """Install a distribution with one entry point."""
        info = f"{distribution.replace('-', '_')}-1.0.dist-info"
        self.write({
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n",
            f"{info}/entry_points.txt": f"[{group}]\n{entry}\n",
        })

    def run(self, *args: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run Python in the folder; whatever fails there fails the test."""
        path = os.pathsep.join([str(self.folder), str(REPOSITORY)])
        env = {**os.environ, "PYTHONPATH": path, "COLUMNS": "500", **environ}
        command = [sys.executable, *args]
        done = subprocess.run(command, env=env, cwd=self.folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """Return a folder with a foreign plugin."""
    site = Site(tmp_path, FOREIGN)
    site.declare("foreign-plugin", "anomalib.models", "ForeignModel = foreign.models:ForeignModel")
    return site
