"""Sizes of the causal video VAE."""

import dataclasses

from gnvc_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Architecture of the VAE; the defaults are Wan2.1's (126.89 M parameters).

    base: width of the first level; multipliers: width of each level in units of `base`;
    blocks: residual blocks per encoder level (a decoder level has one more);
    latent_channels: channels of the latents; temporal_down: whether each level but the last
    also halves the frame rate; patch: pixels, each way, that are folded into channels before the
    first level (2 in Wan2.2's VAE); linear: no networks but a fixed linear transform of blocks and
    its inverse (see `gnvc_jax.vae.klt`), cheap and known without training; head: width of the
    convolutions that clean what the inverse transform gives (`gnvc_jax.vae.head`), 0 for none.
    """

    base: int = 96
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    latent_channels: int = 16
    temporal_down: tuple[bool, ...] = (False, True, True)
    patch: int = 1
    linear: bool = False
    head: int = 0

    def __post_init__(self):
        if self.head and not self.linear:
            raise UsageError(f"head {self.head}: only a linear VAE has one")
        if len(self.temporal_down) != len(self.multipliers) - 1:
            raise UsageError(
                f"temporal_down has {len(self.temporal_down)} entries, expected one per level but "
                f"the last: {len(self.multipliers) - 1}"
            )

    @classmethod
    def from_json(cls, facts: dict) -> "VAEConfig":
        """What `dataclasses.asdict` gave, after a way through JSON, which knows lists only."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in facts.items()})

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.base * m for m in self.multipliers)

    @property
    def stride(self) -> int:
        """Pixels per latent in each spatial direction."""
        return self.patch * 2 ** len(self.temporal_down)

    @property
    def temporal_stride(self) -> int:
        """Frames per latent after the first."""
        return 2 ** sum(self.temporal_down)
