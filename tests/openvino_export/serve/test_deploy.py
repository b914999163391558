# SPDX-License-Identifier: Apache-2.0
"""What `docs/deploy` holds works: the unit of systemd, the steps of the Dockerfile, and the file for other servers."""

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import openvino as ov
import pytest
from PIL import Image

from openvino_export import EdgeDetector

ROOT = Path(__file__).parents[3]
UNIT, DOCKERFILE = ROOT / "docs/deploy/anomalib-edge.service", ROOT / "docs/deploy/Dockerfile"
TOKEN = "0123456789abcdef"  # noqa: S105
installs = pytest.mark.skipif(
    not os.environ.get("CI_INSTALL"), reason="CI_INSTALL is not set: it installs from a registry, by uv"
)


def in_unit(key: str) -> str:
    """Return what a line of the unit says."""
    return next(line for line in UNIT.read_text().splitlines() if line.startswith(f"{key}=")).partition("=")[2]


def in_dockerfile(instruction: str) -> list[str]:
    """Return what the lines with an instruction say."""
    lines = DOCKERFILE.read_text().splitlines()
    return [line.removeprefix(instruction).strip() for line in lines if line.startswith(f"{instruction} ")]


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None and not os.environ.get("CI_INSTALL"), reason="there is no systemd-analyze"
)
def test_unit(tmp_path: Path) -> None:
    """Systemd understands all of it."""
    program = in_unit("ExecStart").split()[0]
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace(program, "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture(scope="module")
def line_pc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the programs of an environment that is made as the Dockerfile makes its own."""
    folder = tmp_path_factory.mktemp("image")
    for copied in in_dockerfile("COPY"):
        *names, target = copied.split()
        for name in names:
            goal = folder / target.strip("/")
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, goal, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                goal.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, goal)
    install = in_dockerfile("RUN")[0].split()
    assert install[:3] == ["pip", "install", "--no-cache-dir"]
    package = install[3].strip('"').replace("/src", str(folder / "src"))
    subprocess.run(["uv", "venv", "--quiet", folder / "venv"], check=True)
    subprocess.run(
        ["uv", "pip", "install", "--quiet", "--python", folder / "venv/bin/python", package], check=True, cwd=folder
    )
    return folder / "venv/bin"


@contextmanager
def served(command: list[str], folder: Path, programs: Path) -> Generator[str, None, None]:
    """Run a command of the station in a folder, with nothing of this checkout; gives its address."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    environment = {"PATH": f"{programs}:/usr/bin:/bin", "HOME": "/nowhere"}
    process = subprocess.Popen([*command, "--port", str(port)], cwd=folder, env=environment)
    try:
        for _ in range(300):
            with socket.socket() as there:
                if process.poll() is not None or there.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://localhost:{port}"
    finally:
        process.terminate()
        assert process.wait(30) == 0


def judges(url: str, products: Path) -> bool:
    """Whether a good part is called good and a bad one bad, by who has the token."""
    parts = [products / "stripes" / "test" / kind / "000.png" for kind in ("good", "hole")]
    headers = {"Authorization": f"Bearer {TOKEN}"}
    answers = [httpx.post(f"{url}/predict", content=part.read_bytes(), headers=headers).json() for part in parts]
    return [answer["pred_label"] for answer in answers] == [False, True]


@installs
@pytest.mark.slow
def test_image(line_pc: Path, bundle: Path, products: Path, tmp_path: Path) -> None:
    """What the Dockerfile installs, starts and asks for works, without torch."""
    (tmp_path / "secrets").write_text(f"TOKEN={TOKEN}\n")
    places = {"/bundle": str(bundle), "/station": str(tmp_path / "station")}
    places |= {"/run/secrets/station": str(tmp_path / "secrets"), "anomalib-edge": str(line_pc / "anomalib-edge")}
    command = [places.get(word, word) for word in json.loads(in_dockerfile("ENTRYPOINT")[0])]
    health = json.loads(in_dockerfile("HEALTHCHECK")[0].partition("CMD ")[2])
    with served(command, tmp_path, line_pc) as url:
        assert judges(url, products)
        assert httpx.post(f"{url}/predict", content=b"").status_code == 401
        port = url.rpartition(":")[2]
        for place, code in ((port, 0), ("9", 1)):
            asked = [word.replace("8085", place) for word in health]
            assert subprocess.run([line_pc / asked[0], *asked[1:]], check=False, stderr=-3).returncode == code
    done = subprocess.run([line_pc / "python", "-c", "import torch"], check=False, capture_output=True, text=True)
    assert "No module named 'torch'" in done.stderr


@installs
@pytest.mark.slow
def test_unit_starts(line_pc: Path, bundle: Path, products: Path, tmp_path: Path) -> None:
    """So does what the unit starts, with its options and credentials."""
    (tmp_path / "secrets").write_text(f"TOKEN={TOKEN}\n")
    state = in_unit("ReadWritePaths")
    shutil.copytree(bundle, tmp_path / "state" / "bundle")
    line = in_unit("ExecStart").replace(state, str(tmp_path / "state")).replace("$OPTIONS", "--keep 5")
    line = line.replace("${CREDENTIALS_DIRECTORY}", str(tmp_path))
    command = line.split()
    assert Path(command[0]).name == "anomalib-edge"
    with served([str(line_pc / "anomalib-edge"), *command[1:]], tmp_path, line_pc) as url:
        assert judges(url, products)
    assert (tmp_path / "state" / "station" / "parts").is_dir()


def test_model_folder(exported: Path, products: Path, tmp_path: Path) -> None:
    """`model.xml` in a folder of its version, as OpenVINO Model Server wants it, judges a batch as the edge PC does."""
    folder = tmp_path / "models" / "inspection" / "1"
    folder.mkdir(parents=True)
    for name in ("model.xml", "model.bin"):
        shutil.copy(exported / name, folder)
    paths = [products / "stripes" / "test" / name for name in ("good/000.png", "hole/000.png", "hole/001.png")]
    batch = np.stack([np.asarray(Image.open(path), np.float32).transpose(2, 0, 1) / 255 for path in paths])
    model = ov.Core().read_model(folder / "model.xml")
    assert model.input().partial_shape[0].is_dynamic
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    result = compiled(batch)
    expected = EdgeDetector(exported).predict(paths)
    assert result["pred_score"] == pytest.approx([each.pred_score for each in expected], abs=1e-3)
    assert result["pred_label"].tolist() == [each.pred_label for each in expected] == [False, True, True]
