"""A bitrate in one pass: the level of each latent follows from what the latents before it took.

A stream of bits fills a bucket that leaks at the bitrate. The first latent of a group takes many
more bits than those after it, so the bucket is compared with what it should hold at that place of a
group, not with nothing. The level of a latent is the one at which the next latents would bring the
bucket back there. What latents cost is learned from those that were coded.
"""

import math
from collections.abc import Sequence

from gnvc_jax.bitstream import Header
from gnvc_jax.codec.config import QUALITIES, CodecConfig

SLOPE = 0.08  # of the logarithm of bits over the level, about that of the shipped model
# Before anything is known, at level 0 and without offsets: bits per pixel of a frame that is coded
# as first latent, and bits of a later latent as a share of this.
FIRST_BITS, LATER_SHARE = 0.003, 0.5
HORIZON = 12  # latents after which the bucket should hold what it should
MEMORY = 0.8  # weight of a latent when the next one of its kind is coded
JUMP = 2  # largest change of the level from one latent to the next
MISJUDGED = 1.3  # factor by which the bits of a first latent may be off, else it is coded again
GROUP_BITS = 8 * 60  # of the container, for each group; known exactly when the group is written


class LeakyBucket:
    """Chooses levels for a bitrate; an object serves one stream.

    Args:
        config: Sizes of the codec, whose offsets of levels are applied.
        header: Header of the stream.
        bitrate: Bits per second.
    """

    def __init__(self, config: CodecConfig, header: Header, bitrate: float) -> None:
        fps = header.fps[0] / header.fps[1]
        self.per_frame = bitrate / fps
        self.group_bits = self.per_frame * header.gop_frames
        pattern = config.level_pattern
        later = (pattern[i % len(pattern)] for i in range(header.gop_latents - 1))
        self.offsets = [config.intra_offset, *later]
        # Of first and of later latents: bits, and the bits that SLOPE alone would give them; both
        # are sums in which older latents count less.
        first = FIRST_BITS * header.width * header.height
        self._sums = [[first, 1.0], [LATER_SHARE * first, 1.0]]
        self._line = 0.0  # bits that should have been spent before this group
        self._spent = 0.0  # bits that were spent in all
        self._place = 0  # number of the latent in its group
        self._base: float | None = None  # level of the latent before, without offset
        self._carry = 0.0  # what rounding of levels left
        self._level = 0

    def begin_group(self, size: int, first: int) -> None:
        """Begins a group.

        Args:
            size: Bytes of the stream so far, with its index and footer.
            first: Number of the first frame of the group.
        """
        self._spent, self._line = 8.0 * size + GROUP_BITS, self.per_frame * first
        self._place = 0

    def level(self) -> int:
        """Chooses the level of the next latent, 0 (worst) to 63."""
        weights = self._weights()
        whole, place = sum(weights), self._place
        # What should be spent before this latent, and by this and the next ones.
        share = sum(weights[:place]) / whole
        ahead = sum(weights[(place + i) % len(weights)] for i in range(HORIZON))
        debt = self._spent - self._line - share * self.group_bits
        budget = max(self.group_bits / whole - debt / ahead, 0.1 * self.group_bits / whole)
        base = math.log(budget) / SLOPE
        if place and self._base is not None:
            base = min(max(base, self._base - JUMP), self._base + JUMP)
        lowest = -max(self.offsets)  # below it, no level changes any more
        self._base = min(max(base, lowest), QUALITIES - 1 - min(self.offsets))
        wanted = self._base + self._carry + self.offsets[place]
        self._level = min(max(round(wanted), 0), QUALITIES - 1)
        self._carry = min(max(wanted - self._level, -0.5), 0.5)
        return self._level

    def misjudges(self, bits: float) -> bool:
        """Whether a first latent should be coded again, since its bits are not as expected."""
        kind = int(self._place > 0)
        expected = self._sums[kind][0] / self._sums[kind][1] * math.exp(SLOPE * self._level)
        if kind or 1 / MISJUDGED < bits / expected < MISJUDGED:
            return False
        # In the first group nothing is known of the later latents, either.
        for sums in self._sums[: 1 if self._line else 2]:
            sums[0] *= bits / expected
        return True

    def coded(self, bits: float) -> None:
        """Notes the bits of the latent that was coded at the level chosen last."""
        sums = self._sums[int(self._place > 0)]
        sums[0] = MEMORY * sums[0] + bits
        sums[1] = MEMORY * sums[1] + math.exp(SLOPE * self._level)
        self._spent += bits
        self._place += 1

    def _weights(self) -> Sequence[float]:
        """Relative bits of the latents of a whole group."""
        costs = [bits / reference for bits, reference in self._sums]
        return [
            costs[int(i > 0)] * math.exp(SLOPE * offset) for i, offset in enumerate(self.offsets)
        ]
