"""Models with another refiner, or with a light decoder in place of their VAE's.

Neither plays a part in how a stream is read, so that streams stay valid. What must fit, the
latents, is checked before gigabytes of weights are read.
"""

import dataclasses
from pathlib import Path
from typing import TypeVar

import numpy as np

from gnvc_jax.api.refiner import load_refiner
from gnvc_jax.api.vae import PretrainedVAE
from gnvc_jax.errors import UsageError
from gnvc_jax.model import Model
from gnvc_jax.porting.checkpoint import has_component, load_weights, read_architecture
from gnvc_jax.refiner import DiTConfig
from gnvc_jax.vae import LightDecoderConfig

Decoding = TypeVar("Decoding", Model, PretrainedVAE)

# Where a ported DiT begins, and its steps, as long as it has not been trained for a codec.
# The paper begins at 0.7 with a trained DiT; one that was not trained keeps more at 0.8. Five steps
# are those of the paper.
UNTRAINED = {"start": 0.8, "steps": 5}


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
    # Only context blocks look at the features of a codec.
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


def with_light_decoder(model: Decoding, path: str | Path) -> Decoding:
    """Gives a model or a VAE a light decoder. Streams of a model stay valid.

    Args:
        model: Model with the VAE of Wan2.1, or one of the same latents; or the VAE alone.
        path: Folder of `gnvc port` with a light decoder.

    Returns:
        The same with this decoder in place of the VAE's.

    Raises:
        UsageError: If the latents of the model are others, or it predicts from decoded frames.
        FileNotFoundError, PortError: If there is no such decoder, or the files are damaged.
    """
    architecture, params = load_weights(path, "decoder", np.float32)
    config = architecture.config
    assert isinstance(config, LightDecoderConfig)
    if isinstance(model, Model) and model.codec_config.motion is not None:
        raise UsageError(
            f"{model.name} predicts from the frames that its own VAE decodes, so another decoder "
            "cannot take its place"
        )
    _check_statistics(model, path, "decoder")
    return dataclasses.replace(model, decoder_config=config, decoder=params)


def _check_statistics(model: Model | PretrainedVAE, path: str | Path, component: str) -> None:
    """Raises UsageError if a model normalises latents unlike a ported component."""
    known = read_architecture(path, component)
    # Shape (2, c): means, then standard deviations.
    expected = np.array([known.latents_mean, known.latents_std], np.float32)
    found = np.array([model.mean, model.std])
    # Statistics pass through float32 and JSON, hence a tolerance; those of other VAEs differ by far
    # more.
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-3, atol=1e-3):
        name = model.name if isinstance(model, Model) else "the VAE"
        raise UsageError(
            f"{name} normalises latents unlike the {component} in {path}; use a model with "
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
