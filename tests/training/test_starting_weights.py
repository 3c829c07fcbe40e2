"""Where the weights of a stage come from, what of them trains, and what is fixed."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from refiner_runs import DIT, STATISTICS, codec_of, save_start, started
from toy_stage import experiment_in

from gnvc_jax.codec.model import LatentCodec
from gnvc_jax.errors import UsageError
from gnvc_jax.parallel import MeshConfig, make_mesh, rules
from gnvc_jax.porting.architectures import Architecture
from gnvc_jax.porting.checkpoint import write_component
from gnvc_jax.refiner import Refiner
from gnvc_jax.training import lora, networks, partition, stages
from gnvc_jax.training.config import ComputeConfig, InitConfig, RunConfig
from gnvc_jax.training.stages import make_stage
from gnvc_jax.training.stages.pixel import PixelLoss
from gnvc_jax.training.weights import origins


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


def test_stages_say_what_they_lack(base, tmp_path):
    with pytest.raises(ValueError, match="'dit/' fits no parameter"):
        started(dataclasses.replace(base, train=("dit/",)))
    with pytest.raises(FileNotFoundError, match="nowhere: no training run"):
        started(dataclasses.replace(base, init=InitConfig(run="nowhere")))
    other = dataclasses.replace(base.codec, entropy_width=12)
    with pytest.raises(ValueError, match="shape"):
        started(dataclasses.replace(base, codec=other))


def test_a_run_does_not_start_from_itself(tmp_path):
    with pytest.raises(UsageError, match=r"init\.run: .* is run\.out too"):
        experiment_in(tmp_path / "run", init=InitConfig(run=str(tmp_path / "other" / ".." / "run")))
    for name, start in (("a", "b"), ("b", "a")):
        facts = {"stage": "pixel", "init": {"run": str(tmp_path / start)}}
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(facts))
    with pytest.raises(UsageError, match=r"its init\.run leads back to"):
        origins(InitConfig(run=str(tmp_path / "a")))


def test_what_a_run_does_not_name_is_as_for_the_run_before(tmp_path):
    for name, init in (
        ("codec", {"vae": "weights", "prompt": "old.npy"}),
        ("latent", {"dit": "dit", "run": str(tmp_path / "codec")}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"stage": name, "init": init}))
    runs = tuple(str(tmp_path / name) for name in ("codec", "latent"))
    found = origins(InitConfig(prompt="new.npy", run=runs[1]))
    assert found == ("weights", "dit", "new.npy", None, runs, None, frozenset())
