"""The bitrate of one pass, on simulated latents whose cost follows laws that it does not know."""

import itertools
import math
import random
from types import SimpleNamespace

import pytest

from gnvc_jax.codec.config import CodecConfig
from gnvc_jax.leaky_bucket import LeakyBucket

PIXELS = 480 * 270


class Source:
    """Latents that cost what a video might: unknown slope, unlike first and later ones, noise."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.slope = self.rng.uniform(0.06, 0.1)
        self.first = PIXELS * 0.006 * math.exp(self.rng.gauss(0, 0.4))
        self.later = self.first * 0.5 * math.exp(self.rng.gauss(0, 0.4))

    def encode(self, bitrate, lengths, gop=97, fps=25, frames=None):
        """Bits per second of groups of these numbers of frames, and the levels of all latents."""
        header = SimpleNamespace(
            fps=(fps, 1),
            gop_frames=gop,
            gop_latents=1 + (gop - 1) // 4,
            temporal_stride=4,
            width=480,
            height=270,
        )
        bucket = LeakyBucket(CodecConfig(intra_offset=25), header, bitrate, frames)
        size, first, levels = 200.0, 0, []
        for frames in lengths:
            bucket.begin_group(size, first)
            size += self.rng.uniform(40, 70)
            for i in range(1 + math.ceil((frames - 1) / 4)):
                noise = math.exp(self.rng.gauss(0, 0.2)) if i else 1.0
                level = bucket.level()
                if bucket.misjudges(self.bits(i, level) * noise):
                    level = bucket.level()
                bits = self.bits(i, level) * noise
                bucket.coded(bits)
                size += bits / 8
                levels.append(level)
            first += frames
        return 8 * size * fps / first, levels

    def bits(self, i, level):
        return (self.later if i else self.first) * math.exp(self.slope * level)


@pytest.mark.parametrize("bitrate", [25e3, 50e3])
def test_the_bitrate_is_met_after_a_few_groups(bitrate):
    for groups, most in ((2, 0.05), (3, 0.03), (10, 0.02)):
        rates = [Source(i).encode(bitrate, [97] * groups)[0] for i in range(40)]
        assert max(abs(rate / bitrate - 1) for rate in rates) < most


def test_short_groups_and_harder_scenes_are_paid_back():
    source = Source(3)
    lengths = [97, 20, 41, 97, 13, 97, 97, 97]
    assert source.encode(5e4, lengths)[0] == pytest.approx(5e4, rel=0.03)
    source.later *= 3
    assert source.encode(5e4, [97] * 4)[0] == pytest.approx(5e4, rel=0.03)


@pytest.mark.parametrize("lengths", [(97, 23), (97, 97, 10), (30, 97, 10), (50, 50, 50, 20)])
def test_a_known_length_leaves_enough_for_a_short_last_group(lengths):
    for seed in range(20):
        rate, _ = Source(seed).encode(25e3, lengths, frames=sum(lengths))
        assert rate == pytest.approx(25e3, rel=0.05)


def test_levels_change_smoothly_and_repeat():
    rate, levels = Source(5).encode(5e4, [97] * 4)
    assert Source(5).encode(5e4, [97] * 4) == (rate, levels)
    inside = [levels[i : i + 24] for i in range(1, 100, 25)]
    assert all(abs(a - b) <= 3 for group in inside for a, b in itertools.pairwise(group))


def test_rates_out_of_reach_end_at_the_last_level():
    assert set(Source(0).encode(10, [97] * 2)[1]) == {0}
    assert set(Source(0).encode(1e12, [97] * 2)[1][1:]) == {63}
