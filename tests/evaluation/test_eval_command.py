"""gnvc eval and gnvc compare: arguments, exit codes, and what runs without a model leave behind."""

import json
import runpy
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from gnvc_jax import cli
from gnvc_jax.commands import evaluation
from gnvc_jax.evaluation.anchors import ANCHORS
from gnvc_jax.evaluation.clips import Clip, write_clip


def parse(line: str) -> dict:
    """The arguments that `evaluate` would be called with."""
    _, _, call = cli.parse(["eval", *line.split()])
    return call.keywords


def run(line: str) -> int:
    return cli.main(["eval", *line.split()])


def test_lists_of_numbers_names_and_files():
    options = parse("--data a b --qp 8,24 --vae --anchors x265 --metrics psnr,lpips_vgg --out o")
    assert options["qp"] == (8, 24) and options["vae"]
    assert options["anchors"] == ("x265",)
    assert options["metrics"] == ("psnr", "lpips_vgg")
    assert options["data"] == (Path("a"), Path("b"))
    options = parse("--data a --metrics dists --weights dists=f --out o --anchors all")
    assert options["weights"] == (("dists", Path("f")),)
    assert options["anchors"] == ANCHORS


@pytest.mark.parametrize(
    "wrong",
    [
        *("--qp x", "--qp 8,", "--anchors vp8", "--metrics psnr,", "--set uvgx", "--range half"),
        *("--x", "--anchor-rates x", "--weights psnr=a", "--weights dists"),
    ],
)
def test_arguments_that_cannot_be_parsed_exit_with_2(wrong, capsys):
    with pytest.raises(SystemExit) as caught:
        run(f"--data a --out o {wrong}")
    assert caught.value.code == 2
    assert wrong.split()[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    [
        *("--qp 64", "--steps 1,101", "--frames 0", "--gop 24", "--processes 0"),
        *("--anchor-rates 0", "--anchor-rates inf", "--anchor-rates nan"),
        *("--weights dists=a", "--flow .", "--flow nowhere --metrics e_warp"),
        *("--t-start 0.5", "--t-start 2 --refiner small", "--refiner nowhere"),
    ],
)
def test_values_out_of_range_exit_with_2_and_one_line(wrong, capsys):
    assert run(f"--data a --out o {wrong}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gnvc: eval: ") and wrong.split()[0] in line


@pytest.mark.parametrize(
    "file", ["evaluation/gnvc_vd", f"{Path(__file__).parents[2]}/configs/evaluation/gnvc_vd.txt"]
)
def test_options_of_the_paper_come_from_a_file_and_later_ones_win(file):
    options = parse(f"@{file} --set uvg --data a --out o --qp 8")
    assert (options["frames"], options["gop"], options["yuv_range"]) == (96, 25, "full")
    assert options["qp"] == (8,) and options["anchors"] == ("vvc",)
    assert options["anchor_rates"] == (1.0, 32.0)


def test_a_missing_file_of_options_exits_with_2(capsys):
    assert run("@nowhere.txt --data a --out o") == 2
    assert "nowhere.txt: no such config file" in capsys.readouterr().err


def test_an_incomplete_test_set_exits_with_2(tmp_path, capsys):
    (tmp_path / "Beauty_1920x1080_120fps_420_8bit_YUV.yuv").write_bytes(b"")
    assert run(f"--set uvg --data {tmp_path} --out {tmp_path}/out") == 2
    assert "uvg: no Bosphorus" in capsys.readouterr().err


def test_a_folder_without_videos_exits_with_2(tmp_path, capsys):
    assert run(f"--data {tmp_path} --out {tmp_path}/out") == 2
    assert "no videos" in capsys.readouterr().err


def test_failures_exit_with_1_and_are_in_the_results(tmp_path, capsys):
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    write_clip(Clip("a", frames, Fraction(25)), tmp_path / "a.mkv")
    (tmp_path / "b.mp4").write_bytes(b"no video")
    arguments = f"--model nowhere --data {tmp_path} --qp 8 --vae --out {tmp_path}/out"
    assert run(arguments) == 1
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


def test_a_few_unreadable_clips_exit_with_3(tmp_path, monkeypatch, capsys):
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    for number in range(10):
        write_clip(Clip("a", frames, Fraction(25)), tmp_path / f"{number}.mkv")

    written = []
    monkeypatch.setattr(evaluation.Sweep, "measure", lambda *_: {"status": "ok", "point": "p"})
    monkeypatch.setattr(
        evaluation, "write_results", lambda _, records, *__: written.append(records)
    )
    for name in ("read_results", "write_report"):
        monkeypatch.setattr(evaluation, name, lambda *_: None)
    arguments = f"--data {tmp_path} --qp 8 --out {tmp_path}/out"
    assert run(arguments) == 0
    for name, code in (("3.mkv", 3), ("4.mkv", 1)):
        (tmp_path / name).write_bytes(b"no video")
        assert run(arguments) == code
        reasons = [r["error"] for r in written[-1] if r["status"] == "failed"]
        assert name in reasons[-1] and len(written[-1]) == 10


def test_compare_prints_and_writes_a_table(tmp_path, capsys):
    results = {"schema": "gnvc-eval/1", "created": "now", "env": {}, "records": []}
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps(results))
    files = [f"{tmp_path}/a.json", f"{tmp_path}/b.json"]
    assert cli.main(["compare", *files, "--out", f"{tmp_path}/c.md"]) == 1
    out = capsys.readouterr().out
    assert "No clip and point in common." in out
    assert (tmp_path / "c.md").read_text() == out
    assert cli.main(["compare", files[0], f"{tmp_path}/none.json"]) == 2
    assert "none.json: No such file" in capsys.readouterr().err
    assert cli.main(["compare", *files, "--out", files[1]]) == 2
    assert "is one of the inputs" in capsys.readouterr().err
    assert json.loads((tmp_path / "b.json").read_text()) == results


@pytest.mark.parametrize("first", ["compare", "--data"])
def test_the_script_runs_eval_unless_the_first_word_is_compare(first, monkeypatch):
    calls = []
    monkeypatch.setattr(cli, "main", lambda argv: calls.append(argv) or 5)
    monkeypatch.setattr(sys, "argv", ["eval.py", first, "x"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(Path(__file__).parents[2] / "eval.py"), run_name="__main__")
    assert caught.value.code == 5
    assert calls == [[*(["eval"] if first == "--data" else []), first, "x"]]
