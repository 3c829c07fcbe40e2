"""Trees to stacks and back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gnvc_jax.parallel import MeshConfig, make_mesh
from gnvc_jax.training.stacks import Stacks


def params():
    names = ("q", "k", "v", "o")
    biases = {name: {"bias": jnp.full((2, 8), float(i))} for i, name in enumerate(names)}
    return {"groups": {"main": biases}, "other": jnp.ones((2, 8)), "large": jnp.ones((1024, 512))}


def test_there_and_back():
    tree = params()
    state = optax.scale_by_adam().init(tree)
    stacks = Stacks(tree)
    packed = stacks.pack((tree, state))
    assert sorted(x.shape for x in packed[0]) == [(1, 1024, 512), (5, 2, 8)]
    assert packed[1].count.shape == () and [x.shape for x in packed[1].mu] == [
        x.shape for x in packed[0]
    ]
    jax.tree.map(np.testing.assert_array_equal, stacks.unpack(packed), (tree, state))


def test_what_devices_split_is_not_stacked():
    """The biases of q, k and v lie with their heads, those of o are whole."""
    with jax.set_mesh(make_mesh(MeshConfig(tensor=4))):
        packed = Stacks(params()).pack(params())
    assert sorted(x.shape[0] for x in packed) == [1, 1, 1, 1, 2]
