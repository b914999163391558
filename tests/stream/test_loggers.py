# SPDX-License-Identifier: Apache-2.0
"""TensorBoard's event files and a real MLflow server, read back."""

import csv
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from anomalib.loggers import AnomalibMLFlowLogger, AnomalibTensorBoardLogger
from anomalib.post_processing import PostProcessor
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from anomalib_ext.data import MultiCategory
from anomalib_ext.files import safe_name
from anomalib_ext.models.continual_patchcore.post_processor import VariantPostProcessor
from anomalib_ext.stream import learn_stream
from openvino_export.memory.thresholds import thresholds

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # before anything imports it

Make = Callable[..., Any]


def events(folder: Path) -> EventAccumulator:
    """Return all that an event file holds."""
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    return accumulator.Reload()


def logged(results_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the steps and values by name that a stream wrote into its own table."""
    values: dict[str, list[tuple[int, float]]] = {}
    with (results_dir / "metrics.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            values.setdefault(row["name"], []).append((int(row["step"]), float(row["value"])))
    return values


def scalars(accumulator: EventAccumulator) -> dict[str, list[tuple[int, float]]]:
    """Return the steps and values of all scalars by name."""
    tags = accumulator.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags}


def test_tensorboard(finished: Any) -> None:  # noqa: ANN401
    """All values and pictures of a stream are there by its steps, each once."""
    accumulator = events(finished.folder / "tensorboard" / "line 3" / "version_0")
    expected = logged(finished.folder)
    odd = safe_name(finished.names[1])
    found = scalars(accumulator)
    del found["hp_metric"]  # Lightning's own
    assert found.keys() == expected.keys() >= {"stripes/image_AUROC", f"memory/share/{odd}", "memory/radius_bound"}
    for name, values in expected.items():
        assert found[name] == pytest.approx(np.float32(values), rel=1e-6)
    assert [step for step, _ in found["stripes/image_AUROC"]] == [1, 2]
    assert [step for step, _ in found[f"memory/share/{odd}"]] == [2]

    assert {"R/image_AUROC", "false_positives/stripes"} <= set(accumulator.Tags()["images"])
    assert [event.step for event in accumulator.Images("R/image_AUROC")] == [1, 2]
    sheet = Image.open(io.BytesIO(accumulator.Images("false_positives/stripes")[-1].encoded_image_string))
    assert sheet.width == 512


def test_a_plain_fit_logs_the_memory(make_data: Make, make_model: Make, make_engine: Make, tmp_path: Path) -> None:
    """Without a stream, Lightning logs the same."""
    model = make_model()
    engine = make_engine(logger=AnomalibTensorBoardLogger(str(tmp_path / "logs"), name="fit"))
    engine.fit(model, datamodule=make_data("stripes"))
    found = scalars(events(tmp_path / "logs" / "fit" / "version_0"))
    assert [value for _, value in found["memory/share/stripes"]] == [1]
    bank = model.model.bank
    assert found["memory/image_threshold/stripes"][0][1] == pytest.approx(thresholds(bank, "stripes").image.value)
    assert found["memory/pixel_threshold/stripes"][0][1] == pytest.approx(thresholds(bank, "stripes").pixel.value)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the address of an MLflow server on this machine."""
    pytest.importorskip("mlflow", reason="MLflow is not installed; it comes with the extra `loggers` or `test`")
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "files"),
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()  # noqa: S310  # our own
                break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.5)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)


@pytest.mark.slow
def test_mlflow(server: str, products: Path, model_config: dict[str, Any], run_command: Make, tmp_path: Path) -> None:
    """The command with loggers from YAML: the server has the run with its parameters, metrics and pictures."""
    from mlflow import MlflowClient

    config = {
        "model": model_config,
        "data": {
            "class_path": "anomalib_ext.data.MultiCategory",
            "init_args": {"root": str(products), "categories": ["stripes", "dots"], "num_workers": 0},
        },
        "results_dir": "results",
        "logger": [
            {"class_path": "AnomalibTensorBoardLogger", "init_args": {"save_dir": "results/tensorboard"}},
            {
                "class_path": "AnomalibMLFlowLogger",
                "init_args": {"tracking_uri": server, "experiment_name": "line 3", "run_name": "first try"},
            },
        ],
    }
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    run_command(tmp_path, "stream", "--config", "config.yaml")

    client = MlflowClient(server)
    experiment = client.get_experiment_by_name("line 3")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("first try", "FINISHED")
    assert (run.data.params["model"], run.data.params["memory_size"]) == ("ContinualPatchCore", "400")
    expected = logged(tmp_path / "results")
    assert run.data.metrics.keys() == expected.keys()
    for name, values in expected.items():
        history = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]
        np.testing.assert_allclose(sorted(history), values)

    pictures = {file.path: file for file in client.list_artifacts(run.info.run_id, "images")}
    matrix = sorted(path for path in pictures if path.startswith("images/R~image_AUROC+") and path.endswith(".png"))
    assert [path.split("+")[2] for path in matrix] == ["1", "2"]
    with Image.open(client.download_artifacts(run.info.run_id, matrix[1], str(tmp_path))) as image:
        assert min(image.size) > 200
    assert not (tmp_path / "mlruns").exists()  # all went to the server
    # TensorBoard, which was in the same list, has the same.
    found = scalars(events(tmp_path / "results" / "tensorboard" / "default" / "version_0"))
    assert found.keys() - {"hp_metric"} == expected.keys()


@pytest.mark.slow
def test_mlflow_pictures_of_mistakes(server: str, make_data: Make, make_model: Make, tmp_path: Path) -> None:
    """They are there by step; a name of characters that MLflow refuses is no hindrance, and the bank keeps it."""
    from mlflow import MlflowClient

    data = make_data("stripes")
    data.category = name = "部品"
    stream = MultiCategory([data])
    data.category = "stripes"
    model = make_model(post_processor=VariantPostProcessor(image_sensitivity=0.9))
    logger = AnomalibMLFlowLogger(tracking_uri=server, experiment_name="mistakes")
    learn_stream(model, stream, tmp_path, logger=logger)
    client = MlflowClient(server)
    paths = [file.path for file in client.list_artifacts(logger.run_id, "images")]
    assert any(path.startswith(f"images/false_positives~{safe_name(name)}+step+1+") for path in paths)
    assert f"{safe_name(name)}/image_AUROC" in client.get_run(logger.run_id).data.metrics


@pytest.mark.slow
def test_a_stream_that_fails_is_marked_so(server: str, make_data: Make, make_model: Make, tmp_path: Path) -> None:
    """The run does not stay open."""
    from mlflow import MlflowClient

    class Failing(PostProcessor):
        def on_validation_epoch_end(self, *args: Any) -> None:  # noqa: ANN401, PLR6301
            del args
            msg = "as asked"
            raise RuntimeError(msg)

    model = make_model(post_processor=Failing())
    logger = AnomalibMLFlowLogger(tracking_uri=server, experiment_name="failed")
    with pytest.raises(RuntimeError, match="as asked"):
        learn_stream(model, MultiCategory([make_data("stripes")]), tmp_path, logger=logger)
    assert MlflowClient(server).get_run(logger.run_id).info.status == "FAILED"
