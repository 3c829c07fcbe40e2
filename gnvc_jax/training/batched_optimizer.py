"""Optimizer updates of many small parameters at once: those of equal shape become one array.

A codec has hundreds of small parameters of a few dozen shapes. An optimizer that takes them one by
one makes a program of tens of thousands of operations, which compilers for accelerators spend
minutes on. `gnvc_jax.training.step` packs parameters, gradients and moments by `StackedParameters`,
updates the stacks, and unpacks them; checkpoints never see a stack.
"""

import collections
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gnvc_jax.arrays import Tree
from gnvc_jax.parallel import rules

# Kernels of layers ("codec/intra/out/kernel") and of the integer scale networks ("P0_kernel"), and
# the two factors of a low-rank change of a kernel ("kernel/a").
KERNEL = re.compile(r"(.*[/_])?kernel(/[ab])?")


def is_kernel(path: tuple) -> bool:
    """Whether the parameter at a path of a tree is a kernel, which weight decay is limited to.

    Biases, norm scales, modulation, gains, densities and the basis of a linear encoder are not:
    decay would pull them towards zero, which means nothing to them. Their shapes do not tell them
    apart, since scanned layers and stacks add axes.
    """
    return KERNEL.fullmatch(rules.path_name(path)) is not None


def is_adversary(path: tuple) -> bool:
    """Whether the parameter at a path of a tree is one of the discriminator's."""
    return rules.path_name(path).startswith("discriminator/")


class StackedParameters:
    """Converts trees like the parameters to stacks and back.

    A tree becomes a list of arrays with one more axis in front. Parameters share a stack if they
    have the same shape and type, have fewer than `rules.SMALL` elements, and are whole on every
    device. Each of the others is alone in its stack: parameters that are split in different ways
    would have to be gathered.

    Args:
        params: Parameters, arrays or shapes.

    Attributes:
        kernels: For each stack, whether it holds kernels (see `is_kernel`) or none.
        adversary: For each stack, whether it holds parameters of the discriminator or none.
        parts: For each stack, the part of the model that each of its parameters belongs to.
    """

    def __init__(self, params: Tree):
        self.structure = jax.tree.structure(params)
        groups: dict[Any, list[int]] = {}
        leaves = jax.tree_util.tree_leaves_with_path(params)
        for i, (path, x) in enumerate(leaves):
            alone = x.size >= rules.SMALL or rules.is_split(path, x.shape)
            # Kernels and others never share a stack, so that weight decay can go by stacks.
            kind = i if alone else (x.shape, x.dtype, is_kernel(path), is_adversary(path))
            groups.setdefault(kind, []).append(i)
        self.groups = list(groups.values())
        self.kernels = [is_kernel(leaves[group[0]][0]) for group in self.groups]
        self.adversary = [is_adversary(leaves[group[0]][0]) for group in self.groups]
        names = [rules.path_name(path).partition("/")[0] for path, _ in leaves]
        self.parts = [[names[i] for i in group] for group in self.groups]

    def pack(self, tree: Tree) -> Tree:
        """Replaces every part of a tree that is structured as the parameters by its stacks.

        The state of an optimizer has several such parts, such as both moments of Adam.
        """

        def is_like_params(x: Any) -> bool:
            return jax.tree.structure(x) == self.structure

        def one(x: Any) -> Any:
            if not is_like_params(x):
                return x
            leaves = jax.tree.leaves(x)
            # (parameters in the group, *shape); one that is alone gets an axis of 1.
            return [jnp.stack([leaves[i] for i in group]) for group in self.groups]

        return jax.tree.map(one, tree, is_leaf=is_like_params)

    def norms(self, stacks: Tree) -> dict[str, jax.Array]:
        """Euclidean norm of each part of the model ("codec", "refiner", ...), from its stacks."""
        squares = collections.defaultdict(list)
        for stack, parts in zip(jax.tree.leaves(stacks), self.parts, strict=True):
            # One sum for each parameter of the stack: (parameters in the group,).
            sums = jnp.sum(jnp.square(stack), axis=tuple(range(1, stack.ndim)))
            for part in sorted(set(parts)):
                squares[part].append(sums[np.array([name == part for name in parts])].sum())
        return {part: jnp.sqrt(sum(values)) for part, values in sorted(squares.items())}

    def unpack(self, tree: Tree) -> Tree:
        """Undoes `pack`."""

        def one(x: Any) -> Any:
            if not isinstance(x, list):
                return x
            # No other lists occur in these trees, so every list is a tree of parameters in stacks.
            leaves = {i: y for group, ys in zip(self.groups, x) for i, y in zip(group, ys)}
            return jax.tree.unflatten(self.structure, [leaves[i] for i in range(len(leaves))])

        return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, list))
