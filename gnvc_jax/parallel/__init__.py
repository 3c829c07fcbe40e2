"""One program on any mesh: devices, where arrays lie on them, attention across them."""

from gnvc_jax.parallel.mesh import MeshConfig, axis_size, backend, make_mesh, parse_mesh
from gnvc_jax.parallel.rules import constrain, shardings

__all__ = [
    "MeshConfig",
    "axis_size",
    "backend",
    "constrain",
    "make_mesh",
    "parse_mesh",
    "shardings",
]
