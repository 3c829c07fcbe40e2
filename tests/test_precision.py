"""The precision of matrix products and convolutions, read from the traced programs.

On CPU every precision gives the same numbers, so what TPUs and GPUs are told is checked instead.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.lax import Precision

from gnvc_jax.codec.model import LatentCodec
from gnvc_jax.metrics.backbones import load_weights
from gnvc_jax.metrics.dists import dists, load_dists
from gnvc_jax.metrics.lpips import lpips
from gnvc_jax.programs import codec_programs
from gnvc_jax.refiner import Refiner
from gnvc_jax.vae import VAE, VAEConfig

HALF = np.dtype(jnp.bfloat16)


def equations(jaxpr):
    """All equations of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def products(function, *args):
    """Matrix products and convolutions of `function(*args)`: (precision, type of the inputs)."""
    found = [
        (e.params["precision"], e.invars[0].aval.dtype)
        for e in equations(jax.make_jaxpr(function)(*args).jaxpr)
        if e.primitive.name in ("dot_general", "conv_general_dilated")
    ]
    assert found
    return found


def all_exact(function, *args):
    return all(precision == (Precision.HIGHEST,) * 2 for precision, _ in products(function, *args))


@pytest.fixture(params=["cpu", "tpu"])
def backend(request, monkeypatch):
    """Convolutions in the form that a backend gets."""
    monkeypatch.setattr("gnvc_jax.convolution.backend", lambda: request.param)


@pytest.mark.parametrize("motion", [False, True], ids=["wan", "linear"])
def test_codec_and_encoder_have_full_precision(tiny_model, motion, backend):
    """Of both kinds of VAE; the second one's codec compensates motion."""
    model = tiny_model(0, motion=motion)
    used, q_index = codec_programs(model), jnp.zeros(1, jnp.int32)
    vae, codec = jax.tree.map(jnp.float32, (model.vae, model.codec))  # half floats in files
    frames, later = jnp.zeros((1, 1, 64, 64, 3)), jnp.zeros((1, 4, 64, 64, 3))
    latents, cache = jax.eval_shape(used.encode_video, vae, None, frames)
    assert all_exact(used.encode_video, vae, None, frames)
    assert all_exact(used.encode_video, vae, cache, later)
    assert all_exact(used.decode_latents, vae, None, latents)

    latent, prediction = jnp.zeros(latents.shape[:1] + latents.shape[2:]), None
    if motion:
        inputs = vae, jnp.zeros((1, 64, 64, 3), jnp.uint8), jnp.zeros((1, 4, 4, 4, 2))
        assert all_exact(used.predict, *inputs)
        predicted, prediction = jax.eval_shape(used.predict, *inputs)
    integers = jax.eval_shape(used.analyse, codec, latent, None, q_index, None)
    integers = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), integers)
    decoded, state = jax.eval_shape(used.reconstruct, codec, integers, None, q_index, None)
    if motion:
        assert all_exact(used.compensate, vae, decoded, prediction, predicted)
    for given in ((None, q_index, None), (state, q_index, prediction)):
        assert all_exact(used.analyse, codec, latent, *given)
        assert all_exact(used.reconstruct, codec, integers, *given)


def test_the_codec_has_full_precision_in_training(tiny_model):
    """Forward and backward."""
    model = tiny_model(0)
    codec, latents = LatentCodec(model.codec_config), jnp.zeros((1, 2, 8, 8, 4))

    def rate(params):
        inputs = latents, jnp.zeros(1, jnp.int32), jax.random.key(0)
        return codec.apply({"params": params}, *inputs).y_bits.sum()

    params = jax.tree.map(jnp.float32, model.codec)
    assert all_exact(jax.grad(rate), params)


def test_products_of_the_refiner_are_as_configured(tiny_model):
    made = tiny_model(0, refiner=True)
    config = made.refiner_config
    latents, one = jnp.zeros((1, 2, 4, 4, 4)), jnp.ones(1)
    inputs = latents, one, latents, jnp.zeros((1, 2, 4, 4, config.features)), jnp.zeros(1, int)

    def of(**options):
        refiner = Refiner(config, **options)
        return products(lambda p: refiner.apply({"params": p}, *inputs), made.refiner)

    assert {p for p, _ in of()} == {(Precision.HIGHEST,) * 2}
    chosen = {p for p, _ in of(precision="high")}
    assert chosen == {(Precision.HIGH,) * 2, (Precision.HIGHEST,) * 2}  # blocks; time and head
    half = of(dtype=jnp.bfloat16)
    exact = [dtype for p, dtype in half if p == (Precision.HIGHEST,) * 2]
    assert set(exact) == {np.dtype("float32")} and len(exact) == 4  # three of time, the head
    assert HALF in {dtype for _, dtype in half}


def test_decoder_runs_in_half_precision_with_remat(monkeypatch):
    """About the same frames; the same gradients; the encoder stays as it is."""
    config = VAEConfig(4, (1, 1), 1, 4, (True,))
    monkeypatch.setattr("gnvc_jax.convolution.backend", lambda: "tpu")
    frames, side = 1 + config.temporal_stride, 2 * config.stride
    video, latents = jnp.zeros((1, frames, side, side, 3)), jnp.ones((1, 2, 2, 2, 4))
    exact, remat = VAE(config), VAE(config, remat=True)
    half = VAE(config, remat=True, dtype=jnp.bfloat16, precision="default")
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.3 * x.size**-0.25, x.shape), jnp.float32),
        jax.eval_shape(exact.init, jax.random.key(0), video)["params"],
    )

    def decode(vae):
        return lambda p: vae.apply({"params": p}, latents, method="decode")

    def encode(vae):
        return lambda p: vae.apply({"params": p}, video, method="encode")

    assert products(encode(half), params) == products(encode(exact), params)
    assert HALF in {dtype for _, dtype in products(decode(half), params)}
    names = {e.primitive.name for e in equations(jax.make_jaxpr(decode(half))(params).jaxpr)}
    assert names & {"checkpoint", "remat", "remat2"}

    found, wanted = jax.jit(decode(half))(params), jax.jit(decode(exact))(params)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted, atol=0.05 * float(jnp.abs(wanted).max()))
    slopes = [
        jax.jit(jax.grad(lambda p, v=v: jnp.sum(decode(v)(p) ** 2)))(params) for v in (exact, remat)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), *slopes)


def test_perceptual_measures_have_full_precision_unless_told(backend):
    x = jnp.zeros((1, 32, 32, 3))
    assert all_exact(dists, load_dists(), x, x)
    weights = load_weights("alex")
    assert all_exact(lpips, weights, x, x)
    told = products(lambda p: lpips(p, x, x, jnp.bfloat16, "default"), weights)
    assert HALF in {dtype for _, dtype in told}
    assert {p for p, dtype in told if dtype == HALF} == {(Precision.DEFAULT,) * 2}
