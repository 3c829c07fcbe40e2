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
    weights = command.parse("--data a --metrics dists --weights dists=f --out o".split()).weights
    assert weights == [("dists", Path("f"))]
    assert command.parse("--data a --anchors all --out o".split()).anchors == ANCHORS


@pytest.mark.parametrize(
    "wrong",
    [
        *("--qp 64", "--qp x", "--anchors vp8", "--frames 0", "--gop 24", "--x", "--processes 0"),
        *("--anchor-rates 0", "--anchor-rates x", "--anchor-rates inf"),
        *("--weights psnr=a", "--weights dists", "--weights dists=a"),
        *("--flow .", "--flow nowhere --metrics e_warp"),
    ],
)
def test_wrong_use_ends_with_2(command, wrong, capsys):
    with pytest.raises(SystemExit) as caught:
        command.parse(f"--data a --out o {wrong}".split())
    assert caught.value.code == 2
    assert wrong.split()[0] in capsys.readouterr().err


def test_the_options_of_the_paper(command, capsys):
    root = Path(__file__).parents[2]
    file = f"@{root}/configs/evaluation/gnvc_vd.txt"
    options = command.parse([file, *"--set uvg --data a --out o --qp 8".split()])
    assert (options.frames, options.gop, options.range) == (96, 25, "full")
    assert options.qp == (8,) and options.anchors == ("vvc",)
    assert options.anchor_rates == (1.0, 32.0)
    with pytest.raises(SystemExit) as caught:
        command.parse(["@nowhere.txt", "--data", "a", "--out", "o"])
    assert caught.value.code == 2 and "nowhere.txt" in capsys.readouterr().err


def test_a_set_that_is_not_whole_ends_with_2(command, tmp_path, capsys):
    (tmp_path / "Beauty_1920x1080_120fps_420_8bit_YUV.yuv").write_bytes(b"")
    arguments = f"--set uvg --data {tmp_path} --out {tmp_path}/out"
    assert command.main(arguments.split()) == 2
    assert "uvg: no Bosphorus" in capsys.readouterr().err


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
    assert results["options"]["qp"] == [8] and results["options"]["data"] == [str(tmp_path)]
    report = (tmp_path / "out/report.html").read_text()
    assert all(name in report for name in ("gnvc-qp8", "vae", "nowhere: neither"))
    out, err = capsys.readouterr()
    assert "nowhere: neither a model file nor a shipped model" in out
    assert "a gnvc-qp8: failed" in err


def test_a_few_clips_that_cannot_be_read_end_with_3(command, tmp_path, monkeypatch, capsys):
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    for number in range(10):
        write_clip(Clip("a", frames, Fraction(25)), tmp_path / f"{number}.mkv")

    written = []
    monkeypatch.setattr(command.Sweep, "measure", lambda *_: {"status": "ok", "point": "p"})
    monkeypatch.setattr(command, "write_results", lambda _, records, *__: written.append(records))
    for name in ("read_results", "write_report"):
        monkeypatch.setattr(command, name, lambda *_: None)
    arguments = f"--data {tmp_path} --qp 8 --out {tmp_path}/out".split()
    assert command.main(arguments) == 0
    for name, code in (("3.mkv", 3), ("4.mkv", 1)):
        (tmp_path / name).write_bytes(b"no video")
        assert command.main(arguments) == code
        reasons = [r["error"] for r in written[-1] if r["status"] == "failed"]
        assert name in reasons[-1] and len(written[-1]) == 10


def test_compare_is_told_apart_by_the_first_word(command, tmp_path, capsys):
    results = {"schema": "gnvc-eval/1", "created": "now", "env": {}, "records": []}
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps(results))
    files = [f"{tmp_path}/a.json", f"{tmp_path}/b.json"]
    assert command.main(["compare", *files, "--out", f"{tmp_path}/c.md"]) == 1
    out = capsys.readouterr().out
    assert "No clip and point in common." in out
    assert (tmp_path / "c.md").read_text() == out
    assert command.main(["compare", files[0], f"{tmp_path}/none.json"]) == 2
    assert "eval.py compare: " in (err := capsys.readouterr().err)
    assert "none.json: No such file" in err
    onto = ["compare", *files, "--out", files[1]]
    for wrong in (["compare", files[0]], ["compare", *files, "--data", "x"], onto):
        with pytest.raises(SystemExit) as caught:
            command.main(wrong)
        assert caught.value.code == 2
    assert [str(p) for p in command.parse("--data compare --out o".split()).data] == ["compare"]
