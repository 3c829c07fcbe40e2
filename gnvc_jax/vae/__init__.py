"""The causal video VAE: frames in [-1, 1] <-> latents.

- `config`: sizes. The defaults are Wan2.1's VAE.
- `layers`: causal convolutions, resampling, norm, attention; each can continue a clip.
- `model`: `VAE`, with the methods `encode` and `decode`.
- `drivers`: functions that run a `VAE` over a whole clip or chunk by chunk. Most callers use these.
- `light`: a decoder of the same latents that takes a small part of the operations.
- `klt`, `head`: the linear VAE of small models, which `VAEConfig.linear` selects.

`gnvc_jax.load_vae` gives a VAE with its weights and normalised latents.
"""

from gnvc_jax.vae.config import VAEConfig
from gnvc_jax.vae.drivers import (
    decode_chunk,
    decode_clip,
    decode_stream,
    encode_chunk,
    encode_clip,
    encode_stream,
    grey_latents,
    pad_video,
)
from gnvc_jax.vae.light import LightDecoder, LightDecoderConfig
from gnvc_jax.vae.model import VAE, init_vae

__all__ = [
    "VAE",
    "LightDecoder",
    "LightDecoderConfig",
    "VAEConfig",
    "decode_chunk",
    "decode_clip",
    "decode_stream",
    "encode_chunk",
    "encode_clip",
    "encode_stream",
    "grey_latents",
    "init_vae",
    "pad_video",
]
