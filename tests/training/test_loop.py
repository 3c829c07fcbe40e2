"""The step against Optax and NumPy, and the loop on a toy stage."""

import dataclasses
import json
import math
import shutil
import signal

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_stage

from gnvc_jax.parallel import MeshConfig, rules
from gnvc_jax.training import hooks, loop
from gnvc_jax.training.config import OptimConfig, RunConfig
from gnvc_jax.training.inputs import Clips
from gnvc_jax.training.state import init_state, learning_rate
from gnvc_jax.training.step import gradient, make_step


def toy(out, *, steps=4, **run):
    base = toy_stage.experiment()
    return dataclasses.replace(
        base,
        optim=dataclasses.replace(base.optim, steps=steps),
        run=dataclasses.replace(base.run, out=str(out), **run),
    )


def train(experiment):
    return loop.train(toy_stage.toy_stage(experiment))


def records(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def quadratic(params, frozen, batch, key, step):
    rest = params["first_basis"] ** 2 + params["modulation"] ** 2 + params["kernel"] ** 2
    return jnp.sum(rest * batch) + jnp.sum(params["bias"] * batch), {}


def run_steps(config, batches):
    params = {"kernel": jnp.full((2, 3), 0.5), "bias": jnp.full(3, -0.25)}
    params |= {"modulation": jnp.full((2, 3), 0.75), "first_basis": jnp.full((2, 3), -0.5)}
    state = init_state(config, params, jax.random.key(0))
    step = jax.jit(make_step(config, quadratic))
    history = [(state, {})]
    for batch in batches:
        history.append(step(history[-1][0], {}, jnp.float32(batch)))
    return history


def test_learning_rate_is_a_warm_up_and_a_cosine():
    config = OptimConfig(lr=2.0, warmup=10, steps=110, final_lr_ratio=0.25)
    schedule = learning_rate(config)
    for step in (0, 3, 10, 35, 60, 110, 500):
        if step < 10:
            expected = 2.0 * step / 10
        else:
            phase = min(1.0, (step - 10) / 100)
            expected = 0.5 + 1.5 * 0.5 * (1 + math.cos(math.pi * phase))
        assert schedule(step) == pytest.approx(expected, rel=1e-5)


def test_step_is_optax_adamw_with_decay_on_kernels_only():
    config = OptimConfig(lr=0.1, warmup=2, steps=6, weight_decay=0.3, clip=1.0, ema=0.9)
    history = run_steps(config, [1.0, 2.0, 30.0, 0.1, 1.0])
    reference = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            learning_rate(config),
            *config.betas,
            weight_decay=0.3,
            mask={"kernel": True, "bias": False, "modulation": False, "first_basis": False},
        ),
    )
    params = history[0][0].params
    state = reference.init(params)
    for batch, (after, _) in zip([1.0, 2.0, 30.0, 0.1, 1.0], history[1:], strict=True):
        grads = jax.grad(lambda p, x=batch: quadratic(p, None, x, None, None)[0])(params)
        updates, state = reference.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5), after.params, params)


def test_norms_by_part_are_those_of_numpy():
    """Of parameters of equal shape in two parts, which share a stack, and of others."""
    rng = np.random.default_rng(0)
    shapes = {"codec": {"a": (3, 2), "b": (3, 2), "c": ()}, "lora": {"a": (3, 2), "d": (4,)}}
    is_shape = dict(is_leaf=lambda x: isinstance(x, tuple))
    params = jax.tree.map(lambda s: jnp.float32(rng.normal(size=s)), shapes, **is_shape)
    goal = jax.tree.map(lambda s: jnp.float32(rng.normal(size=s)), shapes, **is_shape)

    def loss(params, goal, batch, key, step):
        errors = jax.tree.map(lambda p, g: jnp.sum((p - g) ** 2), params, goal)
        return sum(jax.tree.leaves(errors)), {}

    config = OptimConfig(lr=0.1, warmup=0, steps=5, clip=0.5)
    state = init_state(config, params, jax.random.key(0))
    new, values = jax.jit(make_step(config, loss))(state, goal, jnp.zeros(1))
    for part, old in params.items():
        trees = {
            "param": old,
            "grad": jax.tree.map(lambda p, g: 2 * (p - g), old, goal[part]),  # before clipping
            "update": jax.tree.map(np.subtract, new.params[part], old),
        }
        for name, tree in trees.items():
            expected = np.linalg.norm(np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]))
            assert values[f"norm/{name}_{part}"] == pytest.approx(expected, rel=1e-4)


def test_accumulated_parts_are_one_batch():
    """k parts of b give the loss, the metrics and the update of one part of k * b."""

    def loss(params, frozen, batch, key, step):
        error = batch @ params["w"] - frozen["goal"]
        return jnp.mean(error**2), {"mean": jnp.mean(error)}

    params = {"w": jnp.arange(6.0).reshape(3, 2) / 7}
    frozen = {"goal": jnp.array([0.5, -1.0])}
    batch = jnp.asarray(np.random.default_rng(0).normal(size=(12, 3)), jnp.float32)
    results = []
    for parts in (1, 2, 6):
        config = OptimConfig(lr=0.1, warmup=0, steps=5, accumulate=parts)
        state = init_state(config, params, jax.random.key(0))
        results.append(jax.jit(make_step(config, loss))(state, frozen, batch))
    for state, values in results[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
            (state.params, values),
            (results[0][0].params, results[0][1]),
        )


def test_parts_have_noise_of_their_own():
    def loss(params, frozen, batch, key, step):
        return params * jax.random.normal(key), {}

    _, slope = gradient(loss, 2)(jnp.ones(()), {}, jnp.zeros(4), jax.random.key(0), 0)
    keys = [jax.random.fold_in(jax.random.key(0), i) for i in range(2)]
    assert slope == pytest.approx(np.mean([jax.random.normal(k) for k in keys]), rel=1e-5)


def with_batches(stage, change):
    """The stage with change(data set, shape) in place of its data."""
    batches = stage.data.batches
    data = stage.data._replace(batches=lambda shape: change(batches(shape), shape))
    return dataclasses.replace(stage, data=data)


def marked(dataset, shape):
    """Batches with the number of frames and the height in x."""
    return dataset.map(lambda b: b | {"x": b["x"] * 0 + np.float32(shape[:2] * 2)})


def test_clips_grow_at_the_steps_that_are_named(tmp_path):
    base = toy(tmp_path)
    data = dataclasses.replace(
        base.data,
        frames=5,
        clip_length_schedule=((3, 9), (4, 13)),
        size_schedule=((2, 64, 96), (4, 128, 64)),
    )
    assert data.shapes == ((5, 256, 256), (5, 64, 96), (9, 64, 96), (13, 128, 64))
    assert data.largest == (5, 256, 256)  # the one with the most pixels, first or last
    stage = with_batches(toy_stage.toy_stage(dataclasses.replace(base, data=data)), marked)
    clips = Clips(stage.data, data, 0, None)
    taken = [clips.take(step) for step in range(6)]
    assert [int(b["x"][0, 0]) for b in taken] == [5, 5, 5, 9, 13, 13]
    assert [int(b["x"][0, 1]) for b in taken] == [256, 256, 64, 64, 128, 128]
    # What is drawn does not depend on the shape: no draw comes twice and none is left out.
    plain = iter(toy_stage.toy_stage(base).data.batches(data.shape_at(0)))
    for batch in taken:
        np.testing.assert_array_equal(batch["y"], next(plain)["y"])

    # Resumed at any step, the rest is the same.
    for stop in range(6):
        clips = Clips(stage.data, data, 0, None)
        for step in range(stop):
            clips.take(step)
        resumed = Clips(stage.data, data, stop, json.loads(json.dumps(clips.get_state())))
        for step in range(stop, 6):
            jax.tree.map(np.testing.assert_array_equal, resumed.take(step), taken[step])

    for wrong in (((3, 8),), ((3, 9), (2, 13)), ((0, 9),)):
        with pytest.raises(ValueError, match=r"data\."):
            changed = dataclasses.replace(data, clip_length_schedule=wrong)
            dataclasses.replace(base, data=changed)
    for wrong in (((3, 64, 4),), ((3, 64, 64), (2, 64, 96)), ((0, 64, 64),)):
        with pytest.raises(ValueError, match=r"data\."):
            changed = dataclasses.replace(data, size_schedule=wrong)
            dataclasses.replace(base, data=changed)


def test_ema_warms_up_to_its_decay():
    history = run_steps(OptimConfig(lr=0.1, warmup=1, steps=40, ema=0.7), np.ones(40))
    average = np.asarray(history[0][0].params["kernel"], np.float64)
    for step, (state, _) in enumerate(history[1:]):
        decay = min(0.7, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * np.asarray(state.params["kernel"], np.float64)
        np.testing.assert_allclose(state.ema["kernel"], average, rtol=1e-5)


def test_non_finite_update_is_skipped_and_counted():
    config = OptimConfig(lr=0.1, warmup=1, steps=8)
    (before, _), (after, values), (recovered, later) = run_steps(config, [1, 1, np.nan, 1])[2:]
    assert values["skipped"] == 1 and not np.isfinite(values["grad_norm"])
    kept = [(s.params, s.ema, s.opt_state) for s in (before, after)]
    jax.tree.map(np.testing.assert_array_equal, *kept)
    assert after.step == before.step + 1
    assert later["skipped"] == 0
    assert np.all(np.isfinite(recovered.params["kernel"]))
    assert not np.array_equal(recovered.params["kernel"], after.params["kernel"])


def test_a_skipped_step_leaves_the_means_of_the_others(tmp_path):
    """Every line of the record is JSON as the standard has it."""

    def broken(params, constants, batch, key, step):
        value, metrics = toy_stage.loss(params, constants, batch, key, step)
        return value * jnp.where(step == 2, jnp.nan, 1.0), metrics | {"never": jnp.nan}

    for experiment in (toy(tmp_path, steps=4, log_every=4), toy(tmp_path / "every", steps=4)):
        loop.train(dataclasses.replace(toy_stage.toy_stage(experiment), loss=broken))

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    def read(out):
        lines = (out / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line, parse_constant=refuse) for line in lines]

    steps = [r["loss"] for r in read(tmp_path / "every")]
    assert steps[2] is None
    (line,) = read(tmp_path)
    assert line["loss"] == pytest.approx(np.mean([x for x in steps if x is not None]), rel=1e-5)
    assert line["skipped"] == 0.25 and line["never"] is None


def test_run_without_finite_gradients_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(hooks, "MAX_SKIPPED_IN_A_ROW", 3)
    stage = toy_stage.toy_stage(toy(tmp_path, steps=9))
    stage = dataclasses.replace(stage, constants=lambda _: {"scale": jnp.float32("nan")})
    with pytest.raises(FloatingPointError, match=r"step 3: the last 3 gradients not finite"):
        loop.train(stage)


def test_a_trace_of_the_named_steps_is_written(tmp_path):
    train(toy(tmp_path, profile=(2, 3)))
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000
    with pytest.raises(ValueError, match=r"run.profile: \(3, 2\)"):
        RunConfig(profile=(3, 2))


def test_loss_falls(tmp_path):
    base = toy(tmp_path, steps=110, log_every=50)
    optim = dataclasses.replace(base.optim, lr=0.4)
    state = train(dataclasses.replace(base, optim=optim, mesh=MeshConfig(data=1)))
    written = records(tmp_path)
    assert [r["step"] for r in written] == [50, 100, 110]
    assert written[-1]["loss"] < 0.05 * written[0]["loss"]
    np.testing.assert_allclose(state.params["w"], np.arange(8).reshape(4, 2), atol=0.3)


def test_resumed_run_equals_uninterrupted_run(tmp_path):
    """Same losses and bits with a stop half-way, on another mesh too."""
    whole = train(toy(tmp_path / "whole"))

    class Limited:
        """Raises the signal that ends a run while the third batch is awaited."""

        def __init__(self, dataset, frames):
            self.dataset = dataset

        def __iter__(self):
            inner, served = iter(self.dataset), 0

            class Iterator:
                get_state, set_state = inner.get_state, inner.set_state

                def __next__(self):
                    nonlocal served
                    served += 1
                    if served == 2:
                        signal.raise_signal(signal.SIGTERM)
                    return next(inner)

            return Iterator()

    experiment = toy(tmp_path / "parts")
    assert loop.train(with_batches(toy_stage.toy_stage(experiment), Limited)) is None
    assert [r["step"] for r in records(tmp_path / "parts")] == [1, 2]
    resumed = train(experiment)

    def losses(name):
        return [(r["step"], r["loss"], r["grad_norm"]) for r in records(tmp_path / name)]

    assert losses("whole") == losses("parts")
    raw = [dataclasses.replace(s, key=jax.random.key_data(s.key)) for s in (whole, resumed)]
    jax.tree.map(np.testing.assert_array_equal, *raw)


def test_resuming_on_another_mesh(tmp_path, monkeypatch):
    """Weights, averages and moments are split, or whole again, and the run is the same."""
    monkeypatch.setattr(rules, "SMALL", 0)
    whole = train(toy(tmp_path / "whole"))
    experiment = toy(tmp_path / "parts", checkpoint_every=2)
    train(experiment)
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "4")
    moved = train(dataclasses.replace(experiment, mesh=MeshConfig(data=2, fsdp=2)))
    for tree in (moved.params, moved.ema, moved.opt_state[1].mu, moved.opt_state[1].nu):
        assert tree["w"].addressable_shards[0].data.shape == (2, 2)
    np.testing.assert_allclose(moved.params["w"], whole.params["w"], rtol=1e-5)


def test_resuming_on_one_device(tmp_path):
    experiment = toy(tmp_path, checkpoint_every=2)
    experiment = dataclasses.replace(experiment, mesh=MeshConfig(data=1))
    whole = train(experiment)
    shutil.rmtree(tmp_path / "checkpoints" / "4")
    np.testing.assert_array_equal(train(experiment).params["w"], whole.params["w"])


def test_finished_run_is_left_alone(tmp_path):
    state = train(toy(tmp_path))
    before = (tmp_path / "metrics.jsonl").read_text()
    again = train(toy(tmp_path))
    assert again.step == 4
    np.testing.assert_array_equal(state.params["w"], again.params["w"])
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_steps_after_the_first_compile_nothing(tmp_path):
    compiled = []

    def listen(event, seconds, fun_name="", **_):
        if "backend_compile" in event:
            compiled.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        train(toy(tmp_path, steps=4))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert compiled.count("jit(step)") == 1


@pytest.mark.parametrize(
    "mesh, message",
    [
        (MeshConfig(data=3, fsdp=3), "needs 9 devices, there are 8"),
        (MeshConfig(fsdp=16), "there are 8"),
        (MeshConfig(data=3), "data.batch 8 does not divide by 3 devices"),
    ],
)
def test_sizes_that_do_not_fit_the_mesh(tmp_path, mesh, message):
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(toy(tmp_path), mesh=mesh))
