"""Machines that need not be at hand: what XLA must know to compile for them, and what bounds their speed.

    devices = describe("h100").compile_only(1)

The plugins for CUDA and ROCm compile for a description of a card (XLA's `GpuTargetConfig`), libtpu for the name of a
topology; none needs the device. Figures are the makers': dense bfloat16 products, memory, and links to other devices in
one direction. What a launch and an exchange cost at least is assumed, and is to be fitted where a device is at hand.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from dataclasses import dataclass

import jax
from jax.experimental import topologies

from cascade_jax.measure import rocm


class DeviceError(ValueError):
    """A device that cannot be compiled for; the message is one line and says what would help."""


@dataclass(frozen=True)
class Roofline:
    """What the model of a step's time knows of a device.

    Attributes:
      bandwidth: of its memory, bytes per second.
      matmul: bfloat16 operations per second.
      launch: seconds that every kernel costs beside its work.
      link: bytes per second to the other devices of a mesh.
      exchange: seconds that every exchange with them costs beside its bytes.
    """

    bandwidth: float
    matmul: float
    launch: float
    link: float
    exchange: float


@dataclass(frozen=True)
class Card:
    """The part of XLA's description of a GPU that its compiler reads.

    Attributes:
      cores: streaming multiprocessors or compute units, each with `units` float32 units.
      clock: GHz.
      cache: bytes of the level-2 cache.
      shared: bytes of shared memory that a block may ask for.
      capability: CUDA's major compute capability, or the name of AMD's architecture.
    """

    cores: int
    units: int
    clock: float
    cache: int
    shared: int
    capability: int | str


@dataclass(frozen=True)
class Device:
    """A kind of device, and how many of them there are.

    Attributes:
      name: as it is asked for.
      title: its full name.
      memory: bytes.
      card: of GPUs; None for TPUs.
      topology: of TPUs, "2x2"; of GPUs on one host, their number.
    """

    name: str
    title: str
    memory: int
    roofline: Roofline
    card: Card | None = None
    topology: str = "1"

    @property
    def platform(self) -> str:
        """The name that JAX lowers for."""
        if self.card is None:
            return "tpu"
        return "rocm" if isinstance(self.card.capability, str) else "cuda"

    @property
    def count(self) -> int:
        """How many devices the topology has."""
        return math.prod(int(n) for n in self.topology.split("x"))

    def compile_only(self) -> list[jax.Device]:
        """Devices that programs can be compiled for and nothing else.

        Raises:
          DeviceError: if what compiles for them is not installed, or knows no such topology.
        """
        try:
            if self.card is None:
                _need(self, "libtpu")
                with _no_host():
                    return list(topologies.get_topology_desc(f"{self.name}:{self.topology}", "tpu").devices)
            if self.platform == "rocm":
                _need(self, rocm.PLUGIN)
                with rocm.compiling() as register:
                    try:
                        return self._described()
                    except NotImplementedError:  # JAX had looked at its plugins before, and found no card
                        register()
                        return self._described()
            _need(self, "jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
            return self._described()
        except (RuntimeError, OSError) as error:  # JAX's own errors are RuntimeErrors
            what = str(error).splitlines()[0]
            raise DeviceError(f"{self.name}:{self.topology} cannot be compiled for: {what}") from error

    def _described(self) -> list[jax.Device]:
        shape, config = f"1x1x{self.count}", self._target_config()
        return list(topologies.get_topology_desc(shape, self.platform, target_config=config, topology=shape).devices)

    def _target_config(self) -> str:
        card, amd = self.card, self.platform == "rocm"
        capability = f'rocm_compute_capability {{ gcn_arch_name: "{card.capability}" }}'
        if not amd:
            capability = f"cuda_compute_capability {{ major: {card.capability} }}"
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: {64 if amd else 32} threads_per_core_limit: 2048
              shared_memory_per_block: {card.shared if amd else 49152} shared_memory_per_block_optin: {card.shared}
              shared_memory_per_core: {card.shared + (0 if amd else 1024)}
              core_count: {card.cores} fpus_per_core: {card.units} clock_rate_ghz: {card.clock}
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              memory_bandwidth: {self.roofline.bandwidth:.0f} l2_cache_size: {card.cache}
              device_memory_size: {self.memory} {capability}
              registers_per_core_limit: {131072 if amd else 65536} registers_per_block_limit: {131072 if amd else 65536}
            }}
            platform_name: "{self.platform.upper()}" dnn_version_info {{ {"" if amd else "major: 9 minor: 10"} }}
            device_description_str: "{self.title}"
        """


_GPU = {"launch": 2e-6, "exchange": 10e-6}
_TPU = {"launch": 0.5e-6, "exchange": 3e-6}
DEVICES = {
    device.name: device
    for device in (
        Device(
            "h100", "NVIDIA H100 80GB HBM3", 84942979072, Roofline(3.352e12, 989e12, link=450e9, **_GPU),
            Card(132, 128, 1.98, 52428800, 232448, 9),
        ),
        Device(
            "h200", "NVIDIA H200 141GB HBM3e", 151397597184, Roofline(4.8e12, 989e12, link=450e9, **_GPU),
            Card(132, 128, 1.98, 52428800, 232448, 9),
        ),
        Device(
            "a100", "NVIDIA A100-SXM4-80GB", 85100068864, Roofline(2.039e12, 312e12, link=300e9, **_GPU),
            Card(108, 64, 1.41, 41943040, 166912, 8),
        ),
        Device(
            "b200", "NVIDIA B200", 191514411008, Roofline(7.672e12, 2250e12, link=900e9, **_GPU),
            Card(148, 128, 1.965, 132644864, 232448, 10),
        ),
        Device(
            "mi300x", "AMD Instinct MI300X", 206158430208, Roofline(5.3e12, 1307e12, link=448e9, **_GPU),
            Card(304, 128, 2.1, 4194304, 65536, "gfx942:sramecc+:xnack-"),
        ),
        Device("v5e", "Google TPU v5e", 16 << 30, Roofline(819e9, 197e12, link=200e9, **_TPU), topology="1x1"),
        Device("v5p", "Google TPU v5p", 95 << 30, Roofline(2.765e12, 459e12, link=600e9, **_TPU), topology="2x2x1"),
        Device("v6e", "Google TPU v6e", 32 << 30, Roofline(1.64e12, 918e12, link=400e9, **_TPU), topology="1x1"),
    )
}  # fmt: skip


def describe(text: str, devices: int = 1) -> Device:
    """A device by name, with a topology if one is given: "h100", "h100:8", "v5e:2x2".

    Args:
      devices: how many are needed; without a topology in the text, one that has so many is taken.

    Raises:
      DeviceError: if there is no such device, or it has too few of them.
    """
    name, colon, topology = text.strip().partition(":")
    if name not in DEVICES:
        raise DeviceError(f"unknown device {text!r}; known: {', '.join(DEVICES)}, with a topology as v5e:2x2 or h100:8")
    device = DEVICES[name]
    if colon and not re.fullmatch(r"[1-9]\d*" if device.card else r"[1-9]\d*(x[1-9]\d*){1,2}", topology):
        raise DeviceError(
            f"{text!r} has no topology that {name} knows: give it as {name}:{'8' if device.card else '2x2'}"
        )
    if colon:
        device = dataclasses.replace(device, topology=topology)
    elif devices > device.count:
        device = dataclasses.replace(device, topology=str(devices) if device.card else _tpu_topology(device, devices))
    if devices > device.count:
        raise DeviceError(f"{devices} devices are needed, and {name}:{device.topology} has {device.count}")
    return device


def _tpu_topology(device: Device, devices: int) -> str:
    """The smallest usual topology of at least so many."""
    if device.name == "v5p":
        sizes = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4")
    else:
        sizes = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
    return next((size for size in sizes if math.prod(map(int, size.split("x"))) >= devices), sizes[-1])


@contextlib.contextmanager
def _no_host():
    """Keeps libtpu, while it is loaded, from asking the cloud which host this is, and from claiming that for itself."""
    answers = {
        "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }  # fmt: skip
    missing = answers.keys() - os.environ.keys()
    os.environ.update({name: answers[name] for name in missing})
    try:
        yield
    finally:
        for name in missing:
            del os.environ[name]


def _need(device: Device, *modules: str) -> None:
    """Makes sure that one of the modules is installed."""
    if not any(_installed(module) for module in modules):
        what = {"tpu": "libtpu", "cuda": "JAX's CUDA plugin", "rocm": "JAX's ROCm plugin"}[device.platform]
        extra = "rocm" if device.platform == "rocm" else "plan"
        raise DeviceError(f"planning for {device.name} needs {what}: pip install 'cascade_jax[{extra}]'")


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it would be in
        return False
