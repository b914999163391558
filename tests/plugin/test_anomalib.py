# SPDX-License-Identifier: Apache-2.0
"""Tests of the plugin mechanism on the real Anomalib, in few processes, for its import takes many seconds."""

import re
import sysconfig
from pathlib import Path
from typing import Any

import pytest

Site = Any  # the class of conftest.py

REAL = {
    "real.py": """
        from registered import check

        def check_models():
            check()
            import anomalib.models
            from anomalib.models import get_model, list_models

            for name, snake, module, options in (
                ("ForeignModel", "foreign_model", "foreign.models", {"size": 2}),
                ("ContinualPatchCore", "continual_patch_core", "anomalib_ext.models", {"pre_trained": False}),
            ):
                model = getattr(anomalib.models, name)
                assert name in anomalib.models.__all__
                assert snake in list_models()
                assert name in list_models("pascal")
                assert snake.replace("_", " ").title() in list_models("title")
                assert type(get_model(snake, **options)) is model
                for path in name, f"anomalib.models.{name}", f"{module}.{name}":
                    assert type(get_model({"class_path": path, "init_args": options})) is model
    """,
    "spawn.py": """
        import multiprocessing

        def child(queue):
            from anomalib.models import ContinualPatchCore, ForeignModel
            import importlib, sys, real
            real.check_models()
            importlib.reload(sys.modules["anomalib.models"])
            real.check_models()
            queue.put("fine")

        if __name__ == "__main__":
            context = multiprocessing.get_context("spawn")
            queue = context.Queue()
            process = context.Process(target=child, args=[queue])
            process.start()
            process.join()
            assert process.exitcode == 0
            assert queue.get(timeout=1) == "fine"
    """,
    "ddp.py": """
        from lightning.pytorch import Trainer
        from lightning.pytorch.demos.boring_classes import BoringModel

        class Model(BoringModel):
            def on_train_start(self):
                import real

                real.check_models()
                print(f"rank {self.global_rank} is fine", flush=True)

        if __name__ == "__main__":
            Trainer(accelerator="cpu", devices=2, strategy="ddp", fast_dev_run=True).fit(Model())
    """,
    "torch_first.py": """
        import sys, time
        from importlib.metadata import EntryPoint

        def timed(entry, load=EntryPoint.load):
            start = time.perf_counter()
            load(entry)()
            print(entry.value, 1000 * (time.perf_counter() - start))
            return lambda: None

        EntryPoint.load = timed
        sys.modules["anomalib"] = None  # as if it were not installed
        import torch

        EntryPoint.load = timed.__defaults__[0]
        assert {"anomalib_ext.plugin"} <= set(sys.modules)
        assert not {"anomalib.models", "lightning", "faiss", "openvino"} & set(sys.modules)
        del sys.modules["anomalib"]
        import anomalib.models
        import real

        assert "faiss" not in sys.modules
        real.check_models()
    """,
    "commands.py": """
        import contextlib, io, itertools, pathlib, sys
        from anomalib.cli.cli import main  # what the console script imports
        from PIL import Image

        for name in "good/1", "good/2", "good/3", "bad/1", "bad/2":
            path = pathlib.Path(f"images/{name}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (16, 16)).save(path)

        def anomalib(*args):
            sys.argv = ["anomalib", *args]
            with contextlib.redirect_stdout(io.StringIO()) as stdout, contextlib.suppress(SystemExit):
                main()
            return stdout.getvalue()

        for name, module in ("ForeignModel", "foreign.models"), ("ContinualPatchCore", "anomalib_ext.models"):
            pathlib.Path(f"{name}.yaml").write_text(f"model: {{class_path: {name}}}")
            paths = [["--model", f"{prefix}{name}"] for prefix in ("", "anomalib.models.", f"{module}.")]
            paths.append(["--config", f"{name}.yaml"])
            for command, path in itertools.product(["train", "fit", "validate", "test", "predict", "export"], paths):
                data = ["--data", "images"] if command == "predict" else []
                config = anomalib(command, *path, *data, "--print_config")
                assert f".{name}\\n  init_args:" in config, (command, path, config)
        data = "--data=Folder --data.name=tiny --data.root=images --data.normal_dir=good --data.abnormal_dir=bad"
        anomalib("train", "--model=ForeignModel", *data.split(), "--data.num_workers=0")
        anomalib("benchmark", "--config", "benchmark.yaml")
    """,
    "benchmark.yaml": """
        accelerator: cpu
        benchmark:
          seed: 0
          model:
            class_path:
              grid: [ForeignModel, anomalib.models.ForeignModel, foreign.models.ForeignModel]
          data:
            class_path: Folder
            init_args: {name: tiny, root: images, normal_dir: good, abnormal_dir: bad, num_workers: 0}
    """,
}


@pytest.fixture
def real(site: Site) -> Site:
    """Return a folder with a foreign plugin and programs that use it with the real Anomalib."""
    site.write(REAL)
    return site


@pytest.mark.slow
def test_a_spawned_process_that_imports_the_models_first(real: Site) -> None:
    """All of Anomalib's ways to a model find it, also after a reload."""
    assert "Anomalib goes on" not in real.run("spawn.py").stderr


@pytest.mark.slow
def test_distributed_training(real: Site) -> None:
    """Lightning's launcher starts a process that finds the models too."""
    done = real.run("ddp.py")
    assert all(f"rank {rank} is fine" in done.stdout for rank in range(2)), done.stdout
    assert "Anomalib goes on" not in done.stderr


def test_torch_first(real: Site) -> None:
    """An import of torch costs milliseconds, without Anomalib too; a broken plugin then costs one warning."""
    real.declare("broken-plugin", "anomalib.models", "Broken = nowhere:Broken")
    done = real.run("torch_first.py")
    (milliseconds,) = re.findall(r"anomalib_ext\.plugin:install (.*)", done.stdout)
    assert float(milliseconds) < 20
    (warning,) = re.findall(r"UserWarning: (Anomalib goes on without .*)", done.stderr)
    assert "'broken-plugin'. ModuleNotFoundError: No module named 'nowhere'" in warning


@pytest.mark.slow
def test_commands(real: Site) -> None:
    """Every command takes the models by every name; training and benchmark run."""
    stderr = real.run("commands.py").stderr
    assert "Anomalib goes on" not in stderr
    assert len(list(real.folder.glob("results/ForeignModel/tiny/**/*.ckpt"))) == 1, stderr
    (table,) = real.folder.glob("runs/benchmark/*/results.csv")
    assert table.read_text(encoding="utf-8").count("ForeignModel") == 3


@pytest.mark.slow
def test_console_script(real: Site) -> None:
    """The help lists the models."""
    script = Path(sysconfig.get_path("scripts")) / "anomalib"
    done = real.run(str(script), "train", "--help", "-v")
    assert re.search(r"known subclasses: [^)]*anomalib_ext\.models\.ContinualPatchCore", done.stdout), done.stdout
    assert re.search(r"known subclasses: [^)]*foreign\.models\.ForeignModel", done.stdout)
    assert "Anomalib goes on" not in done.stderr
