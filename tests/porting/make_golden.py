"""Makes golden/ anew with torch and diffusers: python -m pytest tests/porting/make_golden.py

Each file holds what diffusers computes with the weights of the fixture `wan_tensor`, its
configuration and the names and shapes of its tensors. `tensors.pth` is a PyTorch file with odd
layouts, `tensors_old.pth` the same in the form before 1.6, `tensors.npz` holds what is in it.
"""

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from gnvc_jax.porting.architectures import WAN22_MEAN, WAN22_STD

FOLDER = Path(__file__).parent / "golden"
DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "text_dim": 24,
    "freq_dim": 32,
    "ffn_dim": 96,
    "num_layers": 4,
}


def build(cls, wan_tensor, **config):
    model = cls(**config).eval()
    state = {name: torch.from_numpy(wan_tensor(name, tuple(value.shape)))
             for name, value in model.state_dict().items()}  # fmt: skip
    model.load_state_dict(state)
    shapes = {name: list(value.shape) for name, value in state.items()}
    return model, json.dumps({"config": dict(model.config), "shapes": shapes})


def tensor(name, *shape):
    noise = np.random.RandomState(len(name)).standard_normal(shape)
    return torch.from_numpy(np.float32(noise))


WAN22 = {"decoder_base_dim": 6, "z_dim": 48, "is_residual": True, "patch_size": 2,
         "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16,
         "latents_mean": list(WAN22_MEAN), "latents_std": list(WAN22_STD)}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "config", "size"), [("vae", {"z_dim": 16}, (24, 40)), ("vae22", WAN22, (32, 48))]
)
def test_make_vae(name, config, size, wan_tensor):
    model, facts = build(diffusers.AutoencoderKLWan, wan_tensor, base_dim=4, **config)
    video = torch.tanh(tensor("video", 1, 3, 9, *size))
    with torch.inference_mode():
        latents = model.encode(video).latent_dist.mode()
        decoded = model.decode(latents).sample
    np.savez(FOLDER / f"{name}.npz", facts=facts, video=video, latents=latents, decoded=decoded)


def test_make_dit(wan_tensor):
    for name, cls, config in (
        ("dit", diffusers.WanTransformer3DModel, {}),
        ("vace", diffusers.WanVACETransformer3DModel, {"vace_layers": [0, 2]}),
    ):
        model, facts = build(cls, wan_tensor, **DIT, **config)
        inputs = {
            "hidden_states": tensor("latents", 2, 16, 3, 6, 8),
            "timestep": torch.tensor([37.5, 903.0]),
            "encoder_hidden_states": tensor("text", 2, 7, 24),
        }
        if config:
            inputs["control_hidden_states"] = tensor("context", 2, 96, 3, 6, 8)
            inputs["control_hidden_states_scale"] = torch.tensor([1.0, 0.5])
        padded = torch.nn.functional.pad(inputs["encoder_hidden_states"], (0, 0, 0, 505))
        with torch.inference_mode():
            (output,) = model(**inputs | {"encoder_hidden_states": padded}, return_dict=False)
        np.savez(FOLDER / f"{name}.npz", facts=facts, output=output, **inputs)


def test_make_torch_file():
    base = tensor("base", 4, 6)
    tensors = {
        "plain": base,
        "transposed": base.t(),
        "slice": base[1:3, 2:5],
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "half": base.half(),
        "bfloat16": base.bfloat16(),
        "double": base.double(),
        "parameter": torch.nn.Parameter(base + 1),
    }
    torch.save(tensors, FOLDER / "tensors.pth")
    torch.save(tensors, FOLDER / "tensors_old.pth", _use_new_zipfile_serialization=False)
    arrays = {name: value.detach().float().numpy() for name, value in tensors.items()}
    np.savez(FOLDER / "tensors.npz", **arrays)
