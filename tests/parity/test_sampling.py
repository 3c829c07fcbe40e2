"""`gnvc_jax.generate` against the pipelines of diffusers, through the files of `gnvc port`."""

import numpy as np
import pytest
from einops import rearrange

torch = pytest.importorskip("torch", reason="torch is not installed: make test-parity")
diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: make test-parity")

from gnvc_jax.generate import load_generator  # noqa: E402
from gnvc_jax.porting.port import port  # noqa: E402
from gnvc_jax.refiner.sampling import euler_times, unipc_times  # noqa: E402

pytestmark = pytest.mark.parity

FRAMES, SIZE, SHIFT, GUIDANCE = 5, 32, 3.0, 4.0


def scheduler(name, shift):
    if name == "euler":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    return diffusers.UniPCMultistepScheduler(**flow, flow_shift=shift)


@pytest.mark.parametrize(("name", "times"), [("euler", euler_times), ("unipc", unipc_times)])
@pytest.mark.parametrize(("steps", "shift"), [(1, 5.0), (5, 5.0), (50, 3.0), (8, 1.0)])
def test_schedules_match_diffusers(name, times, steps, shift):
    theirs = scheduler(name, shift)
    theirs.set_timesteps(steps)
    np.testing.assert_allclose(1 - times(steps, shift), theirs.sigmas, atol=1e-7)


@pytest.fixture(scope="module", params=["dit", "vace"])
def both(request, tmp_path_factory, wan_tensor, tiny_transformer):
    """A function from a scheduler to their pipeline, and our generator with the same weights."""
    sizes = tiny_transformer | {"num_layers": 2}
    if request.param == "dit":
        model = diffusers.WanTransformer3DModel(**sizes)
    else:
        model = diffusers.WanVACETransformer3DModel(**sizes, vace_layers=[0])
    vae = diffusers.AutoencoderKLWan(base_dim=4, z_dim=16)
    folder = tmp_path_factory.mktemp("sampling")
    for name, part in (("transformer", model), ("vae", vae)):
        tensors = {k: wan_tensor(k, tuple(x.shape)) for k, x in part.state_dict().items()}
        part.load_state_dict({k: torch.from_numpy(x) for k, x in tensors.items()})
        part.eval().save_pretrained(folder / "public" / name)
    port(folder / "public", folder / "ported", progress=False)

    def pipeline(scheduler):
        given = {"tokenizer": None, "text_encoder": None, "vae": vae, "scheduler": scheduler}
        if request.param == "dit":
            return diffusers.WanPipeline(**given, transformer=model)
        return diffusers.WanVACEPipeline(**given, transformer=model)

    return pipeline, load_generator(folder / "ported")


@pytest.mark.parametrize("sampler", ["euler", "unipc"])
def test_sampled_latents_match_diffusers(both, sampler, same):
    pipeline, generator = both
    rng = np.random.default_rng(0)
    prompt, negative = rng.normal(size=(2, 1, 5, 24)).astype(np.float32)
    noise = generator.noise(FRAMES, SIZE, SIZE, seed=1)
    used = pipeline(scheduler(sampler, SHIFT))
    used.set_progress_bar_config(disable=True)

    def rows(text):  # their encoder pads to 512 rows
        return torch.from_numpy(np.pad(text, ((0, 0), (0, 512 - text.shape[1]), (0, 0))))

    theirs = used(
        prompt_embeds=rows(prompt),
        negative_prompt_embeds=rows(negative),
        latents=torch.from_numpy(rearrange(np.array(noise), "b t h w c -> b c t h w")),
        num_frames=FRAMES,
        height=SIZE,
        width=SIZE,
        num_inference_steps=4,
        guidance_scale=GUIDANCE,
        output_type="latent",
    ).frames
    options = {"steps": 4, "shift": SHIFT, "guidance": GUIDANCE, "sampler": sampler}
    ours = generator.sample(noise, prompt, negative, **options)
    theirs = rearrange(theirs.numpy(), "b c t h w -> b t h w c")
    same(f"latents after 4 steps, {sampler}", ours, theirs)
