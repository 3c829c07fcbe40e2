"""What a codec makes of a data set (`gnvc cache-coded`), to train a refiner on.

Clips go through the encoder and the decoder of a model with block motion, at random quality levels.
The folder's format is in `gnvc_jax.data.latents`.
"""

import dataclasses
import os
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from gnvc_jax.bitstream import StreamReader
from gnvc_jax.bitstream.tables import QUALITIES
from gnvc_jax.cache_latents import frozen_encoder
from gnvc_jax.coder import check_gop
from gnvc_jax.data.latents import write_latents
from gnvc_jax.errors import UsageError
from gnvc_jax.pretrained import Codec, load_pretrained


def cache_coded(
    source: str | os.PathLike,
    folder: str | os.PathLike,
    model: str,
    frames: int = 97,
    size: int = 256,
    parts: int = 1,
    progress: bool = True,
) -> dict[str, str]:
    """Codes the clips of videos and writes what a refiner sees of them to a folder.

    A video is divided into consecutive clips; of each, random parts are coded, each at a random
    quality level. Processes of one JAX runtime share the videos.

    Args:
        source: Videos, as `gnvc_jax.data.index.find_videos` finds them.
        folder: Folder to write to.
        model: Name of a shipped model with block motion, or path of a model file.
        frames: Number of frames per clip, 1 + 4k, which are one group.
        size: Height and width of a part, at most; a multiple of 64.
        parts: Number of parts of each clip.
        progress: Whether to show a progress bar.

    Returns:
        Videos that failed, each with the reason.

    Raises:
        UsageError: If the model has no block motion, or a number does not fit.
        GnvcError, OSError: If `gnvc_jax.data.latents.write_latents` raises it.
    """
    codec = load_pretrained(model)
    if not codec.motion:
        raise UsageError(f"{model}: only codecs with block motion can be cached")
    if size < codec.padding or size % codec.padding:
        raise UsageError(f"size must be a multiple of {codec.padding}, got {size}")
    encode, info = frozen_encoder(model, frames)
    check_gop(frames, info.temporal_stride)
    info = dataclasses.replace(info, codec=codec.model.fingerprints[0].hex())

    def code(clip: np.ndarray) -> list[dict[str, np.ndarray]]:
        # Seeded by the clip itself: a job that is resumed, or shared, draws the same.
        rng, coded = np.random.default_rng(zlib.crc32(clip[0].tobytes())), []
        for _ in range(parts):
            part = random_part(clip, size, codec.padding, rng)
            found = code_clip(codec, part, int(rng.integers(QUALITIES)))
            coded.append(found | {"video": part, "latents": encode(part)})
        return coded

    shard = jax.process_index(), jax.process_count()
    return write_latents(source, folder, info, code, shard, progress)


def random_part(clip: np.ndarray, size: int, multiple: int, rng: np.random.Generator) -> np.ndarray:
    """Cuts a random part of (t, h, w, 3) out, of sides that are multiples and at most `size`.

    Raises:
        UsageError: If the clip is smaller than one multiple.
    """
    sides = [min(size, side - side % multiple) for side in clip.shape[1:3]]
    if not all(sides):
        raise UsageError(f"{clip.shape[2]} x {clip.shape[1]} pixels, expected {multiple} at least")
    top, left = (int(rng.integers(f - s + 1)) for f, s in zip(clip.shape[1:3], sides))
    return clip[:, top : top + sides[0], left : left + sides[1]]


def code_clip(codec: Codec, clip: np.ndarray, q_index: int) -> dict[str, np.ndarray]:
    """Encodes and decodes a clip as one group.

    Args:
        codec: Codec with block motion.
        clip: Frames, uint8 (t, h, w, 3), sides multiples of 64.
        q_index: Quality level, 0 (worst) to 63.

    Returns:
        "decoded", "features", "levels" and "frames" of `gnvc_jax.data.latents.CODED`.
    """
    stream = codec.encode(clip, qp=QUALITIES - 1 - q_index, gop=len(clip))
    reader = StreamReader(stream)
    (group,) = reader.groups()
    # Of each latent: (1, h, w, c), (1, h, w, f), (1, frames, H, W, 3).
    latents, features, frames = zip(*codec.decode_each_latent(reader.header, group))
    return {
        "decoded": np.asarray(jnp.concatenate(latents)),
        "features": np.asarray(jnp.concatenate(features)),
        "levels": np.asarray(group.q_indices),
        "frames": np.asarray(jnp.concatenate(frames, axis=1))[0],
    }
