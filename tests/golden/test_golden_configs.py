"""Shipped experiments with all their defaults, and where a mesh puts the parameters of models.

A default or a sharding rule that changes by accident shows here. After a change that is meant,
`python -m pytest tests/golden/make_configs.py` writes the files anew.
"""

import collections
import dataclasses
import json
import math
import re
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from gnvc_jax.parallel.rules import path_name, spec
from gnvc_jax.training.config import load
from gnvc_jax.training.stages import make_stage, model_shapes

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
CONFIGS, SHARDINGS = FOLDER / "configs", FOLDER / "shardings"
EXPERIMENTS = {
    path.relative_to(ROOT / "configs").with_suffix("").as_posix(): path
    for path in sorted(ROOT.glob("configs/*/*.py"))
    if path.stem != "models"
}
# Experiments with all parts of their models.
SHARDED = (
    "small/refiner",
    "small_gpu/refiner",
    "wan_1_3b/latent",
    "wan_14b/pixel",
    "wan_1_3b_plus/pixel_adversarial",
)
MESH = {"data": 2, "fsdp": 4, "context": 1, "tensor": 2}


def resolved(path: Path) -> str:
    """An experiment as `config.json` of its run folder has it."""
    return json.dumps(dataclasses.asdict(load(path)), indent=2) + "\n"


def sharding_table(path: Path) -> str:
    """Each split parameter of an experiment's model, and how much of each part is replicated.

    Parameters that differ in a number only, and lie alike, share a line with * for the number.
    """
    mesh = AbstractMesh(tuple(MESH.values()), tuple(MESH), axis_types=(AxisType.Auto,) * len(MESH))
    shapes = model_shapes(make_stage(load(path)))
    split, replicated = collections.Counter(), collections.defaultdict(list)
    for leaf_path, x in jax.tree_util.tree_leaves_with_path(shapes):
        name = path_name(leaf_path)
        axes = spec(name, x.shape, mesh)
        if any(axes):
            split[f"{re.sub('[0-9]+', '*', name)} {x.shape}: {tuple(axes)}"] += 1
        else:
            replicated[name.partition("/")[0]].append(math.prod(x.shape))
    lines = ["Mesh: " + ", ".join(f"{axis} {size}" for axis, size in MESH.items())]
    lines += [
        f"{part}: {len(sizes)} parameters with {sum(sizes)} elements are replicated"
        for part, sizes in sorted(replicated.items())
    ]
    lines += [f"{count} x {line}" for line, count in sorted(split.items())]
    return "\n".join(lines) + "\n"


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_config_resolves_to_its_golden_file(name):
    golden = CONFIGS / f"{name}.json"
    assert golden.is_file(), "run python -m pytest tests/golden/make_configs.py"
    assert json.loads(resolved(EXPERIMENTS[name])) == json.loads(golden.read_text())


def test_each_golden_file_has_its_config():
    names = {p.relative_to(CONFIGS).with_suffix("").as_posix() for p in CONFIGS.rglob("*.json")}
    assert names == set(EXPERIMENTS)


@pytest.mark.parametrize("name", SHARDED)
def test_parameters_are_sharded_as_in_the_golden_table(name):
    table = (SHARDINGS / f"{name}.txt").read_text()
    assert sharding_table(EXPERIMENTS[name]).splitlines() == table.splitlines()
