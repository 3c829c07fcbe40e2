"""Run folders given to the public loaders: the model is put together from a chain of runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gnvc_jax
from gnvc_jax import model as models
from gnvc_jax.errors import UsageError
from gnvc_jax.refiner import DiTConfig, RefinerConfig
from gnvc_jax.training import latent_statistics, stages, weights
from gnvc_jax.training.checkpoints import Checkpoints
from gnvc_jax.training.config import DataConfig, Experiment, InitConfig, RunConfig
from gnvc_jax.training.release import release
from gnvc_jax.training.stages import make_stage
from gnvc_jax.training.stages.codec import CodecLoss
from gnvc_jax.training.stages.latent import LatentLoss
from gnvc_jax.training.stages.vae import VAELoss
from gnvc_jax.training.state import init_state
from gnvc_jax.vae import VAEConfig

VAE = VAEConfig(4, (1, 1, 1), 1, 4, (True, True), patch=2, linear=True)
DIT = DiTConfig(16, 16, 2, 2, 8, 4, text_length=0, context_every=1, context_channels=4)
STATISTICS = {
    "mean": np.float32([0.1, 0.0, -0.1, 0.2]),
    "std": np.float32([1.0, 2.0, 0.5, 1.0]),
    "white": np.float32([[1.0] * 4, [2.0] * 4]),
}


def save(experiment: Experiment, statistics: dict) -> dict:
    """A checkpoint of random parameters, as a short run would leave it; returns them."""
    stage, rng = make_stage(experiment), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: stages.init_trained(stage, key), jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), shapes)
    checkpoints = Checkpoints(experiment)
    state = init_state(experiment.optim, params, jax.random.key(0))
    checkpoints.save(1, state, {}, statistics)
    checkpoints.close()
    return params


@pytest.fixture(scope="module")
def runs(tiny_codec, tmp_path_factory):
    """Folder with the runs vae -> codec -> latent, and the parameters in them by part."""
    folder = tmp_path_factory.mktemp("runs")
    data = DataConfig(frames=5, size=(64, 64), batch=2)
    vae = Experiment("vae", VAE, loss=VAELoss(lpips=0.0), data=data)
    codec = dataclasses.replace(
        vae,
        stage="codec",
        codec=tiny_codec,
        loss=CodecLoss(),
        init=InitConfig(vae=str(folder / "vae")),
    )
    latent = dataclasses.replace(
        codec,
        stage="latent",
        refiner=RefinerConfig(DIT, tiny_codec.width, 2, 1, deviation=0.3),
        train=("refiner/",),
        loss=LatentLoss(),
        init=InitConfig(run=str(folder / "codec")),
    )
    params = {}
    for experiment in (vae, codec, latent):
        run = RunConfig(out=str(folder / experiment.stage))
        statistics = {} if experiment is vae else STATISTICS
        params |= save(dataclasses.replace(experiment, run=run), statistics)
    return folder, params


def test_run_gives_the_model_of_all_runs_it_started_from(runs, tiny_codec):
    folder, params = runs
    codec = gnvc_jax.load_pretrained(folder / "latent")
    mean, std = STATISTICS["mean"], STATISTICS["std"]
    expected = models.build("latent", VAE, tiny_codec, params["vae"], params["codec"], mean, std)
    assert codec.model.name == "latent"
    assert codec.model.fingerprints == expected.fingerprints
    np.testing.assert_array_equal(codec.model.white, STATISTICS["white"])
    video = np.random.default_rng(1).integers(0, 256, (5, 64, 64, 3), np.uint8)
    assert codec.decode(codec.encode(video, qp=40), steps=0).shape == video.shape


def test_vae_and_refiner_of_a_run_have_its_unrounded_parameters(runs):
    folder, params = runs
    vae = gnvc_jax.load_vae(folder / "latent")
    jax.tree.map(np.testing.assert_array_equal, vae.params, params["vae"])
    np.testing.assert_array_equal(vae.mean, STATISTICS["mean"])
    np.testing.assert_array_equal(vae.std, STATISTICS["std"])
    refiner = gnvc_jax.load_refiner(folder / "latent")
    jax.tree.map(np.testing.assert_array_equal, refiner.params, params["refiner"])
    np.testing.assert_array_equal(refiner.white, STATISTICS["white"])


def test_vae_of_a_run_that_measured_nothing_leaves_latents_as_they_are(runs):
    folder, params = runs
    vae = gnvc_jax.load_vae(folder / "vae")
    jax.tree.map(np.testing.assert_array_equal, vae.params, params["vae"])
    np.testing.assert_array_equal(vae.mean, np.zeros(4))
    np.testing.assert_array_equal(vae.std, np.ones(4))


def test_run_that_lacks_a_part_is_named(runs):
    folder, _ = runs
    with pytest.raises(UsageError, match="codec: this model has no refiner"):
        gnvc_jax.load_refiner(folder / "codec")
    with pytest.raises(UsageError, match="vae: a run of the stage `vae` has no codec"):
        gnvc_jax.load_pretrained(folder / "vae")


def test_training_goes_on_from_a_model_file(runs, tmp_path, caplog):
    """Codec and refiner of the file, rounded as it rounds them, also for runs that start later."""
    folder, _ = runs
    released = release(folder / "latent", tmp_path / "model.safetensors")
    start = Experiment(
        "latent",
        VAE,
        released.codec_config,
        released.refiner_config,
        init=InitConfig(model=str(tmp_path / "model.safetensors")),
        train=("codec/", "refiner/"),
        loss=LatentLoss(),
        data=DataConfig(frames=5, size=(64, 64), batch=2),
        run=RunConfig(out=str(tmp_path / "run")),
    )
    statistics = latent_statistics.measure(start)
    jax.tree.map(np.testing.assert_array_equal, statistics, STATISTICS)
    save(dataclasses.replace(start, train=("refiner/",)), statistics)  # the codec stays the file's
    later = dataclasses.replace(
        start, init=InitConfig(run=start.run.out), run=RunConfig(out=str(tmp_path / "later"))
    )
    for experiment in (start, later):
        like = stages.model_shapes(make_stage(experiment))
        found = weights.load(experiment, like, statistics)
        for part in ("vae", "codec"):
            jax.tree.map(np.testing.assert_array_equal, found[part], getattr(released, part))
    kernel = found["refiner"]["dit"]["head"]["kernel"]
    assert (kernel != released.refiner["dit"]["head"]["kernel"]).any()

    # Another refiner starts anew, and one is told.
    assert "other sizes" not in caplog.text
    other = dataclasses.replace(released.refiner_config, window=3)
    weights.load(dataclasses.replace(start, refiner=other), like, statistics)
    assert "model.safetensors: its refiner has other sizes" in caplog.text


@pytest.fixture
def wider(runs, tmp_path):
    """A model file, and an experiment with a wider codec."""
    released = release(runs[0] / "codec", tmp_path / "model.safetensors")
    other = dataclasses.replace(released.codec_config, width=24)
    return released, Experiment("codec", VAE, other, loss=CodecLoss())


def test_a_new_codec_starts_on_the_vae_of_a_model_file(wider, tmp_path):
    released, experiment = wider
    init = InitConfig(vae=str(tmp_path / "model.safetensors"))
    experiment = dataclasses.replace(experiment, init=init)
    found = weights.load(experiment, stages.model_shapes(make_stage(experiment)))
    jax.tree.map(np.testing.assert_array_equal, found["vae"], released.vae)
    larger = dataclasses.replace(VAE, base=2 * VAE.base)
    experiment = dataclasses.replace(experiment, vae=larger)
    with pytest.raises(UsageError, match=r"model\.safetensors: its vae is not .*: base is"):
        weights.load(experiment, stages.model_shapes(make_stage(experiment)))


def test_model_of_other_sizes_and_two_starts_are_refused(wider, tmp_path):
    init = InitConfig(model=str(tmp_path / "model.safetensors"))
    experiment = dataclasses.replace(wider[1], init=init)
    with pytest.raises(
        UsageError, match=r"model\.safetensors: its codec is not .*: width is 8, not 24$"
    ):
        weights.load(experiment, stages.model_shapes(make_stage(experiment)))
    with pytest.raises(UsageError, match=r"init\.run and init\.model"):
        InitConfig(run="a", model="b")
