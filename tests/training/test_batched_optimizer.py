"""Trees to stacks and back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gnvc_jax.parallel import MeshConfig, make_mesh, rules
from gnvc_jax.training.batched_optimizer import StackedParameters, is_kernel
from gnvc_jax.training.config import Experiment
from gnvc_jax.training.stages import init_trained, make_stage
from gnvc_jax.training.stages.codec import CodecLoss
from gnvc_jax.vae import VAEConfig


def params():
    names = ("q", "k", "v", "o")
    biases = {name: {"bias": jnp.full((2, 8), float(i))} for i, name in enumerate(names)}
    return {"groups": {"main": biases}, "other": jnp.ones((2, 8)), "large": jnp.ones((1024, 512))}


def test_there_and_back():
    tree = params()
    state = optax.scale_by_adam().init(tree)
    stacks = StackedParameters(tree)
    packed = stacks.pack((tree, state))
    assert sorted(x.shape for x in packed[0]) == [(1, 1024, 512), (5, 2, 8)]
    assert packed[1].count.shape == () and [x.shape for x in packed[1].mu] == [
        x.shape for x in packed[0]
    ]
    jax.tree.map(np.testing.assert_array_equal, stacks.unpack(packed), (tree, state))


def test_kernels_are_told_from_what_has_their_shape(tiny_codec):
    """Of a real codec: kernels of layers, of the integer networks, and of low-rank changes."""
    vae = VAEConfig(base=4, latent_channels=tiny_codec.latent_channels)
    stage = make_stage(Experiment(stage="codec", vae=vae, codec=tiny_codec, loss=CodecLoss()))
    found = jax.tree_util.tree_leaves_with_path(
        jax.eval_shape(lambda key: init_trained(stage, key), jax.random.key(0))
    )
    kernels = {rules.path_name(path) for path, _ in found if is_kernel(path)}
    rest = {rules.path_name(path) for path, _ in found if not is_kernel(path)}
    assert "codec/inter/entropy/scales/P0_kernel" in kernels and "codec/intra/out/kernel" in kernels
    ends = {name.rpartition("/")[2].rpartition("_")[2] for name in rest}
    assert ends == {"bias", "mult", "gain", "a", "b", "h", "basis", "inverse", "whitening"}
    low_rank = {"refiner": {"dit": {"q": {"kernel": {"a": 1, "b": 2}, "bias": 3}}}}
    (path_a, _), (path_b, _), *_ = sorted(
        jax.tree_util.tree_leaves_with_path(low_rank), key=lambda leaf: leaf[1]
    )
    assert is_kernel(path_a) and is_kernel(path_b)

    tree = {"a": {"kernel": jnp.ones((2, 8))}, "b": {"modulation": jnp.ones((2, 8))}}
    stacks = StackedParameters(tree)
    assert len(stacks.pack(tree)) == 2 and sorted(stacks.kernels) == [False, True]


def test_what_devices_split_is_not_stacked():
    """The biases of q, k and v lie with their heads, those of o are whole."""
    with jax.set_mesh(make_mesh(MeshConfig(tensor=4))):
        packed = StackedParameters(params()).pack(params())
    assert sorted(x.shape[0] for x in packed) == [1, 1, 1, 1, 2]
