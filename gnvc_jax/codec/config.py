"""Sizes of the latent codec, and the constants of its symbols.

`CodecConfig` goes into model files as JSON, so its field names are part of the format. The
constants of symbols and tables are those of the bitstream (docs/bitstream.md); changing one makes a
new version of it.
"""

import dataclasses
from typing import Literal

from gnvc_jax.errors import UsageError

QUALITIES = 64  # quality levels in one model; a larger q_index is better quality
MIXED = 8  # steps from one level to the next, made by mixing the two
KNOTS = 9  # levels 0, 8, ..., 64 have parameters; those between are interpolated
# The nearest of 64 tables costs at most 0.1 % more bits than the exact deviation. With the
# narrowest, a symbol other than zero is less likely than 1 in 100,000.
SCALES = 64  # zero-mean Gaussian tables
SCALE_MIN, SCALE_MAX = 0.11, 16.0  # standard deviations of the first and the last table
# Encoders clip to these bounds. There is no escape code: with 24-bit frequencies, a code for each
# of 255 symbols costs next to nothing.
SYMBOL_BOUND = 127  # residual symbols are -127..127
Z_BOUND = 15  # hyperlatent symbols are -15..15
LATENT_MULTIPLE = 8  # y halves the grid of latents, z quarters it again


@dataclasses.dataclass(frozen=True)
class CodecConfig:
    """Architecture of the latent codec; the defaults are the full size (about 16 M parameters).

    Attributes:
        latent_channels: Channels of the VAE's latents.
        intra_width, width: Features of the intra and of the predicted transform, at latent
            resolution.
        intra_analysis, intra_synthesis: Residual blocks of the intra transform.
        y_channels: Channels of y, at half the latent resolution; a multiple of 4.
        z_channels: Channels of the hyperlatent, at an eighth of the latent resolution.
        scale_width: Width of the integer scale network.
        entropy_width: Width of the networks that predict the means of y.
        k_skip: Elements with a scale index below this one carry no symbol (4: sigma < 0.15).
        inter_context, inter_analysis, inter_synthesis: Residual blocks of the predicted codec.
        motion: "blocks" predicts latents from the last decoded frame by block motion
            (see `gnvc_jax.motion`), None from the last decoded latent, as the paper does.
        motion_kernel: Sharpness of predictions by motion, the parameter a of
            `gnvc_jax.motion.warp.cubic_convolution`. Every latent is predicted from a picture that
            was itself interpolated. At -1/2 squared errors are least, but blur adds up; a smaller
            one keeps detail.
        intra_offset: Levels that encoders add to the quality level of the first latent of a group.
        level_pattern: Levels that they add for the latents after it; the pattern repeats.

    Raises:
        UsageError: If the integer network or the spatial passes cannot have these sizes, the kind
            of motion is unknown, `motion_kernel` is not in -1..0, or `level_pattern` is empty.
    """

    latent_channels: int = 16
    intra_width: int = 320
    width: int = 256
    intra_analysis: int = 6
    intra_synthesis: int = 12
    y_channels: int = 128
    z_channels: int = 64
    scale_width: int = 128
    entropy_width: int = 256
    k_skip: int = 4
    inter_context: int = 4
    inter_analysis: int = 3
    inter_synthesis: int = 5
    motion: Literal["blocks"] | None = None
    motion_kernel: float = -0.5
    intra_offset: int = 0
    level_pattern: tuple[int, ...] | list[int] = (0,)

    def __post_init__(self) -> None:
        # Inputs of layer P2 of the scale network, its widest: see `gnvc_jax.codec.scales`.
        # 127 * 255 * 512 < 2**24: weights are at most 127 and activations at most 255.
        inputs = self.scale_width + 2 * self.y_channels
        if inputs > 512:
            raise UsageError(
                f"scale_width + 2 * y_channels is {inputs}; with at most 512 inputs the integer "
                "scale network is exact in float32"
            )
        if self.motion not in (None, "blocks"):
            raise UsageError(f"motion must be blocks or None, got {self.motion!r}")
        if not -1.0 <= self.motion_kernel <= 0.0:
            raise UsageError(f"motion_kernel must be from -1 to 0, got {self.motion_kernel}")
        # The dataclass is frozen, so this is the way to change a field here.
        object.__setattr__(self, "level_pattern", tuple(self.level_pattern))  # from JSON, a list
        if not self.level_pattern:
            raise UsageError("level_pattern must name at least one level, got none")
        # Each pass over an intra latent codes a quarter of the channels at every position.
        if self.y_channels % 4:
            raise UsageError(f"y_channels must be a multiple of 4, got {self.y_channels}")

    def levels(self, q_index: float, latents: int, group: int = 0) -> list[int]:
        """Quality level of each latent of a group that is coded at level q_index.

        All latents of a group are predicted from the first one, directly or not, so that bits which
        are spent there serve many frames. A level between two whole ones mixes them: of eight
        latents, as many as the fraction has eighths are one level better, evenly spread. So are,
        of eight groups, their first latents.

        Args:
            q_index: Quality level, 0 (worst) to 63, in steps of 1 / MIXED.
            latents: Number of latents in the group.
            group: Number of the group.

        Returns:
            Whole levels. Near either end of the quality range they are clipped, and the offsets of
            the model shrink.
        """
        whole, eighths = divmod(round(MIXED * q_index), MIXED)

        def better(place: int) -> int:  # 0 or 1; the sum over any MIXED places is `eighths`
            before, after = (eighths * p + MIXED // 2 for p in (place, place + 1))
            return after // MIXED - before // MIXED

        # The first latent takes its turn among those of other groups, hence better(group).
        pattern = self.level_pattern
        later = (pattern[i % len(pattern)] + better(i) for i in range(latents - 1))
        offsets = [self.intra_offset + better(group), *later]
        return [min(max(whole + offset, 0), QUALITIES - 1) for offset in offsets]
