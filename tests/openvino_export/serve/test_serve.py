# SPDX-License-Identifier: Apache-2.0
"""Tests of the command `serve` in a process of its own, with clients that others wrote."""

import json
import signal
import ssl
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from openvino_export import EdgeDetector
from openvino_export.cli import main

from .conftest import Server

Serve = Callable[..., Server]


def test_clients_of_triton(serve: Serve, bundle: Path, products: Path) -> None:
    """The real one asks what there is, and gets what the detector says, in both forms of tensors."""
    triton = pytest.importorskip("tritonclient.http")
    paths = sorted((products / "stripes" / "test").rglob("*.png"))[:3]
    expected = EdgeDetector(bundle).predict(paths)
    batch = np.stack([np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1) for path in paths])
    client = triton.InferenceServerClient(serve().url.removeprefix("http://"))
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("model")
    assert client.is_model_ready("model", "1")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    described = client.get_model_metadata("model", "1")
    assert [each["name"] for each in described["inputs"]] == ["image"]
    for kind, values in (("UINT8", batch), ("FP32", (batch / np.float32(255)).astype(np.float32))):
        for is_binary in (True, False):
            image = triton.InferInput("image", values.shape, kind)
            image.set_data_from_numpy(values, binary_data=is_binary)
            wanted = [triton.InferRequestedOutput(each["name"], binary_data=is_binary) for each in described["outputs"]]
            answer = client.infer("model", [image], outputs=wanted, request_id="7")
            assert answer.get_response()["id"] == "7"
            np.testing.assert_allclose(answer.as_numpy("pred_score"), [e.pred_score for e in expected], atol=1e-5)
            assert answer.as_numpy("pred_label").tolist() == [each.pred_label for each in expected]
            maps, masks = answer.as_numpy("anomaly_map"), answer.as_numpy("pred_mask")
            np.testing.assert_allclose(maps[:, 0], [e.anomaly_map for e in expected], atol=1e-5)
            assert (masks[:, 0] == [each.pred_mask for each in expected]).all()
    assert client.infer("model", [image]).as_numpy("anomaly_map") is not None
    for name, shape in (("nothing", (1, 3, 64, 64)), ("model", (1, 1, 64, 64))):
        image = triton.InferInput("image", shape, "UINT8")
        image.set_data_from_numpy(np.zeros(shape, np.uint8))
        with pytest.raises(triton.InferenceServerException, match=r"only model is 'model'|of shape \(batch, 3"):
            client.infer(name, [image])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b'{"inputs": 3}',
        b'{"inputs": [{"name": "image", "shape": [1, 3, 2, 2], "datatype": "FP32", "data": [1]}]}',
        b'{"inputs": [{"name": "image", "shape": [1, 3, -1, 2], "datatype": "FP32", "data": []}]}',
        b'{"inputs": [{"name": "image", "shape": [1, 3, 1, 1], "datatype": "UINT8", "data": [1, 2, 300]}]}',
        b'{"inputs": [{"name": "image", "shape": [1, 3, 1, 1], "datatype": "FP32", "data": ["a", "b", "c"]}]}',
        b"[" * 100_000,
    ],
)
def test_requests_that_are_none(body: bytes) -> None:
    """Each is refused by what is wrong with it."""
    from openvino_export.serve.inference_protocol import read_request

    with pytest.raises(ValueError, match=r"none of the Open Inference Protocol|only input|values|cannot be read"):
        read_request(body, None)


@pytest.mark.slow
def test_a_kill_loses_nothing_that_was_taught(serve: Serve, bundle: Path, products: Path) -> None:
    """After each answer the process is killed: what was answered is known, and parts are still there."""
    server = serve()
    bad = (products / "stripes" / "test" / "hole" / "000.png").read_bytes()
    part = httpx.post(f"{server.url}/predict", content=bad).json()
    server.end(signal.SIGKILL)
    server.start()
    assert httpx.get(f"{server.url}/parts/{part['id']}").json() == part
    said = {"id": part["id"], "verdict": "good", "confirm": True}
    taught = httpx.post(f"{server.url}/feedback", json=said, headers={"X-Who": "Ann"}).json()
    server.end(signal.SIGKILL)
    assert EdgeDetector(bundle).info()["variants"]["stripes"]["images"] == 21
    server.start()
    assert httpx.post(f"{server.url}/predict", content=bad).json()["pred_label"] is False
    assert httpx.post(f"{server.url}/undo", json={"number": taught["teaching"]["number"]}).status_code == 200
    assert httpx.post(f"{server.url}/predict", content=bad).json()["pred_label"] is True
    assert server.end() in {0, -signal.SIGTERM}
    assert "Traceback" not in server.said


def test_events(serve: Serve, products: Path) -> None:
    """Who listens is told of each verdict and teaching; the server ends though someone listens."""
    server = serve()
    bad = (products / "stripes" / "test" / "hole" / "000.png").read_bytes()
    told: list[tuple[str, dict[str, object]]] = []
    is_listening, done = threading.Event(), threading.Event()

    def listen() -> None:
        with suppress(httpx.TransportError), httpx.stream("GET", f"{server.url}/events", timeout=60) as answer:
            lines = answer.iter_lines()
            for line in lines:
                if line.startswith("event: "):
                    told.append((line.removeprefix("event: "), json.loads(next(lines).removeprefix("data: "))))
                    is_listening.set()
                if len(told) == 4:
                    done.set()

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    assert is_listening.wait(20)
    verdict = httpx.post(f"{server.url}/predict", content=bad).json()
    said = {"id": verdict["id"], "verdict": "good", "confirm": True}
    httpx.post(f"{server.url}/feedback", json=said, headers={"X-Who": "Ann"})
    httpx.post(f"{server.url}/undo", json={})
    assert done.wait(20)
    assert [kind for kind, _ in told] == ["mode", "verdict", "taught", "undone"]
    assert told[1][1] == verdict
    assert (told[2][1]["who"], told[3][1]["number"]) == ("Ann", told[2][1]["number"])
    server.end()


def test_https(serve: Serve, tmp_path: Path) -> None:
    """With a certificate the station answers encrypted, and other PCs need the token."""
    certificate, key, secrets = tmp_path / "certificate.pem", tmp_path / "key.pem", tmp_path / "secrets"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    secrets.write_text("TOKEN=0123456789abcdef\n", encoding="utf-8")
    options = ("--certificate", certificate, "--key", key, "--secrets", secrets, "--host", "0.0.0.0")  # noqa: S104
    server = serve(*options, scheme="https")
    with httpx.Client(verify=ssl.create_default_context(cafile=certificate)) as client:
        assert client.get(f"{server.url}/parts").status_code == 401
        answer = client.get(f"{server.url}/parts", headers={"Authorization": "Bearer 0123456789abcdef"})
        assert (answer.status_code, answer.json()) == (200, [])


def test_what_is_refused_at_the_start(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An address that others reach without a token, a source that is not there, no bundle."""
    for options, message in (
        ([str(bundle), "--host", "0.0.0.0"], "so a token is needed"),  # noqa: S104
        (
            [str(bundle), "--source", str(tmp_path / "nothing"), "--folder", str(tmp_path)],
            "There is no folder, video or",
        ),
        ([str(tmp_path / "nothing")], "There is no bundle folder"),
        ([str(bundle), "--secrets", str(tmp_path / "nothing")], "No such file"),
    ):
        assert main(["serve", *options]) == 1
        assert message in capsys.readouterr().err


def test_names_no_network_but_its_own(serve: Serve) -> None:
    """It listens on the loopback address alone."""
    server = serve()
    listening = Path(f"/proc/{server.process.pid}/net/tcp").read_text(encoding="ascii")
    inodes = {str(link.readlink()) for link in Path(f"/proc/{server.process.pid}/fd").iterdir() if link.is_symlink()}
    own = [line.split()[1] for line in listening.splitlines()[1:] if f"socket:[{line.split()[9]}]" in inodes]
    assert {address.partition(":")[0] for address in own} == {"0100007F"}
