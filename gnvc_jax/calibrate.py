"""A latent codec for any VAE from statistics alone (`gnvc calibrate`).

Nothing is trained. The codec is the usual one with its networks at zero, and so a classical
transform coder: the Karhunen-Loeve transform of cells of 2x2 latents, a step for each quality
level, and a probability table for each coefficient and level. Predicted latents are coded as the
difference to the latent decoded before. Training can go on from the model file (`init.model`).

It takes two passes over latents of random clips. The first measures covariances and gives the
transforms (`transforms_from_statistics`); steps are then made coarse enough for the largest
coefficients (`within_range`). The second codes some of the clips, in order to choose tables by the
symbols that really occur (`tables_from_symbols`): a prediction from decoded latents
is worse than one from the source, which is all that covariances know.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from gnvc_jax.arrays import Tree
from gnvc_jax.cache_latents import find_vae, frozen_encoder
from gnvc_jax.codec.config import (
    KNOTS,
    LATENT_MULTIPLE,
    QUALITIES,
    SYMBOL_BOUND,
    CodecConfig,
)
from gnvc_jax.codec.fit import (
    deviation_of_symbols,
    init_from_statistics,
    quiet_hyperprior,
    table_bias,
    worth_of_step,
)
from gnvc_jax.codec.layers import space_to_depth
from gnvc_jax.codec.model import LatentCodec, LatentCodecOutput, init_codec
from gnvc_jax.codec.quality import SPACING
from gnvc_jax.data.clips import clip_dataset
from gnvc_jax.data.index import ClipIndex
from gnvc_jax.data.left_out import LeftOut
from gnvc_jax.errors import UsageError
from gnvc_jax.model import Model, build
from gnvc_jax.moments import Moments
from gnvc_jax.porting.checkpoint import has_component
from gnvc_jax.pretrained import find_model, is_run

Latents = Float[np.ndarray, "t h w c"]

# Steps of the quantiser at the lowest and at the best quality level, in units of the latents, whose
# mean square is about 1.
COARSEST, FINEST = 3.0, 0.1
KEPT = 8  # clips that tables are chosen on, and the range of symbols
HEADROOM = 1.5  # of that range, for other clips


def calibrate(
    source: str | Path,
    vae: str,
    *,
    clips: int = 100,
    frames: int = 17,
    size: tuple[int, int] = (256, 256),
    config: CodecConfig | None = None,
    name: str = "calibrated",
    progress: bool = True,
) -> Model:
    """Fits a latent codec to a VAE.

    Args:
        source: Folder of videos, list of videos (.txt), or a single video.
        vae: VAE, as `gnvc_jax.cache_latents.find_vae` takes it.
        clips: Number of random clips to measure.
        frames: Number of frames of a clip.
        size: Height and width of a clip in pixels.
        config: Sizes of the codec; by default those of the model that the VAE comes from, else the
            full size.
        name: Name of the model.
        progress: Whether to show progress.

    Returns:
        The model, without refiner.

    Raises:
        UsageError: If the size or number of frames does not suit the VAE, or no video is long
            enough.
        FileNotFoundError: If the VAE or the videos are not there.
    """
    vae_config, vae_params, mean, std = find_vae(vae)
    side = vae_config.stride * LATENT_MULTIPLE
    if any(pixels < side or pixels % side for pixels in size):
        raise UsageError(f"size {size[1]}x{size[0]}: expected multiples of {side}")
    if frames <= vae_config.temporal_stride:
        raise UsageError(f"frames {frames}: at least one latent must follow the first")
    if config is None:
        config = default_config(vae, vae_config.latent_channels)
    if config.motion is not None or config.latent_channels != vae_config.latent_channels:
        raise UsageError(
            f"the codec must be without motion and for {vae_config.latent_channels} channels"
        )
    # The first pass measures while it encodes, and keeps a few clips for the second pass.
    encode, _ = frozen_encoder(vae, frames)
    index = ClipIndex(source, None, LeftOut())
    batches = iter(clip_dataset(index, frames=frames, size=size, batch=1, seed=0))
    kept: list[Latents] = []

    def latents() -> Iterable[Latents]:
        for _ in tqdm(range(clips), "measuring", unit="clip", disable=not progress):
            found = encode(next(batches)[0])
            if len(kept) < KEPT:
                kept.append(found)
            yield found

    params = transforms_from_statistics(config, latents())
    params = within_range(params, np.stack(kept))
    params = tables_from_symbols(config, params, np.stack(kept), progress)
    return build(name, vae_config, config, vae_params, params, mean, std)


def default_config(vae: str, channels: int) -> CodecConfig:
    """Chooses the sizes of the codec for a VAE, see `calibrate`."""
    if has_component(vae, "vae") or is_run(vae):
        return CodecConfig(latent_channels=channels)
    # Calibration is for codecs without motion, even if the model's own has some.
    return dataclasses.replace(find_model(vae).codec_config, motion=None, intra_offset=0)


def transforms_from_statistics(config: CodecConfig, clips: Iterable[Latents]) -> Tree:
    """Makes parameters of a `LatentCodec` from the covariances of latents.

    Args:
        config: Sizes, without motion.
        clips: Normalised latents of clips, h and w even.
    """
    kinds: tuple[Literal["intra", "inter"], ...] = ("intra", "inter")
    channels = config.latent_channels
    # plain: channels of the latents, for the whitening; cells: what is coded, for the basis.
    plain = {kind: Moments(channels) for kind in kinds}
    cells = {kind: Moments(4 * channels) for kind in kinds}
    for latents in clips:
        # What each kind of latent is, and what of it is coded.
        given = {"intra": latents[:1], "inter": latents[1:]}
        coded = {"intra": latents[:1], "inter": latents[1:] - latents[:-1]}
        for kind in kinds:
            plain[kind].add(given[kind])
            cells[kind].add(space_to_depth(coded[kind]))
    if not plain["inter"].count:
        raise UsageError("there are no latents to measure")
    # The two steps stand for lambda: the worth of an error at which each would be the best step.
    worth = worth_of_step(COARSEST), worth_of_step(FINEST)
    params = jax.device_get(init_codec(LatentCodec(config), jax.random.key(0)))
    for kind in kinds:
        # Transform, steps and tables of this kind; its hyperlatent is zero.
        variances = np.diag(plain[kind].covariance)
        part = init_from_statistics(params, config, kind, cells[kind], variances, *worth)
        part["entropy"] = quiet_hyperprior(part["entropy"])
        params = {**params, kind: part}
    return params


def within_range(params: Tree, clips: Float[np.ndarray, "b t h w c"]) -> Tree:
    """Makes steps so coarse that no coefficient of some clips leaves the range of symbols.

    The six standard deviations that `init_from_statistics` provides for are not enough where
    latents differ rarely, but then much.

    Args:
        params: Parameters from `transforms_from_statistics`.
        clips: Normalised latents of clips.
    """
    for kind, coded in (("intra", clips[:, :1]), ("inter", np.diff(clips, axis=1))):
        part = dict(params[kind])
        largest = np.abs(space_to_depth(coded) @ part["basis"]).max((0, 1, 2, 3))
        # Channels beyond the values of a cell are zero.
        least = np.log(np.maximum(HEADROOM * largest / SYMBOL_BOUND, 1e-12))
        log_steps = np.maximum(part["y_inverse"]["log_gain"], least.astype(np.float32))
        part["y_gain"], part["y_inverse"] = {"log_gain": -log_steps}, {"log_gain": log_steps}
        params = {**params, kind: part}
    return params


def tables_from_symbols(
    config: CodecConfig, params: Tree, clips: Float[np.ndarray, "b t h w c"], progress: bool
) -> Tree:
    """Makes the scale networks choose tables by the symbols that occur in some clips.

    Clips are coded at every knot of the quality levels.

    Args:
        config: Sizes, without motion.
        params: Parameters from `transforms_from_statistics`.
        clips: Normalised latents of clips.
        progress: Whether to show progress.
    """
    codec = LatentCodec(config)

    @jax.jit
    def mean_squares(params: Tree, latents: jax.Array, q_index: jax.Array) -> jax.Array:
        levels = jnp.full(len(latents), q_index)
        output = codec.apply({"params": params}, latents, levels, jax.random.key(0))
        output = cast(LatentCodecOutput, output)
        # Tables have mean zero, so squares are measured about zero, too.
        squares = jnp.mean(output.symbols.y**2, axis=(2, 3))  # (b, t, cy)
        return jnp.stack([squares[:, 0].mean(0), squares[:, 1:].mean((0, 1))])

    # The last knot lies one level beyond the best, see `gnvc_jax.codec.quality`.
    levels = np.minimum(SPACING * np.arange(KNOTS), QUALITIES - 1)
    bar = tqdm(levels, "choosing tables", unit="level", disable=not progress)
    squares = np.stack([np.asarray(mean_squares(params, clips, q)) for q in bar])  # (knots, 2, cy)
    for i, kind in enumerate(("intra", "inter")):
        part = dict(params[kind])
        scales = dict(part["entropy"]["scales"])
        scales["P3_bias"] = table_bias(config, deviation_of_symbols(squares[:, i]))
        part["entropy"] = {**part["entropy"], "scales": scales}
        params = {**params, kind: part}
    return params
