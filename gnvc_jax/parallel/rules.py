"""Placement of arrays on the mesh: one table for parameters, one set of names for activations.

`shardings` gives the sharding of every leaf of a tree of parameters, `constrain` places an
activation. A parameter is found by the end of its path, so moments, averages and frozen copies,
whose paths end alike, are sharded as it is.

The axis `fsdp` splits one dimension of every large parameter (ZeRO-3, Rajbhandari et al. 2020,
arXiv 1910.02054), `tensor` the heads and hidden units of the DiT (Megatron, Shoeybi et al. 2019,
arXiv 1909.08053): the first product of a pair by columns, the second by rows, so that each pair
costs one reduction.
"""

import math
import re
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gnvc_jax.arrays import Tree
from gnvc_jax.errors import UsageError

BATCH = ("data", "fsdp")  # axes that divide clips

# (end of the path, mesh axes of the last dimensions). Dimensions before these, such as that of
# scanned layers, are not split. Parameters that no rule matches are split along their largest
# dimension by `fsdp`.
RULES = (
    # Kernels are (groups, in, out). Columns of q, k, v are heads, those of ffn_in hidden units.
    (r"groups/.*/(q|k|v|ffn_in)/kernel", ("fsdp", "tensor")),
    # Rows are heads or hidden units: each device has a partial sum of the output.
    (r"groups/.*/(o|ffn_out)/kernel", ("tensor", "fsdp")),
    # Biases and scales are split as the columns they apply to; those of o and ffn_out have no rule.
    (r"groups/.*/(q|k|v|ffn_in)/bias", ("tensor",)),
    (r"groups/.*/norm_(q|k)/scale", ("tensor",)),
)

# In elements. A parameter below SMALL is replicated: gathering it costs more than it saves, and the
# codec's 700 parameters add up to 20 million elements. From SMALL to LARGE it is split if the sizes
# divide, else replicated. From LARGE on it must be split.
SMALL, LARGE = 1 << 19, 1 << 20


def spec(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    """Partition of one parameter.

    Args:
        path: Path of the parameter, such as "codec/intra/out/kernel".
        shape: Shape of the parameter.
        mesh: Mesh, of which the sizes of the axes count.

    Raises:
        UsageError: If the mesh does not divide the sizes of a parameter that must be split.
    """
    # Rules name the last dimensions: scanned layers have one more in front.
    axes: list[str | None] = [None] * len(shape)
    # The first rule that fits. Paths of moments and averages have something in front, hence search.
    named = next((axes for end, axes in RULES if re.search(f"(^|/){end}$", path)), None)
    if named is not None:
        axes[-len(named) :] = named
    elif shape:
        fitting = [i for i, size in enumerate(shape) if size % mesh.shape["fsdp"] == 0]
        # The last of the largest that divide; if none does, the error names the largest.
        axes[max(fitting or range(len(shape)), key=lambda i: (shape[i], i))] = "fsdp"
    # In elements of the whole parameter, as SMALL and LARGE are.
    count = math.prod(shape)
    for i, axis in enumerate(axes):
        # Small parameters are not split by fsdp, but always by tensor: `tensor` decides which heads
        # a device works on.
        if axis is None or (axis == "fsdp" and count < SMALL):
            axes[i] = None
        elif shape[i] % mesh.shape[axis]:
            if axis == "tensor" or count >= LARGE:
                raise UsageError(
                    f"mesh axis {axis}={mesh.shape[axis]} does not divide dimension {i} of "
                    f"parameter {path} {tuple(shape)}"
                )
            axes[i] = None
    return P(*axes)


def shardings(tree: Tree, mesh: Mesh) -> Tree:
    """Sharding of every leaf (array or shape) of a tree of parameters, moments or averages.

    Raises:
        UsageError: See `spec`.
    """

    def place(path: tuple, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, spec(path_name(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, tree)


def path_name(path: tuple) -> str:
    """Writes a path in a tree as a string such as "codec/intra/out/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def is_split(path: tuple, shape: tuple[int, ...]) -> bool:
    """Whether the mesh in use splits the parameter at a path of a tree."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return False
    axes = spec(path_name(path), shape, mesh)
    return any(axis is not None and mesh.shape[axis] > 1 for axis in axes)


def activation_spec(mesh: Mesh | AbstractMesh, shape: tuple[int, ...], **axes: int) -> P:
    """Partition of an activation.

    Args:
        mesh: Mesh, of which the sizes of the axes count.
        shape: Shape of the activation.
        **axes: Dimensions that "batch", "context" and "tensor" split. A dimension that does not
            divide is not split: a single clip is replicated over data x fsdp.
    """
    found: list[tuple[str, ...] | None] = [None] * len(shape)
    for name, dimension in axes.items():
        split = BATCH if name == "batch" else (name,)
        if shape[dimension] % math.prod(mesh.shape[axis] for axis in split) == 0:
            found[dimension] = split
    return P(*found)


def constrain(x: jax.Array, **axes: int) -> jax.Array:
    """Shards x as `activation_spec` says on the mesh in use; without a mesh, returns x."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(mesh, x.shape, **axes))
