"""Sizes of the small model, shared by its training stages."""

from gnvc_jax.codec.config import CodecConfig
from gnvc_jax.vae.config import VAEConfig

VAE = VAEConfig(latent_channels=96, linear=True, head=48)
CODEC = CodecConfig(
    latent_channels=96,
    intra_width=96,
    width=96,
    intra_analysis=3,
    intra_synthesis=4,
    y_channels=192,
    z_channels=16,
    scale_width=32,
    entropy_width=192,
    inter_context=3,
    inter_synthesis=3,
    motion="blocks",
    intra_offset=25,
)
