"""The diffusion refiner: Wan2.1's video DiT, its context adapter and the flow they follow."""

from gnvc_jax.refiner.config import (
    VACE_1_3B,
    VACE_14B,
    WAN_1_3B,
    WAN_14B,
    DiTConfig,
    RefinerConfig,
)
from gnvc_jax.refiner.dit import DiT
from gnvc_jax.refiner.model import Refiner, per_latent_factors, refine

__all__ = [
    "VACE_1_3B",
    "VACE_14B",
    "WAN_1_3B",
    "WAN_14B",
    "DiT",
    "DiTConfig",
    "Refiner",
    "RefinerConfig",
    "per_latent_factors",
    "refine",
]
