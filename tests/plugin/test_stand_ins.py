# SPDX-License-Identifier: Apache-2.0
"""Tests of the plugin mechanism on small stand-ins for torch and Anomalib, which import each other as the real ones do.

Each test starts fresh interpreters. Those of the real Anomalib would take many seconds for their imports.
"""

import re
from textwrap import dedent
from typing import Any

import pytest

Site = Any  # the class of conftest.py

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


@pytest.fixture
def stand_ins(site: Site) -> Site:
    """Return a folder with the stand-ins, this package and a foreign plugin."""
    site.write(STAND_INS)
    # It hides the installed distribution, whose model needs the real Anomalib.
    site.declare("anomalib-ext", "torch.backends", "anomalib_ext = anomalib_ext.plugin:install")
    return site


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
def test_whatever_is_imported_first(stand_ins: Site, first: str) -> None:
    """The model is registered once, silently, whether torch's autoload or this package's import does it."""
    stand_ins.run("-W", "error", "-c", f"{first}\nfrom registered import check; check()")
    if not re.search(r"ForeignModel|len|app", first):  # those need the model at once
        late = f"{first}\nimport anomalib_ext\nfrom registered import check; check()"
        stand_ins.run("-W", "error", "-c", late, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    early = f"import anomalib_ext\n{first}\nfrom registered import check; check()"
    stand_ins.run("-W", "error", "-c", early, TORCH_DEVICE_BACKEND_AUTOLOAD="0")


def test_reload_repetition_and_failed_imports(stand_ins: Site) -> None:
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
    stand_ins.run("-W", "error", "-c", dedent(code))


def test_threads(stand_ins: Site) -> None:
    """Threads that import at once all find the model."""
    # Not `foreign` or a submodule: Python itself lets threads that import such circles see half a module.
    firsts = [first for first in FIRST_IMPORTS if not re.search(r"app|foreign|engine|util|models\.[ci]", first)]
    stand_ins.write({"anomalib/engine/engine.py": "class Engine: pass"})
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
        stand_ins.run("-W", "error", "-c", dedent(code))


@pytest.mark.parametrize("first", ["import anomalib.models", "import torch, anomalib.models"])
def test_a_thread_waits_while_another_registers(stand_ins: Site, first: str) -> None:
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
    stand_ins.write({
        "foreign/__init__.py": "import time; time.sleep(0.2)",
        "anomalib/engine/engine.py": "class Engine: pass",
    })
    stand_ins.run("-W", "error", "-c", dedent(code))


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
def test_broken_plugins(stand_ins: Site, first: str) -> None:
    """Each broken plugin gets one warning, by name and with its reason; all else works."""
    for distribution, (entry, source, _) in BROKEN.items():
        stand_ins.declare(distribution, "anomalib.models", entry)
        if source:
            stand_ins.write({f"{re.split(r'[=:]', entry)[1].strip()}.py": source})
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
    lines = stand_ins.run("-c", dedent(code)).stdout.splitlines()
    assert len(lines) == len(BROKEN), lines
    for distribution, (_, _, reason) in BROKEN.items():
        (line,) = (line for line in lines if f"distribution '{distribution}'" in line)
        assert reason in line
        assert f"uninstall '{distribution}'" in line


OPENVINO = """
    try:
        import openvino_telemetry
        reports = True
    except ImportError:
        reports = False
"""


def test_the_command_does_not_report_its_use(stand_ins: Site) -> None:
    """Anomalib's command imports OpenVINO without its telemetry; other programs import both as they are."""
    stand_ins.write({
        "openvino/__init__.py": OPENVINO,
        "openvino_telemetry.py": "",
        "anomalib/cli/__init__.py": "import anomalib.models, openvino",
    })
    code = "import anomalib.cli, openvino, openvino_telemetry; assert not openvino.reports; assert openvino.__loader__"
    stand_ins.run("-W", "error", "-c", code)
    stand_ins.run("-W", "error", "-c", "import anomalib.models, openvino; assert openvino.reports")
