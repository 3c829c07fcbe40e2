"""The stages with a refiner: their losses, gradients, windows and whitening."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from refiner_runs import STATISTICS, as_codec, batch, drawn, save_start, started

from gnvc_jax.cache_latents import cache_latents
from gnvc_jax.errors import GnvcError
from gnvc_jax.frames import to_float
from gnvc_jax.media.writer import open_writer
from gnvc_jax.parallel import MeshConfig, make_mesh
from gnvc_jax.refiner import flow
from gnvc_jax.training import partition, stages
from gnvc_jax.training.checkpoints import Checkpoints
from gnvc_jax.training.config import InitConfig, RunConfig
from gnvc_jax.training.inputs import Clips
from gnvc_jax.training.networks import make_networks
from gnvc_jax.training.refinement import random_window
from gnvc_jax.training.rollout import roll_out
from gnvc_jax.training.stages import make_stage
from gnvc_jax.training.stages.codec import CodecLoss
from gnvc_jax.training.stages.latent import LatentLoss
from gnvc_jax.training.stages.pixel import PixelLoss
from gnvc_jax.training.stages.vae import VAELoss
from gnvc_jax.training.state import init_state
from gnvc_jax.vae import VAE as VAEModule
from gnvc_jax.vae import encode_clip


def test_latents_of_a_run_are_taken_by_its_codec(base, tmp_path):
    """A VAE of one's own, its run named to `cache_latents` as to the stage."""
    run, cache, video = as_codec(base).init.vae, tmp_path / "cache", tmp_path / "a.mkv"
    frames = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)
    with open_writer(video, 64, 64, 25) as out:
        for frame in frames:
            out.write(frame)
    assert cache_latents(video, cache, run, 5, progress=False) == {}
    data = dataclasses.replace(base.data, latents=str(cache))
    stage = make_stage(as_codec(base, data=data))
    latents = next(iter(stage.data.batches(stage.experiment.data.shape_at(0))))
    # A later phase that the cache does not have is refused before the first step.
    for later, message in (
        ({"clip_length_schedule": ((9, 9),)}, "expected clips of at least 9 frames, found 5"),
        ({"size_schedule": ((9, 128, 64),)}, r"latents of \(8, 8\) are too small for .*\(16, 8\)"),
    ):
        later = dataclasses.replace(data, **later)
        with pytest.raises(GnvcError, match=message):
            Clips(make_stage(as_codec(base, data=later)).data, later, 0, None)
    params = stages.frozen(stage, STATISTICS)["fixed"]["vae"]
    vae = VAEModule(base.vae)
    (wanted,) = encode_clip(vae, params, to_float(frames[None]))
    np.testing.assert_allclose(latents[0], wanted, atol=2e-3 * np.abs(wanted).max())  # half floats
    with pytest.raises(ValueError, match="stage `codec`, expected `vae`"):
        cache_latents(video, cache, base.init.run, 5)
    learned = dataclasses.replace(base.vae, linear=False)
    facts = json.loads((Path(run) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(facts | {"vae": dataclasses.asdict(learned)}))
    with pytest.raises(ValueError, match="its encoder is learned"):
        cache_latents(video, cache, str(tmp_path), 5)


@pytest.mark.slow
def test_the_loss_of_the_latent_stage(base):
    """With a silent head a small refiner's error is known: its velocity is the linear one."""
    stage, params, frozen = started(base)
    head = jax.tree.map(jnp.zeros_like, params["refiner"]["dit"]["head"])
    params = {"refiner": params["refiner"] | {"dit": params["refiner"]["dit"] | {"head": head}}}
    loss = jax.jit(stages.objective(stage))
    value, metrics = loss(params, frozen, batch(), jax.random.key(3), 0)
    key_code, key_time, key_noise, key_window = jax.random.split(jax.random.key(3), 4)
    model, nets = partition.assemble(frozen["fixed"], params), make_networks(base)
    code = jax.jit(lambda *args: roll_out(nets, *args))
    done = code(model, frozen["constants"], batch(), key_code)
    # Of two latents one is refined, the first or the second, which is whitened by its own factor.
    place = int(jax.random.randint(key_window, (), 0, 2))
    part, white = slice(place, place + 1), STATISTICS["white"][place]
    clean, decoded = done.latents[:, part] * white, done.decoded[:, part] * white
    noise = jax.random.normal(key_noise, clean.shape)
    tau = jax.random.uniform(key_time, (2,), jnp.float32, 0.7, 0.999)[:, None, None, None, None]
    state = flow.path_state(clean, decoded, noise, tau)
    velocity = flow.linear_velocity(state, decoded, tau, 0.3)
    matching = jnp.mean((velocity - flow.path_velocity(clean, decoded, noise)) ** 2)
    error = (state + (1 - tau) * velocity - clean) / white
    refined = jnp.mean(error**2, axis=(1, 2, 3, 4))
    np.testing.assert_allclose(metrics["flow"], matching, rtol=1e-4)
    np.testing.assert_allclose(metrics["refined"], refined.mean(), rtol=1e-4)
    low, high = base.loss.lambda_low, base.loss.lambda_high
    rd_lambda = low * (high / low) ** (np.asarray(done.q_index) / 63)
    expected = (rd_lambda * (refined + 0.1 * done.error) + done.rate) / np.sqrt(rd_lambda)
    np.testing.assert_allclose(value, expected.mean() + matching, rtol=1e-4)


def test_windows_begin_anywhere_and_whiten_by_place():
    """What training refines: places from the first latent on, each with its own factors."""
    latents = jnp.arange(5.0)[None, :, None, None, None] * jnp.ones((2, 5, 2, 2, 4)) + 1
    firsts = []
    for seed in range(20):
        window = random_window(jax.random.key(seed), STATISTICS["white"], 5, 3)
        first = int(window.first)
        firsts.append(first)
        want = latents[:, first : first + 3]
        np.testing.assert_array_equal(window.cut(latents), want)
        doubled = want * jnp.where(first + jnp.arange(3) > 0, 2.0, 1.0)[:, None, None, None]
        np.testing.assert_array_equal(window.whitened(latents), doubled)
        np.testing.assert_array_equal(window.put(latents, doubled), latents)
        changed = window.put(latents, doubled + 2.0) != latents
        assert changed[:, first : first + 3].all() and changed.sum() == 2 * 3 * 16
    assert set(firsts) == {0, 1, 2}


def test_whitening_evens_out_what_a_linear_vae_gives(base, tmp_path):
    """Channels whose deviations differ by twenty have about the same afterwards."""
    rng = np.random.default_rng(0)
    canvas = rng.integers(0, 256, (30, 30, 3), np.uint8).repeat(6, 0).repeat(6, 1)
    with open_writer(tmp_path / "a.mkv", 96, 96, 25) as out:
        for t in range(30):
            out.write(
                canvas[t : t + 96, 2 * t : 2 * t + 96] // 2
                + rng.integers(0, 9, (96, 96, 3), np.uint8)
            )
    data = dataclasses.replace(base.data, path=str(tmp_path), frames=5)
    vae = dataclasses.replace(
        base,
        stage="vae",
        loss=VAELoss(lpips=0.0),
        data=data,
        init=InitConfig(),
        run=RunConfig(out=str(tmp_path / "v")),
    )
    stage = make_stage(vae)
    params = stages.start(stage, drawn(stage), {})
    checkpoints = Checkpoints(vae)
    checkpoints.save(1, init_state(vae.optim, params, jax.random.key(0)), {})
    checkpoints.close()
    codec = dataclasses.replace(
        vae, stage="codec", init=InitConfig(vae=vae.run.out), loss=CodecLoss()
    )
    found = make_stage(codec).measure()
    assert (found["mean"] == 0).all() and (found["std"] == 1).all()
    batches = [
        encode_clip(VAEModule(base.vae), params["vae"], to_float(b))
        for b, _ in zip(stage.data.batches(stage.experiment.data.shape_at(0)), range(8))
    ]
    later = np.concatenate(batches)[:, 1:]
    raw = later.std((0, 1, 2, 3))
    white = (later * found["white"][1]).std((0, 1, 2, 3))
    assert white.max() / white.min() < 1.1 < raw.max() / raw.min() / 1.1
    assert white.max() < 1.3


def gradients(experiment):
    stage, params, frozen = started(experiment)
    grad = jax.jit(jax.grad(stages.objective(stage), has_aux=True))
    return grad(params, frozen, batch(), jax.random.key(3), 0)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["latent", "pixel", "distill"])
def test_gradients_reach_what_trains(base, stage):
    frames = PixelLoss(lpips_net="alex", steps=2, single=0.5)
    losses = {
        "latent": LatentLoss(),
        "pixel": frames,
        "distill": dataclasses.replace(frames, distill=1.0),
    }
    experiment = dataclasses.replace(
        base,
        stage=stage,
        train=("codec/", "refiner/"),
        loss=losses[stage],
        refiner=dataclasses.replace(base.refiner, steps=2 if stage == "pixel" else 1),
    )
    if stage == "distill":  # it needs a refiner that was trained
        latent = dataclasses.replace(base, train=("codec/", "refiner/"))
        save_start(latent)
        run = RunConfig(out=latent.run.out + "-distilled")
        experiment = dataclasses.replace(experiment, init=InitConfig(run=latent.run.out), run=run)
    grads, metrics = gradients(experiment)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((grads, metrics)))
    for tree in (grads["refiner"]["dit"]["head"], grads["codec"]["intra"]["out"]):
        assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(tree))


@pytest.mark.slow
def test_devices_share_columns_of_a_clip(base):
    """The codec's loss and gradients with clips split along `context`, as on one device."""
    stage = make_stage(as_codec(base))
    loss, frozen = stages.objective(stage), stages.frozen(stage, STATISTICS)
    inputs = drawn(stage), frozen, batch(), jax.random.key(0), jnp.zeros((), jnp.int32)
    step = jax.value_and_grad(lambda *args: loss(*args)[0])
    found = []
    for mesh in (MeshConfig(data=1), MeshConfig(data=1, context=4)):
        mesh = make_mesh(mesh, jax.devices()[: mesh.context])
        with jax.set_mesh(mesh):
            args = jax.device_put(inputs, NamedSharding(mesh, P()))
            program = jax.jit(step).lower(*args).compile()
            found.append(jax.device_get(program(*args)))
            text = program.as_text()
    assert " collective-permute(" in text  # what convolutions see beyond the edges
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5), *found)
