"""Config files and command-line overrides."""

import dataclasses
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import toy_stage

from gnvc_jax.codec.config import CodecConfig
from gnvc_jax.errors import UsageError
from gnvc_jax.refiner import DiTConfig, RefinerConfig
from gnvc_jax.refiner.attention import IMPLEMENTATIONS, RING
from gnvc_jax.refiner.dit import REMAT
from gnvc_jax.training.config import (
    STAGE_NEEDS,
    ComputeConfig,
    DataConfig,
    Experiment,
    InitConfig,
    OptimConfig,
    Policy,
    RunConfig,
    flatten,
    load,
    override,
)
from gnvc_jax.training.stages import STAGES, make_stage
from gnvc_jax.training.stages.codec import CodecLoss
from gnvc_jax.training.stages.latent import LatentLoss
from gnvc_jax.training.stages.pixel import PixelLoss
from gnvc_jax.training.stages.refine import RefineLoss
from gnvc_jax.training.stages.transform import TransformLoss
from gnvc_jax.vae.config import VAEConfig


@dataclasses.dataclass(frozen=True)
class WeightedLoss:
    weight: float = 1.0


ROOT = Path(__file__).parents[2]
BASE = Experiment(stage="vae", loss=WeightedLoss())


def test_overrides_change_what_they_name_and_nothing_else():
    args = ["--optim.lr", "1e-3", "--data.batch", "4", "--data.size", "64", "96"]
    args += ["--vae.temporal_down", "True", "False", "True", "--loss.weight", "0.5"]
    args += ["--run.tensorboard", "--run.checkpoint-every", "7"]
    before = flatten(dataclasses.asdict(BASE))
    after = flatten(dataclasses.asdict(override(BASE, args)))
    assert {k: v for k, v in after.items() if v != before[k]} == {
        "optim.lr": 1e-3,
        "data.batch": 4,
        "data.size": (64, 96),
        "vae.temporal_down": (True, False, True),
        "loss.weight": 0.5,
        "run.tensorboard": True,
        "run.checkpoint_every": 7,
    }
    assert override(BASE, []) == BASE


@pytest.mark.parametrize(
    "args, told",
    [
        (["--optim.lrr", "1"], "--optim.lr"),
        (["--data.bach", "4"], "--data.batch"),
        (["--optim.lr", "fast"], "could not convert string to float: 'fast'"),
        (["--data.size", "64"], "Expected 2 values"),
        (["--loss.wait", "1"], "--loss.weight"),
        (["--optim.lr", "nan"], "optim.lr: must be in [0, inf], got nan"),
        (["--data.batch", "0"], "data.batch: must be in [1, inf], got 0"),
        (["--data.frames", "12"], "data.frames: must be 1 + 4k, got 12"),
        (["--evaluate.every", "9"], "evaluate.data: name the held-out clips for evaluate.every"),
        (["--evaluate.every", "9", "--evaluate.data", "x"], "has no codec to evaluate, use 0"),
        (["--compute.remat", "foo"], "('none', 'full', 'attention', 'matmuls')"),
        (["--compute.vae.dtype", "half"], "('float32', 'bfloat16')"),
        (["--compute.attention", "flash"], "invalid choice 'flash'"),
    ],
)
def test_wrong_overrides_end_with_a_hint(args, told, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        override(BASE, args)
    assert stop.value.code == 2
    assert told in capsys.readouterr().err


def test_quality_levels_differ():
    for low, high in ((0.5, 0.5), (0.5, 0.05), (0.0, 0.5)):
        with pytest.raises(ValueError, match="lambda_low: expected 0 < lambda_low < lambda_high"):
            CodecLoss(lambda_low=low, lambda_high=high)


def test_wrong_strings_in_a_config_file_are_refused_with_the_choices():
    for make, told in (
        (lambda: ComputeConfig(remat="foo"), "compute.remat: expected one of none, full, attenti"),
        (lambda: Policy(dtype="float16"), "compute.dtype: expected one of float32, bfloat16, got"),
        (lambda: PixelLoss(lpips_net="squeeze"), "loss.lpips_net: expected one of alex, vgg, got"),
        (lambda: CodecConfig(motion="flow"), "motion must be blocks or None, got 'flow'"),
        (lambda: CodecConfig(level_pattern=()), "level_pattern must name at least one level"),
    ):
        with pytest.raises(UsageError, match=told):
            make()


def test_choices_are_what_the_networks_know():
    hints = get_type_hints(ComputeConfig)
    assert set(get_args(hints["remat"])) == set(REMAT)
    (attention, _) = get_args(hints["attention"])
    assert set(get_args(attention)) == {*IMPLEMENTATIONS, RING}


VAE = VAEConfig(base=8, latent_channels=4)
CODEC = CodecConfig(latent_channels=4, width=8, y_channels=8, scale_width=8)
DIT = DiTConfig(16, 16, 2, 2, 8, 4, text_length=0, context_every=1, context_channels=4)
LATENT = Experiment(
    stage="latent",
    vae=VAE,
    codec=CODEC,
    refiner=RefinerConfig(DIT, features=8),
    init=InitConfig(run="a codec"),
    train=("refiner/",),
    loss=LatentLoss(),
    data=DataConfig(size=(64, 128), batch=6),
)
LINEAR = VAEConfig(latent_channels=4, linear=True)
MOTION = dataclasses.replace(CODEC, motion="blocks")
TRANSFORM = dataclasses.replace(
    LATENT, stage="transform", vae=LINEAR, codec=MOTION, refiner=None, loss=TransformLoss()
)
REFINE = dataclasses.replace(
    TRANSFORM,
    stage="refine",
    refiner=LATENT.refiner,
    loss=RefineLoss(),
    data=DataConfig(frames=13, size=(64, 64)),
)
PIXEL = dataclasses.replace(LATENT, stage="pixel", loss=PixelLoss())


@pytest.mark.parametrize(
    "base, changes, told",
    [
        (
            LATENT,
            {"codec": dataclasses.replace(CODEC, latent_channels=16)},
            "codec.latent_channels: must equal vae.latent_channels, 4, got 16",
        ),
        (
            LATENT,
            {"refiner": dataclasses.replace(LATENT.refiner, features=32)},
            "refiner.features: must equal codec.width, 8, got 32",
        ),
        (
            LATENT,
            {"refiner": RefinerConfig(features=8)},
            "refiner.dit.channels: must equal vae.latent_channels, 4, got 16",
        ),
        (TRANSFORM, {"vae": VAE}, "codec.motion: only a linear VAE gives frames"),
        (
            TRANSFORM,
            {"vae": dataclasses.replace(LINEAR, temporal_down=(True, True, True))},
            "codec.motion: made for strides 4 and 8 of the VAE, got 8 and 8",
        ),
        (LATENT, {"data": DataConfig(frames=8)}, "data.frames: must be 1 + 4k, got 8"),
        (
            LATENT,
            {"data": DataConfig(clip_length_schedule=((100, 9), (200, 14)))},
            "data.frames: must be 1 + 4k, got 14",
        ),
        (
            LATENT,
            {"data": DataConfig(size_schedule=((100, 64, 128), (200, 480, 832)))},
            "data.size: must be multiples of 64, got 480 x 832",
        ),
        (
            LATENT,
            {"data": DataConfig(size=(64, 96))},
            "data.size: must be multiples of 64, got 64 x 96",
        ),
        (
            LATENT,
            {"stage": "mine:stage", "codec": None, "data": DataConfig(size=(24, 64))},
            "data.size: must be multiples of 16, got 24 x 64",
        ),
        (
            LATENT,
            {"optim": OptimConfig(accumulate=4)},
            "data.batch: must be a multiple of optim.accumulate, 4, got 6",
        ),
        (LATENT, {"codec": None}, "codec: the stage `latent` needs one, got None"),
        (LATENT, {"refiner": None}, "refiner: the stage `latent` needs one, got None"),
        (
            LATENT,
            {"refiner": RefinerConfig(dataclasses.replace(DIT, context_every=0), features=8)},
            "refiner.dit.context_every: must be positive",
        ),
        (
            LATENT,
            {"init": InitConfig(vae="a", dit="b")},
            "init: the stage `latent` starts from a codec, give init.run or init.model",
        ),
        (LATENT, {"train": ()}, "train: must name what the stage `latent` trains"),
        (
            LATENT,
            {"vae": LINEAR, "codec": MOTION},
            "codec.motion: must be None in the stage `latent`, got blocks",
        ),
        (
            TRANSFORM,
            {"codec": CODEC},
            "codec.motion: must be blocks in the stage `transform`, got None",
        ),
        (
            PIXEL,
            {"data": DataConfig(latents="cache")},
            "data.latents: the stage `pixel` needs frames, got cache",
        ),
        (PIXEL, {"loss": PixelLoss(distill=1.0)}, "loss.distill: must be 0 in the stage `pixel`"),
        (
            PIXEL,
            {"refiner": dataclasses.replace(LATENT.refiner, steps=2)},
            "refiner.steps: the stage `pixel` trains for 5, not 2",
        ),
        (PIXEL, {"stage": "distill"}, "loss.distill: must be positive in the stage `distill`"),
        (REFINE, {"data": DataConfig(frames=9)}, "refiner.window > 2 and data.frames >= 13"),
        (LATENT, {"run": RunConfig(out="a codec")}, "init.run: a codec is run.out too"),
        (LATENT, {"stage": "latnet"}, "unknown stage 'latnet'; there are: vae, "),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused(base, changes, told):
    with pytest.raises(UsageError) as refused:
        make_stage(dataclasses.replace(base, **changes))
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_settings_that_fit_are_accepted():
    for experiment in (LATENT, TRANSFORM, REFINE, dataclasses.replace(PIXEL, refiner=None)):
        assert make_stage(experiment).experiment is experiment
    assert set(STAGE_NEEDS) == set(STAGES)


def test_config_file_may_hold_a_value_or_a_function(tmp_path):
    source = "from gnvc_jax.training.config import Experiment\n"
    (tmp_path / "value.py").write_text(source + "experiment = Experiment(stage='a')\n")
    (tmp_path / "function.py").write_text(source + "def experiment(): return Experiment('b')\n")
    (tmp_path / "neither.py").write_text(source)
    assert load(tmp_path / "value.py").stage == "a"
    assert load(tmp_path / "function.py").stage == "b"
    with pytest.raises(ValueError, match=r"neither.py: defines no `experiment`"):
        load(tmp_path / "neither.py")
    with pytest.raises(FileNotFoundError, match=r"absent.py: no such config file"):
        load(tmp_path / "absent.py")


SHIPPED = [p for p in (ROOT / "configs").rglob("*.py") if "Experiment(" in p.read_text()]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(ROOT)))
def test_shipped_configs_load(path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)  # where train.py lies, so that they may share parts
    experiment = load(path)
    assert experiment.stage in STAGES
    assert override(experiment, []) == experiment


def test_stage_is_found_by_name_or_path():
    stage = make_stage(toy_stage.experiment())
    assert stage.loss is toy_stage.loss
    with pytest.raises(ValueError, match=r"unknown stage 'vea'; there are: vae, "):
        make_stage(Experiment(stage="vea"))
    for stage, told in (
        ("no_such_module:stage", "No module named 'no_such_module'"),
        ("toy_stage:stages", "has no attribute 'stages'"),
    ):
        with pytest.raises(UsageError, match=f"stage '{stage}': .*{told}"):
            make_stage(Experiment(stage=stage))
