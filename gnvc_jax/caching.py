"""Latents of a data set by a frozen VAE: what `gnvc cache-latents` does."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from gnvc_jax.data.latents import CacheInfo, write_latents
from gnvc_jax.model import vae_fingerprint
from gnvc_jax.porting.checkpoint import has_component, load_weights
from gnvc_jax.pretrained import find_model
from gnvc_jax.vae import VAE, encode_stream


def cache_latents(
    source: str | Path, folder: str | Path, vae: str, frames: int, progress: bool = True
) -> dict[str, str]:
    """Cache the latents of all videos at `source`; the videos that failed, with the reason.

    vae: folder of `gnvc port`, name of a shipped model, or a model file. Processes of one JAX
    runtime share the videos. Errors as `write_latents`, `find_model` and `load_weights`.
    """
    if frames < 1 or (frames - 1) % 4:
        raise ValueError(f"frames {frames}: expected 1 + 4k")
    encode, info = frozen_encoder(vae, frames)
    shard = jax.process_index(), jax.process_count()
    return write_latents(source, folder, info, encode, shard, progress)


def frozen_encoder(vae: str, frames: int) -> tuple[Callable[[np.ndarray], np.ndarray], CacheInfo]:
    """uint8 (t, h, w, 3) -> normalised latents (t', h', w', c), and what they are."""
    if has_component(vae, "vae"):
        architecture, params = load_weights(vae, "vae", np.float32)
        config, mean, std = (
            architecture.config,
            architecture.latents_mean,
            architecture.latents_std,
        )
    else:
        model = find_model(vae)
        config, params, mean, std = model.vae_config, model.vae, model.mean, model.std
        params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    module, placed = VAE(config), jax.device_put(params)

    @jax.jit
    def run(params, clip):
        latents = encode_stream(module, params, clip[None].astype(np.float32) / 127.5 - 1.0)
        return (latents[0] - mean) / std

    info = CacheInfo(
        frames,
        vae_fingerprint(config, params),
        tuple(map(float, mean)),
        tuple(map(float, std)),
        config.stride,
    )
    return lambda clip: np.asarray(run(placed, clip)), info
