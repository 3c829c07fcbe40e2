"""The demonstration, with stand-ins for the two commands: what it decodes and what it shows."""

import shutil
import types

import imageio.v3 as iio
import numpy as np
import pytest

from gnvc_jax import demo
from gnvc_jax.evaluation.anchors import AnchorError, AnchorResult, Match
from gnvc_jax.media.errors import UnwritableOutput
from gnvc_jax.pretrained import load_pretrained


@pytest.mark.parametrize(("refined", "x265"), [(False, False), (True, False), (True, True)])
def test_what_is_shown(refined, x265, tmp_path, monkeypatch, capsys):
    calls = []

    def gnvc(command, *args):
        calls.append((command, args))
        target = args[1]
        if command == "encode":
            target.write_bytes(b"stream")
        else:
            shutil.copy(tmp_path / "out" / "source.mkv", target)
        return 1.0

    def match_rate(codec, frames, fps, size):
        if not x265:
            raise AnchorError("ffmpeg: unknown encoder libx265")
        return Match(AnchorResult(b"anchor", frames // 2, 40.0, "", "", 1.0, 1.0), size, True)

    monkeypatch.setattr(demo, "match_rate", match_rate)
    monkeypatch.setattr(demo, "gnvc", gnvc)
    model = types.SimpleNamespace(steps=int(refined))
    monkeypatch.setattr(demo, "load_pretrained", lambda _: model)
    clip = np.random.default_rng(0).integers(0, 256, (6, 48, 64, 3), np.uint8)
    demo.write_all(tmp_path / "clip.mkv", clip, 25)
    demo.run(str(tmp_path / "clip.mkv"), 24, 5, "small", tmp_path / "out")

    steps = [args[args.index("--steps") + 1] for command, args in calls if command == "decode"]
    assert steps == ([0, 1] if refined else [0])
    rows = 2 + refined + x265
    assert iio.imread(tmp_path / "out" / "contact_sheet.png").shape == (rows * 48, 4 * 64, 3)
    frames, _ = demo.read_all(tmp_path / "out" / "side_by_side.mp4")
    assert frames.shape == (5, 48, rows * 64 + 8 * (rows - 1), 3)
    text, messages = capsys.readouterr()
    assert "5 frames of 64x48, qp 24: 6 bytes" in text
    table = {line[:32].strip(): line[32:].split() for line in text.splitlines()}
    assert table[""] == []
    assert table["decoded (--steps 0)"] == ["6", "100.0000", "-", "0.0000", "0.0000"]
    assert ("refined (--steps 1)" in table) == refined
    assert ("x265 veryslow (its smallest)" in text) == x265
    assert ("without x265 beside it (ffmpeg: unknown encoder" in messages) != x265


@pytest.mark.parametrize("name", demo.OUTPUTS)
def test_a_clip_that_would_be_replaced_is_refused(name, tmp_path):
    clip = tmp_path / name
    clip.write_bytes(b"kept")
    with pytest.raises(UnwritableOutput, match="is the input"):
        demo.run(str(clip), 24, 5, "tiny", tmp_path)
    assert clip.read_bytes() == b"kept"


def test_the_shipped_model_is_known():
    """What the demonstration asks of a model, of the real one."""
    assert load_pretrained("small").steps == 1
