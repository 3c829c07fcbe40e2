"""Curves: which points they join, which way is up, and that drawings are whole."""

import re
import xml.etree.ElementTree as xml
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from gnvc_jax.evaluation.plots import (
    frame_figure,
    inline_svg,
    mean_records,
    rate_groups,
    rd_figure,
    write_plots,
)
from gnvc_jax.evaluation.tables import COLUMNS

COLOURS = {"gnvc": "red", "gnvc, 1 step": "blue", "gnvc, 5 steps": "green", "x264": "brown"}


def record(point, bytes_, psnr, lpips=0.3, clip="a", **codec):
    bpp = bytes_ and bytes_ / 1000
    return {
        "status": "ok",
        "clip": clip,
        "point": point,
        "codec": {"codec": "gnvc", **codec},
        "rate": {"bytes": bytes_, "bpp": bpp, "kbps": bpp},
        "quality": {"psnr_rgb": psnr, "lpips_alex": lpips},
        "temporal": {},
    }


RECORDS = [
    record("p2", 40, 30.0, 0.1, steps=5),
    record("p1", 10, 25.0, 0.4, steps=5),
    record("q1", 10, 24.0, 0.5, steps=1),
    record("x-p1", 11, 26.0, 0.6, codec="x264", like="p1"),
    record("x-p2", 39, 31.0, 0.2, codec="x264", like="p2"),
    record("v", None, 35.0, 0.05, codec="vae"),
]


def lines(figure, panel=0):
    return {line.get_label(): line for line in figure.axes[panel].lines}


def test_points_of_one_codec_and_number_of_steps_make_a_curve():
    columns = {name: COLUMNS[name] for name in ("PSNR", "LPIPS alex")}
    figure = rd_figure(RECORDS, columns, {**COLOURS, "vae": "grey"}, "")
    curves = lines(figure)
    assert set(curves) == {"gnvc, 5 steps", "gnvc, 1 step", "x264", "vae"}
    np.testing.assert_allclose(curves["gnvc, 5 steps"].get_xydata(), [[0.01, 25], [0.04, 30]])
    assert curves["gnvc, 5 steps"].get_linestyle() == "-"
    assert curves["x264"].get_linestyle() == "--"
    assert set(curves["vae"].get_ydata()) == {35}  # a level without a rate
    assert [axes.get_xscale() for axes in figure.axes] == ["log"] * 2
    assert [axes.yaxis_inverted() for axes in figure.axes] == [False, True]


def test_points_are_grouped_by_rate():
    dearer = record("x-2x-p1", 20, 28.0, like="2x-p1")
    labels = [[r["point"] for r in group] for group in rate_groups([*RECORDS, dearer])]
    assert labels == [["p1", "q1", "x-p1"], ["p2", "x-p2"], ["v"]]


def test_points_that_a_clip_lacks_are_left_out_of_curves():
    other = record("p1", 20, 27.0, clip="b", steps=5)
    failure = {"status": "failed", "clip": "c", "point": ""}
    (mean,) = mean_records([*RECORDS, other, failure])
    assert mean["point"] == "p1"
    assert mean["quality"]["psnr_rgb"] == 26


def test_frames_and_seams():
    groups = rate_groups(RECORDS)
    curves = {r["point"]: {"psnr_rgb": [r["quality"]["psnr_rgb"]] * 12} for r in RECORDS}
    colours = {**COLOURS, "vae": "grey"}
    figure = frame_figure(groups, curves, {"p1": [0, 5], "p2": [0, 7]}, COLUMNS, colours, "")
    assert len(figure.axes) == 3  # one metric, three rates
    seams = [line.get_xdata()[0] for line in figure.axes[0].lines if len(line.get_xdata()) == 2]
    assert seams == [4.5]
    assert list(lines(figure)["gnvc, 1 step"].get_ydata()) == [24.0] * 12


@pytest.fixture(scope="module")
def plots(tmp_path_factory):
    out = tmp_path_factory.mktemp("plots")
    curves = {("a", r["point"]): {"psnr_rgb": [1.0, 2.0]} for r in RECORDS}
    records = [{**r, "clip": "$x_1$ & <b>"} for r in RECORDS]
    return out / "plots", write_plots(out, [*RECORDS, *records], curves, {})


def test_every_plot_is_written_as_png_and_svg(plots):
    folder, drawings = plots
    assert set(drawings) == {
        "rd",
        "rd_psnr_rgb",
        "rd_lpips_alex",
        "clips/a_rd",
        "clips/a_frames",
        "clips/$x_1$ & <b>_rd",
    }
    for name, text in drawings.items():
        assert Path(f"{folder / name}.svg").read_text() == text
        with Image.open(f"{folder / name}.png") as picture:
            assert len(np.unique(np.asarray(picture.convert("L")))) > 10
        texts = [t.text for t in xml.fromstring(text).iter("{http://www.w3.org/2000/svg}text")]
        assert "bits per pixel" in texts or "frame" in texts
        assert "x264" in texts
    texts = xml.fromstring(drawings["clips/$x_1$ & <b>_rd"]).itertext()
    assert "$x_1$ & <b>" in texts  # neither mathematics nor a tag
    assert matplotlib.rcParams["svg.fonttype"] == "path"  # as it was


def test_inlined_plots_have_unique_identifiers(plots):
    drawing = plots[1]["rd"]
    one, two = inline_svg(drawing, "a", "What it shows"), inline_svg(drawing, "b", "Other")
    ids = [re.findall(r'\bid="([^"]+)"', svg) for svg in (one, two)]
    assert not set(ids[0]) & set(ids[1])
    for svg, known in zip((one, two), ids):
        assert set(re.findall(r'(?:href="|url\()#([^")]+)', svg)) == set(known)
    element = xml.fromstring(one)
    assert element.get("aria-label") == "What it shows"


def test_no_plots_without_records(tmp_path):
    assert write_plots(tmp_path, [{"status": "failed", "clip": "a"}], {}, {}) == {}
