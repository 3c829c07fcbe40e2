"""Coding through the command line tool, with a tool that only copies files."""

import dataclasses
import hashlib
import shlex
import sys
from fractions import Fraction

import jax
import numpy as np
import pytest

from gnvc_jax.evaluation import anchors, points
from gnvc_jax.evaluation.clips import Clip
from gnvc_jax.evaluation.points import AnchorPoint, AutoencoderPoint, CodingError, FilePoint
from gnvc_jax.pretrained import find_model

TOOL = """
import pathlib, shutil, sys
print(*map(pathlib.Path, sys.argv), file=open(LOG, "a"))
command, source, target = sys.argv[1:4]
if "63" in sys.argv:
    sys.exit("tool: note\\ntool: it broke")
shutil.copy(source, target)
"""


@pytest.fixture
def clip():
    frames = np.random.default_rng(0).integers(0, 256, (3, 16, 24, 3), dtype=np.uint8)
    return Clip("a", frames, Fraction(25))


@pytest.fixture
def log(tmp_path, monkeypatch):
    log, tool = tmp_path / "log", tmp_path / "tool.py"
    tool.write_text(f"LOG = {str(log)!r}\n{TOOL}")
    monkeypatch.setattr(points, "TOOL", (sys.executable, str(tool)))
    return log


def test_file_point_codes_in_two_processes(clip, log):
    coded = FilePoint("small", 24, gop=5).code(clip)
    np.testing.assert_array_equal(coded.frames, clip.frames)
    assert coded.bitstream[:4] == b"\x1aE\xdf\xa3"  # the copy is still a Matroska file
    assert min(coded.encode_seconds, coded.decode_seconds) > 0
    encode, decode = (line.split()[1:] for line in log.read_text().splitlines())
    assert encode[0] == "encode"
    assert encode[3:] == ["--qp", "24", "--model", "small", "--gop", "5"]
    assert decode[0] == "decode"
    assert decode[3:] == ["--model", "small"]
    model = find_model("small")
    parameters = sum(x.size for x in jax.tree.leaves((model.vae, model.codec, model.refiner)))
    assert coded.details == {"parameters": parameters}
    assert coded.bitstream == FilePoint("small", 24, 5, 5).code(clip).bitstream
    again = [line.split()[1:] for line in log.read_text().splitlines()[2:]]
    assert [(line[0], line[5:]) for line in again] == [("decode", ["--steps", "5"])]  # one encode


def test_another_refiner_decodes_the_same_file(clip, log, tmp_path):
    """It goes to `gnvc decode` alone, and its weights belong to the identity of the point."""
    folder = tmp_path / "ported"
    (folder / "dit").mkdir(parents=True)
    (folder / "dit" / "weights").write_bytes(b"one")
    plain = FilePoint("small", 24, 5)
    point = dataclasses.replace(plain, refiner=str(folder), t_start=0.8)
    coded = point.code(clip)
    assert coded.bitstream == plain.code(clip).bitstream
    lines = [line.split()[1:] for line in log.read_text().splitlines()]
    assert [line[0] for line in lines] == ["encode", "decode", "decode"]  # one encode
    refined, own = (line[5:] for line in lines[1:])
    assert refined == ["--steps", "5", "--refiner", str(folder), "--t-start", "0.8"]
    assert own == ["--steps", "5"]
    model = find_model("small")
    parameters = sum(x.size for x in jax.tree.leaves((model.vae, model.codec)))
    assert coded.details == {"parameters": parameters}

    identity = point.identity()
    assert identity != plain.identity() and identity == point.identity()
    (folder / "dit" / "weights").write_bytes(b"other")
    assert point.identity() != identity
    assert dataclasses.replace(point, t_start=None).identity() != point.identity()
    with pytest.raises(FileNotFoundError, match="nowhere: neither"):
        dataclasses.replace(point, refiner="nowhere").identity()


def test_message_of_a_failed_command_is_quoted(clip, log):
    with pytest.raises(CodingError, match="gnvc encode: exit status 1, tool: it broke"):
        FilePoint("some-model", 63).code(clip)


def test_identity_follows_the_model_file(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"weights")
    identity = FilePoint(str(path), 8).identity()
    assert identity["model"] == "m"
    assert identity["model_sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert identity["qp"] == 8
    path.write_bytes(b"other weights")
    assert FilePoint(str(path), 8).identity() != identity
    with pytest.raises(FileNotFoundError, match="nowhere: neither"):
        FilePoint("nowhere", 8).identity()


@pytest.mark.parametrize("codec", anchors.ANCHORS)
def test_identity_of_an_anchor_is_its_whole_command(codec, clip, monkeypatch):
    point, encoder = AnchorPoint(codec, "gnvc-qp8", 100), anchors.ENCODERS[codec]
    identity = point.identity()
    for change in (
        {"options": encoder.options + " -threads 1"},
        {"rate": "-q"},
        {"step": 2 * encoder.step},
    ):
        changed = dataclasses.replace(encoder, **change)
        monkeypatch.setitem(anchors.ENCODERS, codec, changed)
        assert point.identity() != identity
    monkeypatch.setitem(anchors.ENCODERS, codec, encoder)
    monkeypatch.setattr(anchors, "_COLOUR_TAGS", ["-color_range", "pc"])
    assert point.identity() != identity
    monkeypatch.undo()
    assert point.identity() == identity
    ran = anchors.Anchor(codec, clip.frames, clip.fps)._arguments(30)
    height, width = clip.frames.shape[1:3]
    given = identity["encode"].replace("SIZE", f"{width}x{height}").replace("CRF", "30")
    assert shlex.split(given.replace("FPS", str(clip.fps))) == ran


def test_autoencoder_point_has_no_file(clip, monkeypatch):
    class Model:
        def reconstruct(self, video):
            return 255 - video

    monkeypatch.setattr(points, "_load_model", lambda name: Model())
    coded = AutoencoderPoint("m").code(clip)
    assert coded.bitstream is None
    np.testing.assert_array_equal(coded.frames, 255 - clip.frames)


def test_labels_are_unique_file_names():
    made = [FilePoint("m", 8), FilePoint("m", 40), AutoencoderPoint("m")]
    made += [AnchorPoint(codec, "gnvc-qp8", 100) for codec in ("x264", "x265")]
    made += [FilePoint("m", 8, 0)]
    names = [point.label + point.suffix for point in made]
    assert names == [
        "gnvc-qp8.gnvc",
        "gnvc-qp40.gnvc",
        "vae",
        "x264-at-gnvc-qp8.h264",
        "x265-at-gnvc-qp8.hevc",
        "gnvc-qp8-steps0.gnvc",
    ]
