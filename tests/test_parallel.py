"""Training over 8 devices, and over two processes: the loss curve of one device."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

from cascade_jax.training import log

HERE = pathlib.Path(__file__).parent
pytestmark = pytest.mark.slow


def launch(devices, *arguments):
    environment = {
        **os.environ,
        "PYTHONPATH": f"{HERE.parent}:{os.environ.get('PYTHONPATH', '')}",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, str(HERE / "parallel.py"), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(*processes):
    for process in processes:
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    finish(launch(8, folder, "one,mesh,parts"))
    return folder


def assert_alike(folder, kind, reference, reference_kind):
    curve, expected = log.read(folder / kind / "log.csv"), log.read(reference / reference_kind / "log.csv")
    assert len(expected["loss"]) == 12
    # sums over rows in another order: float32's rounding, some 1e-7 a step
    np.testing.assert_allclose(curve["loss"], expected["loss"], rtol=1e-5)
    np.testing.assert_allclose(curve["worst"], expected["worst"], rtol=1e-5)
    found, wanted = np.load(folder / f"{kind}.npz"), np.load(reference / f"{reference_kind}.npz")
    np.testing.assert_allclose(found["w"], wanted["w"], atol=1e-5)


@pytest.mark.parametrize("kind", ["mesh", "parts"])
def test_eight_devices_give_the_loss_curve_of_one(runs, kind):
    assert_alike(runs, kind, runs, "one")


def test_two_processes_train_and_checkpoint_together(runs, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    finish(*(launch(2, tmp_path, "mesh", process, port) for process in (0, 1)))
    assert_alike(tmp_path, "mesh", runs, "one")
    assert sorted(int(path.name) for path in (tmp_path / "mesh" / "checkpoints").iterdir()) == [8, 12]
