"""One program on any mesh: devices, where arrays lie on them, attention across them.

`mesh` builds the mesh from a configuration, `rules` says how parameters and activations are sharded
on it, and `attention` is the one operation whose communication is written by hand. Code that runs
under a mesh (`jax.set_mesh`) asks `backend`, `device_kind` and `axis_size` about it; without a
mesh, `constrain` and `attention` leave arrays where they are.
"""

from gnvc_jax.parallel.mesh import (
    MeshConfig,
    axis_size,
    backend,
    device_kind,
    make_mesh,
    parse_mesh,
)
from gnvc_jax.parallel.rules import constrain, shardings

__all__ = [
    "MeshConfig",
    "axis_size",
    "backend",
    "constrain",
    "device_kind",
    "make_mesh",
    "parse_mesh",
    "shardings",
]
