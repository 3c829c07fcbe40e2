"""Exported programs decode a stream as the package does, and need none of its networks."""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import export

from gnvc_jax import cli
from gnvc_jax.bitstream import StreamReader
from gnvc_jax.coder import Coder
from gnvc_jax.export_programs import export_model
from gnvc_jax.model_file import save_model
from gnvc_jax.porting.architectures import Architecture
from gnvc_jax.vae import LightDecoderConfig

EXAMPLE = Path(__file__).parents[1] / "examples/decode_exported.py"


def with_light_decoder(model):
    """The model with a light decoder of random weights."""
    sizes = LightDecoderConfig(widths=(4, 4, 4, 4), latent_channels=4, blocks=1)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: 0.4 * rng.normal(size=x.shape).astype(np.float32),
        Architecture("decoder", sizes).abstract(),
    )
    return dataclasses.replace(model, decoder_config=sizes, decoder=params)


@pytest.mark.parametrize("kind", ["wan", "motion", "light"])
def test_example_decodes_to_the_frames_of_the_decoder(kind, tiny_model, tmp_path, monkeypatch):
    model, out = tiny_model(5, motion=kind == "motion"), io.BytesIO()
    coder = Coder(with_light_decoder(model) if kind == "light" else model)
    canvas = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8).repeat(8, 0)
    canvas = canvas.repeat(8, 1)
    video = np.stack([canvas[t : t + 40, 2 * t : 2 * t + 70] for t in range(11)])
    coder.encode_frames(video, out, coder.header(70, 40, (25, 1), gop=9), qp=20)
    (tmp_path / "stream.gnvc").write_bytes(out.getvalue())
    with StreamReader(out.getvalue()) as reader:
        expected = np.stack(list(coder.decode_frames(reader, 0)))

    export_model(coder.model, tmp_path / "programs", 40, 70, ["cpu"])
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    from decode_exported import decode

    got = decode(tmp_path / "programs", str(tmp_path / "stream.gnvc"))
    assert got.std() > 5
    np.testing.assert_array_equal(got, expected)


def test_example_imports_no_networks():
    script = (
        f"import sys; sys.path.insert(0, {str(EXAMPLE.parent)!r}); import decode_exported; "
        "networks = ('gnvc_jax.vae', 'gnvc_jax.codec.model', 'gnvc_jax.refiner', 'flax'); "
        "assert not [m for m in sys.modules if m.startswith(networks)], sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_manifest_describes_the_programs(tiny_model, tmp_path):
    save_model(tmp_path / "model.safetensors", tiny_model(5, motion=True))
    folder = tmp_path / "programs"
    args = ["export-programs", str(tmp_path / "model.safetensors"), str(folder)]
    assert cli.main([*args, "--size", "64x64", "--platforms", "cpu,tpu"]) == 0
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["width"], manifest["padded_width"]) == (64, 64)
    names = {name.partition("/")[2] for name in manifest["programs"]}
    assert {
        "analyse_inter",
        "encode_intra",
        "predict",
        "frames_inter",
        "reconstruct_intra",
    } <= names
    for facts in manifest["programs"].values():
        program = export.deserialize((folder / facts["file"]).read_bytes())
        assert program.platforms == ("cpu", "tpu")
        shapes = [x for x in json.dumps(facts["outputs"]).split("dtype")]
        assert len(shapes) - 1 == len(program.out_avals)
    assert cli.main([*args, "--size", "64x64"]) != 0  # the folder exists


@pytest.mark.parametrize("size", ["64", "0x64", "axb"])
def test_sizes_that_are_none_are_refused(size, tmp_path, capsys):
    assert cli.main(["export-programs", "small", str(tmp_path / "x"), "--size", size]) != 0
    assert not (tmp_path / "x").exists()
    assert size.partition("x")[0] in capsys.readouterr().err
