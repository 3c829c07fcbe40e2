"""The programs that coding a video consists of: pure functions of parameters and arrays, jitted.

`codec_programs` makes them for a model: what a planner compiles, what is exported for use
elsewhere, and what `gnvc_jax.functions.CodecFunctions` binds to parameters. Nothing keeps state:
caches of the VAE and states of the codec go in and come out.

    frames --encode_video--> latent --analyse--> symbols --reconstruct--> decoded latent
    decoded latent --decode_latents (intra), compensate (with motion)--> uint8 frames
    last frame, vectors --predict--> predicted frames and their latent
    state of the flow --velocity--> its velocity
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from gnvc_jax.arrays import Array, Tree
from gnvc_jax.codec import scales
from gnvc_jax.codec.entropy import LatentSymbols
from gnvc_jax.codec.model import CodecState, LatentCodec, pad_latents
from gnvc_jax.codec.transform import DecodedLatent
from gnvc_jax.frames import to_float, to_uint8
from gnvc_jax.model import Model
from gnvc_jax.motion.warp import predict
from gnvc_jax.parallel import backend, constrain
from gnvc_jax.refiner import Refiner
from gnvc_jax.vae import VAE, LightDecoder, decode_chunk, encode_chunk

KEPT_PROGRAMS = 8  # sets of programs that a process keeps, each of another architecture


class CodecPrograms(NamedTuple):
    """The jitted functions of a model; each takes the parameters that it needs as first argument.

    Latents are normalised: (1, t, h, w, c) for a clip, (1, h, w, c) for a single one.

    Attributes:
        encode_video: (vae, cache, frames) -> latents, cache; frames float (1, t, h, w, 3) in
            [-1, 1], cache None at the start of a group.
        decode_latents: (vae, cache, latents) -> uint8 frames, cache; it takes the parameters of the
            light decoder if the model has one.
        predict: (vae, reference, vectors) -> frames, latent; the four frames that vectors
            (1, 4, h / 16, w / 16, 2) predict from a uint8 frame (1, h, w, 3).
        compensate: (vae, decoded, prediction, predicted) -> uint8 frames of a latent with motion.
        add_latent: (vae, frames, latent, first) -> uint8 frames with what a latent adds to them.
        analyse: (codec, latent, state, q_index, prediction, worth) -> symbols; worth is optional.
        reconstruct: (codec, symbols, state, q_index, prediction) -> decoded latent, state.
        velocity: (refiner, state, tau, decoded, features, q_index) -> velocity, with the level of
            each latent; None for a model without a refiner.
    """

    encode_video: Callable
    decode_latents: Callable
    predict: Callable
    compensate: Callable
    add_latent: Callable
    analyse: Callable
    reconstruct: Callable
    velocity: Callable | None


def shard_columns(tree: Tree) -> Tree:
    """Spreads columns of arrays (..., h, w, c) over the mesh axis `context`, if it divides them."""
    return jax.tree.map(lambda x: constrain(x, context=x.ndim - 2), tree)


def codec_programs(model: Model) -> CodecPrograms:
    """Builds the programs of a model.

    Parameters are passed when a program is called: of the model, only configurations, statistics
    and text are used here.
    """
    # Modules without parameters. The statistics are small and become constants of the programs.
    vae, codec = VAE(model.vae_config), LatentCodec(model.codec_config)
    light = model.decoder_config and LightDecoder(model.decoder_config)
    mean, std, text = model.mean, model.std, model.text

    @jax.jit
    def encode_video(params: Tree, cache: Tree | None, frames: Array) -> tuple[Array, Tree]:
        # A cache of None and a dictionary are different inputs to jit: two programs, for the start
        # of a group and for what follows.
        latents, cache = encode_chunk(vae, params, cache, shard_columns(frames))
        return (latents - mean) / std, shard_columns(cache)

    @jax.jit
    def decode_latents(params: Tree, cache: Tree | None, latents: Array) -> tuple[Array, Tree]:
        # A light decoder was trained on normalised latents; the VAE wants its own units back.
        latents = shard_columns(latents)
        if light:
            frames, cache = decode_chunk(light, params, cache, latents)
        else:
            frames, cache = decode_chunk(vae, params, cache, latents * std + mean)
        return to_uint8(frames), shard_columns(cache)

    @jax.jit
    def predict_frames(params: Tree, reference: Array, vectors: Array) -> tuple[Array, Array]:
        # (1, h, w, 3) and (1, 4, h / 16, w / 16, 2) -> frames (1, 4, h, w, 3) -> latent (1, h, w,
        # c).
        frames = predict(to_float(reference), vectors, model.codec_config.motion_kernel)
        # Motion needs a linear VAE, whose cache is empty: {} goes on with a clip, None starts one.
        latents, _ = encode_chunk(vae, params, {}, shard_columns(frames))
        return frames, ((latents - mean) / std)[:, 0]

    @jax.jit
    def compensate(
        params: Tree, decoded: DecodedLatent, prediction: Array, predicted: Array
    ) -> Array:
        # Back to the units of the VAE, whose inverse transform is applied.
        latents = (x * std + mean for x in (decoded.latent, prediction))
        given = *latents, predicted, decoded.fresh, decoded.detail
        return to_uint8(cast(Array, vae.apply({"params": params}, *given, method="compensate")))

    @functools.partial(jax.jit, static_argnames="first")
    def add_latent(params: Tree, frames: Array, latent: Array, first: bool) -> Array:
        # A difference of latents: the mean cancels.
        given = to_float(frames), latent[:, None] * std, first
        return to_uint8(cast(Array, vae.apply({"params": params}, *given, method="add_latents")))

    @jax.jit
    def analyse(
        params: Tree,
        latent: Array,
        state: CodecState | None,
        q_index: Array,
        prediction: Array | None,
        worth: Array | None = None,
    ) -> LatentSymbols:
        # Frames were padded for the VAE only; the codec needs multiples of eight latents.
        latent = shard_columns(pad_latents(latent[:, None])[:, 0])
        inputs = latent, state, q_index, prediction, worth
        # The bitstream knows no batch axis, and its symbols are integers.
        symbols = codec.apply({"params": params}, *inputs, method="encode")
        return jax.tree.map(lambda x: x[0].astype(jnp.int32), symbols)

    @jax.jit
    def reconstruct(
        params: Tree,
        symbols: LatentSymbols,
        state: CodecState | None,
        q_index: Array,
        prediction: Array | None,
    ) -> tuple[DecodedLatent, CodecState]:
        # Networks hold whole numbers in float32, with a batch axis.
        symbols = jax.tree.map(lambda x: x.astype(jnp.float32)[None], symbols)
        inputs = symbols, state, q_index, prediction
        return shard_columns(codec.apply({"params": params}, *inputs, method="decode"))

    velocity: Callable | None = None
    if model.refiner_config is not None:
        # Half precision where it is faster: the refiner shapes pictures, never symbols.
        dtype = jnp.float32 if backend() == "cpu" else jnp.bfloat16
        refiner = Refiner(model.refiner_config, dtype)
        # XLA's default order of operations on CPUs keeps 2.7 times as much in memory at 832x480.
        order = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}

        @functools.partial(jax.jit, compiler_options=order if backend() == "cpu" else None)
        def refiner_velocity(
            params: Tree, state: Array, tau: Array, decoded: Array, features: Array, q_index: Array
        ) -> Array:
            inputs = decoded, features, q_index, text
            return cast(Array, refiner.apply({"params": params}, state, tau, *inputs))

        velocity = refiner_velocity

    return CodecPrograms(
        encode_video,
        decode_latents,
        predict_frames,
        compensate,
        add_latent,
        analyse,
        reconstruct,
        velocity,
    )


class SharedPrograms(NamedTuple):
    """What models of equal configurations have in common, see `shared_programs`.

    Attributes:
        programs: Programs of the networks.
        scale_index: Jitted `gnvc_jax.codec.scales.scale_index` for the sizes of the codec.
    """

    programs: CodecPrograms
    scale_index: Callable


_shared: dict[tuple, SharedPrograms] = {}


def shared_programs(model: Model) -> SharedPrograms:
    """Returns programs that all models with the same configurations and statistics share.

    Parameters are arguments of programs, so a process that makes several codecs, or the same one
    again, traces and compiles each program only once. The last `KEPT_PROGRAMS` are kept.
    """
    configs = model.vae_config, model.codec_config, model.refiner_config, model.decoder_config
    # What programs hold as constants. The mesh decides what they compile to.
    constants = (
        None if x is None else np.asarray(x).tobytes() for x in (model.mean, model.std, model.text)
    )
    # Compared by value, not by identity: two models loaded from one file share their programs.
    key = repr(configs), *constants, jax.sharding.get_mesh()
    if key not in _shared:
        if len(_shared) >= KEPT_PROGRAMS:
            del _shared[next(iter(_shared))]  # the oldest: dictionaries keep their order
        scale_index = functools.partial(scales.scale_index, model.codec_config)
        _shared[key] = SharedPrograms(
            codec_programs(model), jax.jit(scale_index, static_argnames="dtype")
        )
    return _shared[key]
