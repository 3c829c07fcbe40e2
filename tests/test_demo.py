"""The demonstration, with stand-ins for the two commands: what it decodes and what it shows."""

import shutil
import types

import imageio.v3 as iio
import numpy as np
import pytest

from gnvc_jax import demo
from gnvc_jax.media.errors import UnwritableOutput
from gnvc_jax.pretrained import load_pretrained


@pytest.mark.parametrize("refined", [False, True])
def test_what_is_shown(refined, tmp_path, monkeypatch, capsys):
    calls = []

    def gnvc(command, *args):
        calls.append((command, args))
        target = args[1]
        if command == "encode":
            target.write_bytes(b"stream")
        else:
            shutil.copy(tmp_path / "out" / "source.mkv", target)
        return 1.0

    monkeypatch.setattr(demo, "gnvc", gnvc)
    if refined:
        model = types.SimpleNamespace(refiner={})
        monkeypatch.setattr(demo, "load_pretrained", lambda _: types.SimpleNamespace(model=model))
    clip = np.random.default_rng(0).integers(0, 256, (6, 48, 64, 3), np.uint8)
    demo.write_all(tmp_path / "clip.mkv", clip, 25)
    demo.run(str(tmp_path / "clip.mkv"), 24, 5, "small", tmp_path / "out")

    steps = [args[args.index("--steps") + 1] for command, args in calls if command == "decode"]
    assert steps == ([0, 1] if refined else [0])
    rows = 3 if refined else 2
    assert iio.imread(tmp_path / "out" / "contact_sheet.png").shape == (rows * 48, 4 * 64, 3)
    frames, _ = demo.read_all(tmp_path / "out" / "side_by_side.mp4")
    assert frames.shape == (5, 48, rows * 64 + 8 * (rows - 1), 3)
    text = capsys.readouterr().out
    assert "5 frames of 64x48, qp 24: 6 bytes" in text and "psnr_rgb 100" in text
    assert ("refined (--steps 1)" in text) == refined


@pytest.mark.parametrize("name", demo.OUTPUTS)
def test_a_clip_that_would_be_replaced_is_refused(name, tmp_path):
    clip = tmp_path / name
    clip.write_bytes(b"kept")
    with pytest.raises(UnwritableOutput, match="is the input"):
        demo.run(str(clip), 24, 5, "tiny", tmp_path)
    assert clip.read_bytes() == b"kept"


def test_the_shipped_model_is_known():
    """What the demonstration asks of a model, of the real one."""
    assert load_pretrained("small").model.refiner is None
