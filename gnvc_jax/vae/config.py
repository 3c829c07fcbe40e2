"""Sizes of the causal video VAE.

`VAEConfig` goes into model files and checkpoint folders as JSON, so its field names are part of
their formats; `VAEConfig.from_json` reads it back.
"""

import dataclasses
from typing import Any

from gnvc_jax.errors import UsageError


def with_tuples(facts: dict[str, Any]) -> dict[str, Any]:
    """Turns lists back into the tuples that they were before JSON."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in facts.items()}


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Architecture of the VAE; the defaults are Wan2.1's (126.89 M parameters).

    `WAN22` is that of Wan2.2-TI2V-5B.

    Attributes:
        base: Width of the first level.
        multipliers: Width of each level in units of `base`.
        blocks: Residual blocks per encoder level; a decoder level has one more.
        latent_channels: Channels of the latents.
        temporal_down: For each level but the last, whether it halves the frame rate, too.
        patch: Pixels, each way, that are folded into channels before the first level
            (2 in Wan2.2's VAE).
        linear: Use a fixed linear transform of blocks and its inverse in place of both networks
            (see `gnvc_jax.vae.klt`). The sizes of the networks then only determine the strides.
        head: Width of the convolutions that filter the frames of a linear VAE
            (see `gnvc_jax.vae.head`), 0 for none.
        fade: Whether the change of coded cells fades where they meet copied ones, if frames of a
            linear VAE are predicted by motion (see `gnvc_jax.vae.head.fade_at_copies`).
        shortcuts: Whether each level that changes the resolution has a shortcut around it without
            parameters, as in Wan2.2's VAE (see `gnvc_jax.vae.layers.average_down`).
        decoder_base: `base` of the decoder, 0 for that of the encoder.

    Raises:
        UsageError: If there is a head or a fade without a linear VAE, a wrong number of
            `temporal_down`, or shortcuts between widths that do not divide.
    """

    base: int = 96
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    latent_channels: int = 16
    temporal_down: tuple[bool, ...] = (False, True, True)
    patch: int = 1
    linear: bool = False
    head: int = 0
    fade: bool = False
    shortcuts: bool = False
    decoder_base: int = 0

    def __post_init__(self) -> None:
        if self.head and not self.linear:
            raise UsageError(f"head must be 0 unless the VAE is linear, got {self.head}")
        if self.fade and not self.linear:
            raise UsageError("fade must be False unless the VAE is linear")
        if len(self.temporal_down) != len(self.multipliers) - 1:
            raise UsageError(
                f"temporal_down must have one entry for each level but the last, "
                f"{len(self.multipliers) - 1}, got {len(self.temporal_down)}"
            )
        # Four positions of one level become channels of the next, in either direction.
        levels = list(zip(self.multipliers, self.multipliers[1:]))
        if self.shortcuts and any(4 * fine % coarse for fine, coarse in levels):
            raise UsageError(
                "multipliers of a VAE with shortcuts must divide four times the one before, got "
                f"{self.multipliers}"
            )

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> "VAEConfig":
        """Reads what `dataclasses.asdict` gave back from JSON."""
        return cls(**with_tuples(facts))

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level of the encoder, finest first."""
        return tuple(self.base * m for m in self.multipliers)

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Channels of each level of the decoder, coarsest first."""
        return tuple((self.decoder_base or self.base) * m for m in reversed(self.multipliers))

    @property
    def stride(self) -> int:
        """Pixels per latent in each spatial direction."""
        return self.patch * 2 ** len(self.temporal_down)

    @property
    def temporal_stride(self) -> int:
        """Frames per latent after the first."""
        return 2 ** sum(self.temporal_down)


# Its stride is 16: a patch of 2, and three levels that halve the resolution.
WAN22 = VAEConfig(base=160, latent_channels=48, patch=2, shortcuts=True, decoder_base=256)
