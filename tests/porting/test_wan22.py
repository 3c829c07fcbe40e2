"""The VAE of Wan2.2-TI2V-5B: 48 channels and 16 pixels per latent, from public files to streams."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from gnvc_jax import calibrate, cli
from gnvc_jax.bitstream import StreamReader
from gnvc_jax.demo import camera_move, write_all
from gnvc_jax.model_file import save_model
from gnvc_jax.porting.architectures import WAN22_MEAN, WAN22_STD
from gnvc_jax.porting.checkpoint import read_architecture
from gnvc_jax.porting.port import port
from gnvc_jax.pretrained import Codec
from gnvc_jax.vae.config import WAN22


def test_everything_is_recognised_by_the_tensors(golden, to_original, tmp_path, capsys):
    """As in Wan2.2_VAE.pth, beside which no config.json describes the VAE."""
    tensors = to_original(golden("vae22")[2])
    file = tmp_path / "Wan2.2_VAE.safetensors"
    save_file(tensors, file)
    port(file, tmp_path / "ported", progress=False)
    found = read_architecture(tmp_path / "ported", "vae")
    assert found.config == dataclasses.replace(WAN22, base=4, decoder_base=6)
    assert (found.config.stride, found.config.temporal_stride) == (16, 4)
    assert (found.latents_mean, found.latents_std) == (WAN22_MEAN, WAN22_STD)

    del tensors["decoder.upsamples.0.upsamples.3.time_conv.bias"]
    save_file(tensors, file)
    assert cli.main(["port", "--from", str(file), "--check"]) == 25
    error = capsys.readouterr().err
    assert "missing: decoder.upsamples.0.upsamples.3.time_conv.bias" in error


@pytest.mark.slow
def test_a_calibrated_codec_codes_with_16_pixels_per_latent(
    public, golden, tiny_codec, start_codec, monkeypatch, tmp_path
):
    monkeypatch.setattr(calibrate, "init_codec", lambda codec, key: start_codec(codec))
    # With statistics of what the random weights give, not of the trained VAE's latents.
    latents, facts = golden("vae22")[0]["latents"], public("vae22") / "vae" / "config.json"
    found = {"latents_mean": latents.mean((0, 2, 3, 4)), "latents_std": latents.std((0, 2, 3, 4))}
    found = {name: x.tolist() for name, x in found.items()}
    facts.write_text(json.dumps(json.loads(facts.read_text()) | found))
    port(facts.parent, tmp_path / "ported", progress=False)
    video = camera_move(5)[:, :128, :128]
    write_all(tmp_path / "clip.mkv", video, 25)
    model = calibrate.calibrate(
        tmp_path / "clip.mkv",
        str(tmp_path / "ported"),
        clips=2,
        frames=5,
        size=(128, 128),
        config=dataclasses.replace(tiny_codec, latent_channels=48, y_channels=64),
        progress=False,
    )
    codec = Codec(model)
    streams = [codec.encode(video, qp=qp) for qp in (60, 0)]
    header = StreamReader(streams[0]).header
    assert (header.latent_stride, header.latent_channels) == (16, 48)
    best = codec.reconstruct(video).astype(float)  # random weights: far from the source
    errors = [np.mean((codec.decode(stream) - best) ** 2) for stream in streams]
    assert len(streams[0]) < len(streams[1]) and errors[1] < 0.9 * errors[0]

    save_model(tmp_path / "model.safetensors", model)
    (tmp_path / "clip.gnvc").write_bytes(streams[1])
    line = ["decode", str(tmp_path / "clip.gnvc"), str(tmp_path / "out.mkv")]
    assert cli.main([*line, "--model", str(tmp_path / "model.safetensors")]) == 0
