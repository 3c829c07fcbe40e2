"""Targets: the search against brute force, and streams that really have what was asked for."""

import io
import math

import cv2
import numpy as np
import pytest

from gnvc_jax.analysis import Analysis
from gnvc_jax.bitstream import StreamReader
from gnvc_jax.codec.config import CodecConfig
from gnvc_jax.errors import UsageError
from gnvc_jax.leaky_bucket import LeakyBucket
from gnvc_jax.pretrained import load_pretrained
from gnvc_jax.rate_control import RULES, Target, Trial, encode_to_target, frame_metric, search

LEVELS = np.arange(505) / 8


def file_size(qp: float, groups: int = 3) -> float:
    """A model of the size of a file: 9 % per level, and first latents as large as 20 others."""
    config = CodecConfig(intra_offset=25)
    levels = np.array([config.levels(63 - qp, 25, group) for group in range(groups)])
    weights = np.array([20 * math.exp(-0.09 * 25), *[1] * 24])
    return 400 + 2e5 * (weights * np.exp(0.09 * (levels - 63))).sum() / groups


CURVES = {
    "bitrate": file_size,
    "size": file_size,
    "psnr": lambda qp: 45 - 0.25 * qp - 0.001 * qp**2,
    "lpips": lambda qp: 0.05 * math.exp(0.04 * qp),
}


def found(target, curve):
    trials = []

    def attempt(qp):
        value = curve(qp)
        trials.append(Trial(qp, io.BytesIO(), 200, value, target.surplus(value)))
        return trials[-1]

    best = search(attempt, target.rule)
    assert [t for t in trials if not t.file.closed] == [best]
    return best, len(trials)


@pytest.mark.parametrize("kind", CURVES)
def test_the_search_finds_what_brute_force_finds(kind):
    values = np.array([CURVES[kind](qp) for qp in LEVELS])
    rule = RULES[kind]
    for value in np.exp(np.linspace(np.log(values.min() * 1.01), np.log(values.max() * 0.99), 40)):
        target = Target(kind, value)
        best, passes = found(target, CURVES[kind])
        assert passes <= 8
        surplus = np.array([target.surplus(v) for v in values])
        inside = (surplus >= rule.low) & (surplus <= rule.high)
        if inside.any():
            assert rule.low <= best.surplus <= rule.high
        else:
            allowed = np.where((surplus >= rule.least) & (surplus <= rule.most), abs(surplus), 9)
            assert best.qp == LEVELS[allowed.argmin()]


@pytest.mark.parametrize(
    ("kind", "value", "qp"), [("size", 1e9, 0), ("size", 1, 63), ("psnr", 90, 0), ("lpips", 1, 63)]
)
def test_a_target_out_of_reach_ends_at_the_nearest_level(kind, value, qp):
    best, passes = found(Target(kind, value), CURVES[kind])
    assert best.qp == qp and passes <= 3


def test_noisy_sizes_do_not_mislead_the_search():
    rng = np.random.default_rng(0)
    noise = dict(zip(LEVELS, rng.normal(0, 0.01, len(LEVELS))))
    for value in np.geomspace(4e4, 4e6, 20):
        best, passes = found(Target("size", value), lambda qp: file_size(qp) * (1 + noise[qp]))
        assert best.value <= value and best.value > 0.9 * value and passes <= 9


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_a_target_is_a_positive_number(value):
    with pytest.raises(UsageError, match="positive number"):
        Target("bpp", value)


@pytest.fixture(scope="module")
def codec():
    return load_pretrained("small")


@pytest.fixture(scope="module")
def video():
    canvas = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    canvas = cv2.resize(canvas, (96, 96))
    return np.stack([canvas[t : t + 64, 2 * t : 2 * t + 64] for t in range(5)])


def meet(codec, video, kind, value):
    header = codec.header(64, 64, (25, 1))
    trial = encode_to_target(codec, lambda: iter(video), header, Target(kind, value))
    stream = trial.file.seek(0) or trial.file.read()
    trial.file.close()
    return trial, stream


def test_a_stream_is_never_larger_than_the_largest_size(codec, video):
    for size in (900, 1400):
        trial, stream = meet(codec, video, "size", size)
        assert 0.85 * size < len(stream) <= size
        # What a decoder sees is one level or two neighbouring ones, besides the first latent.
        with StreamReader(stream) as reader:
            (group,) = reader.groups()
        assert abs(group.q_indices[1] - (63 - trial.qp)) < 1


def test_a_quality_is_reached_by_what_a_decoder_shows(codec, video):
    def psnr(stream):
        errors = (codec.decode(stream).astype(float) - video) ** 2
        return (10 * np.log10(255**2 / errors.mean((1, 2, 3)))).mean()

    aim = psnr(codec.encode(video, qp=40)) + 0.2
    trial, stream = meet(codec, video, "psnr", aim)
    # The next worse level misses it: nothing is given away.
    assert psnr(codec.encode(video, qp=trial.qp + 1)) < aim <= psnr(stream) and trial.qp <= 40
    np.testing.assert_allclose(trial.value, psnr(stream), atol=1e-3)


def test_a_rate_below_the_container_names_the_nearest(codec, video):
    with pytest.raises(UsageError, match=r"1.00 kb/s cannot be met; .* kb/s, with --qp 63"):
        meet(codec, video, "bitrate", 1000)


def test_one_pass_steers_levels_towards_a_bitrate(codec, video):
    there_and_back = np.concatenate([video, video[::-1]] * 3)[:29]
    header = codec.header(64, 64, (25, 1), gop=13)
    rates, levels = [], []
    for bitrate in (10e3, 30e3):
        out = io.BytesIO()
        bucket = LeakyBucket(codec.model.codec_config, header, bitrate)
        assert codec.encode_frames(there_and_back, out, header, bucket) == 29
        rates.append(8 * len(out.getvalue()) * 25 / 29 / bitrate)
        assert len(codec.decode(out.getvalue(), steps=0)) == 29
        with StreamReader(out.getvalue()) as reader:
            levels.append([level for group in reader.groups() for level in group.q_indices])
    # Three groups of 13, 13 and 3 frames: the last has taken its first latent, and little else.
    assert all(0.8 < rate < 1.6 for rate in rates), (rates, levels)
    assert all(len(set(chosen)) > 2 for chosen in levels)
    assert np.mean(levels[1]) > np.mean(levels[0]) + 5


def test_metrics_take_frames_of_eight_bits():
    x, y = np.random.default_rng(0).integers(0, 256, (2, 1, 32, 32, 3), np.uint8)
    distance = frame_metric("lpips")
    assert abs(distance(x, x)[0]) < 1e-6 and distance(x, y)[0] > 0.01
    np.testing.assert_allclose(distance(x, y), distance(y, x), rtol=1e-4)
    errors = (x.astype(float) - y) ** 2
    decibels = 10 * np.log10(255**2 / errors.mean())
    np.testing.assert_allclose(frame_metric("psnr")(x, y), [decibels], rtol=1e-5)


def test_lpips_needs_frames_of_some_size(codec):
    header = codec.header(64, 16, (25, 1))
    with pytest.raises(UsageError, match="LPIPS needs frames of at least 32x32 pixels, got 64x16"):
        encode_to_target(codec, list, header, Target("lpips", 0.1))


def test_a_second_pass_repeats_neither_vae_nor_motion_search(codec, video, monkeypatch):
    header, analysis = codec.header(64, 64, (25, 1), gop=5), Analysis()

    def encode(qp):
        out = io.BytesIO()
        codec.encode_frames([*video, *video], out, header, qp, analysis=analysis)
        return out.getvalue()

    first = encode(20)
    monkeypatch.setattr(codec.functions, "encode_video", None)
    monkeypatch.setattr(codec, "_search", None)
    assert encode(20) == first
    assert encode(21.5) != first
    with pytest.raises(TypeError):  # motion of a level far away is searched again
        encode(40)
