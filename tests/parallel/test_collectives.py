"""What a DiT of two layers, forward and backward, says to four devices along each axis."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gnvc_jax.parallel import MeshConfig, make_mesh, rules, shardings
from gnvc_jax.planner import hlo
from gnvc_jax.refiner import DiT, DiTConfig

LAYERS, DEVICES = 2, 4
DIT = DiTConfig(64, 128, 4, LAYERS, 16, 4, text_length=0)


def collectives(axis: str, attention: str | None = None) -> dict[str, float]:
    """Times that each kind runs."""
    dit = DiT(DIT, attention=attention)
    mesh = make_mesh(MeshConfig(**{"data": 1, axis: DEVICES}), jax.devices()[:DEVICES])

    def init(key):
        return dit.init(key, jnp.zeros((1, 1, 2, 2, 4)), jnp.zeros(1))["params"]

    def loss(params, x):
        return jnp.mean(dit.apply({"params": params}, x, jnp.zeros(4)) ** 2)

    params = jax.eval_shape(init, jax.random.key(0))
    places = shardings(params, mesh)
    params = jax.tree.map(lambda x, place: x.update(sharding=place), params, places)
    place = NamedSharding(mesh, P(rules.BATCH))
    x = jax.ShapeDtypeStruct((4, 2, 8, 8, 4), jnp.float32, sharding=place)
    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(loss), out_shardings=places).lower(params, x).compile()
    return {c.kind: c.count for c in hlo.collectives(program.as_text())}


@pytest.fixture(autouse=True)
def split_all(monkeypatch):
    monkeypatch.setattr(rules, "SMALL", 0)


@pytest.mark.slow
def test_data_axis_reduces_gradients():
    assert set(collectives("data")) == {"all-reduce"}


@pytest.mark.slow
def test_fsdp_axis_gathers_parameters():
    """Each kernel of a layer at least once; XLA on CPU reduces where others scatter."""
    kernels = 4 + 4 + 2  # of both attentions and of the hidden layer
    assert collectives("fsdp")["all-gather"] >= LAYERS * kernels


def test_context_axis_exchanges_tokens_for_heads():
    """Queries, keys, values and outputs, forward and backward."""
    found = collectives("context", "chunked")
    assert set(found) == {"all-reduce", "all-to-all"}
    assert found["all-to-all"] == LAYERS * 4 * 2


@pytest.mark.slow
def test_ring_permutes_keys_and_values():
    """Forward, keys and values go to all others; backward, their gradients too, and home."""
    found = collectives("context", "ring")
    assert set(found) == {"all-reduce", "collective-permute"}
    assert found["collective-permute"] == LAYERS * ((DEVICES - 1) * (2 + 4) + 2)


@pytest.mark.slow
def test_tensor_axis_reduces_activations():
    """One per pair of products forward and backward, and those of the norms over all heads."""
    found = collectives("tensor")
    assert set(found) == {"all-reduce"}
    assert LAYERS * 4 <= found["all-reduce"] <= LAYERS * 8
