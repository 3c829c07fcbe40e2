"""The mesh of devices, with four axes, any of which may have size 1.

- data: clips are divided among devices.
- fsdp: clips, and also parameters with gradients, moments and averages.
- context: tokens of one clip.
- tensor: attention heads and hidden units.

The axes are ordered from least to most communication, because neighbours along the last axis have
the fastest links. Several slices of TPUs, each with fast links of its own, are connected by the
network of the data centre: they divide the axis data, along which only gradients travel.
`parse_mesh` reads a mesh from the command line, `make_mesh` builds it.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from gnvc_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each mesh axis.

    Attributes:
        data: Devices that divide clips; -1 takes all that the other axes leave.
        fsdp: Devices that divide clips and parameters.
        context: Devices that divide the tokens of a clip.
        tensor: Devices that divide heads and hidden units.
    """

    data: int = -1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1


def parse_mesh(text: str) -> MeshConfig:
    """Parses a list of axes and sizes, such as "data=2,fsdp=4".

    Raises:
        UsageError: If the text is not such a list.
    """
    names = [field.name for field in dataclasses.fields(MeshConfig)]
    sizes = {}
    for part in filter(None, text.split(",")):
        # A leading minus passes, for data=-1; other negative sizes are refused by `make_mesh`.
        name, _, size = part.partition("=")
        if name not in names or name in sizes or not size.lstrip("-").isdigit():
            raise UsageError(
                f"mesh must be AXIS=SIZE,... with axes {', '.join(names)}, got {text!r}"
            )
        sizes[name] = int(size)
    return MeshConfig(**sizes)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds a mesh.

    Args:
        config: Sizes of the axes.
        devices: Devices to use, by default those of all hosts. The mesh takes the first of them,
            but must use all if they were given or if there are several processes.

    Raises:
        UsageError: If the sizes do not fit the number of devices or slices.
    """
    given, sizes = devices is not None, dataclasses.asdict(config)
    devices = jax.devices() if devices is None else list(devices)
    if sizes["data"] == -1:
        sizes["data"] = 1  # neutral in the product of the others
        sizes["data"] = max(1, len(devices) // max(1, math.prod(sizes.values())))
    # A mesh may be smaller than the machine on one host alone: several processes must all take
    # part.
    used = math.prod(sizes.values())
    whole = given or jax.process_count() > 1
    if min(sizes.values()) < 1 or used > len(devices) or (used < len(devices) and whole):
        raise UsageError(f"mesh {sizes} needs {used} devices, there are {len(devices)}")
    grid = device_grid(sizes, devices[:used])
    return Mesh(grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def device_grid(sizes: dict[str, int], devices: Sequence[jax.Device]) -> np.ndarray:
    """Places devices on a mesh, so that neighbours on it are neighbours in the machine.

    Args:
        sizes: Number of devices along each axis of the mesh, in its order.
        devices: As many devices as the mesh has.

    Raises:
        UsageError: If they lie in several slices that do not divide the axis data.
    """
    # Splitting a physical axis is allowed, since a torus of chips rarely has just the sizes of the
    # mesh.
    split = {"allow_split_physical_axes": True}
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(tuple(sizes.values()), devices, **split)
    if sizes["data"] % slices:
        raise UsageError(
            f"mesh axis data={sizes['data']} must be a multiple of the {slices} slices: the other "
            "axes need the links inside of a slice"
        )
    # The mesh is a product of two: `inside` of each slice, and `across` slices along data alone.
    inside = sizes | {"data": sizes["data"] // slices}
    across = dict.fromkeys(sizes, 1) | {"data": slices}
    shapes = tuple(inside.values()), tuple(across.values())
    return mesh_utils.create_hybrid_device_mesh(*shapes, devices, **split)


def backend() -> str:
    """Platform that code is traced for: the one of the mesh in use, else JAX's default.

    The two differ when the planner compiles for devices that are not present.
    """
    device = _abstract_device()
    return jax.default_backend() if device is None else device.platform


def device_kind() -> str:
    """Kind of device that code is traced for, such as "TPU v5 lite"; see `backend`."""
    device = _abstract_device()
    return jax.devices()[0].device_kind if device is None else device.device_kind


def _abstract_device() -> jax.sharding.AbstractDevice | None:
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh.abstract_device


def axis_size(axis: str) -> int:
    """Number of devices along an axis of the mesh in use, 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape.get(axis, 1)
