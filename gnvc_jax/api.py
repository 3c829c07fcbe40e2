"""VAE and refiner of a model as objects, for notebooks and for code of your own.

    vae = gnvc_jax.load_vae("small")            # or a model file, a run, a folder of `gnvc port`
    latents = vae.encode(video)                 # normalised, (b, n, h / 8, w / 8, c)
    frames = vae.decode(latents)

    refiner = gnvc_jax.load_refiner("weights")  # a folder of `gnvc port`, a model file or a run
    refined = refiner.refine(decoded, features, q_index=32, steps=5)

    codec = Codec(with_refiner(model, "weights"))       # a model with another refiner
    codec = Codec(with_light_decoder(model, "weights")) # a model with a light decoder

Each object holds a configuration and a tree of parameters, and calls pure functions with them:
`gnvc_jax.vae.encode_clip` and `decode_clip`, the Flax module `gnvc_jax.refiner.Refiner` and
`gnvc_jax.refiner.refine`. To differentiate, shard or train, use these with `params`. The whole
codec, from video to bytes and back, is `gnvc_jax.load_pretrained`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int, Key, UInt8

from gnvc_jax.arrays import AnyArray, Tree
from gnvc_jax.errors import UsageError
from gnvc_jax.frames import as_network_input, to_uint8
from gnvc_jax.model import Model
from gnvc_jax.porting.checkpoint import (
    COMPONENTS,
    PROMPT,
    has_component,
    load_prompt,
    load_weights,
    read_architecture,
)
from gnvc_jax.pretrained import find_model, is_run
from gnvc_jax.reconstruct import reconstruct_frames
from gnvc_jax.refiner import DiTConfig, Refiner, RefinerConfig, init_refiner, refine
from gnvc_jax.refiner.config import PATCH
from gnvc_jax.vae import (
    VAE,
    LightDecoderConfig,
    VAEConfig,
    decode_chunk,
    decode_clip,
    encode_chunk,
    encode_clip,
    grey_latents,
)

# Where a ported DiT begins, and its steps, as long as it has not been trained for a codec.
UNTRAINED = {"start": 0.8, "steps": 5}


@dataclasses.dataclass(frozen=True, eq=False)
class PretrainedVAE:
    """A VAE whose latents are normalised per channel, as the codec and the refiner take them.

    Attributes:
        config: Sizes.
        params: Parameters of `gnvc_jax.vae.VAE`, float32.
        mean: Mean of each channel of the latents, (c,).
        std: Standard deviation of each channel, (c,).
    """

    config: VAEConfig
    params: Tree
    mean: np.ndarray
    std: np.ndarray

    @functools.cached_property
    def _functions(self) -> tuple[Callable, Callable]:
        vae = VAE(self.config)

        def encode(params: Tree, video: Array) -> Array:
            return (encode_clip(vae, params, video) - self.mean) / self.std

        def decode(params: Tree, latents: Array, frames: int, size: tuple[int, int]) -> Array:
            return decode_clip(vae, params, latents * self.std + self.mean, frames, size)

        return jax.jit(encode), jax.jit(decode, static_argnames=("frames", "size"))

    @functools.cached_property
    def _chunk_functions(self) -> tuple[Callable, Callable]:
        """Functions of the next frames or latents of a clip; decoding gives uint8 frames."""
        vae, params = VAE(self.config), jax.device_put(self.params)

        @jax.jit
        def encode(params: Tree, cache: Tree | None, frames: Array) -> tuple[Array, Tree]:
            latents, cache = encode_chunk(vae, params, cache, frames)
            return (latents - self.mean) / self.std, cache

        @jax.jit
        def decode(params: Tree, cache: Tree | None, latents: Array) -> tuple[Array, Tree]:
            frames, cache = decode_chunk(vae, params, cache, latents * self.std + self.mean)
            return to_uint8(frames), cache

        return functools.partial(encode, params), functools.partial(decode, params)

    def encode(self, video: AnyArray) -> Float[Array, "b n h2 w2 c"]:
        """Encodes clips of any length and size.

        The last frame, row and column are repeated up to what the VAE can encode.

        Args:
            video: uint8 RGB, or float in [-1, 1]; (t, h, w, 3) or (b, t, h, w, 3).

        Returns:
            Normalised latents with n = 1 + ceil((t - 1) / 4), h2 = ceil(h / 8) and
            w2 = ceil(w / 8), for a VAE with the strides of Wan2.1.

        Raises:
            UsageError: If the video has another shape, type or range.
        """
        return self._functions[0](self.params, as_network_input(video))

    def decode(
        self,
        latents: Float[AnyArray, "b n h2 w2 c"],
        frames: int | None = None,
        size: tuple[int, int] | None = None,
    ) -> Float[Array, "b t h w 3"]:
        """Decodes clips.

        Args:
            latents: Normalised latents.
            frames: Number of frames to return, by default all that the latents stand for.
            size: Height and width to crop to, by default all.

        Returns:
            Video in [-1, 1], float32.

        Raises:
            UsageError: If the latents have another number of axes or channels.
        """
        shape = np.shape(latents)
        if len(shape) != 5 or shape[-1] != self.config.latent_channels:
            raise UsageError(
                f"latents are {shape}, expected (b, n, h, w, {self.config.latent_channels})"
            )
        frames = frames or 1 + self.config.temporal_stride * (shape[1] - 1)
        size = size or (self.config.stride * shape[2], self.config.stride * shape[3])
        return self._functions[1](self.params, jnp.asarray(latents), frames, tuple(size))

    def decode_frames(
        self, latents: Float[AnyArray, "1 n h2 w2 c"]
    ) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """Decodes a clip latent by latent, so that only a few frames are in memory.

        Args:
            latents: Normalised latents.

        Yields:
            RGB frames, all that the latents stand for.
        """
        cache = None
        for i in range(latents.shape[1]):
            frames, cache = self._chunk_functions[1](cache, latents[:, i : i + 1])
            yield from np.asarray(frames[0])

    def reconstruct(
        self, frames: Iterable[UInt8[np.ndarray, "h w 3"]]
    ) -> Iterator[tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w 3"]]]:
        """Encodes and decodes a video of any length and size, a few frames at a time.

        Args:
            frames: RGB frames of one size.

        Yields:
            Each frame, and what it becomes.
        """
        return reconstruct_frames(frames, *self._chunk_functions, self.config)


@dataclasses.dataclass(frozen=True, eq=False)
class PretrainedRefiner:
    """A diffusion refiner of normalised latents.

    Attributes:
        config: Sizes.
        params: Parameters of `gnvc_jax.refiner.Refiner`.
        text: Text condition (1, rows, width), None for a refiner without one.
        white: Factors (2, c) that whiten the first and the later latents, see
            `gnvc_jax.refiner.per_latent_factors`; None if latents are refined as they are.
        dtype: Type of matrix products and attention.
    """

    config: RefinerConfig
    params: Tree
    text: np.ndarray | None = None
    white: np.ndarray | None = None
    dtype: jax.typing.DTypeLike = jnp.float32

    @functools.cached_property
    def _velocity(self) -> Callable[..., Array]:
        refiner = Refiner(self.config, jnp.dtype(self.dtype))

        def velocity(params: Tree, *inputs: Array) -> Array:
            return cast(Array, refiner.apply({"params": params}, *inputs, self.text))

        return jax.jit(velocity)

    def velocity(
        self,
        state: Float[AnyArray, "b t h w c"],
        tau: Float[AnyArray, " b"],
        decoded: Float[AnyArray, "b t h w c"],
        features: Float[AnyArray, "b t h w f"],
        q_index: Int[AnyArray, " b"],
    ) -> Float[Array, "b t h w c"]:
        """Velocity of the flow, data minus noise; see `gnvc_jax.refiner.Refiner`.

        Args:
            state: State of the flow at time `tau`, whitened.
            tau: Flow time, 0 for noise and 1 for data.
            decoded: Decoded latents, whitened.
            features: Features of the codec.
            q_index: Quality levels, 0 (worst) to 63.
        """
        return self._velocity(self.params, state, tau, decoded, features, q_index)

    def refine(
        self,
        decoded: Float[AnyArray, "b t h w c"],
        features: Float[AnyArray, "b t h w f"] | None = None,
        q_index: int = 0,
        steps: int | None = None,
        seed: int = 0,
    ) -> Float[Array, "b t h w c"]:
        """Refines decoded latents of one group, in overlapping windows if it is long.

        Args:
            decoded: Normalised latents as a codec decodes them, h and w even.
            features: Features of the codec; None for zeros.
            q_index: Quality level that the latents were coded at, 0 (worst) to 63; 63 - qp.
            steps: Steps of the flow, None for what the refiner was trained for; with 0, the latents
                are returned as they are.
            seed: Seed of the noise.

        Returns:
            Refined latents, normalised in the same way as the input.

        Raises:
            UsageError: If the latents or features have another number of axes or channels, or
                sides that do not divide into patches.
        """
        shape, channels = np.shape(decoded), self.config.dit.channels
        if len(shape) != 5 or shape[-1] != channels or any(side % PATCH for side in shape[2:4]):
            raise UsageError(
                f"latents are {shape}, expected (b, t, h, w, {channels}) with even h and w"
            )
        given = (*shape[:-1], self.config.features)
        if features is None:
            features = jnp.zeros(given)
        elif np.shape(features) != given:
            raise UsageError(f"features are {np.shape(features)}, expected {given}")

        def velocity(state: Array, tau: Array, decoded: Array, features: Array) -> Array:
            b = state.shape[0]
            conditions = jnp.full((b,), tau), decoded, features, jnp.full((b,), q_index)
            return self.velocity(state, *conditions)

        steps = self.config.steps if steps is None else steps
        inputs = jnp.asarray(decoded), jnp.asarray(features), jax.random.key(seed), steps
        return refine(velocity, self.config, *inputs, self.white)


def load_vae(path: str | Path) -> PretrainedVAE:
    """Loads a VAE.

    A run whose VAE has not been measured yet (stage `vae`) has no statistics of its latents; they
    are then left as the encoder gives them.

    Args:
        path: Name of a shipped model, model file, run folder, or folder of `gnvc port`.

    Raises:
        FileNotFoundError: If there is none of these.
        PortError, ModelCorrupt, UsageError: If the files are damaged.
    """
    if has_component(path, "vae"):
        architecture, params = load_weights(path, "vae", np.float32)
        assert isinstance(architecture.config, VAEConfig)
        mean, std = architecture.latents_mean, architecture.latents_std
        statistics = np.asarray(mean, np.float32), np.asarray(std, np.float32)
        return PretrainedVAE(architecture.config, params, *statistics)
    _refuse_other_components(path, "vae")
    if is_run(path):
        from gnvc_jax.training import latent_statistics, weights
        from gnvc_jax.training.checkpoints import model_of

        experiment = model_of(path)
        known = latent_statistics.identity_statistics(experiment.vae.latent_channels)
        known |= latent_statistics.of_run(path, experiment)
        params = weights.load_vae(experiment)
        return PretrainedVAE(experiment.vae, params, known["mean"], known["std"])
    model = find_model(path)
    return PretrainedVAE(model.vae_config, _float32(model.vae), model.mean, model.std)


def load_refiner(
    path: str | Path,
    *,
    features: int = 256,
    context_every: int = 2,
    dtype: jax.typing.DTypeLike = jnp.float32,
    seed: int = 0,
) -> PretrainedRefiner:
    """Loads a refiner from a model, or makes one from a ported DiT.

    A ported DiT knows nothing of a codec. What it lacks is initialised so that its velocity is
    unchanged at first: the conditions on features and quality are zero, and so is the output of the
    context blocks of a DiT without VACE's adapter. VACE's adapter also sees the latents of a grey
    clip; they come from the VAE in the same folder, and are zero if there is none.

    Args:
        path: Name of a shipped model, model file, run folder, or folder of `gnvc port` with a DiT.
        features: Channels of the codec's features, for a ported DiT.
        context_every: Blocks per new context block, for a ported DiT without an adapter; 0 for no
            context blocks. The DiT then sees decoded latents only in the state that refinement
            begins with.
        dtype: Type of matrix products and attention.
        seed: Seed of new parameters.

    Raises:
        FileNotFoundError: If there is none of these.
        UsageError: If the model has no refiner, or sizes do not fit.
        PortError, ModelCorrupt: If the files are damaged.
    """
    if has_component(path, "dit"):
        return _refiner_of_ported_dit(path, features, context_every, dtype, seed)
    _refuse_other_components(path, "dit")
    if is_run(path):
        found = _refiner_of_run(path, dtype)
    else:
        model = find_model(path)
        params = _float32(model.refiner)
        given = params, model.text, model.white, dtype
        found = model.refiner_config and PretrainedRefiner(model.refiner_config, *given)
    if found is None:
        raise UsageError(
            f"{path}: this model has no refiner; use one that has, or a folder of `gnvc port` with "
            "a DiT"
        )
    return found


def with_refiner(model: Model, path: str | Path, start: float | None = None) -> Model:
    """Gives a model another refiner. Its streams stay valid, since they do not depend on it.

    A ported DiT serves without training, as in the restoration of images by generative priors
    (SDEdit, Meng et al. 2022, arXiv 2108.01073): noise drowns the coding errors, and the pretrained
    flow leads back to natural latents. Its text condition is the one stored by `gnvc port`.

    Args:
        model: Model whose VAE is the one that the DiT was trained with.
        path: See `load_refiner`.
        start: Flow time at which refinement begins, 0 (from noise alone) to 1 (unchanged); by
            default what the refiner was trained for, and `UNTRAINED` for a ported DiT.

    Returns:
        The model with this refiner.

    Raises:
        UsageError: If the latents of the model are not those of the refiner, or `start` is outside
            [0, 1).
        FileNotFoundError, PortError, ModelCorrupt: See `load_refiner`.
    """
    if start is not None and not 0.0 <= start < 1.0:
        raise UsageError(f"refinement must begin at a flow time in [0, 1), got {start:g}")
    ported = has_component(path, "dit")
    if ported:  # before gigabytes are read
        dit = read_architecture(path, "dit").config
        assert isinstance(dit, DiTConfig)
        check_channels(dit, path, model.vae_config.latent_channels, model.name)
        if has_component(path, "vae"):
            _check_statistics(model, path, "vae")
    refiner = load_refiner(path, features=model.codec_config.width, context_every=0)
    config = refiner.config
    check_channels(config.dit, path, model.vae_config.latent_channels, model.name)
    if config.dit.context_every and config.features != model.codec_config.width:
        raise UsageError(
            f"the refiner of {path} takes {config.features} features of a codec, {model.name} has "
            f"{model.codec_config.width}"
        )
    if ported:
        config = dataclasses.replace(config, **UNTRAINED)
    if start is not None:
        config = dataclasses.replace(config, start=start)
    parts = {"refiner": refiner.params, "text": refiner.text, "white": refiner.white}
    return dataclasses.replace(model, refiner_config=config, **parts)


def with_light_decoder(model: Model, path: str | Path) -> Model:
    """Gives a model a light decoder in place of its VAE's. Its streams stay valid.

    Args:
        model: Model with the VAE of Wan2.1, or one of the same latents.
        path: Folder of `gnvc port` with a light decoder.

    Returns:
        The model with this decoder.

    Raises:
        UsageError: If the latents of the model are others, or it predicts from decoded frames.
        FileNotFoundError, PortError: If there is no such decoder, or the files are damaged.
    """
    architecture, params = load_weights(path, "decoder", np.float32)
    config = architecture.config
    assert isinstance(config, LightDecoderConfig)
    if model.codec_config.motion is not None:
        raise UsageError(
            f"{model.name} predicts from the frames that its own VAE decodes, so another decoder "
            "cannot take its place"
        )
    _check_statistics(model, path, "decoder")
    return dataclasses.replace(model, decoder_config=config, decoder=params)


def _check_statistics(model: Model, path: str | Path, component: str) -> None:
    """Raises UsageError if a model normalises latents unlike a ported component."""
    known = read_architecture(path, component)
    expected = np.array([known.latents_mean, known.latents_std], np.float32)
    found = np.array([model.mean, model.std])
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-3, atol=1e-3):
        raise UsageError(
            f"{model.name} normalises latents unlike the {component} in {path}; use a model with "
            "that VAE, such as `gnvc calibrate` makes of ported weights"
        )


def check_channels(dit: DiTConfig, path: str | Path, channels: int, vae: str | Path) -> None:
    """Raises UsageError unless a DiT and a VAE have latents of as many channels.

    Args:
        dit: Sizes of the DiT.
        path: Where it comes from, for the message.
        channels: Channels of the VAE's latents.
        vae: Where that comes from.
    """
    if dit.channels != channels:
        raise UsageError(
            f"the DiT of {path} works on latents of {dit.channels} channels, those of {vae} have "
            f"{channels}; use the VAE that the DiT was trained with"
        )


def _refiner_of_run(path: str | Path, dtype: jax.typing.DTypeLike) -> PretrainedRefiner | None:
    """Loads the refiner of a run and of those it started from, None if there is none.

    Unlike that of a model file, it is not rounded.
    """
    from gnvc_jax.training import latent_statistics, weights
    from gnvc_jax.training.checkpoints import model_of

    experiment = model_of(path)
    if experiment.refiner is None:
        return None
    refiner = Refiner(experiment.refiner)
    shapes = jax.eval_shape(lambda key: init_refiner(refiner, key), jax.random.key(0))
    statistics = latent_statistics.of_run(path, experiment)
    found = weights.load(experiment, {"refiner": shapes}, statistics)
    weights.check_complete(found, {"refiner": shapes})
    text = weights.load_text(experiment)
    white = statistics["white"]
    return PretrainedRefiner(experiment.refiner, found["refiner"], text, white, dtype)


def _refiner_of_ported_dit(
    path: str | Path, features: int, context_every: int, dtype: jax.typing.DTypeLike, seed: int
) -> PretrainedRefiner:
    """Makes a refiner of a ported DiT, see `load_refiner`."""
    dit = read_architecture(path, "dit").config
    assert isinstance(dit, DiTConfig)
    if context_every and not dit.context_every:
        new = {"context_every": context_every, "context_channels": dit.channels}
        dit = dataclasses.replace(dit, **new)
    config = RefinerConfig(dit, features=features)
    known = {f"dit/{k}": x for k, x in flatten_dict(load_weights(path, "dit")[1], sep="/").items()}
    if config.vace_layout and has_component(path, "vae"):
        vae = load_vae(path)
        grey = grey_latents(VAE(vae.config), vae.params)
        known["grey"] = (grey - vae.mean) / vae.std
    known |= _new_parameters(config, set(known), jax.random.key(seed))
    text = None
    if dit.text_length:
        kept = Path(path) / PROMPT
        no_text = np.zeros((1, 1, dit.text_width), np.float32)
        text = load_prompt(kept, dit) if kept.is_file() else no_text
    return PretrainedRefiner(config, unflatten_dict(known, sep="/"), text, None, dtype)


def _new_parameters(config: RefinerConfig, known: set[str], key: Key[Array, ""]) -> dict[str, Any]:
    """Draws parameters of a refiner by path, without those that are known."""

    @jax.jit
    def init(key: Array) -> dict[str, Any]:
        params = flatten_dict(init_refiner(Refiner(config), key), sep="/")
        # The compiler drops what is not returned, so a DiT never exists twice in memory.
        return {path: x for path, x in params.items() if path not in known}

    return init(key)


def _float32(params: Tree) -> Tree:
    """Converts parameters of a model file, whose kernels are stored in float16, to float32."""
    return jax.tree.map(lambda x: np.asarray(x, np.float32), params)


def _refuse_other_components(path: str | Path, wanted: str) -> None:
    """Refuses a folder of `gnvc port` that lacks the wanted component.

    Raises:
        FileNotFoundError: If the folder holds other components only.
    """
    if others := [name for name in COMPONENTS if has_component(path, name)]:
        raise FileNotFoundError(f"{path}: holds {', '.join(others)}, but no ported {wanted}")
