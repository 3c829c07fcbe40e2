"""Config files and command-line overrides."""

import dataclasses
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import toy_stage

from gnvc_jax.errors import UsageError
from gnvc_jax.refiner.attention import IMPLEMENTATIONS, RING
from gnvc_jax.refiner.dit import REMAT
from gnvc_jax.training.config import (
    ComputeConfig,
    Experiment,
    Policy,
    flatten,
    load,
    override,
)
from gnvc_jax.training.stages import STAGES, make_stage
from gnvc_jax.training.stages.codec import CodecLoss
from gnvc_jax.training.stages.pixel import PixelLoss


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
    ):
        with pytest.raises(UsageError, match=told):
            make()


def test_choices_are_what_the_networks_know():
    hints = get_type_hints(ComputeConfig)
    assert set(get_args(hints["remat"])) == set(REMAT)
    (attention, _) = get_args(hints["attention"])
    assert set(get_args(attention)) == {*IMPLEMENTATIONS, RING}


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
