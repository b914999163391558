# SPDX-License-Identifier: Apache-2.0
"""Tests of the device that runs a graph."""

import subprocess
import sys
from pathlib import Path

import pytest

from openvino_export.device import check_device, core


@pytest.mark.parametrize("device", ["CPU", "AUTO", "AUTO:GPU,CPU", "HETERO:CPU", "CPU.0"])
def test_known_devices(device: str) -> None:
    """The CPU is always there, and OpenVINO looks for others itself where it may choose."""
    check_device(device)


@pytest.mark.parametrize("device", ["GPU.7", "NPU", "TPU"])
def test_missing_devices(device: str) -> None:
    """A missing one is named with those that are there."""
    with pytest.raises(ValueError, match=rf"no device {device} on this PC. It finds .*CPU"):
        check_device(device)


def test_one_core() -> None:
    """For the whole process."""
    assert core() is core()


FIRST_TOGETHER = """
import sys
from pathlib import Path
import threading
from openvino_export.device import core

def convert():
    together.wait()
    core()
    import openvino
    openvino.Type.f32.to_dtype()

sys.setswitchinterval(1e-6)
together = threading.Barrier(8)
for thread in (threads := [threading.Thread(target=convert) for _ in range(8)]):
    thread.start()
for thread in threads:
    thread.join()
"""


def test_threads_that_begin_together_do_not_wait_for_ever() -> None:
    """OpenVINO's first conversion of a type is not safe for several threads."""
    subprocess.run([sys.executable, "-c", FIRST_TOGETHER], check=True, timeout=100)


def test_nothing_is_asked_of_the_network(exported: Path) -> None:
    """Neither OpenVINO nor a detector opens a socket, looks up a host or starts a program; its user may still do so."""
    code = """
import sys
from pathlib import Path
seen = []
events = {"socket.connect", "socket.getaddrinfo", "os.fork", "os.posix_spawn", "subprocess.Popen"}
sys.addaudithook(lambda event, args: seen.append((event, args)) if event in events else None)
from openvino_export import EdgeDetector
EdgeDetector(sys.argv[1]).info()
assert "openvino" in sys.modules and "openvino_telemetry" not in sys.modules
import openvino_telemetry
print(seen)
"""
    done = subprocess.run([sys.executable, "-c", code, str(exported)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
