"""A video through the VAE alone: what a codec without any loss would give.

Frames stream: the first one gives a latent, every further four frames (Wan2.1's stride in time)
give another. Memory depends on the size of frames and not on the length of the video.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from jaxtyping import UInt8

from gnvc_jax.frames import pad_frames, to_float
from gnvc_jax.vae import VAEConfig

Frame = UInt8[np.ndarray, "h w 3"]


def reconstruct_frames(
    frames: Iterable[Frame], encode: Callable, decode: Callable, config: VAEConfig
) -> Iterator[tuple[Frame, Frame]]:
    """Encodes and decodes frames as they come.

    Args:
        frames: Frames of one size, which need not be a multiple of the VAE's stride.
        encode: (cache, float frames (1, t, h, w, 3)) -> latents, cache. The cache is None at the
            start of the video.
        decode: (cache, latents) -> uint8 frames (1, t, h, w, 3), cache.
        config: Sizes of the VAE.

    Yields:
        Each frame, and what it becomes.
    """
    frames, encoder, decoder = iter(frames), None, None
    size = config.temporal_stride
    while given := list(itertools.islice(frames, 1 if encoder is None else size)):
        h, w, _ = given[0].shape
        # The last chunk may be short: its last frame is repeated, and what is too much is dropped.
        missing = 0 if encoder is None else size - len(given)
        chunk = pad_frames(np.stack(given + given[-1:] * missing), config.stride)
        # (1, t, h, w, 3) -> (1, 1, h', w', c) -> (1, t, h, w, 3); the caches carry the causal
        # convolutions on to the next chunk.
        latents, encoder = encode(encoder, to_float(chunk)[None])
        decoded, decoder = decode(decoder, latents)
        yield from zip(given, np.asarray(decoded[0, :, :h, :w]))
