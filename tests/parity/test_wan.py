"""VAE, DiT and VACE against diffusers, through the files that users have and `gnvc port`.

Weights are random and none is trivial; float32 on CPU. `make test-parity` installs what is needed.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

torch = pytest.importorskip("torch", reason="torch is not installed: make test-parity")
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: make test-parity")

from safetensors.torch import save_file  # noqa: E402

from gnvc_jax import cli  # noqa: E402
from gnvc_jax.porting.checkpoint import load_weights  # noqa: E402
from gnvc_jax.refiner import DiT  # noqa: E402
from gnvc_jax.vae import VAE, decode_stream, encode_stream  # noqa: E402

pytestmark = pytest.mark.parity

# One block of Wan2.1's 1.3B model.
REAL = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 1}


def randomise(model, seed=0):
    """Random weights that all matter."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn_like(p)
            if name.endswith("gamma") or ("norm" in name and name.endswith("weight")):
                p.copy_(1 + 0.2 * noise)
            elif name.endswith("weight"):
                p.copy_(noise / p[0].numel() ** 0.5)
            else:
                p.copy_(0.2 * noise)
    return model.eval()


def port(source, target, *options):
    done = cli.main(["port", "--from", str(source), "--to", str(target), "--no-progress", *options])
    assert done == 0


def ported(model, component, folder):
    """Architecture and parameters of a torch model, through its own saving and `gnvc port`."""
    model.save_pretrained(folder / "public" / component)
    port(folder / "public" / component, folder / "ported")
    return load_weights(folder / "ported", "vae" if component == "vae" else "dit")


def last(x):
    return jnp.asarray(rearrange(x.detach().numpy(), "b c t h w -> b t h w c"))


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    model = randomise(diffusers.AutoencoderKLWan(base_dim=8, z_dim=16))
    architecture, params = ported(model, "vae", tmp_path_factory.mktemp("vae"))
    return model, VAE(architecture.config), params


def check_vae(model, ours, params, frames, h, w, same):
    """Encoder and decoder on a random clip and on random latents."""
    torch.manual_seed(frames)
    video = torch.rand(1, 3, frames, h, w) * 2 - 1
    cfg = ours.config
    shape = 1 + (frames - 1) // cfg.temporal_stride, h // cfg.stride, w // cfg.stride
    latents = torch.randn(1, cfg.latent_channels, *shape)
    with torch.inference_mode():
        posterior = model.encode(video).latent_dist
        decoded = model.decode(latents).sample
    mean, logvar = ours.apply({"params": params}, last(video), method="encode")
    same("mean", mean, last(posterior.mean))
    same("log-variance", logvar, last(posterior.logvar))
    frames_out = ours.apply({"params": params}, last(latents), method="decode")
    same("decoded", jnp.clip(frames_out, -1, 1), last(decoded))


@pytest.mark.parametrize(
    ("frames", "h", "w"), [(1, 32, 48), (5, 32, 48), (17, 32, 48), (5, 27, 45), (1, 16, 40)]
)
def test_vae_matches_diffusers(vae, frames, h, w, same):
    check_vae(*vae, frames, h, w, same)


@pytest.fixture(scope="module")
def vae22(tmp_path_factory):
    """As `vae`, with the layers of Wan2.2-TI2V-5B."""
    model = randomise(
        diffusers.AutoencoderKLWan(
            base_dim=8,
            decoder_base_dim=12,
            z_dim=48,
            is_residual=True,
            patch_size=2,
            in_channels=12,
            out_channels=12,
            scale_factor_spatial=16,
            latents_mean=[0.0] * 48,
            latents_std=[1.0] * 48,
        )
    )
    architecture, params = ported(model, "vae", tmp_path_factory.mktemp("vae22"))
    return model, VAE(architecture.config), params


@pytest.mark.parametrize(("frames", "h", "w"), [(1, 32, 48), (9, 32, 48), (5, 16, 80)])
def test_vae_of_wan22_matches_diffusers(vae22, frames, h, w, same):
    check_vae(*vae22, frames, h, w, same)


def test_streamed_vae_of_wan22_matches_diffusers(vae22, same):
    model, ours, params = vae22
    torch.manual_seed(0)
    video = torch.rand(1, 3, 13, 32, 32) * 2 - 1
    with torch.inference_mode():
        latents = model.encode(video).latent_dist.mean
        decoded = model.decode(latents).sample
    found = jax.jit(lambda video: encode_stream(ours, params, video))(last(video))
    same("mean", found, last(latents))
    found = jax.jit(lambda z: decode_stream(ours, params, z, 13, (32, 32)))(last(latents))
    same("decoded", found, last(decoded))


def test_full_size_vae_matches_diffusers(tmp_path, same):
    """Wide convolutions take another road on CPU (see `gnvc_jax.winograd`)."""
    model = randomise(diffusers.AutoencoderKLWan())
    architecture, params = ported(model, "vae", tmp_path)
    ours = VAE(architecture.config)
    torch.manual_seed(5)
    video = torch.rand(1, 3, 5, 32, 48) * 2 - 1
    latents = torch.randn(1, 16, 2, 4, 6)
    with torch.inference_mode():
        mean = model.encode(video).latent_dist.mean
        decoded = model.decode(latents).sample
    encode, decode = (
        jax.jit(lambda params, x, way=way: ours.apply({"params": params}, x, method=way))
        for way in ("encode", "decode")
    )
    same("mean", encode(params, last(video))[0], last(mean))
    same("decoded", jnp.clip(decode(params, last(latents)), -1, 1), last(decoded))


def test_gradients_of_the_vae_match_diffusers(vae, tmp_path, same):
    """Of a loss through encoder and decoder, with respect to every parameter and the video."""
    model, ours, params = vae
    torch.manual_seed(0)
    video = (torch.rand(1, 3, 5, 16, 24) * 2 - 1).requires_grad_()
    model.zero_grad()
    latents = model.encode(video).latent_dist.mean
    decoded = model._decode(latents, return_dict=False)[0]  # before clipping: clipped has no slope
    (decoded.clamp(-1, 1) ** 2).mean().backward()

    def loss(params, video):
        mean, _ = ours.apply({"params": params}, video, method="encode")
        decoded = ours.apply({"params": params}, mean, method="decode")
        return (jnp.clip(decoded, -1, 1) ** 2).mean()

    by_params, by_video = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, last(video))
    same("video, scaled", 1e4 * by_video, 1e4 * last(video.grad))
    # The gradients take the road of the weights: saved by torch, ported, compared.
    with torch.no_grad():
        scaled = randomise(diffusers.AutoencoderKLWan(base_dim=8, z_dim=16))
        for target, p in zip(scaled.parameters(), model.parameters()):
            target.copy_(p.grad)
    _, theirs = ported(scaled, "vae", tmp_path)
    largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(theirs))
    for path, a in jax.tree_util.tree_leaves_with_path(by_params):
        b = theirs
        for part in path:
            b = b[part.key]
        error = np.abs(np.asarray(a) - b).max() / np.abs(b).max()
        # Where a gradient is all but zero by symmetry, rounding of the others is its scale.
        assert error <= 1e-5 or np.abs(np.asarray(a) - b).max() <= 1e-7 * largest, path
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (by_params, theirs)]
    same("parameters", flat[0] / largest, flat[1] / largest)


@pytest.mark.parametrize("size", ["tiny", "real"])
@pytest.mark.parametrize("adapter", [False, True], ids=["dit", "vace"])
def test_dit_matches_diffusers(size, adapter, tmp_path, same, tiny_transformer):
    config = tiny_transformer if size == "tiny" else REAL
    if adapter:
        layers = list(range(0, config["num_layers"], 2))
        model = diffusers.WanVACETransformer3DModel(**config, vace_layers=layers)
    else:
        model = diffusers.WanTransformer3DModel(**config)
    model = randomise(model)
    architecture, params = ported(model, "transformer", tmp_path)
    torch.manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(2, 16, 3, 6, 8),
        "timestep": torch.tensor([37.5, 903.0]),
        "encoder_hidden_states": torch.randn(2, 512, config.get("text_dim", 4096)),
    }
    ours = [last(inputs["hidden_states"]), *(inputs[k].numpy() for k in list(inputs)[1:])]
    if adapter:
        scale = torch.linspace(1.0, 0.5, len(layers))
        inputs["control_hidden_states"] = torch.randn(2, 96, 3, 6, 8)
        inputs["control_hidden_states_scale"] = scale
        ours += [last(inputs["control_hidden_states"]), scale.numpy()]
    with torch.inference_mode():
        (velocity,) = model(**inputs, return_dict=False)
    same("velocity", DiT(architecture.config).apply({"params": params}, *ours), last(velocity))


def test_files_in_the_original_names_give_the_same_parameters(
    vae, to_original, tmp_path, tiny_transformer
):
    """Wan2.1_VAE.pth and a DiT in two files with an index, as Wan-AI publishes them."""
    model, _, expected = vae
    folder = tmp_path / "Wan2.1"
    folder.mkdir()
    torch.save(to_original(model.state_dict()), folder / "Wan2.1_VAE.pth")

    dit = randomise(diffusers.WanVACETransformer3DModel(**tiny_transformer, vace_layers=[0, 2]))
    state = sorted(to_original(dit.state_dict()).items())
    parts = dict(state[::2]), dict(state[1::2])
    names = {}
    for i, part in enumerate(parts, 1):
        name = f"diffusion_pytorch_model-{i:05d}-of-00002.safetensors"
        save_file(part, folder / name)
        names |= dict.fromkeys(part, name)
    index = json.dumps({"weight_map": names})
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
    facts = {"dim": 64, "num_heads": 2, "vace_layers": [0, 2], "eps": 1e-6, "text_len": 512}
    (folder / "config.json").write_text(json.dumps(facts))

    port(folder, tmp_path / "original")
    _, params = load_weights(tmp_path / "original", "vae")
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    architecture, params = load_weights(tmp_path / "original", "dit")
    other, expected = ported(dit, "transformer", tmp_path)
    assert architecture == other
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_diffusers_reads_what_is_exported(tmp_path, tiny_transformer):
    dit = diffusers.WanVACETransformer3DModel(**tiny_transformer, vace_layers=[0, 2])
    for component, model in (
        ("vae", diffusers.AutoencoderKLWan(base_dim=8, z_dim=16)),
        ("transformer", dit),
    ):
        folder = tmp_path / component
        ported(randomise(model), component, folder)
        source, target = str(folder / "ported"), str(folder / "back")
        assert cli.main(["export", "--from", source, "--to", target, "--no-progress"]) == 0
        again = type(model).from_pretrained(folder / "back" / component)
        for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items()):
            assert torch.equal(a, b), name
