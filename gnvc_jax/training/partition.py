"""Selection of the parameters that train: trees are split and joined by the paths of their leaves.

A model is a tree of all parameters by part, {"vae": ..., "codec": ..., "refiner": ...}. A run
trains some of them and keeps the others fixed:

    trained, fixed = split(model, ("codec/", "refiner/dit/groups/context"))
    model = assemble(fixed, trained)

Only what trains has gradients, optimizer moments and a place in checkpoints. Low-rank changes
(`gnvc_jax.training.lora`) are one more part, "lora", of what trains; `assemble` merges them.
"""

import re
from collections.abc import Sequence

from flax.traverse_util import flatten_dict, unflatten_dict

from gnvc_jax.arrays import Tree
from gnvc_jax.errors import UsageError
from gnvc_jax.training import lora

EVERYTHING = ("",)  # the pattern that fits every path


def split(tree: Tree, patterns: Sequence[str]) -> tuple[Tree, Tree]:
    """Splits a tree into what trains and what does not.

    Args:
        tree: Nested dictionary of parameters or shapes.
        patterns: Regular expressions. A parameter trains if one of them matches the beginning of
            its path ("codec/intra/out/kernel").

    Returns:
        Two trees: the parameters that train, and the others.

    Raises:
        UsageError: If a pattern fits no parameter.
    """
    # Paths such as "codec/intra/out/kernel"; `re.match` anchors patterns at their beginning.
    flat = flatten_dict(tree, sep="/")
    for pattern in patterns:
        if not any(re.match(pattern, path) for path in flat):
            parts = ", ".join(sorted({path.split("/")[0] for path in flat}))
            raise UsageError(
                f"train: {pattern!r} fits no parameter; the parts of the model are {parts}"
            )
    chosen = {path for path in flat if any(re.match(pattern, path) for pattern in patterns)}
    trained = {path: x for path, x in flat.items() if path in chosen}
    fixed = {path: x for path, x in flat.items() if path not in chosen}
    return unflatten_dict(trained, sep="/"), unflatten_dict(fixed, sep="/")


def join(*trees: Tree) -> Tree:
    """Joins trees to one with the leaves of all; where several have a leaf, the last wins."""
    flat: dict = {}
    for tree in trees:
        flat |= flatten_dict(tree, sep="/")
    return unflatten_dict(flat, sep="/")


def assemble(fixed: Tree, trained: Tree) -> Tree:
    """Puts a model together from fixed and trained parameters, with low-rank changes merged."""
    return lora.merge_part(join(fixed, trained))
