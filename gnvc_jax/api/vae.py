"""A VAE with normalised latents, from a shipped model, a model file, a run or ported weights.

`load_vae` returns a `PretrainedVAE`, which goes from frames to normalised latents and back, a clip
at once (`encode`, `decode`) or a few frames at a time (`decode_frames`, `reconstruct`). Underneath
are the pure functions of `gnvc_jax.vae`; their latents are not normalised. What this class adds is
the choice of the decoder, the statistics of the latents, and compiled functions that are kept.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from gnvc_jax.arrays import AnyArray, Tree
from gnvc_jax.errors import UsageError
from gnvc_jax.frames import as_network_input, to_uint8
from gnvc_jax.model import as_float32
from gnvc_jax.porting.checkpoint import has_component, load_weights, refuse_other_components
from gnvc_jax.pretrained import find_model, is_run
from gnvc_jax.reconstruct import reconstruct_frames
from gnvc_jax.vae import (
    VAE,
    LightDecoder,
    LightDecoderConfig,
    VAEConfig,
    decode_chunk,
    decode_clip,
    encode_chunk,
    encode_clip,
)


@dataclasses.dataclass(frozen=True, eq=False)
class PretrainedVAE:
    """A VAE whose latents are normalised per channel, as the codec and the refiner take them.

    Attributes:
        config: Sizes.
        params: Parameters of `gnvc_jax.vae.VAE`, float32.
        mean: Mean of each channel of the latents, (c,).
        std: Standard deviation of each channel, (c,).
        decoder_config: Sizes of a light decoder that decodes in place of the VAE, or None; see
            `gnvc_jax.api.with_light_decoder`.
        decoder: Its parameters, None without one.
    """

    config: VAEConfig
    params: Tree
    mean: np.ndarray
    std: np.ndarray
    decoder_config: LightDecoderConfig | None = None
    decoder: Tree | None = None

    @functools.cached_property
    def _decoder(self) -> tuple[VAE | LightDecoder, Tree, Callable[[Array], Array]]:
        """What decodes, its parameters, and a function from normalised latents to its input."""
        if self.decoder_config is not None:
            # A light decoder takes normalised latents; a VAE those that its encoder gave.
            return LightDecoder(self.decoder_config), self.decoder, lambda latents: latents
        return VAE(self.config), self.params, lambda latents: latents * self.std + self.mean

    @functools.cached_property
    def _functions(self) -> tuple[Callable, Callable]:
        """Jitted functions that encode and decode whole clips."""
        vae, (decoder, _, scaled) = VAE(self.config), self._decoder

        # Parameters are arguments rather than constants: XLA would try to fold constants. Each size
        # of video compiles once.
        def encode(params: Tree, video: Array) -> Array:
            return (encode_clip(vae, params, video) - self.mean) / self.std

        def decode(params: Tree, latents: Array, frames: int, size: tuple[int, int]) -> Array:
            return decode_clip(decoder, params, scaled(latents), frames, size)

        return jax.jit(encode), jax.jit(decode, static_argnames=("frames", "size"))

    @functools.cached_property
    def _chunk_functions(self) -> tuple[Callable, Callable]:
        """Functions of the next frames or latents of a clip; decoding gives uint8 frames."""
        # Placed once: a NumPy tree would be copied to the device for every chunk.
        vae, (decoder, weights, scaled) = VAE(self.config), self._decoder
        own, weights = jax.device_put((self.params, weights))

        @jax.jit
        def encode(params: Tree, cache: Tree | None, frames: Array) -> tuple[Array, Tree]:
            latents, cache = encode_chunk(vae, params, cache, frames)
            return (latents - self.mean) / self.std, cache

        @jax.jit
        def decode(params: Tree, cache: Tree | None, latents: Array) -> tuple[Array, Tree]:
            # Rounded on the device, which makes the copy to the host a quarter of the size.
            frames, cache = decode_chunk(decoder, params, cache, scaled(latents))
            return to_uint8(frames), cache

        return functools.partial(encode, own), functools.partial(decode, weights)

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
        encode, _ = self._functions
        return encode(self.params, as_network_input(video))

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
        # The first latent is one frame, each later one `temporal_stride` frames. Both sizes are
        # static: they decide shapes.
        frames = frames or 1 + self.config.temporal_stride * (shape[1] - 1)
        size = size or (self.config.stride * shape[2], self.config.stride * shape[3])
        (_, decode), (_, params, _) = self._functions, self._decoder
        return decode(params, jnp.asarray(latents), frames, tuple(size))

    def decode_frames(
        self, latents: Float[AnyArray, "1 n h2 w2 c"]
    ) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
        """Decodes a clip latent by latent, so that only a few frames are in memory.

        Args:
            latents: Normalised latents.

        Yields:
            RGB frames, all that the latents stand for.
        """
        # A cache of None starts a clip: its first latent stands for one frame, later ones for four.
        (_, decode), cache = self._chunk_functions, None
        for i in range(latents.shape[1]):
            frames, cache = decode(cache, latents[:, i : i + 1])
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
    # A folder of `gnvc port` first, then a run; whatever else is the name or path of a model.
    if has_component(path, "vae"):
        architecture, params = load_weights(path, "vae", np.float32)
        assert isinstance(architecture.config, VAEConfig)
        mean, std = architecture.latents_mean, architecture.latents_std
        statistics = np.asarray(mean, np.float32), np.asarray(std, np.float32)
        return PretrainedVAE(architecture.config, params, *statistics)
    refuse_other_components(path, "vae")
    if is_run(path):
        # Imported here: coding with a model file does not need the training code.
        from gnvc_jax.training import latent_statistics, weights
        from gnvc_jax.training.run_folder import model_of

        experiment = model_of(path)
        known = latent_statistics.identity_statistics(experiment.vae.latent_channels)
        # Measured by a later stage, for which the VAE was finished; else mean 0 and std 1 remain.
        known |= latent_statistics.of_run(path, experiment)
        params = weights.load_vae(experiment)
        return PretrainedVAE(experiment.vae, params, known["mean"], known["std"])
    model = find_model(path)
    return PretrainedVAE(model.vae_config, as_float32(model.vae), model.mean, model.std)
