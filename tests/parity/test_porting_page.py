"""The commands of docs/porting.md, one after another, on random weights in the public layouts."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

torch = pytest.importorskip("torch", reason="torch is not installed: make test-parity")

from gnvc_jax import calibrate, cli  # noqa: E402
from gnvc_jax.demo import camera_move, write_all  # noqa: E402
from gnvc_jax.media.reader import read_clip  # noqa: E402
from gnvc_jax.porting.names import light_decoder_tensors  # noqa: E402
from gnvc_jax.vae import LightDecoderConfig  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.slow]

GOLDEN = Path(__file__).parents[1] / "porting" / "golden"
PAGE = Path(__file__).parents[2] / "docs" / "porting.md"
# What makes commands small; the last of two equal options counts.
SMALL = {
    "calibrate": "--clips 4 --frames 5 --size 64x64",
    "generate": "--size 32x32 --frames 5 --steps 2",
}
# Training, evaluation and the weights of LPIPS have tests of their own.
OMITTED = "gnvc train", "gnvc eval", "gnvc port --from FOLDER"


def commands():
    text = PAGE.read_text().replace("\\\n", " ")
    for line in re.findall(r"^    gnvc .*$", text, re.MULTILINE):
        if not line.strip().startswith(OMITTED):
            words = shlex.split(line)[1:]
            yield words + SMALL.get(words[0], "").split()


def save_torch(tensors, path):
    torch.save({k: torch.from_numpy(x) for k, x in tensors.items()}, path)


@pytest.fixture
def tensors_of(wan_tensor, to_original):
    """A function from the name of a golden file to tensors with Wan-AI's names."""

    def make(name):
        with np.load(GOLDEN / f"{name}.npz") as file:
            shapes = json.loads(str(file["facts"]))["shapes"]
        return to_original({k: wan_tensor(k, tuple(shape)) for k, shape in shapes.items()})

    return make


@pytest.fixture
def write_repository(tensors_of):
    """A function that writes a repository of Wan-AI and returns the tensors of its DiT.

    It holds the VAE as PyTorch saves it and, in some of its folders, a DiT and its config.json.
    """

    def write(folder, dit, places=(".",)):
        folder.mkdir()
        save_torch(tensors_of("vae"), folder / "Wan2.1_VAE.pth")
        tensors = tensors_of(dit)
        for place in (folder / name for name in places):
            place.mkdir(exist_ok=True)
            save_file(tensors, place / "diffusion_pytorch_model.safetensors")
            (place / "config.json").write_text(json.dumps({"model_type": "t2v", "num_heads": 2}))
        return tensors

    return write


def test_documented_commands_run_in_order(
    tmp_path, monkeypatch, write_repository, tensors_of, wan_tensor, tiny_codec
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        calibrate,
        "default_config",
        lambda _, channels: type(tiny_codec)(**{**vars(tiny_codec), "latent_channels": channels}),
    )
    vace = write_repository(tmp_path / "Wan2.1-VACE-1.3B", "vace")
    write_repository(tmp_path / "Wan2.1-T2V-1.3B", "dit")
    experts = "high_noise_model", "low_noise_model"
    write_repository(tmp_path / "Wan2.2-T2V-A14B", "dit", experts)
    adapter = {k: x for k, x in vace.items() if k.startswith("vace_")}
    save_file(adapter, "vace_module.safetensors")
    video = camera_move(7)[:, :60, :90]
    (tmp_path / "CLIPS").mkdir()
    write_all(tmp_path / "CLIPS" / "a.mp4", camera_move(7)[:, :80, :96], 25)
    write_all(tmp_path / "clip.mp4", video, 25)
    light = light_decoder_tensors(LightDecoderConfig(widths=(8, 6, 5, 4)))
    save_torch({t.original: wan_tensor(t.original, t.shape) for t in light}, "taew2_1.pth")
    save_torch(tensors_of("vae22"), "Wan2.2_VAE.pth")
    lora = {"lora_A": (2, 64), "lora_B": (64, 2)}
    layer = "diffusion_model.blocks.0.self_attn.q"
    tensors = {f"{layer}.{k}.weight": np.ones(size, np.float32) for k, size in lora.items()}
    save_file(tensors, "lora.safetensors")
    for name in ("cat", "negative"):
        np.save(f"{name}.npy", np.random.default_rng(len(name)).normal(size=(4, 24)))

    done = []
    for words in commands():
        assert cli.main([*words, "--no-progress"]) == 0, words
        done.append(words[0])
    expected = (
        "port reconstruct port generate calibrate encode decode decode port decode generate "
        "port port port port"
    )
    assert done == expected.split()

    clips = {
        name: read_clip(f"{name}.mp4", 0, 5).astype(float)
        for name in ("cat", "cat_light", "clip_decoded", "clip_refined", "clip_light")
    }
    assert clips["cat"].shape == (5, 32, 32, 3) and clips["cat"].std() > 1
    assert np.abs(clips["cat_light"] - clips["cat"]).mean() > 1
    assert read_clip("clip_vae.mkv", 0, 7).shape == video.shape
    change = np.abs(clips["clip_refined"] - clips["clip_decoded"]).mean()
    assert change > 1
    assert np.abs(clips["clip_light"] - clips["clip_decoded"]).mean() > 1
    # With almost no noise there is almost nothing to do.
    words = "decode clip.gnvc same.mp4 --model calibrated.safetensors --refiner weights/t2v-1.3b"
    assert cli.main([*words.split(), "--t-start", "0.999", "--steps", "1"]) == 0
    same = read_clip("same.mp4", 0, 5).astype(float)
    assert np.abs(same - clips["clip_decoded"]).mean() < 0.2 * change
