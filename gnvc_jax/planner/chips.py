"""Peak figures of chips, and the topologies that XLA can compile for without one.

Figures per TPU chip are those of docs.cloud.google.com/tpu/docs/{v4,v5p,v5e,v6e,tpu7x}: bfloat16
operations, capacity and bandwidth of memory, interconnect. The published figure of the interconnect
counts both directions of all links. The bandwidth of the data center network is published per chip
of v5p and per pod of 256 chips of v5e and v6e.

Figures of GPUs are those of NVIDIA's data sheets of H100 SXM, H200 SXM and HGX B200: dense bfloat16
operations (the sheets count sparse ones, twice as many), memory, its bandwidth, and NVLink, of
whose 900 or 1800 GB/s each direction has half. Between machines, a DGX H100, H200 or B200 has one
InfiniBand adapter of 400 Gbit/s per GPU (ConnectX-7).
"""

import dataclasses
import itertools
import math
import os
import re
from typing import NamedTuple

import jax

from gnvc_jax.errors import UsageError
from gnvc_jax.planner import gpus


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak figures of one chip.

    Attributes:
        platform: Name in libtpu's topologies; GPU for GPUs.
        flops: Dense bfloat16 operations per second.
        memory: Bytes of HBM.
        bandwidth: Bytes per second of HBM.
        link: Bytes per second of one link of the interconnect, in one direction; of a GPU, those
            of all its NVLinks.
        axes: Number of axes of the torus; GPUs of a machine stand in a row.
        devices: Devices per chip in a topology. (On a real v4, both cores are one device.)
        network: Bytes per second of the data center network, which connects slices, or of the
            InfiniBand of a GPU, which connects machines; 0 where no figure is published.
    """

    platform: str
    flops: float
    memory: int
    bandwidth: float
    link: float
    axes: int
    devices: int = 1
    network: float = 0.0

    @property
    def is_gpu(self) -> bool:
        """Whether this is a GPU, whose machines stand for slices."""
        return self.platform == GPU

    @property
    def ring(self) -> float:
        """Bytes per second that a chip can send in a ring of neighbours inside of a slice."""
        # Along one axis of a torus there are two links, one for each direction of the ring.
        return self.link if self.is_gpu else 2 * self.link

    @property
    def networks(self) -> dict[str, str]:
        """Names of the networks inside of a slice ("ici") and between slices ("dcn")."""
        names = ("NVLink", "InfiniBand") if self.is_gpu else ("ICI", "DCN")
        return dict(zip(("ici", "dcn"), names))


GPU = "gpu"
GPUS_PER_NODE = 8  # that NVLink connects, in an HGX or DGX machine

# platform, operations/s, HBM in bytes, HBM in bytes/s, link in bytes/s, axes of the torus.
CHIPS = {
    "v4": Chip("v4", 275e12, 32 << 30, 1228e9, 50e9, 3, devices=2),
    "v5e": Chip("v5e", 197e12, 16 << 30, 819e9, 50e9, 2, network=6.4e12 / 8 / 256),
    "v5p": Chip("v5", 459e12, 95 << 30, 2765e9, 100e9, 3, network=50e9 / 8),
    "v6e": Chip("v6e", 918e12, 32 << 30, 1638e9, 100e9, 2, network=25.6e12 / 8 / 256),
    "v7x": Chip("tpu7x", 2307e12, 192 << 30, 7370e9, 100e9, 3, devices=2),
    "h100": Chip(GPU, 989e12, 80 * 10**9, 3350e9, 450e9, 1, network=400e9 / 8),
    "h200": Chip(GPU, 989e12, 141 * 10**9, 4800e9, 450e9, 1, network=400e9 / 8),
    "b200": Chip(GPU, 2250e12, 180 * 10**9, 8000e9, 900e9, 1, network=400e9 / 8),
}

# Chips by `jax.Device.device_kind`. "Lite" in a kind is the "e" of v5e and v6e.
KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "v7x",
} | {gpu.kind: name for name, gpu in gpus.PROPERTIES.items()}

# Dense bfloat16 operations per second of a device, by `jax.Device.device_kind`. Those of GPUs are
# from the data sheets of NVIDIA, where the figures for sparse matrices are twice as high.
PEAK_FLOPS = {
    "TPU v4": CHIPS["v4"].flops,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v5p": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "TPU7x": CHIPS["v7x"].flops / CHIPS["v7x"].devices,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": CHIPS["h100"].flops,
    "NVIDIA H200": CHIPS["h200"].flops,
    "NVIDIA B200": CHIPS["b200"].flops,
}


# Seconds that data takes over one link of the interconnect, however little it is; "How to Scale
# Your Model" (jax-ml.github.io/scaling-book), chapter on sharded matrices.
HOP_S = 1e-6


class Topology(NamedTuple):
    """Slices of one kind of chip.

    Attributes:
        chip: Figures of the chip.
        shape: Chips along each axis of the torus of a slice, or GPUs of a machine.
        slices: Number of slices or machines, which a slower network connects.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int


def parse_topology(text: str) -> Topology:
    """Parses a topology: "v5p:4x4x4" is one slice of 4x4x4 chips, "2xv5e:16x16" two of 16x16.

    "4xh100:8" is four machines of eight GPUs.

    Raises:
        UsageError: If the chip is unknown, the shape has the wrong number of axes, there are
            several slices of a chip whose network has no published figures, or more GPUs in a
            machine than NVLink connects.
    """
    found = re.fullmatch(r"(?:([1-9]\d*)x)?(\w+):(\d+(?:x\d+)*)", text)
    if found is None or found[2] not in CHIPS:
        raise UsageError(
            f"topology {text!r}: expected [SLICESx]CHIP:AxB[xC], CHIP of {', '.join(CHIPS)}"
        )
    count, name, shape = found.groups()
    chip, sizes, slices = CHIPS[name], tuple(map(int, shape.split("x"))), int(count or 1)
    if len(sizes) != chip.axes:
        raise UsageError(f"topology {text!r}: {name} has {chip.axes} dimensions")
    if slices > 1 and not chip.network:
        known = ", ".join(name for name, chip in CHIPS.items() if chip.network)
        raise UsageError(f"topology {text!r}: the network between slices is known for {known} only")
    if chip.is_gpu and sizes[0] > GPUS_PER_NODE:
        raise UsageError(
            f"topology {text!r}: a machine has at most {GPUS_PER_NODE} GPUs, write "
            f"MACHINESx{name}:{GPUS_PER_NODE}"
        )
    return Topology(chip, sizes, slices)


def compact_topology(name: str, count: int) -> str:
    """Topology of one slice whose torus has sides as equal as possible: "v5p:2x4x4" for 32 chips.

    GPUs are those of one machine, or of several full ones: "4xh100:8" for 32.

    Args:
        name: Name of the chip.
        count: Number of chips.

    Raises:
        UsageError: If more GPUs than a machine has do not fill machines.
    """
    if CHIPS[name].is_gpu and count > GPUS_PER_NODE:
        if count % GPUS_PER_NODE:
            raise UsageError(f"{count} {name}: must be a multiple of {GPUS_PER_NODE} GPUs")
        return f"{count // GPUS_PER_NODE}x{name}:{GPUS_PER_NODE}"
    sides = [n for n in range(1, count + 1) if count % n == 0]
    shapes = itertools.combinations_with_replacement(sides, CHIPS[name].axes)
    best = min((s for s in shapes if math.prod(s) == count), key=lambda s: (s[-1], -s[0]))
    # Sides of one chip come last, as in libtpu's names of topologies.
    return f"{name}:{'x'.join(map(str, sorted(best, key=lambda n: (n == 1, n))))}"


def device_count(text: str) -> int:
    """Returns the number of devices of a topology.

    Raises:
        UsageError: If the topology cannot be parsed, see `parse_topology`.
    """
    chip, shape, slices = parse_topology(text)
    return slices * math.prod(shape) * chip.devices


def topology_devices(text: str) -> list[jax.Device]:
    """Returns devices of a topology, which programs can be compiled for, but not run on.

    Raises:
        UsageError: If there is no such topology, or libtpu or JAX's CUDA plugin is not installed.
    """
    from jax.experimental import topologies

    chip, shape, slices = parse_topology(text)
    if chip.is_gpu:
        name = next(key for key, one in CHIPS.items() if one == chip)
        config = gpus.target_config(name, chip.memory, chip.bandwidth)
        return gpus.gpu_devices(name, slices, shape[0], config)
    # Settings that libtpu reads when it is loaded.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU to query
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nor to claim
    os.environ.setdefault("TPU_LIBRARY_PATH", libtpu_path())
    name = f"{chip.platform}:{'x'.join(map(str, shape))}"
    several = {"num_slices": slices} if slices > 1 else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **several)
    except Exception as error:
        raise UsageError(f"topology {text!r}: {str(error).splitlines()[0]}") from None
    if len(found.devices) != device_count(text):
        raise UsageError(
            f"topology {text!r}: {len(found.devices)} devices, expected {device_count(text)}"
        )
    return found.devices


def libtpu_path() -> str:
    """Path of libtpu, which compiles for TPUs on any x86 machine.

    Raises:
        UsageError: If it is not installed.
    """
    try:
        import libtpu  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UsageError("compiling for TPUs needs libtpu: pip install 'gnvc-jax[tpu]'") from None
    return libtpu.get_library_path()
