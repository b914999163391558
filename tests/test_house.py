# SPDX-License-Identifier: Apache-2.0
"""The rules of the house: what may import what, how long files and classes may be, and what a property may cost."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("anomalib_ext", "openvino_export")
NOT_ON_THE_EDGE = {"anomalib", "anomalib_ext", "lightning", "pytorch_lightning", "torch", "torchvision"}
LONGEST_FILE, LONGEST_CLASS = 400, 300
COSTLY = {
    *("cat", "concatenate", "hstack", "stack", "vstack"),
    *("clone", "copy", "deepcopy", "to_arrays", "tolist"),
    *("mean", "norm", "sort", "sorted", "sum"),
}
LOOPS = (ast.For, ast.While, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)

# Imports all modules of the package; prints their names, who has added to `sys.meta_path`, and all that is loaded.
IMPORT_ALL = """
import importlib, json, pkgutil, sys
before = list(sys.meta_path)
import openvino_export
names = [module.name for module in pkgutil.walk_packages(openvino_export.__path__, "openvino_export.")]
for name in names:
    importlib.import_module(name)
added = [type(finder).__module__ for finder in sys.meta_path if finder not in before]
print(json.dumps([names, added, list(sys.modules)]))
"""


def sources(*folders: str) -> Iterator[tuple[str, str]]:
    """Yield path and text of each Python file below folders of the checkout."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def nodes(*folders: str) -> Iterator[tuple[str, ast.AST]]:
    """Yield the place and each node of the syntax trees of all files."""
    for path, text in sources(*folders):
        for node in ast.walk(ast.parse(text)):
            yield f"{path}:{getattr(node, 'lineno', 0)}", node


def imported(node: ast.AST) -> list[str]:
    """Return the top-level packages that a node imports, by a statement or by a function with their name."""
    names: list[str] = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and not node.level:
        names = [node.module or ""]
    elif isinstance(node, ast.Call) and called(node) in {"import_module", "__import__"}:
        names = [str(argument.value) for argument in node.args[:1] if isinstance(argument, ast.Constant)]
    return [name.partition(".")[0] for name in names]


def called(node: ast.Call) -> str:
    """Return the last name of what is called: "sum" of both ``sum(x)`` and ``x.sum()``."""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def test_edge_package_stands_alone() -> None:
    """All its modules are imported without what stands on it, and without changing how Python imports."""
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    names, finders, loaded = json.loads(done.stdout)
    modules = {path.removesuffix(".py").removesuffix("/__init__") for path, _ in sources("openvino_export")}
    assert {"openvino_export", *names} == {module.replace("/", ".") for module in modules}
    assert {*finders} <= {"six"}  # which comes with the extra opcua
    assert not NOT_ON_THE_EDGE & {name.partition(".")[0] for name in loaded}


def test_edge_package_names_nothing_above_it() -> None:
    """No function of it imports what stands on it, either, and no annotation."""
    places = [place for place, node in nodes("openvino_export") if NOT_ON_THE_EDGE & set(imported(node))]
    assert not places, "\n".join(places)


def test_files_are_short() -> None:
    """None has more lines than a reader keeps in mind."""
    lengths = {path: len(text.splitlines()) for path, text in sources(*PACKAGES, "tests", "docs")}
    assert len(lengths) > 100
    too_long = [f"{path}: {length}" for path, length in lengths.items() if length > LONGEST_FILE]
    assert not too_long, "\n".join(too_long)


def test_classes_are_short() -> None:
    """The same for classes."""
    lengths = {
        f"{place} {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for place, node in nodes(*PACKAGES, "tests", "docs")
        if isinstance(node, ast.ClassDef)
    }
    assert len(lengths) > 50
    too_long = [f"{name}: {length}" for name, length in lengths.items() if length > LONGEST_CLASS]
    assert not too_long, "\n".join(too_long)


def test_properties_cost_nothing() -> None:
    """No body of a property copies, sums or loops, since reading an attribute should not.

    A ``cached_property`` may: it does so once. The names of calls are all that is seen; neither what a called function
    does, nor the cost of an operator such as ``@``, nor a property that is made without a decorator.
    """
    costly, number = [], 0
    for place, node in nodes(*PACKAGES):
        if not isinstance(node, ast.FunctionDef) or not any(
            isinstance(decorator, ast.Name) and decorator.id == "property" for decorator in node.decorator_list
        ):
            continue
        number += 1
        inside = list(ast.walk(node))
        costs = {called(part) for part in inside if isinstance(part, ast.Call)} & COSTLY
        costs |= {type(part).__name__ for part in inside if isinstance(part, LOOPS)}
        if costs:
            costly.append(f"{place} {node.name}: {', '.join(sorted(costs))}")
    assert number > 5
    assert not costly, "\n".join(costly)


def test_learning_is_one_transaction() -> None:
    """Only the memory changes banks and opens pools; all who learn begin an update.

    By the names of what is called: a bank gets variants in `memory/` alone, and updates begin where
    images are learned, or one is gone on with. A call under another name is not seen.
    """
    begins, changes = set(), set()
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                called = node.func if isinstance(node, ast.Call) else None
                name = called.id if isinstance(called, ast.Name) else getattr(called, "attr", None)
                place = path.relative_to(ROOT).as_posix()
                if name in {"with_variants", "PatchPool"}:
                    changes.add(place)
                if name == "Update":
                    begins.add(place)
    assert {Path(place).parent.as_posix() for place in changes} == {"openvino_export/memory"}
    assert begins == {
        "anomalib_ext/benchmark/learners.py",
        "anomalib_ext/models/continual_patchcore/torch_model.py",
        "openvino_export/detector.py",
        "openvino_export/memory/state.py",
        "openvino_export/memory/update.py",
    }
