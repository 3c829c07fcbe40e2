"""Latents of a data set by a frozen VAE (`gnvc cache-latents`).

`find_vae` loads a VAE from wherever it is, `frozen_encoder` makes it a function of clips, and
`cache_latents` runs it over many videos. The folder's format is in `gnvc_jax.data.latents`.
"""

import os
from collections.abc import Callable

import jax
import numpy as np

from gnvc_jax.arrays import Array, Tree
from gnvc_jax.buckets import as_path
from gnvc_jax.data.latents import CacheInfo, write_latents
from gnvc_jax.errors import UsageError
from gnvc_jax.frames import to_float
from gnvc_jax.model import as_float32, vae_fingerprint
from gnvc_jax.porting.checkpoint import has_component, load_weights
from gnvc_jax.pretrained import find_model
from gnvc_jax.training.run_folder import config_of, load_params
from gnvc_jax.vae import VAE, VAEConfig, encode_stream, init_vae


def cache_latents(
    source: str | os.PathLike,
    folder: str | os.PathLike,
    vae: str,
    frames: int,
    progress: bool = True,
) -> dict[str, str]:
    """Writes the latents of videos to a folder. Processes of one JAX runtime share the videos.

    Args:
        source: Videos, as `gnvc_jax.media.search.find_videos` finds them.
        folder: Folder to write to.
        vae: VAE, as `find_vae` takes it.
        frames: Number of frames per clip, 1 + 4k.
        progress: Whether to show a progress bar.

    Returns:
        Videos that failed, each with the reason.

    Raises:
        GnvcError, OSError: If `find_vae` or `gnvc_jax.data.latents.write_latents` raises it.
    """
    encode, info = frozen_encoder(vae, frames)
    shard = jax.process_index(), jax.process_count()
    return write_latents(source, folder, info, encode, shard, progress)


def frozen_encoder(vae: str, frames: int) -> tuple[Callable[[np.ndarray], np.ndarray], CacheInfo]:
    """Loads a VAE as an encoder of clips.

    Args:
        vae: VAE, as `find_vae` takes it.
        frames: Number of frames per clip.

    Returns:
        Function from a clip, uint8 (t, h, w, 3), to its normalised latents (n, h2, w2, c), and the
        description of a cache of such latents.

    Raises:
        UsageError: If the VAE cannot encode so many frames, or `find_vae` raises it.
    """
    config, params, mean, std = find_vae(vae)
    if frames < 1 or (frames - 1) % config.temporal_stride:
        raise UsageError(f"frames {frames}: expected 1 + {config.temporal_stride}k")
    # An argument of the program below; as a constant it would be compiled into it.
    module, placed = VAE(config), jax.device_put(params)

    @jax.jit
    def run(params: Tree, clip: Array) -> Array:
        latents = encode_stream(module, params, to_float(clip)[None])
        # One clip, so without the axis of the batch.
        return (latents[0] - mean) / std

    info = CacheInfo(
        frames,
        vae_fingerprint(config, params),
        tuple(map(float, mean)),
        tuple(map(float, std)),
        config.stride,
        config.temporal_stride,
    )
    return lambda clip: np.asarray(run(placed, clip)), info


def find_vae(vae: str) -> tuple[VAEConfig, Tree, np.ndarray, np.ndarray]:
    """Loads a VAE whose latents have known statistics.

    Args:
        vae: Folder of `gnvc port`, run of the stage `vae` with a linear encoder, name of a shipped
            model, or model file.

    Returns:
        Sizes and float32 parameters of the VAE; mean and standard deviation (c,) of its latents.

    Raises:
        FileNotFoundError: If there is none of these.
        PortError, ModelCorrupt: If the files are damaged.
        UsageError: If the run is of another stage, or its encoder is learned: the statistics of
            such an encoder are measured by the stage that trains on it.
    """
    if has_component(vae, "vae"):
        found, params = load_weights(vae, "vae", np.float32)
        config, mean, std = found.config, found.latents_mean, found.latents_std
        assert isinstance(config, VAEConfig)
    elif (as_path(vae) / "config.json").is_file():
        facts = config_of(vae)
        if facts["stage"] != "vae":
            raise UsageError(f"{vae}: a run of the stage `{facts['stage']}`, expected `vae`")
        config = VAEConfig.from_json(facts["vae"])
        # Statistics of a learned encoder belong to the codec that was trained on them.
        if not config.linear:
            raise UsageError(f"{vae}: its encoder is learned; codecs for it train on frames")
        like = jax.eval_shape(lambda key: init_vae(VAE(config), key), jax.random.key(0))
        params = load_params(vae, {"vae": like})["vae"]
        mean, std = np.zeros(config.latent_channels), np.ones(config.latent_channels)
    else:
        model = find_model(vae)
        config, mean, std = model.vae_config, model.mean, model.std
        # Kernels of model files are float16.
        params = as_float32(model.vae)
    return config, params, np.asarray(mean, np.float32), np.asarray(std, np.float32)
