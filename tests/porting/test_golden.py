"""Ported weights give what diffusers gave with them, without torch (see make_golden.py)."""

import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from safetensors.numpy import save_file

from gnvc_jax.porting.checkpoint import load_weights
from gnvc_jax.porting.port import port
from gnvc_jax.refiner import DiT
from gnvc_jax.vae import VAE, decode_clip, encode_clip


def last(x):
    return jnp.asarray(rearrange(x, "b c t h w -> b t h w c"))


def relative_error(ours, theirs):
    theirs = rearrange(theirs, "b c t h w -> b t h w c")
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize("name", ["vae", "vae22"])
def test_vae(name, public, golden, tmp_path):
    arrays, _, _ = golden(name)
    port(public(name), tmp_path / "ported", progress=False)
    architecture, params = load_weights(tmp_path / "ported", "vae")
    vae, (*_, h, w) = VAE(architecture.config), arrays["video"].shape
    latents = encode_clip(vae, params, last(arrays["video"]))
    assert relative_error(latents, arrays["latents"]) < 1e-5
    decoded = decode_clip(vae, params, last(arrays["latents"]), 9, (h, w))
    assert relative_error(decoded, arrays["decoded"]) < 1e-5


@pytest.mark.parametrize("name", ["dit", "vace"])
def test_dit(name, public, golden, tmp_path):
    arrays, _, _ = golden(name)
    port(public(name), tmp_path / "ported", progress=False)
    architecture, params = load_weights(tmp_path / "ported", "dit")
    inputs = last(arrays["hidden_states"]), arrays["timestep"], arrays["encoder_hidden_states"]
    if name == "vace":
        inputs += last(arrays["control_hidden_states"]), arrays["control_hidden_states_scale"]
    velocity = DiT(architecture.config).apply({"params": params}, *inputs)
    assert relative_error(velocity, arrays["output"]) < 1e-5


@pytest.mark.parametrize("name", ["vae", "vae22", "dit", "vace"])
def test_original_names_give_the_same_parameters(name, public, golden, to_original, tmp_path):
    _, _, tensors = golden(name)
    component = "vae" if name.startswith("vae") else "dit"
    prefix = "model.diffusion_model." if component == "dit" else ""  # as ComfyUI writes it
    renamed = {prefix + k: v for k, v in to_original(tensors).items()}
    assert len(renamed) == len(tensors) and renamed.keys() != tensors.keys()
    save_file(renamed, tmp_path / "original.safetensors")
    port(public(name), tmp_path / "a", progress=False)
    port(tmp_path / "original.safetensors", tmp_path / "b", heads=2, progress=False)
    (one, a), (two, b) = (load_weights(tmp_path / folder, component) for folder in "ab")
    assert one == two
    import jax

    jax.tree.map(np.testing.assert_array_equal, a, b)
