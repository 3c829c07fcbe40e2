"""Audio tracks: from a file to bytes, and beside new pictures."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest

from gnvc_jax.media.audio import AudioTrack, read_audio
from gnvc_jax.media.writer import DAMAGED_NOTE, SILENT_NOTE, open_writer

SECONDS = 1.2


def tone(rate: int) -> np.ndarray:
    """Mono samples (1, n) float32 that tell where they are: a rising tone."""
    t = np.arange(int(SECONDS * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * (300 + 500 * t) * t)).astype(np.float32)[None]


def write(path, codec: str, rate: int, delay: Fraction = Fraction(0)) -> None:
    """A video with sound that starts `delay` seconds after the pictures."""
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 32, 16, "yuv420p"
        sound = out.add_stream(codec, rate=rate, layout="mono")
        sound.codec_context.open()
        form, layout = sound.codec_context.format, sound.codec_context.layout
        resampler = av.AudioResampler(form, layout, rate, sound.codec_context.frame_size or 1024)
        samples = av.AudioFrame.from_ndarray(tone(rate), format="fltp", layout="mono")
        samples.sample_rate, samples.pts = rate, int(delay * rate)
        samples.time_base = Fraction(1, rate)
        for number in range(30):
            picture = np.full((16, 32, 3), 8 * number, np.uint8)
            out.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(video.encode())
        for piece in resampler.resample(samples) + resampler.resample(None):
            out.mux(sound.encode(piece))
        out.mux(sound.encode())


def packets(source) -> tuple[list[bytes], np.ndarray]:
    """Bytes of all audio packets, and their times since the first picture, if there is one."""
    with av.open(source if isinstance(source, io.BytesIO) else str(source)) as container:
        stream, zero = container.streams.audio[0], 0.0
        for video in container.streams.video:
            zero = float(video.start_time * video.time_base)
        found = [p for p in container.demux(stream) if p.dts is not None]
        times = np.array([float(p.pts * p.time_base) for p in found])
        return [bytes(p) for p in found], times - zero


def rewrite(path, track: AudioTrack, frames: int = 30) -> list[str]:
    """Writes new pictures with a track, and returns the notes."""
    with open_writer(path, 32, 16, 25, audio=track) as out:
        for _ in range(frames):
            out.write(np.zeros((16, 32, 3), np.uint8))
    return list(out.notes)


@pytest.mark.parametrize(
    "codec, rate, source, target",
    [
        ("aac", 44100, "a.mp4", "b.mp4"),
        ("aac", 44100, "a.mp4", "b.mkv"),
        ("libopus", 48000, "a.mkv", "b.mkv"),
        ("libmp3lame", 44100, "a.mkv", "b.mp4"),
        ("pcm_s16le", 44100, "a.mkv", "b.mkv"),
        ("flac", 44100, "a.mkv", "b.mp4"),
    ],
)
def test_packets_are_copied_with_their_times(tmp_path, codec, rate, source, target):
    write(tmp_path / source, codec, rate)
    track = AudioTrack.unpack(read_audio(tmp_path / source).pack())
    assert rewrite(tmp_path / target, track) == []
    before, times = packets(tmp_path / source)
    after, later = packets(tmp_path / target)
    # What sounds after the last picture is left out.
    assert len(before) >= len(after) >= len(before) - 4
    assert after == before[: len(after)]
    # Matroska counts milliseconds.
    np.testing.assert_allclose(later, times[: len(later)], atol=0.002)


def test_sound_that_starts_late_stays_late(tmp_path):
    write(tmp_path / "a.mkv", "aac", 44100, delay=Fraction(1, 2))
    track = read_audio(tmp_path / "a.mkv")
    assert float(track.start) == pytest.approx(0.5, abs=0.05)
    rewrite(tmp_path / "b.mp4", track, frames=50)
    assert packets(tmp_path / "b.mp4")[1][0] == pytest.approx(float(track.start), abs=0.001)


def test_sound_is_cut_with_the_pictures(tmp_path):
    write(tmp_path / "a.mp4", "aac", 44100)
    track = read_audio(tmp_path / "a.mp4", seconds=Fraction(1, 2))
    times = packets(io.BytesIO(track.nut))[1] + float(track.start)
    assert 0.45 < times[-1] < 0.5
    # A video that is shorter than its track, as after damage.
    rewrite(tmp_path / "b.mp4", track, frames=5)
    assert packets(tmp_path / "b.mp4")[1][-1] < 0.2


def test_opus_keeps_the_sound_at_its_place(tmp_path):
    write(tmp_path / "a.mp4", "aac", 44100)
    track = read_audio(tmp_path / "a.mp4", bitrate=24_000)
    size = sum(map(len, packets(io.BytesIO(track.nut))[0]))
    assert 0.5 < 8 * size / SECONDS / 24_000 < 1.5
    rewrite(tmp_path / "b.mkv", track)
    with av.open(str(tmp_path / "b.mkv")) as container:
        stream = container.streams.audio[0]
        assert stream.codec_context.name == "opus" and stream.sample_rate == 48000
        heard = np.concatenate([f.to_ndarray()[0] for f in container.decode(stream)])
    wanted = tone(48000)[0]
    length = min(len(heard), len(wanted)) - 4800
    # The best shift of what is heard against the source, in samples: 10 ms at most.
    spectrum = np.fft.rfft(heard[:length], 2 * length)
    match = np.fft.irfft(spectrum * np.conj(np.fft.rfft(wanted[:length], 2 * length)))
    assert abs((np.argmax(match) + length) % (2 * length) - length) < 480


def test_no_track_and_no_place_for_one(tmp_path):
    write(tmp_path / "a.mov", "pcm_alaw", 8000)
    track = read_audio(tmp_path / "a.mov")
    assert rewrite(tmp_path / "b.mp4", track) == [SILENT_NOTE]
    assert rewrite(tmp_path / "b.y4m", track) == [SILENT_NOTE]
    broken = AudioTrack(track.start, track.nut[:40])
    assert rewrite(tmp_path / "c.mkv", broken) == [SILENT_NOTE]
    assert rewrite(tmp_path / "d.mkv", AudioTrack.unpack(b"1234")) == [SILENT_NOTE]
    assert read_audio(tmp_path / "b.mp4") is None


def test_damaged_sound_costs_no_picture(tmp_path):
    write(tmp_path / "a.mkv", "libopus", 48000)
    track, rng, notes = read_audio(tmp_path / "a.mkv"), np.random.default_rng(0), set()
    for case in range(40):
        nut = bytearray(track.nut)
        for at in rng.integers(200, len(nut), 40):
            nut[at] ^= 1 << int(rng.integers(8))
        path = tmp_path / f"{case}.mkv"
        notes.update(rewrite(path, AudioTrack(track.start, bytes(nut))))
        with av.open(str(path)) as video:
            assert sum(1 for _ in video.decode(video=0)) == 30
    assert notes == {DAMAGED_NOTE, SILENT_NOTE}
