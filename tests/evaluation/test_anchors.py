"""x264 and x265 as anchors: what the streams contain, and the search for a rate."""

import re
from fractions import Fraction

import av
import numpy as np
import pytest

from gnvc_jax.evaluation import anchors
from gnvc_jax.evaluation.anchors import (
    Anchor,
    AnchorError,
    bisect_crf,
    encode_anchor,
    match_rate,
)

FPS = Fraction(30000, 1001)


def moving_pattern(t=8, h=64, w=64):
    """(t, h, w, 3) uint8 in soft colours, so that 4:2:0 loses little."""
    k, y, x = np.mgrid[:t, :h, :w]
    wave = 60 * np.sin((x + 3 * k) / 9) * np.cos(y / 7)
    return np.stack([120 + wave, 130 + 0.8 * wave, 110 - 0.5 * wave], -1).astype(np.uint8)


def psnr(a, b):
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


def unit_types(codec, stream):
    """NAL unit types of a byte stream (ITU-T H.264 and H.265, annex B)."""
    headers = [stream[m.end()] for m in re.finditer(b"\x00\x00\x01", stream)]
    return [h & 31 if codec == "x264" else h >> 1 & 63 for h in headers]


@pytest.mark.parametrize("codec", ["x264", "x265"])
def test_streams_are_bare_and_start_with_their_only_intra_frame(codec):
    frames = moving_pattern()
    result = encode_anchor(codec, frames, FPS, 28)
    types = unit_types(codec, result.bitstream)
    parameters, intra, side = {
        "x264": ((7, 8), (5,), (6,)),
        "x265": ((32, 33, 34), (19, 20), (39, 40)),
    }[codec]
    assert tuple(types[: len(parameters)]) == parameters
    assert sum(t in intra for t in types) == 1
    assert not set(types) & set(side)
    assert b"crf" not in result.bitstream  # the settings that both write into SEI messages
    assert result.size == len(result.bitstream)
    assert "/" not in result.command.replace("30000/1001", "")
    assert psnr(result.frames, frames) > 33


@pytest.mark.parametrize("codec", ["x264", "x265"])
def test_another_decoder_sees_tags_and_no_reordering(codec, tmp_path):
    path = tmp_path / "coded"
    path.write_bytes(encode_anchor(codec, moving_pattern(), FPS, 28).bitstream)
    with av.open(str(path), format=anchors.ENCODERS[codec].format) as container:
        frames = list(container.decode(video=0))
    assert len(frames) == 8
    assert {int(frame.colorspace) for frame in frames} == {1}  # BT.709
    assert {int(frame.color_range) for frame in frames} == {1}  # limited
    assert [int(frame.pict_type) for frame in frames] == [1] + [2] * 7  # I, then P


@pytest.mark.parametrize("codec", ["svtav1", "vvc"])
def test_newer_codecs_return_the_frames_and_reach_lower_rates(codec):
    frames = moving_pattern(5, 64, 72)
    fine, coarse = (encode_anchor(codec, frames, FPS, crf) for crf in (20, 55))
    assert fine.frames.shape == frames.shape
    assert psnr(fine.frames, frames) > 35
    assert psnr(fine.frames, frames) > psnr(coarse.frames, frames) > 25
    assert coarse.size < fine.size


def test_an_empty_output_is_retried(monkeypatch):
    real, calls = anchors.run_ffmpeg, []

    def sometimes_empty(arguments, inputs, output):
        calls.append(output)
        return b"" if len(calls) == 1 else real(arguments, inputs, output)

    monkeypatch.setattr(anchors, "run_ffmpeg", sometimes_empty)
    assert encode_anchor("x264", moving_pattern(2), FPS, 30).frames.shape[0] == 2
    monkeypatch.setattr(anchors, "run_ffmpeg", lambda *_: b"")
    with pytest.raises(AnchorError, match="empty file at crf 30"):
        encode_anchor("x264", moving_pattern(2), FPS, 30)


def test_odd_sides_keep_their_size():
    frames = moving_pattern(3, 33, 47)
    result = encode_anchor("x264", frames, FPS, 20)
    assert result.frames.shape == frames.shape
    assert psnr(result.frames, frames) > 35


def test_rates_are_matched_and_fall_with_the_target():
    anchor = Anchor("x264", moving_pattern(), FPS)
    sizes = {crf: anchor.encode(crf).size for crf in (20, 28, 40)}
    assert sizes[20] > sizes[28] > sizes[40]
    matches = [anchor.match(size) for size in sizes.values()]
    for match, size in zip(matches, sizes.values(), strict=True):
        assert match.target_bytes == size
        assert not match.at_floor
        assert match.result.size == pytest.approx(size, rel=0.02)


def test_floor_is_reported():
    match = match_rate("x265", moving_pattern(3), FPS, 50)
    assert match.at_floor
    assert match.result.crf == 51
    assert match.result.size > 50


@pytest.mark.parametrize("target", [90, 100, 1234, 10**5, 10**7])
def test_bisection_finds_the_nearest_size(target):
    def size(crf):
        calls.append(crf)
        return round(100 * 1.15 ** (51 - crf))

    calls = []
    crf, at_floor = bisect_crf(size, target, tolerance=0)
    grid = np.arange(0, 51.01, 0.25)
    nearest = min(grid, key=lambda c: abs(np.log(round(100 * 1.15 ** (51 - c)) / target)))
    if target < 10**7:  # the finest setting is never tried: it would take longest
        assert crf == nearest
    else:
        assert crf <= 0.25
    assert at_floor == (target < 100)
    assert len(calls) <= 10


def test_named_errors(monkeypatch):
    frames = moving_pattern(2)
    with pytest.raises(ValueError, match="unknown anchor 'vp8'"):
        encode_anchor("vp8", frames, FPS, 30)
    with pytest.raises(ValueError, match="uint8"):
        encode_anchor("x264", frames.astype(float), FPS, 30)
    broken = anchors.AnchorEncoder("-c:v libnothing", "h264")
    monkeypatch.setitem(anchors.ENCODERS, "x264", broken)
    with pytest.raises(AnchorError, match="exit status"):
        encode_anchor("x264", frames, FPS, 30)


def test_a_lost_frame_is_noticed(monkeypatch):
    frames = moving_pattern(3)
    real = anchors.run_ffmpeg
    short = encode_anchor("x264", frames[:2], FPS, 30).bitstream

    def lossy(arguments, inputs, output):
        return short if output.startswith("coded") else real(arguments, inputs, output)

    monkeypatch.setattr(anchors, "run_ffmpeg", lossy)
    with pytest.raises(AnchorError, match="3 frames of 64x64 went in"):
        encode_anchor("x264", frames, FPS, 30)
