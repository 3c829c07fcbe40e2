"""A run folder is enough: what the run started from may be gone, and the folder elsewhere."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_stage
from flax.traverse_util import flatten_dict
from refiner_runs import DIT, STATISTICS, drawn, make_base, save_start

import gnvc_jax
from gnvc_jax.errors import UsageError
from gnvc_jax.parallel import MeshConfig
from gnvc_jax.porting.architectures import Architecture
from gnvc_jax.porting.checkpoint import leaves_by_path, write_component
from gnvc_jax.training import fixed_parameters, loop, stages, weights
from gnvc_jax.training.config import ComputeConfig, InitConfig, RunConfig
from gnvc_jax.training.release import build_model, release
from gnvc_jax.training.stages import make_stage
from gnvc_jax.training.stages.pixel import PixelLoss


def begin(experiment):
    """Leaves a run folder as a run of no steps would, with random parameters; returns these."""
    Path(experiment.run.out).mkdir(exist_ok=True)
    stages.keep(make_stage(experiment), STATISTICS)
    return save_start(experiment)


def train(experiment):
    """Trains for two steps in the real loop, with all parameters and a loss of no cost."""
    stage = make_stage(experiment)
    shapes = stages.model_shapes(stage)

    def loss(params, constants, batch, key, step):
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(params)), {}

    stage = dataclasses.replace(
        stage,
        init=lambda key: jax.tree.map(lambda x: jnp.full(x.shape, 0.1), shapes),
        loss=loss,
        data=toy_stage.toy_stage(toy_stage.experiment()).data,
        measure=lambda: STATISTICS,
    )
    return loop.train(stage)


def write_dit(folder, config, seed):
    """Writes random weights as `gnvc port` would; returns them by path."""
    architecture, rng = Architecture("dit", config), np.random.default_rng(seed)
    shapes = leaves_by_path(architecture.abstract())
    arrays = {k: rng.normal(0, 0.1, x.shape).astype(np.float32) for k, x in shapes.items()}
    folder.mkdir()
    write_component(folder / "dit", architecture, arrays.items())
    return arrays


@pytest.fixture(scope="module")
def home(tiny_codec, tmp_path_factory):
    """A folder with runs, a ported DiT and a prompt, and an experiment that starts from them.

    All paths are relative. The experiment computes in bfloat16 and trains low-rank changes.
    """
    folder = tmp_path_factory.mktemp("home")
    with contextlib.chdir(folder):
        base = make_base(tiny_codec, Path())
        assert base.refiner is not None
        dit = dataclasses.replace(DIT, text_width=8, text_length=3)
        write_dit(Path("ported"), dit, 5)
        np.save("text.npy", np.random.default_rng(5).normal(size=(2, 8)).astype(np.float32))
    return folder, dataclasses.replace(
        base,
        refiner=dataclasses.replace(base.refiner, dit=dit),
        compute=ComputeConfig(dtype="bfloat16"),
        lora=2,
        train=("refiner/(features|quality|grey)", "refiner/dit/(context_|groups/context)"),
        init=InitConfig(run="codec", dit="ported", prompt="text.npy"),
        optim=dataclasses.replace(toy_stage.experiment().optim, lr=0.01, steps=2),
        mesh=MeshConfig(data=1),
        run=RunConfig(out="latent", log_every=1),
    )


@pytest.fixture
def runs(home, tmp_path, monkeypatch):
    """The experiment, in a working directory that is a copy of its home."""
    # Counting operations traces the loss of the stage, which is not the one that runs here.
    monkeypatch.setattr("gnvc_jax.training.throughput.operations", lambda *_: 0.0)
    shutil.copytree(home[0], tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    return home[1]


def leave(experiment, tmp_path, monkeypatch):
    """Moves the run's folder and deletes everything else that is there; returns the new place."""
    shutil.move(experiment.run.out, tmp_path / "moved")
    shutil.rmtree(tmp_path / "home")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "moved"


def test_release_needs_nothing_but_the_run_folder(runs, tmp_path, monkeypatch):
    train(runs)
    expected = build_model(runs.run.out, "mine")
    folder = leave(runs, tmp_path, monkeypatch)
    found = release(folder, tmp_path / "mine.safetensors")
    assert found.fingerprints == expected.fingerprints
    jax.tree.map(np.testing.assert_array_equal, found.refiner, expected.refiner)
    np.testing.assert_array_equal(found.text, expected.text)
    assert found.text is not None and found.text.shape == (1, 2, 8) and found.text.any()
    # The public loaders read it in the same way.
    refiner = gnvc_jax.load_refiner(folder)
    kernel = refiner.params["dit"]["groups"]["block_0"]["ffn_in"]["kernel"]
    assert found.refiner is not None
    stored = found.refiner["dit"]["groups"]["block_0"]["ffn_in"]["kernel"]
    np.testing.assert_array_equal(np.float16(kernel), stored)
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.float32(y)),
        gnvc_jax.load_pretrained(folder).model.codec,
        found.codec,
    )
    assert gnvc_jax.load_vae(folder).config == runs.vae


def test_run_keeps_what_it_computed_with(runs):
    """Kernels of the DiT in bfloat16, as on the mesh; the VAE exact, whatever its decoder uses."""
    fixed = stages.frozen(make_stage(runs), STATISTICS)["fixed"]
    begin(runs)
    folder = fixed_parameters.find("latent")
    assert folder is not None
    kept = fixed_parameters.load(folder, stages.stored_shapes(make_stage(runs)))
    jax.tree.map(np.testing.assert_array_equal, kept, fixed)
    types = jax.tree.map(lambda x: x.dtype, kept)
    assert types["refiner"]["dit"]["groups"]["block_0"]["ffn_in"]["kernel"] == jnp.bfloat16
    assert set(jax.tree.leaves(types["vae"])) == {np.dtype("float32")}
    sources = json.loads((folder / "sources.json").read_text())
    assert all(path.startswith("/") for path in sources.values() if path is not None)


def test_resumed_run_and_its_successor_need_no_sources(runs, tmp_path, monkeypatch):
    begin(runs)
    expected = stages.frozen(make_stage(runs), STATISTICS)
    folder = leave(runs, tmp_path, monkeypatch)
    # The same experiment, with the run folder where it is now.
    resumed = dataclasses.replace(runs, run=RunConfig(out=str(folder)))
    found = stages.frozen(make_stage(resumed), STATISTICS)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    later = dataclasses.replace(
        runs,
        init=InitConfig(run=str(folder)),
        lora=0,
        train=("codec/",),
        run=RunConfig(out="later"),
    )
    begin(later)
    sources = json.loads((tmp_path / "elsewhere" / "later" / "fixed" / "sources.json").read_text())
    assert sources["dit"] == str(tmp_path / "home" / "ported")  # where it came from in the end
    text = weights.load_text(later)
    np.testing.assert_array_equal(text, weights.load_text(resumed))
    assert text is not None and text.any()


def test_low_rank_changes_are_merged_into_kept_kernels(runs):
    """Those of a run become part of the kernels that a later run without such changes keeps."""
    change = begin(runs)["lora"]["refiner"]["dit"]["groups"]["block_0"]["ffn_in"]["kernel"]
    later = dataclasses.replace(
        runs, init=InitConfig(run="latent"), lora=0, train=("codec/",), run=RunConfig(out="later")
    )
    before = stages.frozen(make_stage(runs), STATISTICS)["fixed"]
    after = stages.frozen(make_stage(later), STATISTICS)["fixed"]
    before, after = (
        np.float32(x["refiner"]["dit"]["groups"]["block_0"]["ffn_in"]["kernel"])
        for x in (before, after)
    )
    merged = before + np.asarray(change["a"] @ change["b"])
    np.testing.assert_array_equal(after, merged.astype(jnp.bfloat16).astype(np.float32))


def test_teacher_of_a_resumed_run_comes_from_its_folder(runs, tmp_path, monkeypatch):
    begin(runs)
    loss = PixelLoss(lpips_net="alex", steps=2, single=0.5, distill=1.0)
    distill = dataclasses.replace(
        runs,
        stage="distill",
        loss=loss,
        init=InitConfig(run="latent"),
        run=RunConfig(out="distill"),
    )
    expected = stages.load_teacher(make_stage(distill), STATISTICS)
    begin(distill)
    folder = leave(distill, tmp_path, monkeypatch)
    stage = make_stage(dataclasses.replace(distill, run=RunConfig(out=str(folder))))
    found = stages.load_teacher(stage, STATISTICS)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert flatten_dict(found).keys() == flatten_dict(drawn(stage)).keys()


def test_named_sources_replace_those_of_the_run_before(runs, tmp_path):
    begin(runs)
    other = write_dit(tmp_path / "other", runs.refiner.dit, 9)
    later = dataclasses.replace(
        runs,
        init=InitConfig(run="latent", dit=str(tmp_path / "other")),
        run=RunConfig(out="later"),
    )
    found = stages.frozen(make_stage(later), STATISTICS)["fixed"]["refiner"]["dit"]
    kernel = found["groups"]["block_0"]["ffn_in"]["kernel"]
    np.testing.assert_array_equal(
        kernel, other["groups/block_0/ffn_in/kernel"].astype(jnp.bfloat16)
    )


def test_damaged_and_stale_fixed_parameters(runs):
    begin(runs)
    folder = fixed_parameters.find("latent")
    assert folder is not None
    stored = stages.stored_shapes(make_stage(runs))
    shutil.rmtree("latent/checkpoints")
    assert fixed_parameters.find("latent") is None  # binds nobody without a checkpoint
    files = list((folder / "parameters").rglob("d/*"))
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(UsageError, match="parameters: cannot be read"):
        fixed_parameters.load(folder, stored)
    begin(runs)  # a new start writes them again
    assert fixed_parameters.load(folder, stored)
