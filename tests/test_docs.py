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
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "anomalib_ext" / "models").glob("*/README.md")),
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
]
# Those that are not run at all.
NOT_RUN = {
    "python3 -m venv .venv": "makes the user's environment; the CI makes two with the same commands",
    '.venv/bin/pip install -e ".[train,offline]"': "installs into it; the CI installs these extras",
    '.venv/bin/pip install -e ".[train,offline,test]"': "likewise",
    '.venv/bin/pip install -e ".[train,offline,test,docs]"': "likewise",
    ".venv/bin/pytest": "these very tests",
    ".venv/bin/pytest -m slow": "likewise",
    ".venv/bin/pytest tests/test_metrics.py -k NAME": "likewise",
    ".venv/bin/ruff check .": "the CI does it",
    ".venv/bin/ruff format .": "likewise",
    ".venv/bin/mypy anomalib_ext openvino_export": "likewise",
    ".venv/bin/sphinx-build --quiet --fail-on-warning docs docs/_build": "likewise",
    "pip install .": "installs into the edge PC's environment; the CI does, and tests there",
    "OPENBLAS_NUM_THREADS=1 python tests/benchmarks/edge.py --root datasets --rounds 100 "
    "--results results/latency.csv": "exports and times banks of 10,000 vectors and more, for minutes",
    "anomalib-edge variants rename weights/openvino new_lid lid": "needs variants of these names; "
    "tests/openvino_export/cli/test_variants.py does it",
    "anomalib-edge variants merge weights/openvino cap lid": "likewise",
    "anomalib-edge variants delete weights/openvino cap": "likewise",
    'uv pip install --python ../anomalib/application/backend/.venv ".[train,offline]"': "needs Studio",
    'uv pip install --python ../anomalib/application/backend/.venv "nncf<3.3"': "likewise",
    "HF_HOME=/data/weights ./run.sh": "likewise",
    "HF_HOME=weights hf download timm/wide_resnet50_2.racm_in1k": "needs the internet",
    "PL_TRAINER_MAX_EPOCHS=1 anomalib benchmark --config configs/benchmark/small/dinomaly.yaml": "Anomalib's model "
    "cannot do without weights from the internet",
}
# Those of which only the arguments are parsed, by the program itself, by how they begin.
PARSED = {
    "python tests/benchmarks/distillation.py": "needs a teacher's weights from the internet, and minutes",
    "python tests/benchmarks/distillation_cost.py": "likewise",
    "python tests/benchmarks/soak.py": "a slow test runs its code",
    "python tests/benchmarks/speed.py": "takes minutes, whatever its arguments",
}
# Arguments that make the others quick, and free of the internet, by how they begin. The last value of several counts.
FEW = "--data.root datasets --data.num_workers 0 --trainer.accelerator cpu "
UNTRAINED = FEW + "--model.pre_trained false "
SHORT = "--trainer.max_epochs 1 --trainer.limit_train_batches 1 "
CRR = UNTRAINED + "--model.encoder test_vit --model.head_width 8 --model.repair_steps 1 --model.segment_steps 1"
SA_CFA = FEW + "--model.backbone tf_efficientnet_lite0 --model.layers '[blocks.2, blocks.4]'"
HET_NET = "--model.backbone resnet18 --model.transformer test_vit --model.transformer_pre_trained false"
CLASSES = ("folder_of_class_folders", "classes")
FINETUNE = "--backbone tf_efficientnet_lite0 --max_epochs 1 --accelerator cpu"
SMALLER = {
    "anomalib train --config configs/model/continual_patch_core_edge.yaml": "--data.num_workers 0",
    "anomalib train --config configs/model/crr.yaml": CRR,
    "anomalib train --config configs/model/het_net.yaml": UNTRAINED + SHORT + HET_NET,
    "anomalib train --config configs/model/rd_akf.yaml": UNTRAINED + SHORT + "--model.backbone resnet18",
    "anomalib train --config configs/model/sa_cfa_patchcore.yaml": SA_CFA,
    "anomalib train --model ContinualPatchCore --data MVTecAD": "--data.num_workers 0",
    "anomalib train --model Crr": CRR,
    "anomalib train --model RdAkf": UNTRAINED + SHORT,
    "anomalib train --model SaCfaPatchCore": SA_CFA,
    "anomalib train --model Padim": UNTRAINED + "--model.layers '[layer3]'",
    "anomalib test --config configs/model/het_net.yaml": UNTRAINED + HET_NET,
    "anomalib-ext stream --model": "--data.num_workers 0",
    "anomalib-ext benchmark": "--data.categories '[hazelnut, cookie]' --learners '{reservoir: [50]}' --orders 1 "
    "--mixed false --shots '[]' --data.root datasets --drifts '{}'",
    "anomalib-ext finetune": FINETUNE,
    "python tests/benchmarks/continual.py": "--products '[hazelnut, pill]' --sizes '[50]' --orders 2",
    "python tests/benchmarks/drift.py": "--products '[pill]' --runs 1",
    "python tests/benchmarks/decisions.py": "--products '[hazelnut, pill]' --sizes '[50]' --images '[2]' --draws 1",
    "python tests/benchmarks/blurred.py": "--sizes '[50]'",
    "python tests/benchmarks/shown_defects.py": "--products '[hazelnut, pill]' --sizes '[50]' --folds 1",
    "python tests/benchmarks/updating.py": "--products '[hazelnut, pill]' --sizes '[50]' --refits 1",
    "python tests/benchmarks/synthesis.py": "--count 2 --sides '[64]'",
}
# Those that take longest, by how they begin, where a quick one is much the same; none needs what another one made.
SLOW = (
    "PL_TRAINER_MAX_EPOCHS=3 anomalib benchmark --config configs/benchmark/small/reverse_distillation.yaml",
    "PL_TRAINER_MAX_EPOCHS=2 anomalib benchmark --config configs/benchmark/small/het_net.yaml",
    "anomalib benchmark --config configs/benchmark/small/crr.yaml",
    "anomalib train --config configs/model/crr.yaml",
    "anomalib train --model Crr --model.head_width",
    "anomalib train --model Padim",
    "python tests/benchmarks/blurred.py",
    "python tests/benchmarks/decisions.py",
    "python tests/benchmarks/drift.py",
    "python tests/benchmarks/shown_defects.py",
    "python tests/benchmarks/updating.py",
)


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


def marked(command: str) -> object:
    """Return a command as a parameter, with a mark if it is slow."""
    return pytest.param(command, marks=pytest.mark.slow if command.startswith(SLOW) else ())


def parsed_only(command: str) -> bool:
    """Whether the arguments of a command are parsed, and no more."""
    return any(command.startswith(start) for start in PARSED)


def smaller_pipeline(path: Path) -> None:
    """Have a file for Anomalib's pipeline, which takes no arguments, ask for little, on a CPU, without the internet."""
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    config["accelerator"] = "cpu"
    model, data = config["benchmark"]["model"], config["benchmark"]["data"]["init_args"]
    if "init_args" in model:
        small = {
            "ContinualPatchCore": {"memory_size": 50},
            "Crr": {"encoder": "test_vit", "head_width": 8, "repair_steps": 1, "segment_steps": 1},
        }
        model["init_args"] |= {"pre_trained": False, **small.get(str(model["class_path"]), {})}
    else:  # all with their default backbones, of which one comes with a package
        model |= {"class_path": "ContinualPatchCore", "init_args": {"memory_size": 50}}
    if "grid" in data.get("category", ()):
        data["category"] = data["category"]["grid"][0]
    data["num_workers"] = 0
    path.write_text(yaml.safe_dump(config), encoding="utf-8")


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
    """Return a folder with what the pages say that the user has: data, and a checkout, beside that of Anomalib."""
    folder = tmp_path_factory.mktemp("user") / "anomalib-ext"
    for name in ("configs", "tests/benchmarks"):
        shutil.copytree(ROOT / name, folder / name)
    three = shutil.ignore_patterns("00[3-9].png", "0[12]*.png", "00[3-9]_mask.png")
    for source, target in (
        ("stripes", "datasets/MVTecAD/bottle"),
        ("dots", "datasets/MVTecAD/pill"),
        ("checks", "datasets/my_product"),
        ("stripes/train/good", "good_images"),
        *(("dots", f"datasets/{name}") for name in ("hazelnut", "bottle", "pill", "cookie")),
        ("dots", "datasets/visa/visa_pytorch/candle"),
        *(("stripes/train/good", f"{name}/images/striped") for name in ("datasets/dtd", "dtd")),
        *((f"{name}/train/good", f"{classes}/{name}") for name in ("stripes", "dots") for classes in CLASSES),
    ):
        shutil.copytree(products / source, folder / target, ignore=three)
    for kind in ("test", "ground_truth"):
        (folder / "datasets/my_product" / kind / "hole").rename(folder / "datasets/my_product" / kind / "defect")
    shutil.copy(products / "stripes/test/good/000.png", folder / "part.png")
    for path in (folder / "configs/benchmark").rglob("*.yaml"):
        if "benchmark" in yaml.safe_load(path.read_text(encoding="utf-8")):
            smaller_pipeline(path)
    (folder.parent / "anomalib/application/backend/src/core").mkdir(parents=True)
    (folder / "docs/images").mkdir(parents=True)
    # Two products in place of four.
    quickstart = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text(encoding="utf-8"))
    del quickstart["data"]["datamodules"][2:]
    (folder / "configs/quickstart.yaml").write_text(yaml.safe_dump(quickstart), encoding="utf-8")
    pictures = (ROOT / "docs/pictures.py").read_text(encoding="utf-8").replace(', "moon", "retina")', ")")
    (folder / "docs/pictures.py").write_text(pictures, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def small_defaults(set_defaults: Callable[..., None]) -> Generator[None]:
    """Have models take small images by default, ContinualPatchCore a small backbone, and the example data be few."""
    models = import_module("anomalib_ext.models")
    photos = import_module("anomalib_ext.data.photo_variants")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("TRAIN_IMAGES", "GOOD_TEST_IMAGES", "TEST_IMAGES_PER_DEFECT"):
            patch.setattr(photos, name, getattr(photos, name) // 4)
        for name in ("ContinualPatchCore", "SaCfaPatchCore", "RdAkf", "HetNet"):
            set_defaults(patch, getattr(models, name).configure_pre_processor, image_size=(64, 64))
        small = {"backbone": "resnet18", "layers": ("layer2", "layer3"), "pre_trained": False}
        set_defaults(patch, models.ContinualPatchCore.__init__, **small)
        yield


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """Bring back what commands set for their process."""
    monkeypatch.setattr("anomalib.pipelines.components.base.pipeline.redirect_logs", lambda _: None)
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("process", "small_defaults")
@pytest.mark.parametrize("command", [marked(each) for each in commands() if each not in NOT_RUN])
def test_command(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It runs, or is at least understood by its program."""
    monkeypatch.chdir(folder)
    if ">>" in command:
        subprocess.run(["bash", "-c", command], check=True)
        return
    words = shlex.split(command.removeprefix(".venv/bin/"))
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        assert name == "PL_TRAINER_MAX_EPOCHS"
        assert int(value)
        monkeypatch.setenv(name, "1")
    for start, arguments in SMALLER.items():
        if command.startswith(start):
            words += shlex.split(arguments)
    if parsed_only(command):
        words.append("--print_config")
    for name in {"REPAIR.ckpt", "MODEL.ckpt"} & set(words):  # the user's name for what the last training wrote
        shutil.copy(max(folder.glob("results/**/model.ckpt"), key=lambda path: path.stat().st_mtime), name)
    is_script = words[0] == "python"
    if is_script:
        monkeypatch.syspath_prepend(str(Path(words[1]).resolve().parent))
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
    assert "There were some errors" not in printed.out  # with which Anomalib's pipeline ends well
    if parsed_only(command):
        assert ":" in printed.out  # the configuration


@pytest.mark.slow
def test_quickstart(tmp_path: Path) -> None:
    """The first command, as it is: all of its data, and the default backbone."""
    script = Path(sysconfig.get_path("scripts")) / "anomalib-ext"
    command = [script, "stream", "--config", ROOT / "configs/quickstart.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "results/quickstart/results.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 1 + sum(range(1, 5))
    assert len(list((tmp_path / "results/quickstart/images").iterdir())) == 4


@pytest.mark.parametrize("program", [pytest.param("anomalib", marks=pytest.mark.slow), "anomalib-ext", "anomalib-edge"])
def test_script(program: str) -> None:
    """The programs of the other test are installed by these names."""
    script = Path(sysconfig.get_path("scripts")) / program
    done = subprocess.run([script, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--help" in done.stdout


def test_help_comes_at_once() -> None:
    """It imports none of what the subcommands need."""
    code = (
        "import sys; from anomalib_ext.cli import main\n"
        "try: main()\n"
        "finally: print(sorted({'anomalib', 'jsonargparse', 'pandas', 'torch'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n[]\n")


def test_exceptions_are_needed() -> None:
    """What is listed above as not run is there."""
    there = commands()
    assert not NOT_RUN.keys() - set(there)
    starts = (*PARSED, *SMALLER, *SLOW)
    assert not [start for start in starts if not any(command.startswith(start) for command in there)]


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
        if "Lightning's" in whose:
            lightning = find_spec("lightning.pytorch.cli")
            assert lightning
            assert message in Path(lightning.origin or "").read_text(encoding="utf-8")
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
