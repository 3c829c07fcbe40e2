"""GPUs that XLA can compile for without one: JAX's CUDA plugin with a description of the GPU.

The plugin is part of `jax[cuda12]` and `jax[cuda13]`. It needs neither a GPU nor a driver to
compile, only the properties of a GPU that CUDA would report, which are written here as the text of
XLA's GpuTargetConfigProto (github.com/openxla/xla, xla/stream_executor/device_description.proto).
Two things cannot be compiled without a GPU: trials of kernels, which are left out
(`COMPILER_OPTIONS`), and cuDNN's flash attention, in whose place plans have XLA's (`ATTENTION`).
"""

from typing import NamedTuple

import jax

from gnvc_jax.errors import UsageError


class Properties(NamedTuple):
    """What CUDA reports of a GPU, as far as it differs between kinds.

    Attributes:
        kind: Name of the device.
        capability: Major and minor compute capability.
        cores: Streaming multiprocessors.
        cache: Bytes of the L2 cache.
        clock: GHz.
    """

    kind: str
    capability: tuple[int, int]
    cores: int
    cache: int
    clock: float


PROPERTIES = {
    "h100": Properties("NVIDIA H100 80GB HBM3", (9, 0), 132, 50 << 20, 1.98),
    "h200": Properties("NVIDIA H200", (9, 0), 132, 50 << 20, 1.98),
    "b200": Properties("NVIDIA B200", (10, 0), 148, 126 << 20, 1.965),
}

# Properties that these kinds have in common; CUDA C++ Programming Guide, compute capabilities 9.0
# and 10.0.
COMMON = {
    "threads_per_block_limit": 1024,
    "threads_per_warp": 32,
    "shared_memory_per_block": 48 << 10,
    "shared_memory_per_core": 228 << 10,
    "shared_memory_per_block_optin": 227 << 10,
    "threads_per_core_limit": 2048,
    "fpus_per_core": 128,
    "block_dim_limit_x": 2**31 - 1,
    "block_dim_limit_y": 2**16 - 1,
    "block_dim_limit_z": 2**16 - 1,
    "registers_per_core_limit": 1 << 16,
    "registers_per_block_limit": 1 << 16,
}

COMPILER_OPTIONS = {"xla_gpu_autotune_level": 0}
ATTENTION = "chunked"
NOTE = (
    "compiled by XLA without the GPU: kernels are not tuned, attention is XLA's in place of "
    "cuDNN's, and workspaces of libraries are not counted"
)


def target_config(name: str, memory: int, bandwidth: float) -> str:
    """Describes a GPU to XLA.

    Args:
        name: Key of PROPERTIES.
        memory: Bytes of its memory.
        bandwidth: Bytes per second of its memory.
    """
    gpu = PROPERTIES[name]
    values = COMMON | {
        "core_count": gpu.cores,
        "l2_cache_size": gpu.cache,
        "clock_rate_ghz": gpu.clock,
        "device_memory_size": memory,
        "memory_bandwidth": int(bandwidth),
    }
    lines = [f"{key}: {value}" for key, value in values.items()]
    major, minor = gpu.capability
    lines.append(f"cuda_compute_capability {{ major: {major} minor: {minor} }}")
    return (
        f"gpu_device_info {{ {' '.join(lines)} }} "
        f'platform_name: "CUDA" device_description_str: "{gpu.kind}"'
    )


def gpu_devices(name: str, nodes: int, per_node: int, config: str) -> list[jax.Device]:
    """Returns GPUs that programs can be compiled for, but not run on.

    Args:
        name: Key of PROPERTIES.
        nodes: Number of machines.
        per_node: GPUs of each.
        config: What `target_config` gives.

    Raises:
        UsageError: If JAX's CUDA plugin is not installed.
    """
    from jax.experimental import topologies

    # Slices, hosts of each, devices of each: NVLink reaches as far as a machine.
    shape = f"{nodes}x1x{per_node}"
    options = {"target_config": config, "topology": shape}
    try:
        return topologies.get_topology_desc(name, "cuda", **options).devices
    except NotImplementedError:
        raise UsageError(
            "compiling for GPUs needs JAX's CUDA plugin: pip install 'gnvc-jax[gpu]'"
        ) from None
