"""Sizes of the small model, shared by its training stages."""

from gnvc_jax.codec.config import CodecConfig
from gnvc_jax.refiner import DiTConfig, RefinerConfig
from gnvc_jax.vae.config import VAEConfig

VAE = VAEConfig(
    base=24,
    multipliers=(1, 2, 4),
    blocks=1,
    temporal_down=(True, True),
    patch=2,
    linear_encoder=True,
)
CODEC = CodecConfig(
    intra_width=64,
    width=64,
    intra_analysis=2,
    intra_synthesis=3,
    y_channels=64,
    z_channels=16,
    scale_width=32,
)
# It corrects what decoded latents alone suggest (see RefinerConfig.deviation).
REFINER = RefinerConfig(
    dit=DiTConfig(
        width=192,
        ffn_width=576,
        heads=3,
        layers=4,
        frequencies=64,
        text_length=0,
        context_every=2,
        context_channels=16,
    ),
    features=CODEC.width,
    window=5,
    deviation=0.3,
)
