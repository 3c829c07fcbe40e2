"""The causal video VAE of Wan2.1: modules, whole-clip and streaming drivers."""

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
from gnvc_jax.vae.model import VAE

__all__ = [
    "VAE",
    "VAEConfig",
    "decode_chunk",
    "decode_clip",
    "decode_stream",
    "encode_chunk",
    "encode_clip",
    "encode_stream",
    "grey_latents",
    "pad_video",
]
