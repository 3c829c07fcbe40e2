"""train.py: one line for what the user can repair, a traceback for a fault of the program."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from gnvc_jax.errors import TrainingDiverged, UsageError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(monkeypatch):
    """Calls `main` of train.py with the toy stage and these arguments."""
    spec = importlib.util.spec_from_file_location("train_command", ROOT / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*args, instead=None):
        config = Path(__file__).with_name("toy_stage.py")
        monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(config), *map(str, args)])
        if instead:
            monkeypatch.setattr(module, "train", instead)
        module.main()

    return call


def raising(error):
    def train(*_):
        raise error

    return train


@pytest.mark.parametrize(
    "error", [UsageError("batch 3"), TrainingDiverged("step 9"), OSError(28, "No space", "a.json")]
)
def test_what_the_user_can_repair_is_one_line(run, tmp_path, error):
    with pytest.raises(SystemExit) as stop:
        run("--run.out", tmp_path, instead=raising(error))
    assert stop.value.code == f"train.py: {error}"


@pytest.mark.parametrize("error", [ValueError("in a kernel"), TypeError("in jax")])
def test_a_fault_keeps_its_traceback(run, tmp_path, error):
    with pytest.raises(type(error)) as caught:
        run("--run.out", tmp_path, instead=raising(error))
    assert caught.value is error


def test_a_run_folder_at_or_below_a_file(run, tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    for out in (file, file / "run", file / "a" / "run"):
        with pytest.raises(SystemExit) as stop:
            run("--run.out", out)
        assert stop.value.code.startswith(f"train.py: run.out: no folder {out} can be made")
    assert file.read_text() == "kept"


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"stage": '])
def test_a_damaged_configuration_is_named(run, tmp_path, damage):
    run("--run.out", tmp_path)
    config = tmp_path / "config.json"
    whole = config.read_text()
    config.write_text(damage)
    with pytest.raises(SystemExit) as stop:
        run("--run.out", tmp_path)
    assert str(config) in stop.value.code and "damaged" in stop.value.code
    assert config.read_text() == damage  # nothing is overwritten
    config.write_text(whole)
    run("--run.out", tmp_path)
    copies = [json.loads(p.read_text()) for p in tmp_path.glob("checkpoints/*/config/metadata")]
    assert copies and all(copy == json.loads(whole) for copy in copies)
