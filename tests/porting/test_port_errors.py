"""What `gnvc port` refuses: variants, damaged files and values, checkpoints that do not fit."""

import json
import re
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from gnvc_jax.porting.checkpoint import load_prompt, load_weights
from gnvc_jax.porting.errors import PortError
from gnvc_jax.porting.export import export
from gnvc_jax.porting.port import port
from gnvc_jax.porting.sources import open_sources

WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_all_mismatches_are_listed(public, tmp_path):
    def edit(tensors):
        tensors["blocks.1.attn1.to_q.weight"] = np.zeros((64, 65), np.float32)
        tensors["blocks.2.attn1.norm_k.weight"] = np.zeros((64,), np.int32)
        tensors["blocks.0.extra"] = np.zeros((1,), np.float32)
        del tensors["proj_out.bias"], tensors["blocks.3.ffn.net.2.bias"]
        return tensors

    folder = public("dit", edit)
    with pytest.raises(PortError) as caught:
        port(folder, tmp_path / "ported", progress=False)
    message = str(caught.value)
    assert str(folder / "transformer" / WEIGHTS) in message
    for problem in (
        "5 tensors do not fit",
        "missing: blocks.3.ffn.net.2.bias",
        "missing: proj_out.bias",
        "unexpected: blocks.0.extra",
        "shape: blocks.1.attn1.to_q.weight is (64, 65), expected (64, 64)",
        "type: blocks.2.attn1.norm_k.weight is I32",
    ):
        assert problem in message
    assert [p.name for p in tmp_path.iterdir()] == ["public"]


@pytest.mark.parametrize(
    ("name", "facts", "message"),
    [
        ("dit", {"image_dim": 1280}, "image_dim = 1280"),
        ("dit", {"num_attention_heads": 3}, "must divide the width 64, got 3"),
        ("vace", {"vace_layers": [0, 1]}, "vace_layers"),
        ("vae", {"is_residual": True}, "is_residual = True, but the tensors are those of False"),
        ("vae22", {"decoder_base_dim": 4}, "decoder_base_dim = 4, but the tensors are those of 6"),
        ("vae", {"latents_mean": [0.0]}, "1 means"),
        ("vae", {"num_res_blocks": 1}, "unexpected: encoder.down_blocks.10"),
    ],
)
def test_unknown_variants_are_refused(name, facts, message, public, tmp_path):
    folder = public(name)
    (path,) = folder.glob("*/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))
    with pytest.raises(PortError, match=message):
        port(folder, tmp_path / "ported", progress=False)


def save_torch(tensors, path):
    """The file that torch.save writes for a dictionary of float32 tensors, without torch."""

    def numbers(values):
        return "(" + "".join(f"I{n}\n" for n in values) + "t"

    text = "(d"
    with zipfile.ZipFile(path, "w") as archive:
        for key, (name, x) in enumerate(tensors.items()):
            storage = f"(S'storage'\nctorch\nFloatStorage\nS'{key}'\nS'cpu'\nI{x.size}\ntQ"
            strides = [step // x.itemsize for step in np.ascontiguousarray(x).strides]
            text += f"S'{name}'\nctorch._utils\n_rebuild_tensor_v2\n"
            text += f"({storage}I0\n{numbers(x.shape)}{numbers(strides)}I00\nNtRs"
            archive.writestr(f"x/data/{key}", x.tobytes())
        archive.writestr("x/data.pkl", text + ".")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("file", "save"), [("w.safetensors", save_file), ("w.pth", save_torch)])
def test_nan_and_infinite_values_are_refused(value, file, save, golden, to_original, tmp_path):
    tensors = to_original(golden("dit")[2])
    save(tensors, tmp_path / file)
    port(tmp_path / file, tmp_path / "ported", heads=2, progress=False)
    name = "blocks.1.ffn.2.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][3, 4] = value
    save(tensors, tmp_path / file)
    with pytest.raises(PortError, match=rf"{re.escape(file)}: {re.escape(name)} has 1 of .* NaN"):
        port(tmp_path / file, tmp_path / "damaged", heads=2, progress=False)
    assert not (tmp_path / "damaged").exists()


def test_values_that_overflow_the_target_type_are_refused(public, tmp_path):
    def edit(tensors):
        tensors["proj_out.bias"] = tensors["proj_out.bias"].astype(np.float64) + 1e300
        return tensors

    with pytest.raises(PortError, match=r"proj_out\.bias has .* infinite as float32"):
        port(public("dit", edit), tmp_path / "ported", "float32", progress=False)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "Git LFS pointer"),
        (b"\n <!DOCTYPE html>\n<html><body>Sign in</body></html>", "HTML"),
        (b"\xef\xbb\xbf<html>", "HTML"),
        (b"<?xml version='1.0'?><Error/>", "XML page"),
        (b"GGUF\3\0\0\0", "GGUF"),
        (b'{"error": "unauthorised"}', "JSON"),
        (b"", "empty"),
    ],
)
@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "prompt.npy"])
def test_files_that_are_not_weights_are_explained(data, said, name, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(PortError, match=rf"{re.escape(name)}: .*{said}"):
        (load_prompt if name == "prompt.npy" else open_sources)(tmp_path / name)


def test_scales_that_fit_no_tensor_are_refused(golden, to_original, tmp_path):
    path = "blocks.1.ffn.2.weight"
    stored = {f"model.diffusion_model.{k}": x for k, x in to_original(golden("dit")[2]).items()}
    stored[f"model.diffusion_model.{path}_scale"] = np.ones((2, 3), np.float32)
    save_file(stored, tmp_path / "w.safetensors")
    message = rf"the scale of {re.escape(path)} has shape \(2, 3\), expected .* each of 64 rows"
    with pytest.raises(PortError, match=message):
        open_sources(tmp_path / "w.safetensors")
    del stored[f"model.diffusion_model.{path}"]
    save_file(stored, tmp_path / "w.safetensors")
    with pytest.raises(PortError, match=rf"has a scale for {re.escape(path)}, but no such tensor"):
        open_sources(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("heads", "message"),
    [(n, f"must divide the width 64, got {n}") for n in (0, -2, 5)] + [(64, "64 heads")],
)
def test_impossible_numbers_of_heads_are_refused(heads, message, public, tmp_path):
    with pytest.raises(PortError, match=message):
        port(public("dit"), tmp_path / "ported", heads=heads, progress=False)


def test_a_narrow_model_needs_its_number_of_heads(public, tmp_path):
    folder = public("dit")
    (folder / "transformer" / "config.json").unlink()
    with pytest.raises(PortError, match="give --heads"):
        port(folder, tmp_path / "ported", progress=False)
    port(folder, tmp_path / "ported", heads=2, progress=False)


def test_damaged_files_and_targets(public, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        port(tmp_path / "nowhere", tmp_path / "ported")
    folder = public("dit")
    (tmp_path / "taken").mkdir()
    with pytest.raises(FileExistsError, match="taken"):
        port(folder, tmp_path / "taken", progress=False)
    file = folder / "transformer" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(PortError, match=rf"{WEIGHTS}: truncated or damaged safetensors file"):
        port(folder, tmp_path / "ported", progress=False)
    (folder / "transformer" / "config.json").write_text("{")
    with pytest.raises(PortError):
        port(folder, tmp_path / "ported", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["public", "taken"]


def test_damaged_checkpoints(public, tmp_path):
    port(public("dit"), tmp_path / "ported", progress=False)
    with pytest.raises(FileNotFoundError, match="no ported vae"):
        load_weights(tmp_path / "ported", "vae")
    with pytest.raises(FileNotFoundError, match="no ported weights"):
        export(tmp_path / "public", tmp_path / "out")
    path = tmp_path / "ported" / "dit" / "architecture.json"
    facts = json.loads(path.read_text())
    facts["config"]["ffn_width"] = 100
    path.write_text(json.dumps(facts))
    with pytest.raises(PortError, match=r"ffn_in/kernel is .* expected"):
        load_weights(tmp_path / "ported", "dit")
    path.write_text("{}")
    with pytest.raises(PortError, match=r"architecture\.json"):
        export(tmp_path / "ported", tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
