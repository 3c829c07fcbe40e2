"""report.html, read as a browser reads it: complete, alone, escaped, with pictures that open."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from gnvc_jax.evaluation import report
from gnvc_jax.evaluation.pictures import Pictures
from gnvc_jax.evaluation.report import write_report

VOID = {"meta", "img", "input", "br", "link", "hr"}


class Page(HTMLParser):
    """Elements with their attributes and texts; fails on an end tag that fits no start tag."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        assert len(dict(attributes)) == len(attributes), f"an attribute twice in {tag}"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self):
        return " ".join(filter(None, self.texts))


def decode(uri: str) -> Image.Image:
    head, data = uri.split(",")
    assert head == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(data, validate=True))).convert("RGB")


@pytest.fixture(scope="module")
def page(run):
    out, results = run
    text = write_report(out, results).read_text()
    return text, Page(text), results


def test_report_shows_every_record(page):
    _, parsed, results = page
    assert len(results["records"]) == 16
    for record in results["records"]:
        assert record["clip"] in parsed.text
        if record["status"] == "ok":
            assert record["point"] in parsed.texts  # a heading of a row
            if record["rate"]["bytes"]:
                assert str(record["rate"]["bytes"]) in parsed.texts
            assert f"{record['quality']['psnr_rgb']:.2f}" in parsed.texts
        else:
            assert record["error"] in parsed.text
    assert "sides must be at least 161" in parsed.text  # why MS-SSIM was not measured
    assert "coarsest setting" in parsed.text
    assert parsed.all("title") and "Evaluation of m<1>" in parsed.texts
    for fact in ("eval.py --data 'a b'", "a <cpu>, d", "128×96"):
        assert fact in parsed.text


def test_report_shows_the_figures_of_the_paper(page):
    _, parsed, _ = page
    assert "Beside the figures of GNVC-VD's paper, waves (not as there: 8 frames)" in parsed.text
    assert "BD-rate of <waves>, %" in parsed.texts and "-12.3 to +56.0" in parsed.texts
    assert "GNVC-VD -89.4, another +2.0" in parsed.texts


def test_report_loads_nothing_from_elsewhere(page):
    text, parsed, _ = page
    for tag, attributes in parsed.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            if value := attributes.get(name):
                assert value.startswith(("data:image/webp;base64,", "#")), value[:80]
    assert all(address.startswith("#") for address in re.findall(r"url\(\s*['\"]?(.)", text))
    assert "@import" not in text
    (policy,) = (m for m in parsed.all("meta") if "http-equiv" in m)
    assert policy["content"].startswith("default-src 'none'")


def test_clip_names_are_escaped(page):
    _, parsed, _ = page
    assert all("onerror" not in attributes for _, attributes in parsed.elements)
    assert len(parsed.all("script")) == 1
    assert all(image["src"] != "x" for image in parsed.all("img"))


def test_identifiers_are_unique_and_links_lead_somewhere(page):
    _, parsed, _ = page
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [a["href"][1:] for a in parsed.all("a")]
    assert links == ["means", "clip0", "clip1", "gaps"]
    assert set(links) <= set(ids)


def test_pictures_show_what_was_kept(page, run):
    _, parsed, results = page
    pictures = Pictures(run[0])
    frames = [image for image in parsed.all("img") if "data-point" in image]
    points = {"source", "gnvc6", "gnvc3", "gnvc2", "vae7"}
    points |= {f"x264-at-{like}" for like in ("gnvc6", "gnvc3", "gnvc2")}
    assert {image["data-point"] for image in frames} == points
    assert len(frames) == 2 * 3 * len(points)
    assert all(image["alt"] for image in parsed.all("img"))
    sha256 = results["records"][0]["source"]["sha256"]
    view = pictures.load_view("plain", sha256)
    for image in frames[: len(frames) // 2]:
        file = f"{int(image['data-frame']):04d}.png"
        expected = np.asarray(Image.open(pictures.path("plain", image["data-point"], file)))
        got = np.asarray(decode(image["src"]))
        assert got.shape == expected.shape == (96, 128, 3)
        assert np.abs(got.astype(float) - expected).mean() < 25  # noise, coded with loss
    rest = [decode(image["src"]).size for image in parsed.all("img") if "data-point" not in image]
    assert set(rest) == {(view.side, view.side), (128, 11)}


def test_controls_have_accessible_names(page):
    _, parsed, _ = page
    ranges = parsed.all("input")
    assert len(ranges) == 2 and all(r["type"] == "range" and r["aria-label"] for r in ranges)
    assert len(parsed.all("select")) == len(parsed.all("label")) == 6
    assert parsed.all("html")[0]["lang"] == "en"
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in parsed.all("svg"))
    assert len(parsed.all("svg")) == 1 + 2 * 2  # means; rates and frames of two clips


def test_seams_come_from_the_stream(run):
    out, results = run
    finished = [r for r in results["records"] if r["status"] == "ok"]
    seams = report._seams(out, finished)
    assert {point for _, point in seams} == {"gnvc6"}  # the only one that is a .gnvc file
    assert seams["plain", "gnvc6"] == [0, 9]


def test_picture_quality_is_lowered_to_limit_the_size(run, monkeypatch):
    out, results = run
    monkeypatch.setattr(report, "write_plots", lambda *_: {})
    sizes = []
    for limit in (10**9, 0):
        monkeypatch.setattr(report, "MAX_BYTES", limit)
        sizes.append(write_report(out, results).stat().st_size)
    assert sizes[1] < 0.8 * sizes[0]


def test_report_of_failures_only(tmp_path):
    """Nothing finished; and a run whose side files were taken away."""
    failure = {"clip": "c", "point": "", "status": "failed", "error": "c.mkv: no <video>"}
    results = {"created": "now", "command": ["eval.py"], "env": {}, "records": [failure]}
    parsed = Page(write_report(tmp_path, results).read_text())
    assert "c.mkv: no <video>" in parsed.text
    assert parsed.all("svg") == parsed.all("img") == []


def test_a_run_without_side_files(run, tmp_path):
    results = json.loads(json.dumps(run[1]))
    results["records"] = results["records"][:2]
    parsed = Page(write_report(tmp_path, results).read_text())
    assert "No pictures were kept." in parsed.texts
    assert parsed.all("img") == []
    assert len(parsed.all("svg")) == 2
