"""`gnvc train`: one line for what the user can repair, a traceback for a fault of the program."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from gnvc_jax import cli
from gnvc_jax.errors import TrainingDiverged, UsageError

ROOT = Path(__file__).parents[2]
CONFIG = str(Path(__file__).with_name("toy_stage.py"))


@pytest.fixture
def run(monkeypatch, capsys):
    """Calls `gnvc train` with the toy stage and these arguments; gives its code and errors."""

    def call(*args, instead=None):
        if instead:
            monkeypatch.setattr("gnvc_jax.training.loop.train", instead)
        code = cli.main(["train", "--config", CONFIG, *map(str, args)])
        return code, capsys.readouterr().err

    monkeypatch.setattr("gnvc_jax.runtime.use_compilation_cache", lambda: None)
    return call


def raising(error):
    def train(*_):
        raise error

    return train


@pytest.mark.parametrize(
    "error, told",
    [
        (UsageError("batch 3"), (2, "gnvc: train: batch 3\n")),
        (TrainingDiverged("step 9"), (1, "gnvc: step 9\n")),
        (OSError(28, "No space", "a.json"), (74, "gnvc: a.json: No space\n")),
    ],
)
def test_what_the_user_can_repair_is_one_line(run, tmp_path, error, told):
    assert run("--run.out", tmp_path, instead=raising(error)) == told


@pytest.mark.parametrize("error", [ValueError("in a kernel"), TypeError("in jax")])
def test_a_fault_keeps_its_traceback(run, tmp_path, error):
    with pytest.raises(type(error)) as caught:
        run("--run.out", tmp_path, instead=raising(error))
    assert caught.value is error


def test_a_run_folder_at_or_below_a_file(run, tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    for out in (file, file / "run", file / "a" / "run"):
        code, told = run("--run.out", out)
        assert code == 2
        assert told.startswith(f"gnvc: train: run.out: no folder {out} can be made")
    assert file.read_text() == "kept"


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"stage": '])
def test_a_damaged_configuration_is_named(run, tmp_path, damage):
    run("--run.out", tmp_path)
    config = tmp_path / "config.json"
    whole = config.read_text()
    config.write_text(damage)
    code, told = run("--run.out", tmp_path)
    assert code == 2 and str(config) in told and "damaged" in told
    assert config.read_text() == damage  # nothing is overwritten
    config.write_text(whole)
    run("--run.out", tmp_path)
    copies = [json.loads(p.read_text()) for p in tmp_path.glob("checkpoints/*/config/data.json")]
    assert copies and all(copy == json.loads(whole) for copy in copies)


@pytest.mark.parametrize(
    "args, code, told",
    [
        ([], 2, "--config"),
        (["--config", CONFIG, "--optim.lx", "1"], 2, "--optim.lr"),
        (["--config", "absent.py"], 66, "absent.py"),
        (["--config", CONFIG, "--help"], 0, "--optim.lr"),
    ],
)
def test_train_py_is_the_command(args, code, told, monkeypatch, capsys):
    """Run in this process, as `python train.py` would: an interpreter of its own takes seconds."""
    monkeypatch.setattr("gnvc_jax.runtime.use_compilation_cache", lambda: None)
    monkeypatch.setattr(sys, "argv", ["train.py", *args])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    said = capsys.readouterr()
    assert ended.value.code == code and told in said.out + said.err
    assert "Traceback" not in said.err
