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
from gnvc_jax.codec.model import LatentCodec
from gnvc_jax.frames import to_float
from gnvc_jax.media.writer import open_writer
from gnvc_jax.parallel import MeshConfig, make_mesh, rules
from gnvc_jax.porting.architectures import Architecture
from gnvc_jax.porting.checkpoint import write_component
from gnvc_jax.refiner import DiTConfig, Refiner, RefinerConfig, flow
from gnvc_jax.training import lora, networks, partition, stages
from gnvc_jax.training.checkpoints import Checkpoints
from gnvc_jax.training.config import ComputeConfig, DataConfig, Experiment, InitConfig, RunConfig
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
        init=InitConfig(vae=str(folder / "vae")),
        loss=CodecLoss(),
        run=RunConfig(out=str(folder / "codec")),
    )
    save_start(codec)
    return dataclasses.replace(
        codec,
        stage="latent",
        refiner=RefinerConfig(DIT, tiny_codec.width, 2, 1, deviation=0.3),
        train=("refiner/",),
        loss=LatentLoss(),
        init=InitConfig(run=codec.run.out),
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
    shapes = jax.eval_shape(lambda key: stages.init_trained(stage, key), jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), jnp.float32), shapes)


def save_start(experiment, change=lambda params: params):
    """A checkpoint with random parameters, as a run of no steps would leave."""
    params = change(drawn(make_stage(experiment)))
    checkpoints = Checkpoints(experiment)
    state = init_state(experiment.optim, params, jax.random.key(0))
    checkpoints.save(1, state, {}, STATISTICS)
    checkpoints.close()
    return params


def batch():
    return np.random.default_rng(0).integers(0, 256, (2, 5, 64, 64, 3), np.uint8)


def started(experiment):
    stage = make_stage(experiment)
    params = stages.start(stage, drawn(stage, 1), STATISTICS)
    return stage, params, stages.frozen(stage, STATISTICS)


def as_codec(base, **changes):
    """The experiment that the codec's run was made with."""
    init = InitConfig(vae=str(Path(base.init.run).parent / "vae"))
    return dataclasses.replace(base, stage="codec", init=init, loss=CodecLoss(), **changes)


def codec_of(base):
    """The parameters in the codec's run."""
    return drawn(make_stage(as_codec(base)))["codec"]


def paths(tree):
    return set(flatten_dict(tree, sep="/"))


def test_parts_are_chosen_by_path():
    tree = {"a": {"x": 1, "y": 2}, "b": {"x": 3}}
    chosen, rest = partition.split(tree, ("a/y", "b/"))
    assert (chosen, rest) == ({"a": {"y": 2}, "b": {"x": 3}}, {"a": {"x": 1}})
    assert partition.join(rest, chosen) == tree
    message = r"'c/' fits no parameter; the parts of the model are a, b"
    with pytest.raises(ValueError, match=message):
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
    every = paths(stages.model_shapes(stage))
    assert paths(params) == {path for path in every if path.startswith("refiner/")}
    jax.tree.map(np.testing.assert_array_equal, frozen["fixed"]["codec"], codec_of(base))
    model = partition.assemble(frozen["fixed"], params)
    assert set(model) == {"vae", "codec", "refiner"}
    planned = stages.frozen_shapes(stage)  # without any file
    assert jax.tree.map(np.shape, frozen) == jax.tree.map(np.shape, planned)


def test_each_part_has_a_key_of_its_own(base, monkeypatch):
    """Neither parameters nor noise of two parts come from the same random numbers."""
    keys = []

    def noted(*key):
        keys.extend(key)
        return {"params": {"kernel": jnp.zeros(1)}}

    monkeypatch.setattr(networks, "init_vae", lambda _, key: noted(key)["params"])
    monkeypatch.setattr(LatentCodec, "init", lambda _, key, x, q, noise: noted(key, noise))
    monkeypatch.setattr(Refiner, "init", lambda _, key, *args: noted(key))
    monkeypatch.setattr(lora, "init", lambda parts, rank, key: noted(key)["params"])
    with jax.disable_jit():
        stages.init_trained(make_stage(dataclasses.replace(base, lora=2)), jax.random.key(0))
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
        init=dataclasses.replace(base.init, dit=str(folder)),
    )
    return experiment, flat


def test_frozen_weights_lie_as_they_are_used(with_weights, monkeypatch):
    """On the mesh, each device its part, kernels in the type that their layers compute in."""
    experiment, source = with_weights
    monkeypatch.setattr(rules, "SMALL", 0)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    stage = make_stage(experiment)
    with jax.set_mesh(mesh):
        frozen = stages.frozen(stage, STATISTICS)
    dit = flatten_dict(frozen["fixed"]["refiner"]["dit"], sep="/")
    assert dit.keys() == {p for p in source if not p.startswith(("context_", "groups/context"))}
    places = flatten_dict(rules.shardings(frozen["fixed"], mesh)["refiner"]["dit"], sep="/")
    for path, x in dit.items():
        exact = not path.endswith("kernel") or path.startswith(("time_", "head/"))
        assert x.dtype == (jnp.float32 if exact else jnp.bfloat16), path
        assert x.sharding == places[path]
        np.testing.assert_array_equal(x, source[path].astype(x.dtype))
    planned = stages.frozen_shapes(stage)["fixed"]
    assert jax.tree.map(lambda x: x.dtype, planned) == jax.tree.map(
        lambda x: x.dtype, frozen["fixed"]
    )
    # Without a mesh, and for a model file, all is on the host and exact.
    exact = make_stage(dataclasses.replace(experiment, compute=ComputeConfig()))
    exact = stages.frozen(exact, STATISTICS)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(exact["fixed"]))
    assert {x.dtype for x in jax.tree.leaves(exact["fixed"])} == {np.dtype("float32")}


def test_trained_parts_of_a_ported_dit_stay_float32(with_weights):
    experiment, source = with_weights
    _, params, frozen = started(experiment)
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
    loss = PixelLoss(lpips_net="alex", steps=2, single=0.5, distill=1.0)
    distill = dataclasses.replace(
        latent,
        stage="distill",
        loss=loss,
        init=InitConfig(run=latent.run.out),
        run=RunConfig(out=str(tmp_path / "distill")),
    )
    stage, params, frozen = started(distill)
    assert paths(frozen["teacher"]) == paths(saved) == paths(params)
    assert jax.tree.map(np.shape, frozen["teacher"]) == jax.tree.map(
        np.shape, stages.teacher_shapes(stage)
    )
    start = partition.assemble(frozen["fixed"], params)["refiner"]
    teacher = partition.assemble(frozen["fixed"], frozen["teacher"])["refiner"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3), start, teacher
    )
    # Changes of another rank are in the kernels, and the teacher has none of its own.
    _, _, frozen = started(dataclasses.replace(distill, lora=3))
    again = partition.assemble(frozen["fixed"], frozen["teacher"])["refiner"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3), again, teacher
    )


def test_low_rank_changes_of_a_chain_of_runs_count_once(with_weights, tmp_path):
    """A run that goes on with the changes of another has these in its own."""
    first = dataclasses.replace(with_weights[0], lora=2, run=RunConfig(out=str(tmp_path / "first")))
    save_start(first)
    second = dataclasses.replace(
        first, init=InitConfig(run=first.run.out), run=RunConfig(out=str(tmp_path / "second"))
    )
    saved = save_start(second, lambda params: jax.tree.map(lambda x: x + 1.0, params))
    kernel = ("refiner", "dit", "groups", "block_0", "ffn_in", "kernel")

    def at(tree, path=kernel):
        return at(tree[path[0]], path[1:]) if path else tree

    source = with_weights[1]["groups/block_0/ffn_in/kernel"]
    change = at(saved["lora"])
    merged = source + np.asarray(change["a"] @ change["b"])
    for rank, wanted in ((2, source), (0, merged), (3, merged)):
        third = dataclasses.replace(
            second,
            lora=rank,
            compute=ComputeConfig(),
            init=InitConfig(run=second.run.out),
            run=RunConfig(out=str(tmp_path / "third")),
        )
        fixed = stages.frozen(make_stage(third), STATISTICS)["fixed"]
        np.testing.assert_allclose(at(fixed), wanted, atol=1e-5)


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
    latents = next(iter(stage.data.batches(5)))
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
        loss=PixelLoss(lpips_net="alex", steps=1),
        init=InitConfig(run=latent.run.out),
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
        for b, _ in zip(stage.data.batches(5), range(8))
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


def test_stages_say_what_they_lack(base, tmp_path):
    with pytest.raises(ValueError, match="'dit/' fits no parameter"):
        started(dataclasses.replace(base, train=("dit/",)))
    with pytest.raises(FileNotFoundError, match="nowhere: no training run"):
        started(dataclasses.replace(base, init=InitConfig(run="nowhere")))
    other = dataclasses.replace(base.codec, entropy_width=12)
    with pytest.raises(ValueError, match="shape"):
        started(dataclasses.replace(base, codec=other))


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
