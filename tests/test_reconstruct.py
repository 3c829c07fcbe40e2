"""`gnvc reconstruct`: against the whole-clip pass of the VAE and PSNR by skimage."""

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio

import gnvc_jax
from gnvc_jax import cli
from gnvc_jax.demo import camera_move, write_all
from gnvc_jax.media.reader import read_clip
from gnvc_jax.model_file import save_model


@pytest.fixture
def place(tiny_model, tmp_path, monkeypatch):
    """A working folder with a VAE and a clip of seven frames with odd sides."""
    save_model(tmp_path / "m.safetensors", tiny_model())
    write_all(tmp_path / "clip.mkv", camera_move(7)[:, :19, :37], 25)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_reconstruct_equals_whole_clip_and_prints_psnr(place, capsys):
    assert cli.main("reconstruct clip.mkv out.mkv --vae m.safetensors".split()) == 0
    video, got = read_clip("clip.mkv", 0, 7), read_clip("out.mkv", 0, 7)
    vae = gnvc_jax.load_vae("m.safetensors")
    whole = vae.decode(vae.encode(video), frames=7, size=(19, 37))[0]
    np.testing.assert_allclose(got, (np.asarray(whole) + 1) * 127.5, atol=0.51)
    expected = [peak_signal_noise_ratio(a, b) for a, b in zip(video, got)]
    mean, low = np.mean(expected), np.min(expected)
    text = f"out.mkv: 7 frames, PSNR {mean:.2f} dB (lowest frame {low:.2f} dB)\n"
    assert capsys.readouterr().out == text


def test_reconstruct_that_fails_leaves_nothing(place, capsys):
    write_all(place / "cut.y4m", camera_move(3)[:, :16, :16], 25)
    (place / "cut.y4m").write_bytes((place / "cut.y4m").read_bytes()[:-100])
    before = sorted(place.iterdir())
    for arguments, code, message in (
        ("clip.mkv out.mkv --vae nothing", 66, "nothing: neither a shipped model"),
        ("nothing.mp4 out.mkv --vae m.safetensors", 66, "nothing.mp4: no such file"),
        ("clip.mkv out.mkv --vae m.safetensors --frames 0", 2, "--frames must be at least 1"),
        ("clip.mkv clip.mkv --vae m.safetensors --force", 73, "clip.mkv: is the input"),
        ("cut.y4m out.mkv --vae m.safetensors", 65, "cut.y4m"),
    ):
        assert cli.main(["reconstruct", *arguments.split()]) == code
        assert message in capsys.readouterr().err
    assert sorted(place.iterdir()) == before
