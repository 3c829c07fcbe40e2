"""Every experiment in configs/ loads, and its model is what it says, without any weights."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gnvc_jax.parallel import MeshConfig, make_mesh
from gnvc_jax.planner.program import bytes_per_device
from gnvc_jax.planner.training import abstract_arguments
from gnvc_jax.training import config
from gnvc_jax.training.discriminator import AdversarialConfig
from gnvc_jax.training.partition import split
from gnvc_jax.training.stages import make_stage, model_shapes, objective
from gnvc_jax.training.state import init_state
from gnvc_jax.training.step import make_step

CONFIGS = Path(__file__).parents[1] / "configs"
STAGES_OF_SMALL = ("codec", "rollout", "refiner")
FILES = sorted(p for p in CONFIGS.glob("*/*.py") if p.stem != "models")


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.syspath_prepend(str(CONFIGS.parent))


def count(tree) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_it_loads(path):
    experiment = config.load(path)
    make_stage(experiment)
    assert path.stem.startswith(experiment.stage) or path.parent.name.startswith("small")


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_it_initialises(path):
    params = model_shapes(make_stage(config.load(path)))
    assert count(params) > 1e5


def test_what_trains_at_full_size():
    """The adapter of VACE with the new conditions, 735 M and 5 M, and the codec; not the DiT."""
    stage = make_stage(config.load(CONFIGS / "wan_1_3b" / "latent.py"))
    parts = model_shapes(stage)
    assert count(parts["refiner"]["dit"]) == 2_153_972_032
    assert count(parts["vae"]) == 126_892_531
    trained, fixed = split(parts, stage.experiment.train)
    new = count(parts["refiner"]["features"]) + count(parts["refiner"]["quality"])
    adapter = 2_153_972_032 - 1_418_996_800
    assert count(trained["refiner"]) == adapter + new
    assert count(trained["codec"]) == count(parts["codec"])
    assert count(fixed["refiner"]["dit"]) == 1_418_996_800
    assert "codec" not in fixed


def test_successors_differ_from_the_paper_where_they_say_so():
    """Same networks and trained parts; other levels, numbers of steps, last clips and losses."""
    paper, plus = (
        {
            stage: config.load(CONFIGS / name / f"{stage}.py")
            for stage in ("codec", "latent", "pixel")
        }
        for name in ("wan_1_3b", "wan_1_3b_plus")
    )
    for stage, one in plus.items():
        assert one.refiner == paper[stage].refiner and one.train == paper[stage].train
        assert one.optim == paper[stage].optim and one.vae == paper[stage].vae
        assert one.codec.levels(20, 7) == [28, 20, 22, 20, 24, 20, 22]
        assert paper[stage].codec.levels(20, 7) == [20] * 7
    starts = [one.init.run for one in plus.values()]
    assert starts == [None, "runs/wan_1_3b_plus/codec", "runs/wan_1_3b_plus/latent"]
    pixel = plus["pixel"]
    assert pixel.data.shapes == ((13, 256, 256), (25, 512, 832))
    assert pixel.optim.steps - pixel.data.size_schedule[0][0] == 20_000
    assert [pixel.tokens(shape) for shape in pixel.data.shapes] == [1024, 7 * 32 * 52]
    assert pixel.loss.mean_steps == 3
    for name in ("dists", "features", "adversarial"):
        more = config.load(CONFIGS / "wan_1_3b_plus" / f"pixel_{name}.py")
        weight = {"dists": 0.0, "features": 0.0, "adversarial": AdversarialConfig()}[name]
        assert dataclasses.replace(more.loss, **{name: weight}) == pixel.loss != more.loss
        assert dataclasses.replace(more, loss=pixel.loss, run=pixel.run) == pixel
    more = config.load(CONFIGS / "wan_1_3b_plus" / "pixel_adversarial.py")
    parts, model = model_shapes(make_stage(more)), model_shapes(make_stage(pixel))
    assert count(parts.pop("discriminator")) == 1_711_297
    assert count(parts) == count(model)


def test_larger_small_model_is_the_small_one_but_for_its_sizes():
    """Width 192 and a DiT of about 60 M parameters; each stage starts from the one before."""
    small, large = (
        {stage: config.load(CONFIGS / name / f"{stage}.py") for stage in STAGES_OF_SMALL}
        for name in ("small", "small_gpu")
    )
    for stage in STAGES_OF_SMALL:
        assert large[stage].loss == small[stage].loss and large[stage].vae == small[stage].vae
        assert large[stage].codec.width == 192 and large[stage].data.size == (256, 256)
        assert large[stage].data.frames == small[stage].data.frames
    starts = [large[stage].init.run for stage in STAGES_OF_SMALL]
    assert starts == [None, "runs/small_gpu/codec", "runs/small_gpu/rollout"]
    stage = make_stage(large["refiner"])
    assert 55e6 < count(model_shapes(stage)["refiner"]["dit"]) < 65e6
    arguments = abstract_arguments(
        stage, make_mesh(MeshConfig(data=1)), large["refiner"].data.largest
    )
    assert bytes_per_device(arguments[:2]) < 2**30  # what is left of 80 GB is for activations


@pytest.mark.slow
def test_one_step_at_full_width():
    """The first stage at 2 of 30 layers: the loss is finite, what should train moves."""
    experiment = config.load(CONFIGS / "wan_1_3b" / "latent.py")
    dit = dataclasses.replace(experiment.refiner.dit, layers=2)
    refiner = dataclasses.replace(experiment.refiner, dit=dit)
    stage = make_stage(dataclasses.replace(experiment, refiner=refiner))
    shapes = model_shapes(stage)
    rng = np.random.default_rng(0)
    parts = jax.tree.map(lambda x: rng.normal(0, 0.02, x.shape).astype(np.float32), shapes)
    params, fixed = split(parts, experiment.train)
    constants = {"mean": 0.0, "std": 1.0, "white": np.ones((2, 16))}
    constants["text"] = np.zeros((1, 1, dit.text_width))
    frozen = {"fixed": fixed, "constants": constants}
    latents = rng.normal(size=(2, 2, 8, 8, dit.channels)).astype(np.float32)

    optim = dataclasses.replace(experiment.optim, warmup=1)
    step = jax.jit(make_step(optim, objective(stage)))
    state = init_state(optim, jax.tree.map(jnp.asarray, params), jax.random.key(0))
    for _ in range(2):  # the first has a learning rate of zero
        state, values = step(state, frozen, latents)
    assert np.isfinite(values["loss"]) and values["skipped"] == 0
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, params)
    assert np.mean(jax.tree.leaves(moved)) > 0.9
