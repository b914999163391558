# SPDX-License-Identifier: Apache-2.0
"""The documentation is true: its commands run, its messages are in the sources, its pictures are there.

The commands of the README come first, and all run in one folder, so that later ones find what earlier ones made.
"""

import ast
import logging
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Generator
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "anomalib_ext" / "models").glob("*/README.md")),
]
# Those that are not run at all.
NOT_RUN = {
    "python3 -m venv .venv": "makes the user's environment; the CI makes two with the same commands",
    '.venv/bin/pip install -e ".[train,offline]"': "installs into it; the CI installs these extras",
    '.venv/bin/pip install -e ".[train,offline,test]"': "likewise",
    ".venv/bin/pytest": "these very tests",
    "pip install .": "installs into the edge PC's environment; the CI does, and tests there",
    "cat configs/studio/model_metadata.yaml >> application/backend/src/core/model_metadata.yaml": "needs Studio",
    'uv pip install --python application/backend/.venv ".[train,offline]"': "needs Studio",
    "python docs/pictures.py": "its pictures are in the repository",
    "PL_TRAINER_MAX_EPOCHS=100 anomalib benchmark --config configs/benchmark/mvtec_ad.yaml": "needs a GPU, for hours",
    "PL_TRAINER_MAX_EPOCHS=100 anomalib benchmark --config configs/benchmark/visa.yaml": "needs a GPU, for hours",
    "anomalib-ext compare": "needs the results of these two",
}
INTERNET = "trains with weights from the internet; smaller ones are trained in the tests of the model"
HOURS = "takes minutes to hours, on data sets that the user has"
# Those of which only the arguments are parsed, by the program itself, by how they begin.
PARSED = {
    "anomalib train --config configs/model/crr.yaml": INTERNET,
    "anomalib train --config configs/model/het_net.yaml": INTERNET,
    "anomalib train --config configs/model/rd_akf.yaml": INTERNET,
    "anomalib train --config configs/model/sa_cfa_patchcore.yaml": INTERNET,
    "anomalib train --model Crr": INTERNET,
    "anomalib train --model RdAkf": INTERNET,
    "anomalib train --model SaCfaPatchCore": INTERNET,
    "anomalib train --model Padim": INTERNET,
    "anomalib test --config configs/model/het_net.yaml": INTERNET,
    "anomalib-ext benchmark --config configs/benchmark/continual.yaml": HOURS,
    "anomalib-ext finetune": INTERNET,
    "python tests/benchmarks/continual.py": HOURS,
    "python tests/benchmarks/distillation.py": HOURS,
    "python tests/benchmarks/speed.py": HOURS,
    "python tests/benchmarks/synthesis.py": HOURS,
}


def commands() -> list[str]:
    """Return the commands of all pages' shell blocks, each once, in order and without comments."""
    found: list[str] = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for indent, block in re.findall(
            r"^( *)```(?:bash|console|sh|shell)\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE
        ):
            for line in block.splitlines():
                command = re.sub(r"(^|\s)#.*", "", line.removeprefix(indent).removeprefix("$ "))
                found += [part.strip() for part in command.split("&&") if part.strip()]
    return list(dict.fromkeys(found))


def parsed_only(command: str) -> bool:
    """Whether the arguments of a command are parsed, and no more."""
    return any(command.startswith(start) for start in PARSED)


@cache
def entry(program: str) -> Callable[[], object]:
    """Return what a console script of this environment calls."""
    if program == "anomalib":
        from anomalib.cli.cli import main
    elif program == "anomalib-ext":
        from anomalib_ext.cli import main
    else:
        assert program == "anomalib-edge", f"{program!r} is no program of ours: run it here, or say in NOT_RUN why not"
        from openvino_export.cli import main  # type: ignore[assignment]
    return main


@pytest.fixture(scope="module")
def folder(products: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what the pages say that the user has: data, and a checkout."""
    folder = tmp_path_factory.mktemp("user")
    for name in ("configs", "tests/benchmarks"):
        shutil.copytree(ROOT / name, folder / name)
    for source, target in {
        "stripes": "datasets/MVTecAD/bottle",
        "dots": "datasets/MVTecAD/pill",
        "stripes/train/good": "good_images",
    }.items():
        shutil.copytree(products / source, folder / target)
    shutil.copytree(products / "checks", folder / "datasets/my_product")
    for kind in ("test", "ground_truth"):
        (folder / "datasets/my_product" / kind / "hole").rename(folder / "datasets/my_product" / kind / "defect")
    shutil.copy(products / "stripes/test/good/000.png", folder / "part.png")
    return folder


@pytest.fixture
def log_levels() -> Generator[None]:
    """Bring back the levels that our command sets for its process."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.mark.usefixtures("log_levels")
@pytest.mark.parametrize("command", [each for each in commands() if each not in NOT_RUN])
def test_command(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It runs, or is at least understood by its program."""
    monkeypatch.chdir(folder)
    words = shlex.split(command.removeprefix(".venv/bin/"))
    if parsed_only(command):
        words.append("--print_config")
    is_script = words[0] == "python"
    run = partial(runpy.run_path, words[1], run_name="__main__") if is_script else entry(words[0])
    monkeypatch.setattr(sys, "argv", words[is_script:])
    code: object = 0
    try:
        returned = run()
        code = returned if isinstance(returned, int) else 0  # a script gives its names
    except SystemExit as end:
        code = end.code or 0
    printed = capsys.readouterr()
    # 3 is anomalous
    assert code == 0 or (code == 3 and words[:2] == ["anomalib-edge", "predict"]), f"{code}: {printed.err}"
    if parsed_only(command):
        assert ":" in printed.out  # the configuration


@pytest.mark.parametrize("program", ["anomalib", "anomalib-ext", "anomalib-edge"])
def test_script(program: str) -> None:
    """The programs of the other test are installed by these names."""
    script = Path(sysconfig.get_path("scripts")) / program
    done = subprocess.run([script, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--help" in done.stdout


def test_exceptions_are_needed() -> None:
    """What is listed above as not run is there."""
    there = commands()
    assert not NOT_RUN.keys() - set(there)
    assert not [start for start in PARSED if not any(command.startswith(start) for command in there)]


def test_messages() -> None:
    """Every message of the page on troubleshooting is in the sources."""
    spec = find_spec("anomalib.models")
    assert spec
    assert spec.origin
    files = [
        Path(spec.origin),
        *(path for name in ("anomalib_ext", "openvino_export") for path in (ROOT / name).rglob("*.py")),
    ]
    sources = [text(node) for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\*\*(`+)(.*?)\1\*\*(.*)$", page, re.MULTILINE)
    assert len(quoted) == page.count("\n**") > 40
    for _, message, whose in quoted:
        if "the system's" in whose:
            assert message == os.strerror(28)
            continue
        pattern = re.compile(".*".join(re.escape(part) for part in message.split("…")), re.DOTALL)
        assert any(pattern.search(source) for source in sources), message


def text(node: ast.AST) -> str:
    """Return what a literal says, with "…" for what is filled in."""
    if isinstance(node, ast.Constant):
        return re.sub(r"%[a-z]", "…", node.value) if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(text(part) or "…" for part in node.values)
    if isinstance(node, ast.BinOp):
        return text(node.left) + text(node.right)
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    """Pictures and pages that are linked are there."""
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target
