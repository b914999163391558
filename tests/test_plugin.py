# SPDX-License-Identifier: Apache-2.0
"""Tests of the plugin mechanism, each in a fresh interpreter.

An import of Anomalib takes many seconds, so most tests run on small stand-ins for torch and Anomalib that
import each other as the real ones do; the rest confirm the same on the real ones, in few processes.
"""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from textwrap import dedent

import pytest

import anomalib_ext

REPOSITORY = Path(anomalib_ext.__file__).parents[1]

STAND_INS = {
    "torch/__init__.py": """
        import os
        from importlib.metadata import entry_points

        if os.getenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "1":
            for entry in entry_points(group="torch.backends"):
                entry.load()()
    """,
    "dependency.py": "",
    "anomalib/__init__.py": """
        class LearningType:
            ONE_CLASS = "one_class"
    """,
    "anomalib/models/__init__.py": """
        import torch
        from anomalib.models.components import AnomalibModule

        from .image import Padim
        import dependency

        ALLOWED_MODULES = {"anomalib.models"}
        __all__ = ["Padim"]

        def list_models():
            return [model.__name__ for model in AnomalibModule.__subclasses__()]
    """,
    "anomalib/models/components/__init__.py": """
        import time
        import torch

        time.sleep(0.05)  # for other threads to come in between

        class AnomalibModule:
            def __init__(self, **_):
                pass
    """,
    "anomalib/models/image/__init__.py": """
        from anomalib.models.components import AnomalibModule

        class Padim(AnomalibModule):
            pass
    """,
    "anomalib/engine/__init__.py": "from .engine import Engine",
    "anomalib/engine/engine.py": """
        from anomalib.models import AnomalibModule

        class Engine:
            pass
    """,
}

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


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    """Return a folder with the stand-ins, this package and a foreign plugin."""
    write(tmp_path, STAND_INS | FOREIGN)
    # It hides the installed distribution, whose model needs the real Anomalib.
    declare(tmp_path, "anomalib-ext", "torch.backends", "anomalib_ext = anomalib_ext.plugin:install")
    declare(tmp_path, "foreign-plugin", "anomalib.models", "ForeignModel = foreign.models:ForeignModel")
    return tmp_path


FIRST_IMPORTS = [
    "from anomalib.models import ForeignModel",
    "from anomalib.models import *; ForeignModel",
    "import anomalib.models; assert 'ForeignModel' in anomalib.models.list_models()",
    "from anomalib.models import AnomalibModule as base; assert len(base.__subclasses__()) == 2",
    "from anomalib.models.components import AnomalibModule as base; assert len(base.__subclasses__()) == 2",
    "from anomalib.models.image import Padim",
    "from anomalib.engine import Engine; import sys; sys.modules['anomalib.models'].ForeignModel",
    "from anomalib.engine.engine import Engine; import sys; sys.modules['anomalib.models'].ForeignModel",
    "from foreign.models import ForeignModel; import sys; sys.modules['anomalib.models'].ForeignModel",
    "import foreign.models.lightning_model; import sys; sys.modules['anomalib.models'].ForeignModel",
    "import app",
    "import torch",
    "import anomalib",
    "import anomalib_ext",
    "import importlib.util; importlib.util.find_spec('anomalib.models').loader.get_source('anomalib.models')",
]


@pytest.mark.parametrize("first", FIRST_IMPORTS)
def test_whatever_is_imported_first(stand_ins: Path, first: str) -> None:
    """The model is registered once, silently, whether torch's autoload or this package's import does it."""
    run(stand_ins, "-W", "error", "-c", f"{first}\nfrom registered import check; check()")
    if not re.search(r"ForeignModel|len|app", first):  # those need the model at once
        late = f"{first}\nimport anomalib_ext\nfrom registered import check; check()"
        run(stand_ins, "-W", "error", "-c", late, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    early = f"import anomalib_ext\n{first}\nfrom registered import check; check()"
    run(stand_ins, "-W", "error", "-c", early, TORCH_DEVICE_BACKEND_AUTOLOAD="0")


def test_reload_repetition_and_failed_imports(stand_ins: Path) -> None:
    """A reload, a second call and an import that first fails leave the model registered once."""
    code = """
    import importlib, sys
    sys.modules["dependency"] = None
    for _ in range(2):
        try:
            import anomalib.models
        except ImportError as error:
            assert "dependency" in str(error), error
        else:
            raise AssertionError
    assert "anomalib.models" not in sys.modules
    del sys.modules["dependency"]
    import anomalib.models
    from registered import check
    check()
    from anomalib_ext.plugin import install
    for _ in range(2):
        finders = list(sys.meta_path)
        install()
        assert sys.meta_path == finders
        importlib.reload(anomalib.models)
        check()
    """
    run(stand_ins, "-W", "error", "-c", dedent(code))


def test_threads(stand_ins: Path) -> None:
    """Threads that import at once all find the model."""
    # Not `foreign` or a submodule: Python itself lets threads that import such circles see half a module.
    firsts = [first for first in FIRST_IMPORTS if not re.search(r"app|foreign|engine|util|models\.[ci]", first)]
    write(stand_ins, {"anomalib/engine/engine.py": "class Engine: pass"})
    code = f"""
    import sys, threading
    from registered import check
    sys.setswitchinterval(1e-6)
    barrier, fine = threading.Barrier({len(firsts)}), []

    def work(first):
        barrier.wait()
        exec(first, {{}})
        from anomalib.models import ForeignModel
        fine.append(first)

    threads = [threading.Thread(target=work, args=[first]) for first in {firsts!r}]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(fine) == len(threads)
    check()
    """
    assert len(firsts) == 7
    for _ in range(3):
        run(stand_ins, "-W", "error", "-c", dedent(code))


@pytest.mark.parametrize("first", ["import anomalib.models", "import torch, anomalib.models"])
def test_a_thread_waits_while_another_registers(stand_ins: Path, first: str) -> None:
    """The import of the models has not ended, for any thread, until they are registered."""
    code = f"""
    import sys, threading, time

    def register():
        {first}

    thread = threading.Thread(target=register)
    thread.start()
    while "foreign" not in sys.modules:
        time.sleep(0.001)
    from anomalib.models import ForeignModel
    thread.join()
    """
    write(
        stand_ins,
        {
            "foreign/__init__.py": "import time; time.sleep(0.2)",
            "anomalib/engine/engine.py": "class Engine: pass",
        },
    )
    run(stand_ins, "-W", "error", "-c", dedent(code))


BROKEN = {
    "no-module": ("NoModule = nowhere:NoModule", "", "No module named 'nowhere'"),
    "no-import": ("NoImport = no_import:NoImport", "import lacking", "No module named 'lacking'"),
    "no-class": ("NoClass = no_class:NoClass", "pass", "no attribute 'NoClass'"),
    "raises": ("Raises = raises:Raises", "1 / 0", "ZeroDivisionError"),
    "malformed": ("Malformed = !", "", "'!' is not of the form 'module:Class'"),
    "exits": ("Exits = exits:Exits", "raise SystemExit('no license')", "SystemExit: no license"),
    "no-subclass": ("NoSubclass = no_subclass:NoSubclass", "class NoSubclass: pass", "derived directly"),
    "no-type": ("NoType = no_type:NoType", "NoType = 1", "derived directly"),
    "indirect": (
        "Indirect = indirect:Indirect",
        "from anomalib.models import Padim\nclass Indirect(Padim): pass",
        "derived directly",
    ),
    "alias": (
        "Alias = alias:Alias",
        "from anomalib.models import AnomalibModule\nclass Other(AnomalibModule): pass\nAlias = Other",
        "derived directly",
    ),
    "other-name": ("OtherName = other_name:Other", "", "named as its class"),
    "clash": ("PaDim = clash:PaDim", "raise SystemError('imported')", "'PaDim' is taken"),
    "foreign-twin": ("ForeignModel = twin:ForeignModel", "raise SystemError('imported')", "'ForeignModel' is taken"),
}


@pytest.mark.parametrize("first", ["import torch", "from anomalib.engine import Engine"])
def test_broken_plugins(stand_ins: Path, first: str) -> None:
    """Each broken plugin gets one warning, by name and with its reason; all else works."""
    for distribution, (entry, source, _) in BROKEN.items():
        declare(stand_ins, distribution, "anomalib.models", entry)
        if source:
            write(stand_ins, {f"{re.split(r'[=:]', entry)[1].strip()}.py": source})
    code = f"""
    import warnings
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        {first}
        import anomalib.models
    from registered import check
    check()
    assert set(anomalib.models.__all__) == {{"Padim", "ForeignModel"}}
    print(*(warning.message for warning in caught), sep="\\n")
    """
    lines = run(stand_ins, "-c", dedent(code)).stdout.splitlines()
    assert len(lines) == len(BROKEN), lines
    for distribution, (_, _, reason) in BROKEN.items():
        (line,) = (line for line in lines if f"distribution '{distribution}'" in line)
        assert reason in line
        assert f"uninstall '{distribution}'" in line


# The real Anomalib, from here on.

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
def real(tmp_path: Path) -> Path:
    """Return a folder with a foreign plugin and programs that use it with the real Anomalib."""
    write(tmp_path, FOREIGN | REAL)
    declare(tmp_path, "foreign-plugin", "anomalib.models", "ForeignModel = foreign.models:ForeignModel")
    return tmp_path


def test_a_spawned_process_that_imports_the_models_first(real: Path) -> None:
    """All of Anomalib's ways to a model find it, also after a reload."""
    assert "Anomalib goes on" not in run(real, "spawn.py").stderr


def test_distributed_training(real: Path) -> None:
    """Lightning's launcher starts a process that finds the models too."""
    done = run(real, "ddp.py")
    assert all(f"rank {rank} is fine" in done.stdout for rank in range(2)), done.stdout
    assert "Anomalib goes on" not in done.stderr


def test_torch_first(real: Path) -> None:
    """An import of torch costs milliseconds, without Anomalib too; a broken plugin then costs one warning."""
    declare(real, "broken-plugin", "anomalib.models", "Broken = nowhere:Broken")
    done = run(real, "torch_first.py")
    (milliseconds,) = re.findall(r"anomalib_ext\.plugin:install (.*)", done.stdout)
    assert float(milliseconds) < 20
    (warning,) = re.findall(r"UserWarning: (Anomalib goes on without .*)", done.stderr)
    assert "'broken-plugin'. ModuleNotFoundError: No module named 'nowhere'" in warning


def test_commands(real: Path) -> None:
    """Every command takes the models by every name; training and benchmark run."""
    stderr = run(real, "commands.py").stderr
    assert "Anomalib goes on" not in stderr
    assert len(list(real.glob("results/ForeignModel/tiny/**/*.ckpt"))) == 1, stderr
    (table,) = real.glob("runs/benchmark/*/results.csv")
    assert table.read_text(encoding="utf-8").count("ForeignModel") == 3


def test_console_script(real: Path) -> None:
    """The help lists the models."""
    script = Path(sysconfig.get_path("scripts")) / "anomalib"
    done = run(real, str(script), "train", "--help", "-v")
    assert re.search(r"known subclasses: [^)]*anomalib_ext\.models\.ContinualPatchCore", done.stdout), done.stdout
    assert re.search(r"known subclasses: [^)]*foreign\.models\.ForeignModel", done.stdout)
    assert "Anomalib goes on" not in done.stderr
