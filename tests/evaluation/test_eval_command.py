"""eval.py: arguments, exit statuses, and what a run without a model leaves behind."""

import importlib.util
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from gnvc_jax.evaluation.anchors import ANCHORS
from gnvc_jax.evaluation.clips import Clip, write_clip


@pytest.fixture(scope="module")
def command():
    path = Path(__file__).parents[2] / "eval.py"
    spec = importlib.util.spec_from_file_location("eval_command", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_arguments(command):
    options = command.parse(
        "--data a b --qp 8,24 --vae --anchors x265 --metrics psnr,lpips_vgg --out o".split()
    )
    assert options.qp == (8, 24)
    assert options.anchors == ("x265",)
    assert options.metrics == ("psnr", "lpips_vgg")
    assert [str(path) for path in options.data] == ["a", "b"]
    assert command.parse("--data a --anchors all --out o".split()).anchors == ANCHORS


@pytest.mark.parametrize("wrong", ["--qp 64", "--qp x", "--anchors vp8", "--frames 0", "--x"])
def test_wrong_use_ends_with_2(command, wrong, capsys):
    with pytest.raises(SystemExit) as caught:
        command.parse(f"--data a --out o {wrong}".split())
    assert caught.value.code == 2
    assert wrong.split()[0] in capsys.readouterr().err


def test_no_data_ends_with_2(command, tmp_path, capsys):
    assert command.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "no videos" in capsys.readouterr().err


def test_failures_end_with_1_and_are_in_the_results(command, tmp_path, capsys):
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    write_clip(Clip("a", frames, Fraction(25)), tmp_path / "a.mkv")
    (tmp_path / "b.mp4").write_bytes(b"no video")
    arguments = f"--model nowhere --data {tmp_path} --qp 8 --vae --out {tmp_path}/out"
    assert command.main(arguments.split()) == 1
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert [(r["clip"], r["point"], r["status"]) for r in results["records"]] == [
        ("a", "gnvc-qp8", "failed"),
        ("a", "vae", "failed"),
        ("b", "", "failed"),
    ]
    assert results["env"]["packages"]["jax"]
    out, err = capsys.readouterr()
    assert "nowhere: neither a model file nor a shipped model" in out
    assert "a gnvc-qp8: failed" in err
