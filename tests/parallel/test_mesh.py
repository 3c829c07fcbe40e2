"""The mesh, and where parameters and activations lie on it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from gnvc_jax.codec.config import CodecConfig
from gnvc_jax.codec.model import LatentCodec
from gnvc_jax.parallel import MeshConfig, backend, constrain, make_mesh, parse_mesh, shardings
from gnvc_jax.parallel.mesh import device_grid
from gnvc_jax.parallel.rules import spec
from gnvc_jax.refiner import VACE_1_3B, Refiner, RefinerConfig
from gnvc_jax.training.config import OptimConfig
from gnvc_jax.training.state import init_state
from gnvc_jax.vae import VAE, VAEConfig


def test_mesh_takes_all_devices():
    mesh = make_mesh(MeshConfig(context=2))
    assert dict(mesh.shape) == {"data": 4, "fsdp": 1, "context": 2, "tensor": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert dict(make_mesh(parse_mesh("data=1,fsdp=3")).shape)["fsdp"] == 3


def test_parse_mesh_reads_axes_and_sizes():
    assert parse_mesh("data=2,fsdp=4") == MeshConfig(2, 4, 1, 1)
    assert parse_mesh("tensor=2") == MeshConfig(-1, 1, 1, 2)
    for wrong in ("fsdp", "fsdp=x", "seq=2", "data=1,data=2"):
        with pytest.raises(ValueError, match=r"must be AXIS=SIZE,\.\.\. with axes data, fsdp"):
            parse_mesh(wrong)


@pytest.mark.parametrize("wrong", [MeshConfig(fsdp=16), MeshConfig(3, 3), MeshConfig(1, 0)])
def test_impossible_meshes_are_refused(wrong):
    with pytest.raises(ValueError, match="there are 8"):
        make_mesh(wrong)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What meshes need to know of a device that lies in a slice."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "a platform without a known topology"
    device_kind: str = ""


def test_slices_divide_the_data_axis():
    """Each slice holds whole copies of the other axes, in any order of the devices."""
    devices = [Chip(i, i % 2) for i in range(16)]
    grid = device_grid({"data": 4, "fsdp": 2, "context": 1, "tensor": 2}, devices)
    assert grid.shape == (4, 2, 1, 2) and len({device.id for device in grid.flat}) == 16
    slices = np.vectorize(lambda device: device.slice_index)(grid)
    assert np.array_equal(slices, np.broadcast_to([[[[0]]], [[[0]]], [[[1]]], [[[1]]]], grid.shape))
    with pytest.raises(ValueError, match="data=1 must be a multiple of the 2 slices"):
        device_grid({"data": 1, "fsdp": 16}, devices)


def test_sharding_follows_the_end_of_the_path():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    block = "refiner/dit/groups/block_0"
    for path, shape, expected in (
        (f"{block}/self_attention/q/kernel", (15, 1536, 1536), P(None, "fsdp", "tensor")),
        (f"{block}/self_attention/o/kernel", (15, 1536, 1536), P(None, "tensor", "fsdp")),
        (f"{block}/ffn_in/kernel", (15, 1536, 8960), P(None, "fsdp", "tensor")),
        (f"{block}/ffn_out/kernel", (15, 8960, 1536), P(None, "tensor", "fsdp")),
        (f"{block}/ffn_in/bias", (15, 8960), P(None, "tensor")),
        ("opt_state/1/mu/dit/groups/context/cross_attention/v/kernel", (9, 512, 512), "as q"),
        ("vae/decoder/in/kernel", (3, 3, 3, 384, 384), P(None, None, None, None, "fsdp")),
        ("time_modulation/kernel", (1536, 9216), P(None, "fsdp")),
        ("time_modulation/bias", (9216,), P()),  # small
        ("codec/odd/kernel", (3, 3, 127, 127), P()),  # not small, but nothing divides
    ):
        expected = P(None, "fsdp", "tensor") if expected == "as q" else expected
        found = jax.NamedSharding(mesh, spec(path, shape, mesh))
        assert found.is_equivalent_to(jax.NamedSharding(mesh, expected), len(shape)), path


def test_large_parameters_that_do_not_divide_are_errors():
    mesh = make_mesh(MeshConfig(data=1, fsdp=7))
    with pytest.raises(ValueError, match=r"fsdp=7 does not divide dimension 1 of parameter a/big"):
        spec("a/big", (1024, 2048), mesh)
    mesh = make_mesh(MeshConfig(data=1, tensor=8))
    with pytest.raises(ValueError, match=r"tensor=8 does not divide dimension 1 of parameter g"):
        spec("groups/block_0/ffn_in/kernel", (8, 12), mesh)


@pytest.mark.slow
def test_full_size_model_is_sharded():
    """Each of eight devices holds an eighth of weights, averages and moments, to a percent."""
    codec_config = CodecConfig()
    latents, one = jnp.zeros((1, 1, 2, 2, 16)), jnp.zeros(1)
    refiner = Refiner(RefinerConfig(VACE_1_3B, codec_config.width))
    inputs = latents, one, latents, jnp.zeros((1, 1, 2, 2, codec_config.width)), one.astype(int)

    def init(key):
        q_index, clip = jnp.zeros((1,), int), jnp.zeros((1, 2, 8, 8, 16))
        params = {
            "vae": VAE(VAEConfig()).init(key, jnp.zeros((1, 5, 16, 16, 3)))["params"],
            "codec": LatentCodec(codec_config).init(key, clip, q_index, key)["params"],
            "refiner": refiner.init(key, *inputs, jnp.zeros((1, 1, 4096)))["params"],
        }
        return init_state(OptimConfig(), params, key)

    state = jax.eval_shape(init, jax.random.key(0))
    placed = shardings(state, make_mesh(MeshConfig(data=1, fsdp=8)))
    here = everywhere = 0
    for x, place in zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True):
        everywhere += np.prod(x.shape)
        here += np.prod(place.shard_shape(x.shape))
    assert here / everywhere == pytest.approx(1 / 8, rel=0.1)  # 20 million small ones are whole


def test_activations_that_do_not_divide_stay_whole():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, context=2))
    with jax.set_mesh(mesh):
        place = jax.jit(lambda x: constrain(x, batch=0, context=1))
        assert place(jnp.zeros((4, 6))).addressable_shards[0].data.shape == (1, 3)
        assert place(jnp.zeros((1, 6))).addressable_shards[0].data.shape == (1, 3)
        assert backend() == jax.devices()[0].platform
