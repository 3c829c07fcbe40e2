"""Latents of a data set by a frozen VAE: what `gnvc cache-latents` does."""

import itertools
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from gnvc_jax.data.index import find_videos
from gnvc_jax.data.latents import CacheInfo, clips_of, read_info, write_latents
from gnvc_jax.media.errors import MediaError
from gnvc_jax.model import vae_fingerprint
from gnvc_jax.porting.checkpoint import has_component, load_weights
from gnvc_jax.pretrained import find_model
from gnvc_jax.training.checkpoints import config_of, load_params
from gnvc_jax.training.stages.vae import init_vae
from gnvc_jax.vae import VAE, VAEConfig, encode_stream

Tree = dict
Statistics = tuple[np.ndarray, np.ndarray]

STATISTICS_VIDEOS = 32  # that mean and deviation of latents are taken from, if no one knows them


def cache_latents(
    source: str | Path, folder: str | Path, vae: str, frames: int, progress: bool = True
) -> dict[str, str]:
    """Cache the latents of all videos at `source`; the videos that failed, with the reason.

    vae: folder of `gnvc port`, a run of the stage `vae`, name of a shipped model, or a model file.
    Processes of one JAX runtime share the videos. Errors as `write_latents`, `find_vae` and
    `measured`.
    """
    if frames < 1 or (frames - 1) % 4:
        raise ValueError(f"frames {frames}: expected 1 + 4k")
    config, params, known = find_vae(vae)
    module, placed = VAE(config), jax.device_put(params)

    @jax.jit
    def encode(params, clip):
        return encode_stream(module, params, clip[None].astype(np.float32) / 127.5 - 1.0)[0]

    def latents(clip: np.ndarray) -> np.ndarray:
        return np.asarray(encode(placed, clip))

    if known is None and (Path(folder) / "cache.json").is_file():
        info = read_info(folder)  # goes on as it began, even if there are more videos now
        known = np.asarray(info.mean, np.float32), np.asarray(info.std, np.float32)
    mean, std = known or measured(latents, source, frames, 2 * config.stride)
    info = CacheInfo(
        frames,
        vae_fingerprint(config, params),
        tuple(map(float, mean)),
        tuple(map(float, std)),
        config.stride,
    )
    shard = jax.process_index(), jax.process_count()
    return write_latents(
        source, folder, info, lambda clip: (latents(clip) - mean) / std, shard, progress
    )


def find_vae(vae: str) -> tuple[VAEConfig, Tree, Statistics | None]:
    """Sizes and float32 parameters of a VAE; mean and deviation (c,) of its latents, if known.

    Errors as `load_weights`, `load_params` and `find_model`; ValueError for a run of another stage.
    """
    if has_component(vae, "vae"):
        found, params = load_weights(vae, "vae", np.float32)
        config, known = found.config, (found.latents_mean, found.latents_std)
    elif Path(vae).is_dir():
        facts, known = config_of(vae), None
        if facts["stage"] != "vae":
            raise ValueError(f"{vae}: a run of the stage `{facts['stage']}`, expected `vae`")
        config = VAEConfig.from_json(facts["vae"])
        params = load_params(
            vae, jax.eval_shape(lambda key: init_vae(VAE(config), key), jax.random.key(0))
        )
        if config.linear_encoder:  # see `CodecStage.frozen`
            known = np.zeros(config.latent_channels), np.ones(config.latent_channels)
    else:
        model = find_model(vae)
        config, params, known = model.vae_config, model.vae, (model.mean, model.std)
        params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    return config, params, known and tuple(np.asarray(x, np.float32) for x in known)


def measured(
    latents: Callable[[np.ndarray], np.ndarray], source: str | Path, frames: int, multiple: int
) -> Statistics:
    """Mean and deviation (c,) of the latents of the first clips of some videos.

    frames, multiple: see `clips_of`. Raises ValueError where no video has a clip.
    """
    found = []
    for video in sorted(set(find_videos(Path(source))))[:STATISTICS_VIDEOS]:
        try:
            found += map(latents, itertools.islice(clips_of(video, frames, multiple), 1))
        except MediaError:
            continue  # the caller will say so when it comes to this video
    if not found:
        raise ValueError(f"{source}: no video with a clip of {frames} frames")
    channels = np.concatenate([x.reshape(-1, x.shape[-1]) for x in found])
    return channels.mean(0), channels.std(0)
