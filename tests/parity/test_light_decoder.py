"""The light decoder against a transcription of TAEHV in PyTorch that works frame by frame."""

import jax
import numpy as np
import pytest
from einops import rearrange

torch = pytest.importorskip("torch", reason="torch is not installed: make test-parity")

from gnvc_jax import cli  # noqa: E402
from gnvc_jax.porting.checkpoint import load_weights  # noqa: E402
from gnvc_jax.porting.names import light_decoder_tensors  # noqa: E402
from gnvc_jax.vae import LightDecoder, LightDecoderConfig, decode_chunk  # noqa: E402

pytestmark = pytest.mark.parity

functional = torch.nn.functional
UPSAMPLINGS, RELUS, LAST = (6, 12, 18), (2, 21), 22


def transcription(weights, latents):
    """Frames (n, 3, h, w) in [0, 1] of normalised latents (n, c, h, w).

    The decoder is a sequence of layers, each fed with one frame after the other.
    """
    before = {}  # the last frame that each block has seen

    def conv(x, name):
        kernel, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
        return functional.conv2d(x, kernel, bias, padding=kernel.shape[-1] // 2)

    def frames_after(place, x):
        name = f"decoder.{place}"
        if place > LAST:
            yield x
        elif place == 0:
            yield from frames_after(1, 3 * torch.tanh(x / 3))
        elif place in RELUS:
            yield from frames_after(place + 1, x.relu())
        elif place in UPSAMPLINGS:
            yield from frames_after(place + 1, functional.interpolate(x, scale_factor=2))
        elif f"{name}.conv.0.weight" in weights:
            y = torch.cat([x, before.get(place, torch.zeros_like(x))], dim=1)
            before[place] = x
            y = conv(conv(y, f"{name}.conv.0").relu(), f"{name}.conv.2").relu()
            yield from frames_after(place + 1, (x + conv(y, f"{name}.conv.4")).relu())
        elif f"{name}.conv.weight" in weights:  # as many frames as it multiplies the channels
            for part in conv(x, f"{name}.conv").split(x.shape[1], dim=1):
                yield from frames_after(place + 1, part)
        else:
            yield from frames_after(place + 1, conv(x, name))

    with torch.inference_mode():
        frames = [frame for latent in latents for frame in frames_after(0, latent[None])]
    return torch.cat(frames[3:]).clamp(0, 1)  # the first latent stands for one frame


def test_light_decoder_matches_a_transcription_of_taehv(tmp_path, same):
    torch.manual_seed(0)
    config = LightDecoderConfig(widths=(12, 8, 6, 5))
    weights = {"encoder.0.weight": torch.zeros(64, 3, 3, 3)}
    for tensor in light_decoder_tensors(config):
        noise = torch.randn(tensor.shape)
        fan_in = int(np.prod(tensor.shape[1:])) if len(tensor.shape) > 1 else 25
        weights[tensor.original] = noise / fan_in**0.5
    weights["decoder.22.bias"] += 0.5  # in the middle of [0, 1]
    torch.save(weights, tmp_path / "taew2_1.pth")
    line = ["port", "--from", str(tmp_path / "taew2_1.pth"), "--to", str(tmp_path / "ported")]
    assert cli.main([*line, "--no-progress"]) == 0
    architecture, params = load_weights(tmp_path / "ported", "decoder")
    assert architecture.config == config

    latents = 2 * torch.randn(3, 16, 4, 6)
    expected = 2 * rearrange(transcription(weights, latents), "t c h w -> t h w c").numpy() - 1
    assert expected.shape == (9, 32, 48, 3)
    assert np.mean(np.abs(expected) < 1) > 0.5
    decoder = LightDecoder(config)
    decode = jax.jit(lambda cache, x: decode_chunk(decoder, params, cache, x))
    x = rearrange(latents.numpy(), "t c h w -> 1 t h w c")
    same("whole clip", decode(None, x)[0][0], expected)
    cache, chunks = None, []
    for i in range(3):
        frames, cache = decode(cache, x[:, i : i + 1])
        chunks.append(frames[0])
    same("latent by latent", np.concatenate(chunks), expected)
