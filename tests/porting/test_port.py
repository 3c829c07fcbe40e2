"""From public files to checkpoints and back: what is written."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from gnvc_jax import cli
from gnvc_jax.errors import UsageError
from gnvc_jax.porting.checkpoint import load_prompt, load_weights
from gnvc_jax.porting.errors import PortError
from gnvc_jax.porting.export import export
from gnvc_jax.porting.names import light_decoder_tensors
from gnvc_jax.porting.port import port
from gnvc_jax.porting.sources import open_sources
from gnvc_jax.porting.vace import add_adapter
from gnvc_jax.vae import LightDecoderConfig

WEIGHTS = "diffusion_pytorch_model.safetensors"


def as_bfloat16(tensors):
    return {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()}


def mixed(tensors):
    return {
        k: v if "norm" in k or "table" in k else v.astype(np.float16) for k, v in tensors.items()
    }


@pytest.mark.parametrize("edit", [dict, as_bfloat16, mixed])
@pytest.mark.parametrize("name", ["vae", "vae22", "vace"])
def test_export_restores_every_bit(name, edit, public, tmp_path):
    folder = public(name, edit)
    port(folder, tmp_path / "ported", progress=False)
    export(tmp_path / "ported", tmp_path / "back", progress=False)
    (component,) = folder.iterdir()
    there, back = (load_file(f / component.name / WEIGHTS) for f in (folder, tmp_path / "back"))
    assert there.keys() == back.keys()
    for key, value in there.items():
        assert value.dtype == back[key].dtype and value.tobytes() == back[key].tobytes(), key
    facts = json.loads((tmp_path / "back" / component.name / "config.json").read_text())
    original = json.loads((component / "config.json").read_text())
    assert facts.items() <= (original | {"_class_name": facts["_class_name"]}).items()


def test_shards_in_and_out(public, golden, tmp_path):
    whole = public("dit")
    port(whole, tmp_path / "ported", progress=False)
    (folder,) = export(
        tmp_path / "ported", tmp_path / "sharded", shard_bytes=100_000, progress=False
    )
    assert len(list(folder.glob("*-of-*.safetensors"))) > 3
    assert max(f.stat().st_size for f in folder.glob("*-of-*.safetensors")) < 120_000
    port(tmp_path / "sharded", tmp_path / "again", progress=False)
    (one, a), (two, b) = (load_weights(tmp_path / f, "dit") for f in ("ported", "again"))
    assert one == two
    jax.tree.map(np.testing.assert_array_equal, a, b)

    part = sorted(folder.glob("*-of-*.safetensors"))[0]
    part.rename(tmp_path / "elsewhere")
    with pytest.raises(PortError, match=part.name):
        open_sources(tmp_path / "sharded")


@pytest.mark.parametrize("damaged", ["_METADATA", "manifest.ocdbt"])
def test_damaged_weights_are_named(public, tmp_path, damaged):
    port(public("vae"), tmp_path / "ported", progress=False)
    (tmp_path / "ported/vae/weights/state" / damaged).write_bytes(b"{")
    with pytest.raises(PortError, match="weights: cannot be read"):
        load_weights(tmp_path / "ported", "vae")


def test_the_report_lists_every_tensor(public, golden, tmp_path):
    _, _, tensors = golden("vace")
    (summary,) = port(public("vace"), tmp_path / "ported", progress=False)
    with open(tmp_path / "ported" / "dit" / "report.csv") as file:
        rows = list(csv.DictReader(file))
    assert {r["tensor"]: r["shape"] for r in rows} == {
        k: "x".join(map(str, v.shape)) for k, v in tensors.items()
    }
    assert len({(r["parameter"], r["row"]) for r in rows}) == len(tensors) == summary.tensors
    assert summary.parameters == sum(v.size for v in tensors.values())


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_dtype_conversion(dtype, size, public, golden, tmp_path):
    _, _, tensors = golden("dit")
    port(public("dit"), tmp_path / "ported", dtype, progress=False)
    _, params = load_weights(tmp_path / "ported", "dit")
    assert {x.dtype.itemsize for x in jax.tree.leaves(params)} == {size}
    kernel = params["head"]["kernel"]
    expected = tensors["proj_out.weight"].T.astype(dtype)
    np.testing.assert_array_equal(kernel, expected)
    _, wide = load_weights(tmp_path / "ported", "dit", dtype=jnp.float32)
    np.testing.assert_array_equal(wide["head"]["kernel"], expected.astype(np.float32))


def test_each_device_reads_its_part(public, tmp_path):
    port(public("dit"), tmp_path / "ported", progress=False)
    architecture, plain = load_weights(tmp_path / "ported", "dit")
    types = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=types)

    def place(x):
        axes = [None] * x.ndim
        if x.shape[-1] % 8 == 0:
            axes[-1] = "fsdp"
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))

    shardings = jax.tree.map(place, architecture.abstract())
    _, placed = load_weights(tmp_path / "ported", "dit", shardings=shardings)
    kernel = placed["groups"]["block_0"]["ffn_in"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (4, 64, 12)
    jax.tree.map(np.testing.assert_array_equal, plain, placed)


def test_folders_of_several_components(public, golden, to_original, tmp_path):
    public("vae")
    port(public("dit"), tmp_path / "both", progress=False)
    assert {p.name for p in (tmp_path / "both").iterdir()} == {"vae", "dit"}

    flat = tmp_path / "flat"
    flat.mkdir()
    for name in ("vae", "dit"):
        save_file(to_original(golden(name)[2]), flat / f"{name}.safetensors")
    save_file({"shared.weight": np.zeros((2, 2), np.float32)}, flat / "text.safetensors")
    found = open_sources(flat)
    assert [(s.component, s.scheme) for s in found] == [("dit", "original"), ("vae", "original")]

    save_file(golden("dit")[2], flat / "second.safetensors")
    with pytest.raises(PortError, match=r"several files hold a dit.*second\.safetensors"):
        open_sources(flat)
    with pytest.raises(PortError, match=r"text\.safetensors: holds no VAE or DiT"):
        open_sources(flat / "text.safetensors")


@pytest.mark.parametrize("names", [("transformer", "transformer_2"),
                                   ("high_noise_model", "low_noise_model")])  # fmt: skip
def test_of_two_experts_the_one_for_low_noise_is_taken_if_chosen(
    names, public, golden, to_original, tmp_path, capsys
):
    public("vae")
    folder = public("dit")
    (folder / "transformer").rename(folder / names[0])
    shutil.copytree(folder / names[0], folder / names[1])
    if names[1] == "low_noise_model":  # as Wan-AI publishes it
        (folder / "vae" / WEIGHTS).rename(folder / "Wan2.1_VAE.safetensors")
        shutil.rmtree(folder / "vae")
    tensors = {k: 2 * x for k, x in golden("dit")[2].items()}
    save_file(tensors, folder / names[1] / WEIGHTS)
    line = ["port", "--from", str(folder), "--check", "--no-progress"]
    assert cli.main(line) == 25
    error = capsys.readouterr().err
    assert f"{names[0]}/ and {names[1]}/ are two experts" in error and "give --low-noise" in error
    assert cli.main([*line, "--low-noise"]) == 0
    output = capsys.readouterr().out
    assert "vae: can be ported" in output and "dit: can be ported" in output
    (dit,) = [s for s in open_sources(folder, low_noise=True) if s.component == "dit"]
    np.testing.assert_array_equal(dit.entries["proj_out.weight"].read(), tensors["proj_out.weight"])
    with pytest.raises(UsageError, match=r"no Wan2\.2 model with an expert for low noise"):
        open_sources(folder / names[0], low_noise=True)


@pytest.mark.parametrize("renamed", ["base", "adapter"])
def test_an_adapter_in_a_file_of_its_own(renamed, public, golden, to_original, tmp_path, capsys):
    """Joined with its DiT, in another naming scheme, it gives the tensors of the whole."""
    tensors = golden("vace")[2]
    parts = {
        "adapter": {k: x for k, x in tensors.items() if k.startswith("vace_")},
        "base": {k: x for k, x in tensors.items() if not k.startswith("vace_")},
    }
    parts[renamed] = {f"diffusion_model.{k}": x for k, x in to_original(parts[renamed]).items()}
    base, adapter = (tmp_path / f"{name}.safetensors" for name in ("base", "adapter"))
    save_file(parts["base"], base)
    save_file(parts["adapter"], adapter)
    line = ["port", "--heads", "2", "--check", "--no-progress", "--from"]
    assert cli.main([*line, str(base), "--vace", str(adapter)]) == 0
    assert f"dit: can be ported: {len(tensors)} tensors" in capsys.readouterr().out
    (joined,) = add_adapter(open_sources(base), adapter)
    for name, x in (to_original(tensors) if renamed == "base" else tensors).items():
        np.testing.assert_array_equal(joined.entries[name].read(), x, err_msg=name)

    public("vace")
    vae, whole = public("vae") / "vae", tmp_path / "public" / "transformer"
    for given, message in (
        ([adapter], f"{adapter}: holds VACE's adapter alone; give the text-to-video DiT"),
        ([vae, "--vace", adapter], "no text-to-video DiT, which the adapter of"),
        ([base, "--vace", base], f"{base}: expected the tensors of VACE's adapter alone"),
        ([whole, "--vace", adapter], "both hold vace_"),
    ):
        assert cli.main([*line, *map(str, given)]) == 25
        assert message in capsys.readouterr().err


def test_a_light_decoder_is_ported_without_its_encoder(wan_tensor, tmp_path, capsys):
    sizes = LightDecoderConfig(widths=(6, 5, 4, 3))
    tensors = {t.original: wan_tensor(t.original, t.shape) for t in light_decoder_tensors(sizes)}
    # Places in TAEHV's sequence: blocks at 3 to 5, 9 to 11, 15 to 17, doublings before 7, 13, 19.
    assert tensors["decoder.9.conv.0.weight"].shape == (5, 10, 3, 3)
    assert [len(tensors[f"decoder.{i}.conv.weight"]) for i in (7, 13, 19)] == [6, 10, 8]
    assert tensors["decoder.22.weight"].shape == (3, 3, 3, 3)
    encoder = {"encoder.0.weight": np.zeros((64, 3, 3, 3), np.float32)}
    file = tmp_path / "taew2_1.safetensors"
    save_file(tensors | encoder, file)
    (summary,) = port(file, tmp_path / "ported", progress=False)
    assert summary.tensors == len(tensors)
    architecture, params = load_weights(tmp_path / "ported", "decoder")
    assert architecture.config == sizes and len(architecture.latents_mean) == 16
    grown = tensors["decoder.13.conv.weight"][:, :, 0, 0].T
    np.testing.assert_array_equal(params["level1_up"]["grow"]["kernel"], grown)
    with pytest.raises(FileNotFoundError, match="no ported weights of a VAE or a DiT"):
        export(tmp_path / "ported", tmp_path / "out", progress=False)

    tensors["decoder.1.weight"] = np.zeros((6, 48, 3, 3), np.float32)  # as in taew2_2
    save_file(tensors, file)
    assert cli.main(["port", "--from", str(file), "--check"]) == 25
    assert "decodes latents of 48 channels, those of Wan2.1 have 16" in capsys.readouterr().err


def test_a_header_whose_length_looks_like_a_page_is_read(tmp_path):
    """The first byte of a safetensors file is the low byte of a length: here '<', 60 + 256 n."""
    tensors = {"time_embedding.0.weight": np.zeros(1, np.float32)}
    for padding in range(0, 256, 8):
        save_file(tensors, tmp_path / "w.safetensors", metadata={"a": "b" * padding})
        data = (tmp_path / "w.safetensors").read_bytes()
        length = int.from_bytes(data[:8], "little")
        wider = length + (60 - length) % 256  # spaces after the header are allowed
        data = wider.to_bytes(8, "little") + data[8 : 8 + length].ljust(wider) + data[8 + length :]
        (tmp_path / "w.safetensors").write_bytes(data)
        assert data[:1] == b"<" and open_sources(tmp_path / "w.safetensors")


@pytest.mark.parametrize("prefix", ["diffusion_model.", "model.diffusion_model.", "module."])
def test_prefixes_of_other_programs(prefix, public, golden, to_original, tmp_path):
    tensors = to_original(golden("dit")[2])
    save_file({prefix + k: v for k, v in tensors.items()}, tmp_path / "w.safetensors")
    port(tmp_path / "w.safetensors", tmp_path / "ported", heads=2, progress=False)
    port(public("dit"), tmp_path / "plain", progress=False)
    one, two = (load_weights(tmp_path / f, "dit")[1] for f in ("ported", "plain"))
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.parametrize(
    ("ending", "unused", "axes", "shape"),
    [
        ("scale_weight", {"scale_input": np.ones(1, np.float32)}, None, (1,)),
        ("weight_scale", {"input_scale": np.ones((), np.float32)}, None, ()),
        ("weight_scale", {"comfy_quant": np.zeros(9, np.uint8)}, 1, (-1, 1)),
        ("weight_scale", {}, 1, (-1,)),
    ],
    ids=["comfyui", "comfyui-new", "rows", "flat-rows"],
)
def test_scaled_tensors_of_8_bits_are_dequantised(
    ending, unused, axes, shape, golden, to_original, tmp_path, caplog
):
    """As ComfyUI and lightx2v store them: a factor for each matrix or row, and marks."""
    tensors = to_original(golden("dit")[2])
    float8, path = ml_dtypes.float8_e4m3fn, "blocks.1.ffn.2.weight"
    stored, expected = {"scaled_fp8": np.zeros(0, float8)}, {}
    for name, x in tensors.items():
        if name.startswith("blocks.") and x.ndim == 2 and name.endswith("weight"):
            # 448 is the largest number of this type.
            scale = np.abs(x).max(axes, keepdims=True) / np.float32(448)
            stored[name] = (x / scale).astype(float8)
            stored[name.replace("weight", ending)] = scale.reshape(shape)
            stored |= {name.replace("weight", k): value for k, value in unused.items()}
            expected[name] = scale * stored[name].astype(np.float32)
        else:
            stored[name] = x.astype(float8) if name == "head.head.weight" else x
    stored = {f"model.diffusion_model.{k}": x for k, x in stored.items()}
    save_file(stored, tmp_path / "w.safetensors")
    port(tmp_path / "w.safetensors", tmp_path / "ported", heads=2, progress=False)
    _, params = load_weights(tmp_path / "ported", "dit")
    got = params["groups"]["block_0"]["ffn_out"]["kernel"][1].T
    np.testing.assert_allclose(got, expected[path], rtol=1e-6)
    assert got.dtype == np.float32 and 0.001 < np.abs(got - tensors[path]).max() < 0.2
    head = tensors["head.head.weight"].astype(float8).astype(np.float32)
    np.testing.assert_array_equal(params["head"]["kernel"].T, head)
    assert f"{len(expected) + 1} tensors of 8 bits are dequantised to float32" in caplog.text


def test_check_reads_everything_and_writes_nothing(public, golden, tmp_path, capsys):
    folder = public("dit")
    before = sorted(tmp_path.rglob("*"))
    check = ["port", "--from", str(folder), "--check", "--no-progress"]
    assert cli.main(check) == 0
    assert "dit: can be ported: 123 tensors" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    tensors = dict(golden("dit")[2])
    tensors["proj_out.bias"] = tensors["proj_out.bias"] + np.inf
    save_file(tensors, folder / "transformer" / WEIGHTS)
    assert cli.main(check) == 25
    assert "proj_out.bias has 64 of 64 values that are NaN" in capsys.readouterr().err
    for wrong in (check[:-2], [*check, "--to", str(tmp_path / "x")]):
        assert cli.main(wrong) == 2
        assert "expected either --to FOLDER or --check" in capsys.readouterr().err


def test_shards_without_their_index(public, tmp_path, caplog):
    port(public("dit"), tmp_path / "ported", progress=False)
    export(tmp_path / "ported", tmp_path / "out", shard_bytes=100_000, progress=False)
    (index,) = (tmp_path / "out" / "transformer").glob("*.index.json")
    port(index, tmp_path / "named", progress=False)  # an index may be named itself
    index.unlink()
    port(tmp_path / "out", tmp_path / "again", progress=False)
    assert index.name in caplog.text
    one, two = (load_weights(tmp_path / f, "dit")[1] for f in ("ported", "again"))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    shards = sorted(index.parent.glob("*-of-*.safetensors"))
    with pytest.raises(PortError, match=rf"one of {len(shards)} shards; name the folder"):
        open_sources(shards[0])
    shards[1].unlink()
    with pytest.raises(PortError, match=rf"{index.name}: missing, and so are the shards 2 of"):
        open_sources(tmp_path / "out")


def test_prompt_files_are_checked_and_stored(public, tmp_path):
    text = np.random.default_rng(0).normal(size=(5, 24)).astype(np.float32)
    np.save(tmp_path / "text.npy", text)
    save_file({"prompt": text[None].astype(ml_dtypes.bfloat16)}, tmp_path / "text.safetensors")
    port(public("dit"), tmp_path / "ported", prompt=tmp_path / "text.npy", progress=False)
    architecture, _ = load_weights(tmp_path / "ported", "dit")
    kept = load_prompt(tmp_path / "ported" / "prompt.npy", architecture.config)
    np.testing.assert_array_equal(kept[0], text)
    rounded = load_prompt(tmp_path / "text.safetensors", architecture.config)
    np.testing.assert_allclose(rounded[0], text, rtol=1e-2)
    for bad in (text[:, :3], np.zeros((600, 24)), np.zeros((0, 24)), text * np.nan):
        np.save(tmp_path / "bad.npy", bad)
        with pytest.raises(PortError, match=r"bad\.npy"):
            load_prompt(tmp_path / "bad.npy", architecture.config)
    (tmp_path / "bad.npy").write_bytes(b"text")
    with pytest.raises(PortError, match=r"bad\.npy"):
        load_prompt(tmp_path / "bad.npy")


def test_port_and_export_commands(public, tmp_path):
    def gnvc(*args):
        command = [sys.executable, "-m", "gnvc_jax.cli", *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ)

    folder = public("dit")
    done = gnvc("port", "--from", folder, "--to", tmp_path / "ported", "--no-progress")
    assert done.returncode == 0, done.stderr
    assert "123 tensors" in done.stdout and "diffusers names" in done.stdout
    done = gnvc("export", "--from", tmp_path / "ported", "--to", tmp_path / "out", "--no-progress")
    assert done.returncode == 0, done.stderr
    back = Path(done.stdout.strip()) / WEIGHTS
    assert (
        back.read_bytes() != b""
        and load_file(back).keys() == load_file(folder / "transformer" / WEIGHTS).keys()
    )

    done = gnvc("port", "--from", folder, "--to", tmp_path / "ported")
    assert done.returncode == 66 and "ported: exists" in done.stderr
    save_file({"head.modulation": np.zeros(1)}, tmp_path / "x.safetensors")
    done = gnvc("port", "--from", tmp_path / "x.safetensors", "--to", tmp_path / "y")
    assert done.returncode == 25 and "x.safetensors" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "y").exists()


def test_parameter_names_are_stable(public, tmp_path):
    """A checkpoint outlives the code: its layout is part of the format."""
    port(public("vace"), tmp_path / "ported", progress=False)
    _, params = load_weights(tmp_path / "ported", "dit")
    shapes = {k: x.shape for k, x in flatten_dict(params, sep="/").items()}
    assert shapes["groups/block_1/self_attention/q/kernel"] == (2, 64, 64)
    assert shapes["groups/context/ffn_in/kernel"] == (2, 64, 96)
    assert shapes["context_embedding/kernel"] == (4 * 96, 64)
