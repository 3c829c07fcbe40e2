"""The parts of a model as objects, for notebooks and for code of one's own.

    vae = gnvc_jax.load_vae("small")                    # or a folder of `gnvc port`, a model file
    latents = vae.encode(video)                         # normalised, (b, n, h / 8, w / 8, c)
    frames = vae.decode(latents)

    refiner = gnvc_jax.load_refiner("weights")          # a folder of `gnvc port`, or a model file
    refined = refiner.refine(decoded, features, q_index=32, steps=5)

    codec = gnvc_jax.load_pretrained("small")           # the whole codec: video <-> bytes

Each object holds a configuration and a tree of parameters, and calls pure functions with them:
`gnvc_jax.vae.encode_clip` and `decode_clip`, the Flax module `gnvc_jax.refiner.Refiner` and
`gnvc_jax.refiner.refine`. Take `params` and these to differentiate, to shard or to train.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from gnvc_jax.errors import UsageError
from gnvc_jax.porting.checkpoint import (
    COMPONENTS,
    PROMPT,
    has_component,
    load_prompt,
    load_weights,
    read_architecture,
)
from gnvc_jax.pretrained import find_model
from gnvc_jax.refiner import DiTConfig, Refiner, RefinerConfig, per_latent_factors, refine
from gnvc_jax.vae import VAE, VAEConfig, decode_clip, encode_clip

Array = jax.Array
Tree = Any


def to_video(video: np.ndarray | Array) -> Array:
    """Checks a video and brings it to the form that networks take.

    Args:
        video: uint8 RGB, or float in [-1, 1]; (t, h, w, 3), or with a batch axis before.

    Returns:
        float32 in [-1, 1], (b, t, h, w, 3).

    Raises:
        UsageError: If the type, the shape or the range is another.
    """
    shape, dtype = np.shape(video), jnp.result_type(video)
    if len(shape) not in (4, 5) or shape[-1] != 3 or 0 in shape:
        raise UsageError(f"video is {shape}, expected (frames, height, width, 3) or a batch of it")
    if dtype == jnp.uint8:
        video = jnp.asarray(video, jnp.float32) / 127.5 - 1.0
    elif jnp.issubdtype(dtype, jnp.floating):
        video = jnp.asarray(video, jnp.float32)
        # A tracer has no values to look at; inside `jit` the range is the caller's affair.
        if not isinstance(video, jax.core.Tracer):
            low, high = float(video.min()), float(video.max())
            if not (low >= -1.0 and high <= 1.0):
                raise UsageError(f"video has values in [{low:g}, {high:g}], expected [-1, 1]")
    else:
        raise UsageError(f"video is {dtype}, expected uint8, or float in [-1, 1]")
    return video if len(shape) == 5 else video[None]


@dataclasses.dataclass(frozen=True, eq=False)
class PretrainedVAE:
    """A VAE whose latents are normalised per channel, as the codec and the refiner take them.

    Attributes:
        config: Sizes.
        params: Parameters of `gnvc_jax.vae.VAE`, float32.
        mean, std: Statistics of the latents, (c,).
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

    def encode(self, video: np.ndarray | Array) -> Array:
        """Encodes clips of any length and size; the last frame, row and column are repeated.

        Args:
            video: See `to_video`.

        Returns:
            Normalised latents (b, 1 + ceil((t - 1) / 4), ceil(h / 8), ceil(w / 8), c) for a VAE
            with the strides 4 and 8.
        """
        return self._functions[0](self.params, to_video(video))

    def decode(
        self, latents: Array, frames: int | None = None, size: tuple[int, int] | None = None
    ) -> Array:
        """Decodes normalised latents (b, n, h', w', c).

        Args:
            latents: Latents.
            frames: Number of frames to return, by default all that the latents stand for.
            size: Height and width to crop to, by default all.

        Returns:
            Video (b, t, h, w, 3) float32 in [-1, 1].

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


@dataclasses.dataclass(frozen=True, eq=False)
class PretrainedRefiner:
    """A diffusion refiner of normalised latents.

    Attributes:
        config: Sizes.
        params: Parameters of `gnvc_jax.refiner.Refiner`.
        text: Text condition (1, rows, width), None for a refiner without.
        white: Factors (2, c) that whiten first and later latents, None for latents that need none.
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
            return refiner.apply({"params": params}, *inputs, self.text)

        return jax.jit(velocity)

    def velocity(
        self, state: Array, tau: Array, decoded: Array, features: Array, q_index: Array
    ) -> Array:
        """Velocity of the flow, data minus noise; see `gnvc_jax.refiner.Refiner`.

        Args:
            state: State of the flow, (b, t, h, w, c), whitened.
            tau: Flow time (b,), 0 for noise, 1 for data.
            decoded: Decoded latents, like the state.
            features: Features of the codec, (b, t, h, w, f).
            q_index: Quality levels (b,), int32.
        """
        return self._velocity(self.params, state, tau, decoded, features, q_index)

    def refine(
        self,
        decoded: Array,
        features: Array | None = None,
        q_index: int = 0,
        steps: int = 1,
        seed: int = 0,
    ) -> Array:
        """Refines decoded latents of one group, in overlapping windows if it is long.

        Args:
            decoded: Normalised latents as a codec decodes them, (b, t, h, w, c), h and w even.
            features: Features of the codec, (b, t, h, w, f); None for zeros.
            q_index: Quality level that the latents were coded at, 0..63.
            steps: Steps of the flow; 0 returns the latents as they are.
            seed: Seed of the noise.

        Returns:
            Normalised latents of the same shape.
        """
        shape = np.shape(decoded)
        if features is None:
            features = jnp.zeros((*shape[:-1], self.config.features))
        white = 1.0
        if self.white is not None:
            white = per_latent_factors(jnp.asarray(self.white), shape[1])

        def velocity(state: Array, tau: Array, decoded: Array, features: Array) -> Array:
            b = state.shape[0]
            conditions = jnp.full((b,), tau), decoded, features, jnp.full((b,), q_index)
            return self.velocity(state, *conditions)

        inputs = jnp.asarray(decoded) * white, features, jax.random.key(seed), steps
        return refine(velocity, self.config, *inputs) / white


def load_vae(path: str | Path) -> PretrainedVAE:
    """Loads a VAE.

    Args:
        path: Folder of `gnvc port`, a model file, or the name of a shipped model.

    Raises:
        FileNotFoundError: If there is none of these.
        PortError, ModelCorrupt: If the files are damaged.
    """
    if has_component(path, "vae"):
        architecture, params = load_weights(path, "vae", np.float32)
        mean, std = architecture.latents_mean, architecture.latents_std
        return PretrainedVAE(architecture.config, params, np.float32(mean), np.float32(std))
    _no_other_component(path, "vae")
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
    """Loads a refiner, from a model or from a ported DiT.

    A ported DiT knows nothing of a codec. What it lacks is initialised so that the DiT's velocity
    is unchanged at first: the conditions on features and quality are zero, and so is the output
    of the context blocks of a DiT without VACE's adapter.

    Args:
        path: Folder of `gnvc port` with a DiT, a model file, or the name of a shipped model.
        features: Channels of the codec's features, for a ported DiT.
        context_every: Blocks per new context block, for a ported DiT without an adapter.
        dtype: Type of matrix products and attention.
        seed: Seed of new parameters.

    Raises:
        FileNotFoundError: If there is none of these.
        UsageError: If the model has no refiner, or sizes do not fit.
        PortError, ModelCorrupt: If the files are damaged.
    """
    if not has_component(path, "dit"):
        _no_other_component(path, "dit")
        model = find_model(path)
        if model.refiner_config is None:
            raise UsageError(f"{path}: this model has no refiner")
        given = _float32(model.refiner), model.text, model.white, dtype
        return PretrainedRefiner(model.refiner_config, *given)
    dit = read_architecture(path, "dit").config
    assert isinstance(dit, DiTConfig)
    if not dit.context_every:
        new = {"context_every": context_every, "context_channels": dit.channels}
        dit = dataclasses.replace(dit, **new)
    config = RefinerConfig(dit, features=features)
    known = {f"dit/{k}": x for k, x in flatten_dict(load_weights(path, "dit")[1], sep="/").items()}
    text = None
    if dit.text_length:
        kept = Path(path) / PROMPT
        text = np.zeros((1, 1, dit.text_width), np.float32)
        text = load_prompt(kept, dit) if kept.is_file() else text
    known |= _new_parameters(config, set(known), jax.random.key(seed))
    return PretrainedRefiner(config, unflatten_dict(known, sep="/"), text, None, dtype)


def _new_parameters(config: RefinerConfig, known: set[str], key: Array) -> dict[str, Array]:
    """Freshly initialised parameters of a refiner, by path, but for those known."""
    dit = config.dit
    latents, one = jnp.zeros((1, 1, 2, 2, dit.channels)), jnp.zeros((1,))
    features = jnp.zeros((1, 1, 2, 2, config.features))
    text = jnp.zeros((1, 1, dit.text_width)) if dit.text_length else None

    @jax.jit
    def init(key: Array) -> dict[str, Array]:
        inputs = latents, one, latents, features, one.astype(jnp.int32), text
        params = flatten_dict(Refiner(config).init(key, *inputs)["params"], sep="/")
        # What is not returned is not computed: a DiT need not exist twice.
        return {path: x for path, x in params.items() if path not in known}

    return init(key)


def _float32(params: Tree) -> Tree:
    """Parameters of a model file, whose kernels are half floats, in float32."""
    return jax.tree.map(lambda x: np.asarray(x, np.float32), params)


def _no_other_component(path: str | Path, wanted: str) -> None:
    """FileNotFoundError for a folder of `gnvc port` that lacks the wanted component."""
    if others := [name for name in COMPONENTS if has_component(path, name)]:
        raise FileNotFoundError(f"{path}: holds {', '.join(others)}, but no ported {wanted}")
