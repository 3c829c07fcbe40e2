"""The full-size model: Wan2.1's VAE and VACE-1.3B under a latent codec of DCVC-RT's size."""

from gnvc_jax.codec.config import CodecConfig
from gnvc_jax.refiner import VACE_1_3B, RefinerConfig
from gnvc_jax.vae.config import VAEConfig

VAE = VAEConfig()
CODEC = CodecConfig()
# Five Euler steps, as in the paper (L = 5).
REFINER = RefinerConfig(dit=VACE_1_3B, features=CODEC.width, steps=5)

# Made by: gnvc port --from Wan2.1-VACE-1.3B --to weights/vace-1.3b
WEIGHTS = "weights/vace-1.3b"

# What trains: the codec, and of the refiner the adapter and the new conditions (the DiT is frozen).
ADAPTER = (
    "refiner/(features|quality)",
    "refiner/dit/(context_embedding|context_in|groups/context)",
)
