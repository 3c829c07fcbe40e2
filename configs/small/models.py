"""Sizes of the small model, shared by its training stages."""

from gnvc_jax.codec.config import CodecConfig
from gnvc_jax.refiner.config import DiTConfig, RefinerConfig
from gnvc_jax.vae.config import VAEConfig

# A latent has 96 of the 768 coefficients of 8 x 8 pixels in 4 frames, 3 colours.
VAE = VAEConfig(latent_channels=96, linear=True, head=48, fade=True)
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
    motion_kernel=-0.7,
    # More than training draws (`TransformLoss.intra_offset`): a good first frame gains in LPIPS and
    # DISTS what is worth a little PSNR, see the model's card.
    intra_offset=36,
)
REFINER = RefinerConfig(
    dit=DiTConfig(
        width=256,
        ffn_width=1024,
        heads=4,
        layers=6,
        frequencies=64,
        channels=96,
        text_length=0,
        # One context block for all six blocks.
        context_every=6,
        context_channels=96,
        window=8,  # tokens: the 128x128 pixels of a training crop
    ),
    features=96,
    window=5,
    overlap=1,
    # No noise in the starting state: refinement is one deterministic step.
    noise=0.0,
    deviation=0.5,
)
