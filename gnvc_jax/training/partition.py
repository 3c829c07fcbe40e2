"""Which parameters of a model train: trees split and joined by the paths of their leaves."""

import re
from collections.abc import Sequence
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from gnvc_jax.errors import UsageError

Tree = Any


def split(tree: Tree, patterns: Sequence[str]) -> tuple[Tree, Tree]:
    """The parameters whose path ("codec/intra/out/kernel") begins as one of the patterns says, and
    the others.

    Raises UsageError for a pattern that fits no parameter.
    """
    flat = flatten_dict(tree, sep="/")
    for pattern in patterns:
        if not any(re.match(pattern, path) for path in flat):
            parts = ", ".join(sorted({path.split("/")[0] for path in flat}))
            raise UsageError(f"train: {pattern!r} fits no parameter; the parts are {parts}")
    chosen = {p for p in flat if any(re.match(pattern, p) for pattern in patterns)}
    return tuple(
        unflatten_dict({p: x for p, x in flat.items() if (p in chosen) == wanted}, sep="/")
        for wanted in (True, False)
    )


def join(*trees: Tree) -> Tree:
    """One tree with the leaves of all; where several have one, the last wins."""
    flat: dict = {}
    for tree in trees:
        flat |= flatten_dict(tree, sep="/")
    return unflatten_dict(flat, sep="/")
