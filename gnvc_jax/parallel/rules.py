"""Where arrays lie on the mesh: one table for parameters, one set of names for activations.

A parameter is found by the end of its path, hence moments, averages and frozen copies, whose paths
end alike, lie as it does. The axis `fsdp` splits one dimension of every large parameter (ZeRO-3,
Rajbhandari et al. 2020, arXiv 1910.02054), `tensor` the heads and hidden units of the DiT
(Megatron, Shoeybi et al. 2019, arXiv 1909.08053): the first product of a pair by columns, the
second by rows, so that each pair costs one reduction.
"""

import math
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gnvc_jax.errors import UsageError

Tree = Any

BATCH = ("data", "fsdp")

# (end of the path, axes of the last dimensions); those before, such as that of scanned layers,
# stay whole. Parameters that no line names are split along their largest dimension by `fsdp`.
RULES = (
    (r"groups/.*/(q|k|v|ffn_in)/kernel", ("fsdp", "tensor")),
    (r"groups/.*/(o|ffn_out)/kernel", ("tensor", "fsdp")),
    (r"groups/.*/(q|k|v|ffn_in)/bias", ("tensor",)),
    (r"groups/.*/norm_(q|k)/scale", ("tensor",)),
)

# Numbers. A parameter below SMALL is whole on every device: gathering it costs more than it saves,
# and the codec's 700 add up to 20 million. From SMALL to LARGE it is split if the sizes allow, else
# whole. From LARGE on it must be split.
SMALL, LARGE = 1 << 19, 1 << 20


def spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Axes of the parameter at `path` ("codec/intra/out/kernel").

    Raises UsageError if the mesh does not divide the sizes of a parameter that must be split.
    """
    axes = [None] * len(shape)
    named = next((axes for end, axes in RULES if re.search(f"(^|/){end}$", path)), None)
    if named is not None:
        axes[-len(named) :] = named
    elif shape:
        fitting = [i for i, size in enumerate(shape) if size % mesh.shape["fsdp"] == 0]
        # The last of the largest; where none divides, the largest is what the error names.
        axes[max(fitting or range(len(shape)), key=lambda i: (shape[i], i))] = "fsdp"
    count = math.prod(shape)
    for i, axis in enumerate(axes):
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
    """The sharding of every leaf (array or shape) of a tree of parameters, or of what follows them.

    Raises UsageError: see `spec`.
    """

    def place(path, leaf):
        return NamedSharding(mesh, spec(path_name(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, tree)


def path_name(path: tuple) -> str:
    """A path in a tree as "codec/intra/out/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def is_split(path: tuple, shape: tuple[int, ...]) -> bool:
    """Whether the mesh in use splits the parameter at a path of a tree."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return False
    axes = spec(path_name(path), shape, mesh)
    return any(axis is not None and mesh.shape[axis] > 1 for axis in axes)


def activation_spec(mesh: Mesh, shape: tuple[int, ...], **axes: int) -> P:
    """Axes of an activation; `axes`: batch, context, tensor = the dimension that they split.

    A dimension that does not divide stays whole: a single clip is the same on all of data x fsdp.
    """
    found = [None] * len(shape)
    for name, dimension in axes.items():
        split = BATCH if name == "batch" else (name,)
        if shape[dimension] % math.prod(mesh.shape[axis] for axis in split) == 0:
            found[dimension] = split
    return P(*found)


def constrain(x: jax.Array, **axes: int) -> jax.Array:
    """x placed as `activation_spec` says on the mesh in use; as it is without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(mesh, x.shape, **axes))
