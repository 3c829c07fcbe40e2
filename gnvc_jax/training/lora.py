"""Low-rank changes of kernels (LoRA, Hu et al. 2021, arXiv 2106.09685), merged before use.

A kernel W (..., in, out) becomes W + A B with A (..., in, r) and B (..., r, out). B starts at zero,
so that nothing changes at first. These are transforms of the parameter tree: merging costs one
small product per kernel and step, and networks know nothing of it. There is no factor alpha / r;
the learning rate takes its place.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from gnvc_jax.arrays import Tree
from gnvc_jax.errors import UsageError

TARGETS = r"refiner/dit/groups/.*/(q|k|v|o|ffn_in|ffn_out)/kernel"


def init(params: Tree, rank: int, key: jax.Array) -> Tree:
    """Draws A and makes B for every kernel that TARGETS names.

    Args:
        params: Parameters of the whole model, arrays or shapes.
        rank: Rank r of the changes.
        key: Random key.

    Returns:
        Tree like that of the kernels, with {"a": A, "b": B} in place of each.

    Raises:
        UsageError: If there is no such kernel.
    """
    leaves: dict[str, Any] = flatten_dict(params, sep="/")
    kernels = {path: x for path, x in leaves.items() if re.fullmatch(TARGETS, path)}
    if not kernels:
        raise UsageError("lora: the model has no refiner to adapt")
    flat = {}
    for (path, kernel), kernel_key in zip(kernels.items(), jax.random.split(key, len(kernels))):
        # `rows` is the axis of the scanned groups, which all change on their own.
        *rows, inner, outer = kernel.shape
        # Rows of A have the scale 1 / sqrt(in), so that x A has that of x.
        flat[f"{path}/a"] = jax.random.normal(kernel_key, (*rows, inner, rank)) * inner**-0.5
        flat[f"{path}/b"] = jnp.zeros((*rows, rank, outer))
    return unflatten_dict(flat, sep="/")


def shapes(params: Tree, rank: int) -> Tree:
    """Shapes of what `init` returns; an empty tree where there is no kernel to change."""
    flat = flatten_dict(params, sep="/")
    if not any(re.fullmatch(TARGETS, path) for path in flat):
        return {}
    return jax.eval_shape(lambda key: init(params, rank, key), jax.random.key(0))


def merge(params: Tree, lora: Tree) -> Tree:
    """Adds low-rank changes to parameters: W + A B for every kernel that has one."""
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    changes: dict[str, Any] = flatten_dict(lora, sep="/")
    for path in {change.rpartition("/")[0] for change in changes}:
        # (..., in, r) @ (..., r, out), batched over the groups of the scan.
        flat[path] = flat[path] + changes[f"{path}/a"] @ changes[f"{path}/b"]
    return unflatten_dict(flat, sep="/")


def merge_part(params: Tree) -> Tree:
    """Merges the part "lora" of a tree of parameters, if there is one, into the other parts."""
    others = {name: part for name, part in params.items() if name != "lora"}
    return merge(others, params["lora"]) if "lora" in params else others
