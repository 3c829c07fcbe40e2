"""A bitrate in one pass: the level of each latent follows from what the latents before it took.

A stream of bits fills a bucket that leaks at the bitrate. The first latent of a group takes many
more bits than those after it, so the bucket is compared with what it should hold at that place of a
group, not with nothing. The level of a latent is the one at which the next latents would bring the
bucket back there. What latents cost is learned from those that were coded. If the length of the
video is known, what a short last group takes is saved before.
"""

import itertools
import math
from collections.abc import Sequence

from gnvc_jax.bitstream import Header
from gnvc_jax.codec.config import QUALITIES, CodecConfig

SLOPE = 0.08  # of the logarithm of bits over the level, about that of the shipped model
# Before anything is known, at level 0 and without offsets: bits per pixel of a frame that is coded
# as first latent, and bits of a later latent as a share of this.
FIRST_BITS, LATER_SHARE = 0.003, 0.5
HORIZON = 12  # number of latents over which a surplus or a deficit of bits is made up
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
        frames: Number of frames of the video, None if it is not known.
    """

    def __init__(
        self, config: CodecConfig, header: Header, bitrate: float, frames: int | None = None
    ) -> None:
        self.per_frame = bitrate * header.fps[1] / header.fps[0]  # bits
        self.gop, self.stride, self.frames = header.gop_frames, header.temporal_stride, frames
        pattern = config.level_pattern
        later = (pattern[i % len(pattern)] for i in range(header.gop_latents - 1))
        self.offsets = [config.intra_offset, *later]
        # Of first and of later latents: bits, and the bits that SLOPE alone would give them; both
        # are sums in which older latents count less.
        first = FIRST_BITS * header.width * header.height
        self._sums = [[first, 1.0], [LATER_SHARE * first, 1.0]]
        self._spent = 0.0  # bits that were spent in all
        self._coded = [0] * header.gop_latents  # latents that were coded, by place in their group
        self._end = 0  # frames that the video has if it is known, else up to a full group from here
        self._ahead = 0  # latents from the next one up to there, if no scene cut begins a group
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
        self._spent = 8.0 * size + GROUP_BITS
        self._place = 0
        self._end = first + self.gop if self.frames is None else max(self.frames, first + 1)
        groups, rest = divmod(self._end - first, self.gop)
        # A last group of `rest` frames has one latent for its first frame and one for each `stride`
        # frames after it, rounded up.
        self._ahead = groups * len(self.offsets) + (rest and 1 + -(-(rest - 1) // self.stride))

    def level(self) -> int:
        """Chooses the level of the next latent, 0 (worst) to 63."""
        # A weight is what a latent takes relative to others if all have the same base level: the
        # share that it should get of the bits. `cycle` has those from the next latent on.
        weights, place = self._weights(), self._place
        cycle = [*weights[place:], *weights[:place]]
        past = sum(weight * count for weight, count in zip(weights, self._coded))
        groups, rest = divmod(max(self._ahead, 1), len(cycle))
        future = groups * sum(cycle) + sum(cycle[:rest])
        soon = sum(itertools.islice(itertools.cycle(cycle), min(max(self._ahead, 1), HORIZON)))
        # Bits for a unit of weight, the same for all latents.
        unit = self.per_frame * self._end / (past + future)
        # What was spent beyond the share of the latents so far is taken from those that come soon;
        # a tenth always remains, so that the level does not collapse.
        debt = self._spent - unit * past
        budget = max(unit - debt / soon, 0.1 * unit)
        # Bits of weight 1 are exp(SLOPE * level), see `_weights`; this solves for the level.
        base = math.log(budget) / SLOPE
        if place and self._base is not None:
            base = min(max(base, self._base - JUMP), self._base + JUMP)
        lowest = -max(self.offsets)  # below it, no level changes any more
        self._base = min(max(base, lowest), QUALITIES - 1 - min(self.offsets))
        # Levels are whole; what rounding leaves goes to the next latent, so the mean is exact.
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
        for sums in self._sums[: 1 if self._coded[0] else 2]:
            sums[0] *= bits / expected
        return True

    def coded(self, bits: float) -> None:
        """Notes the bits of the latent that was coded at the level chosen last."""
        sums = self._sums[int(self._place > 0)]
        sums[0] = MEMORY * sums[0] + bits
        sums[1] = MEMORY * sums[1] + math.exp(SLOPE * self._level)
        self._spent += bits
        self._coded[self._place] += 1
        self._place += 1
        self._ahead -= 1

    def _weights(self) -> Sequence[float]:
        """Relative bits of the latents of a whole group."""
        costs = [bits / reference for bits, reference in self._sums]
        return [
            costs[int(i > 0)] * math.exp(SLOPE * offset) for i, offset in enumerate(self.offsets)
        ]
