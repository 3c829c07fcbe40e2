"""The diffusion refiner: decoded latents of a group -> latents of a more natural video.

- `config`: sizes of the DiT and of the refiner, and the presets of Wan2.1 and VACE.
- `dit`: Wan2.1's video DiT with VACE's context adapter, the network.
- `attention`: its attention, by the best kernel of each backend.
- `flow`: the equations of the flow, in the paper's convention and in Wan's.
- `model`: `Refiner` conditions the DiT on what the codec decoded, and `refine` follows its velocity
  through a whole group in overlapping windows.

`gnvc_jax.load_refiner` gives a refiner with its weights; `gnvc_jax.training.stages` trains one.
"""

from gnvc_jax.refiner.config import (
    VACE_1_3B,
    VACE_14B,
    WAN_1_3B,
    WAN_14B,
    DiTConfig,
    RefinerConfig,
)
from gnvc_jax.refiner.dit import DiT
from gnvc_jax.refiner.model import Refiner, init_refiner, per_latent_factors, refine

__all__ = [
    "VACE_1_3B",
    "VACE_14B",
    "WAN_1_3B",
    "WAN_14B",
    "DiT",
    "DiTConfig",
    "Refiner",
    "RefinerConfig",
    "init_refiner",
    "per_latent_factors",
    "refine",
]
