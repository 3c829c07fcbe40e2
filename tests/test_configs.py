"""Every experiment in configs/ loads, and its model is what it says, without any weights."""

from pathlib import Path

import jax
import numpy as np
import pytest

from gnvc_jax.training import config
from gnvc_jax.training.parts import split
from gnvc_jax.training.stages import make_stage

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(p for p in CONFIGS.glob("*/*.py") if p.stem != "models")


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.syspath_prepend(str(CONFIGS.parent))


def count(tree) -> int:
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_it_loads(path):
    experiment = config.load(path)
    assert experiment.stage == path.stem
    make_stage(experiment)


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_it_initialises(path):
    params = jax.eval_shape(make_stage(config.load(path)).init, jax.random.key(0))
    assert count(params) > 1e5


def test_what_trains_at_full_size():
    """The adapter of VACE with the new conditions, 735 M and 5 M, and the codec; not the DiT."""
    stage = make_stage(config.load(CONFIGS / "wan_1_3b" / "latent.py"))
    parts = jax.eval_shape(stage.init_parts, jax.random.key(0))
    assert count(parts["refiner"]["dit"]) == 2_153_972_032
    assert count(parts["vae"]) == 126_892_531
    trained, fixed = split(parts, stage.experiment.train)
    new = count(parts["refiner"]["features"]) + count(parts["refiner"]["quality"])
    adapter = 2_153_972_032 - 1_418_996_800
    assert count(trained["refiner"]) == adapter + new
    assert count(trained["codec"]) == count(parts["codec"])
    assert count(fixed["refiner"]["dit"]) == 1_418_996_800
    assert "codec" not in fixed
