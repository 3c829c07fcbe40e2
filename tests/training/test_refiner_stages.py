"""The stages with a refiner: what trains, where weights come from, which losses they have."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gnvc_jax.cache_latents import cache_latents
from gnvc_jax.codec.model import LatentCodec, LatentCodecOutput
from gnvc_jax.media.writer import open_writer
from gnvc_jax.parallel import MeshConfig, make_mesh, rules
from gnvc_jax.porting.architectures import Architecture
from gnvc_jax.porting.checkpoint import write_component
from gnvc_jax.refiner import DiTConfig, Refiner, RefinerConfig, flow
from gnvc_jax.training import loop, lora, partition
from gnvc_jax.training.checkpoints import Checkpoints
from gnvc_jax.training.config import ComputeConfig, DataConfig, Experiment, RunConfig
from gnvc_jax.training.stages import make_stage
from gnvc_jax.training.stages.codec import CodecLoss, Coding
from gnvc_jax.training.stages.latent import LatentLoss
from gnvc_jax.training.stages.pixel import DistillLoss, PixelLoss
from gnvc_jax.training.stages.vae import VAELoss, pixels
from gnvc_jax.vae import VAE as VAEModule
from gnvc_jax.vae import VAEConfig, encode_clip

VAE = VAEConfig(4, (1, 1, 1), 1, 4, (True, True), patch=2, linear=True)
DIT = DiTConfig(16, 16, 2, 2, 8, 4, text_length=0, context_every=1, context_channels=4)


@pytest.fixture(scope="module")
def base(tiny_codec, tmp_path_factory):
    """An experiment of the stage `latent`, and runs of `vae` and `codec` that it starts from."""
    folder = tmp_path_factory.mktemp("runs")
    experiment = Experiment(
        stage="vae",
        vae=VAE,
        codec=tiny_codec,
        loss=VAELoss(lpips=0.0),
        data=DataConfig(frames=5, size=(64, 64), batch=2),
        run=RunConfig(out=str(folder / "vae")),
    )
    save_start(experiment)
    codec = dataclasses.replace(
        experiment,
        stage="codec",
        loss=CodecLoss(vae=str(folder / "vae")),
        run=RunConfig(out=str(folder / "codec")),
    )
    save_start(codec)
    return dataclasses.replace(
        codec,
        stage="latent",
        refiner=RefinerConfig(DIT, tiny_codec.width, 2, 1, deviation=0.3),
        train=("refiner/",),
        loss=LatentLoss(vae=str(folder / "vae")),
        init_from=codec.run.out,
        run=RunConfig(out=str(folder / "latent")),
    )


# What a run would measure of its clips; refiners see later latents doubled.
STATISTICS = {
    "mean": np.zeros(4, np.float32),
    "std": np.ones(4, np.float32),
    "white": np.float32([[1.0] * 4, [2.0] * 4]),
}


def drawn(stage, seed=0):
    """Parameters of a stage at random; initialising them would take longer to compile."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(stage.init, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), jnp.float32), shapes)


def save_start(experiment, change=lambda params: params):
    """A checkpoint with random parameters, as a run of no steps would leave."""
    params = change(drawn(make_stage(experiment)))
    checkpoints = Checkpoints(experiment)
    state = loop.init_state(experiment.optim, params, jax.random.key(0))
    checkpoints.save(1, state, {}, STATISTICS)
    checkpoints.close()
    return params


def batch():
    return np.random.default_rng(0).integers(0, 256, (2, 5, 64, 64, 3), np.uint8)


def started(experiment):
    stage = make_stage(experiment)
    params = stage.warm_start(drawn(stage, 1))
    return stage, params, stage.frozen()


def codec_of(base):
    """The parameters in the codec's run."""
    codec = dataclasses.replace(base, stage="codec", loss=CodecLoss(vae=base.loss.vae))
    return drawn(make_stage(codec))


def paths(tree):
    return set(flatten_dict(tree, sep="/"))


def test_parts_are_chosen_by_path():
    tree = {"a": {"x": 1, "y": 2}, "b": {"x": 3}}
    chosen, rest = partition.split(tree, ("a/y", "b/"))
    assert (chosen, rest) == ({"a": {"y": 2}, "b": {"x": 3}}, {"a": {"x": 1}})
    assert partition.join(rest, chosen) == tree
    with pytest.raises(ValueError, match=r"'c/' fits no parameter; the parts are a, b"):
        partition.split(tree, ("a/", "c/"))


def test_low_rank_changes_start_at_nothing_and_add_a_product():
    shape = {
        "refiner": {"dit": {"groups": {"block_0": {"ffn_in": {"kernel": np.ones((3, 4, 5))}}}}}
    }
    changes = lora.init(shape, 2, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, lora.merge(shape, changes), shape)
    one = changes["refiner"]["dit"]["groups"]["block_0"]["ffn_in"]["kernel"]
    assert one["a"].shape == (3, 4, 2) and one["b"].shape == (3, 2, 5)
    one["b"] = jnp.ones_like(one["b"])
    merged = lora.merge(shape, changes)["refiner"]["dit"]["groups"]["block_0"]["ffn_in"]["kernel"]
    expected = 1 + np.einsum("gir,gro->gio", one["a"], one["b"])
    np.testing.assert_allclose(merged, expected, rtol=1e-5)
    with pytest.raises(ValueError, match="no refiner"):
        lora.init({"codec": {"kernel": np.ones((2, 2))}}, 2, jax.random.key(0))


def test_weights_come_from_where_they_should(base):
    stage, params, frozen = started(base)
    every = paths(stage.shapes)
    assert paths(params) == {path for path in every if path.startswith("refiner/")}
    jax.tree.map(np.testing.assert_array_equal, frozen["fixed"]["codec"], codec_of(base))
    model = stage.model_parts(params, frozen)
    assert set(model) == {"vae", "codec", "refiner"}
    planned = stage.frozen_shapes()  # without any file
    assert jax.tree.map(np.shape, frozen) == jax.tree.map(np.shape, planned)


def test_each_part_has_a_key_of_its_own(base, monkeypatch):
    """Neither parameters nor noise of two parts come from the same random numbers."""
    keys = []

    def noted(*key):
        keys.extend(key)
        return {"params": {"kernel": jnp.zeros(1)}}

    module = "gnvc_jax.training.stages.latent."
    monkeypatch.setattr(module + "init_vae", lambda _, key: noted(key)["params"])
    monkeypatch.setattr(LatentCodec, "init", lambda _, key, x, q, noise: noted(key, noise))
    monkeypatch.setattr(Refiner, "init", lambda _, key, *args: noted(key))
    monkeypatch.setattr(lora, "init", lambda parts, rank, key: noted(key)["params"])
    make_stage(dataclasses.replace(base, lora=2)).init(jax.random.key(0))
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == len(keys) == 5


@pytest.fixture(scope="module")
def with_weights(base, tmp_path_factory):
    """The experiment with a ported DiT, computing in bfloat16; and the parameters of that DiT.

    What trains is the adapter, whose hints start at zero.
    """
    folder = tmp_path_factory.mktemp("ported")
    dit = dataclasses.replace(DIT, text_width=8, text_length=3)
    architecture = Architecture("dit", dit)
    rng = np.random.default_rng(5)
    params = jax.tree.map(
        lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), architecture.abstract()
    )
    flat = flatten_dict(params, sep="/")
    write_component(folder / "dit", architecture, flat.items())
    experiment = dataclasses.replace(
        base,
        refiner=dataclasses.replace(base.refiner, dit=dit),
        compute=ComputeConfig(dtype="bfloat16"),
        train=("refiner/(features|quality)", "refiner/dit/(context_|groups/context)"),
        loss=dataclasses.replace(base.loss, weights=str(folder)),
    )
    return experiment, flat


def test_frozen_weights_lie_as_they_are_used(with_weights, monkeypatch):
    """On the mesh, each device its part, kernels in the type that their layers compute in."""
    experiment, source = with_weights
    monkeypatch.setattr(rules, "SMALL", 0)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    stage = make_stage(experiment)
    with jax.set_mesh(mesh):
        frozen = stage.frozen()
    dit = flatten_dict(frozen["fixed"]["refiner"]["dit"], sep="/")
    assert dit.keys() == {p for p in source if not p.startswith(("context_", "groups/context"))}
    places = flatten_dict(rules.shardings(frozen["fixed"], mesh)["refiner"]["dit"], sep="/")
    for path, x in dit.items():
        exact = not path.endswith("kernel") or path.startswith(("time_", "head/"))
        assert x.dtype == (jnp.float32 if exact else jnp.bfloat16), path
        assert x.sharding == places[path]
        np.testing.assert_array_equal(x, source[path].astype(x.dtype))
    planned = stage.frozen_shapes()["fixed"]
    assert jax.tree.map(lambda x: x.dtype, planned) == jax.tree.map(
        lambda x: x.dtype, frozen["fixed"]
    )
    # Without a mesh, and for a model file, all is on the host and exact.
    exact = make_stage(dataclasses.replace(experiment, compute=ComputeConfig())).frozen()
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(exact["fixed"]))
    assert {x.dtype for x in jax.tree.leaves(exact["fixed"])} == {np.dtype("float32")}


def test_a_stage_keeps_no_copy_of_what_it_loaded(with_weights):
    """Only the parts that are asked for are read, and none stays on the stage."""
    experiment, source = with_weights
    stage, params, frozen = started(experiment)
    held = [x for k, x in vars(stage).items() if isinstance(x, dict) and k != "statistics"]
    kept = [
        x for x in jax.tree.leaves(held) if isinstance(x, np.ndarray | jax.Array) and x.ndim > 1
    ]
    assert kept == []
    context = params["refiner"]["dit"]["groups"]["context"]["ffn_in"]["kernel"]
    np.testing.assert_array_equal(context, source["groups/context/ffn_in/kernel"])
    assert context.dtype == jnp.float32  # it trains
    assert "codec" in frozen["fixed"] and "groups" in frozen["fixed"]["refiner"]["dit"]


def test_the_teacher_shares_what_does_not_train(with_weights, tmp_path):
    """Its own are the adapter, and low-rank changes; together they are the starting weights."""
    latent = dataclasses.replace(
        with_weights[0], lora=2, run=RunConfig(out=str(tmp_path / "latent"))
    )
    saved = save_start(latent)
    loss = DistillLoss(
        lpips_net="alex", vae=latent.loss.vae, weights=latent.loss.weights, steps=2, single=0.5
    )
    distill = dataclasses.replace(
        latent,
        stage="distill",
        loss=loss,
        init_from=latent.run.out,
        run=RunConfig(out=str(tmp_path / "distill")),
    )
    stage, params, frozen = started(distill)
    assert paths(frozen["teacher"]) == paths(saved) == paths(params)
    assert jax.tree.map(np.shape, frozen["teacher"]) == jax.tree.map(np.shape, stage.teacher)
    start = stage.model_parts(params, frozen)["refiner"]
    teacher = stage.model_parts(frozen["teacher"], frozen)["refiner"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3), start, teacher
    )
    # Changes of another rank are in the kernels, and the teacher has none of its own.
    other, _, frozen = started(dataclasses.replace(distill, lora=3))
    again = other.model_parts(frozen["teacher"], frozen)["refiner"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3), again, teacher
    )


def test_latents_of_a_run_are_taken_by_its_codec(base, tmp_path):
    """A VAE of one's own, its run named to `cache_latents` as to the stage."""
    run, cache, video = base.loss.vae, tmp_path / "cache", tmp_path / "a.mkv"
    frames = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)
    with open_writer(video, 64, 64, 25) as out:
        for frame in frames:
            out.write(frame)
    assert cache_latents(video, cache, run, 5, progress=False) == {}
    data = dataclasses.replace(base.data, latents=str(cache))
    codec = dataclasses.replace(base, stage="codec", loss=CodecLoss(vae=run), data=data)
    stage = make_stage(codec)
    stage.statistics = STATISTICS
    latents, frozen = next(iter(stage.dataset())), stage.frozen()
    vae = VAEModule(base.vae)
    (wanted,) = encode_clip(vae, frozen["vae"], pixels(frames[None]))
    wanted = (wanted - frozen["mean"]) / frozen["std"]
    np.testing.assert_allclose(latents[0], wanted, atol=2e-3 * np.abs(wanted).max())  # half floats
    with pytest.raises(ValueError, match="stage `codec`, expected `vae`"):
        cache_latents(video, cache, base.init_from, 5)
    learned = dataclasses.replace(base.vae, linear=False)
    facts = json.loads((Path(run) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(facts | {"vae": dataclasses.asdict(learned)}))
    with pytest.raises(ValueError, match="its encoder is learned"):
        cache_latents(video, cache, str(tmp_path), 5)


@pytest.mark.slow
def test_a_later_stage_goes_on_with_what_trained(base, tmp_path):
    """Also with what trained before and does not any more, and with low-rank changes."""
    latent = dataclasses.replace(base, lora=2, run=RunConfig(out=str(tmp_path / "latent")))

    def ones(params):
        return jax.tree.map(lambda x: jnp.ones_like(x) / 8, params)

    before = save_start(latent, ones)
    assert set(before) == {"refiner", "lora"}
    later = dataclasses.replace(
        latent,
        stage="pixel",
        train=("codec/",),
        lora=0,
        loss=PixelLoss(lpips_net="alex", vae=base.loss.vae),
        init_from=latent.run.out,
        run=RunConfig(out=str(tmp_path / "later")),
    )
    _, params, frozen = started(later)
    kernel = frozen["fixed"]["refiner"]["dit"]["groups"]["block_0"]["ffn_in"]["kernel"]
    np.testing.assert_allclose(kernel, np.full(kernel.shape, 1 / 8 + 2 / 64))
    # The codec comes from the run before, which `latent` did not train.
    jax.tree.map(np.testing.assert_array_equal, params["codec"], codec_of(base))

    same_rank = dataclasses.replace(later, train=("codec/", "refiner/"), lora=2)
    _, params, _ = started(same_rank)
    assert set(params) == {"codec", "refiner", "lora"}
    jax.tree.map(np.testing.assert_array_equal, params["lora"], before["lora"])


@pytest.mark.slow
def test_the_loss_of_the_latent_stage(base):
    """With a silent head a small refiner's error is known: its velocity is the linear one."""
    stage, params, frozen = started(base)
    head = jax.tree.map(jnp.zeros_like, params["refiner"]["dit"]["head"])
    params = {"refiner": params["refiner"] | {"dit": params["refiner"]["dit"] | {"head": head}}}
    value, metrics = jax.jit(stage.loss)(params, frozen, batch(), jax.random.key(3), 0)
    key_code, key_time, key_noise, key_window = jax.random.split(jax.random.key(3), 4)
    model = stage.model_parts(params, frozen)
    everything = frozen | {"vae": model["vae"]}
    done = jax.jit(stage.code)(model["codec"], everything, batch(), key_code)
    # Of two latents one is refined, the first or the second, which is whitened by its own factor.
    place = int(jax.random.randint(key_window, (), 0, 2))
    part, white = slice(place, place + 1), STATISTICS["white"][place]
    clean, decoded = done.latents[:, part] * white, done.coded.latent[:, part] * white
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
    multiplier = low * (high / low) ** (np.asarray(done.q_index) / 63)
    expected = (multiplier * (refined + 0.1 * done.error) + done.rate) / np.sqrt(multiplier)
    np.testing.assert_allclose(value, expected.mean() + matching, rtol=1e-4)


def test_windows_begin_anywhere_and_whiten_by_place(base):
    """What training refines: places from the first latent on, each with its own factors."""
    stage = make_stage(
        dataclasses.replace(base, refiner=dataclasses.replace(base.refiner, window=3, overlap=1))
    )
    latents = jnp.arange(5.0)[None, :, None, None, None] * jnp.ones((2, 5, 2, 2, 4)) + 1
    done = Coding(latents, LatentCodecOutput(latents, latents, *[None] * 4), *[None] * 5)
    firsts = []
    for seed in range(20):
        window = stage.window(STATISTICS["white"], done, jax.random.key(seed))
        first = int(window.first)
        firsts.append(first)
        want = latents[:, first : first + 3]
        np.testing.assert_array_equal(window.features, want)
        doubled = want * jnp.where(first + jnp.arange(3) > 0, 2.0, 1.0)[:, None, None, None]
        np.testing.assert_array_equal(window.of(latents), doubled)
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
        init_from=None,
        run=RunConfig(out=str(tmp_path / "v")),
    )
    stage = make_stage(vae)
    params = stage.warm_start(jax.jit(stage.init)(jax.random.key(0)))
    checkpoints = Checkpoints(vae)
    checkpoints.save(1, loop.init_state(vae.optim, params, jax.random.key(0)), {})
    checkpoints.close()
    codec = dataclasses.replace(vae, stage="codec", loss=CodecLoss(vae=vae.run.out))
    found = make_stage(codec).statistics
    assert (found["mean"] == 0).all() and (found["std"] == 1).all()
    batches = [
        encode_clip(VAEModule(base.vae), params, pixels(b))
        for b, _ in zip(stage.dataset(), range(8))
    ]
    later = np.concatenate(batches)[:, 1:]
    raw = later.std((0, 1, 2, 3))
    white = (later * found["white"][1]).std((0, 1, 2, 3))
    assert white.max() / white.min() < 1.1 < raw.max() / raw.min() / 1.1
    assert white.max() < 1.3


def gradients(experiment):
    stage, params, frozen = started(experiment)
    grad = jax.jit(jax.grad(stage.loss, has_aux=True))
    return grad(params, frozen, batch(), jax.random.key(3), 0)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["latent", "pixel", "distill"])
def test_gradients_reach_what_trains(base, stage):
    losses = {"latent": LatentLoss, "pixel": PixelLoss, "distill": DistillLoss}
    options = {} if stage == "latent" else {"lpips_net": "alex", "steps": 2, "single": 0.5}
    experiment = dataclasses.replace(
        base,
        stage=stage,
        train=("codec/", "refiner/"),
        loss=losses[stage](vae=base.loss.vae, **options),
    )
    if stage == "distill":  # it needs a refiner that was trained
        latent = dataclasses.replace(base, train=("codec/", "refiner/"))
        save_start(latent)
        run = RunConfig(out=latent.run.out + "-distilled")
        experiment = dataclasses.replace(experiment, init_from=latent.run.out, run=run)
    grads, metrics = gradients(experiment)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((grads, metrics)))
    for tree in (grads["refiner"]["dit"]["head"], grads["codec"]["intra"]["out"]):
        assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(tree))


def test_stages_say_what_they_lack(base, tmp_path):
    for change, message in (
        ({"init_from": None}, "init_from: the stage `latent` starts from"),
        ({"train": ()}, "train: say what"),
        ({"refiner": None}, "refiner: the stage `latent` trains one"),
        ({"train": ("dit/",)}, "'dit/' fits no parameter"),
    ):
        with pytest.raises(ValueError, match=message):
            started(dataclasses.replace(base, **change))
    with pytest.raises(FileNotFoundError, match="nowhere: no training run"):
        started(dataclasses.replace(base, init_from="nowhere"))
    other = dataclasses.replace(base.codec, width=12)
    with pytest.raises(ValueError, match="shape"):
        started(dataclasses.replace(base, codec=other))


@pytest.mark.slow
def test_devices_share_columns_of_a_clip(base):
    """The codec's loss and gradients with clips split along `context`, as on one device."""
    codec = dataclasses.replace(base, stage="codec", loss=CodecLoss(vae=base.loss.vae))
    stage = make_stage(codec)
    stage.statistics = STATISTICS
    inputs = drawn(stage), stage.frozen(), batch(), jax.random.key(0), jnp.zeros((), jnp.int32)
    step = jax.value_and_grad(lambda *args: stage.loss(*args)[0])
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
