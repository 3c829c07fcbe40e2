"""LoRA files: what is merged is W + scale * alpha / rank * up @ down, and what is refused."""

import csv
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from gnvc_jax import cli
from gnvc_jax.errors import UsageError
from gnvc_jax.porting.checkpoint import leaves_by_path, load_weights
from gnvc_jax.porting.errors import PortError
from gnvc_jax.porting.port import port

RANK = 3
# Layers by their names in the original scheme; the last is a convolution.
LAYERS = ["blocks.0.self_attn.q", "blocks.3.cross_attn.o", "blocks.2.ffn.0", "time_projection.1"]
LAYERS += ["head.head", "patch_embedding"]


@pytest.fixture(scope="module")
def base(golden, to_original):
    """Tensors of a DiT under the names of diffusers, and these names by those of Wan-AI."""
    tensors = golden("dit")[2]
    return tensors, {old: new for new, old in zip(tensors, to_original(tensors))}


@pytest.fixture
def make(base, tmp_path):
    """make(pair, name, alpha, config): a LoRA file, and the changes that it stands for.

    pair: names of the two matrices; name: from a name of Wan-AI to the name in the file.
    """
    tensors, names = base
    rng = np.random.default_rng(0)

    def write(pair, name, alpha=None, config=None):
        stored, changes = {}, {}
        for layer in LAYERS:
            target = names[f"{layer}.weight"]
            out, *rest = tensors[target].shape
            down = rng.normal(size=(RANK, *rest)).astype(np.float32)
            up = rng.normal(size=(out, RANK, *[1] * len(rest[1:]))).astype(np.float32)
            stored |= {f"{name(layer)}.{k}.weight": x for k, x in zip(pair, (down, up))}
            if alpha is not None and config is None:
                stored[f"{name(layer)}.alpha"] = np.array(alpha, np.float32)
            product = up.reshape(out, RANK).astype(float) @ down.reshape(RANK, -1).astype(float)
            factor = 1 if alpha is None else alpha / RANK
            changes[target] = factor * product.reshape(tensors[target].shape)
        path = tmp_path / "lora.safetensors"
        save_file(stored, path, config and {"lora_adapter_metadata": json.dumps(config)})
        return path, stored, changes

    return write


def merged(folder, tmp_path, *options):
    """Tensors of the checkpoint that `gnvc port` makes, under the names of diffusers."""
    target = tmp_path / "ported"
    line = ["port", "--from", folder, "--to", target, "--no-progress", *options]
    assert cli.main([str(word) for word in line]) == 0
    architecture, params = load_weights(target, "dit")
    leaves = leaves_by_path(params)
    return {
        t.diffusers: t.inverse(leaves[t.path][... if t.index is None else t.index])
        for t in architecture.tensors
    }


def check(got, tensors, changes):
    for name, x in tensors.items():
        if name in changes:
            expected = x + changes[name]
            error = np.abs(got[name] - expected).max() / np.abs(expected).max()
            assert error < 1e-6 and np.abs(changes[name]).max() > 0.1, name
        else:
            np.testing.assert_array_equal(got[name], x, err_msg=name)


def kohya(layer):
    return "lora_unet_" + layer.replace(".", "_")


def test_pairs_and_differences_in_the_names_of_lightx2v(base, make, public, tmp_path):
    tensors, names = base
    path, stored, changes = make(("lora_down", "lora_up"), "diffusion_model.{}".format)
    changes = {name: 0.5 * x for name, x in changes.items()}
    for key, target in (
        ("blocks.1.self_attn.norm_q.diff", "blocks.1.self_attn.norm_q.weight"),
        ("blocks.1.norm3.diff_b", "blocks.1.norm3.bias"),
        ("blocks.2.self_attn.q.diff_b", "blocks.2.self_attn.q.bias"),
        ("blocks.3.diff_m", "blocks.3.modulation"),
        ("head.diff_m", "head.modulation"),
    ):
        change = np.random.default_rng(len(key)).normal(size=tensors[names[target]].shape)
        stored[f"diffusion_model.{key}"] = change.astype(np.float32)
        changes[names[target]] = 0.5 * change
    save_file(stored, path)
    got = merged(public("dit"), tmp_path, "--lora", path, "--scale", "0.5")
    check(got, tensors, changes)
    with open(tmp_path / "ported" / "dit" / "report.csv") as file:
        changed = {row["tensor"] for row in csv.DictReader(file) if " + 0.5 * " in row["file"]}
    assert changed == changes.keys()


def test_alpha_in_the_names_of_kohya_and_a_base_of_wan_ai(base, make, to_original, tmp_path):
    tensors, _ = base
    path, _, changes = make(("lora_down", "lora_up"), kohya, alpha=8.0)
    save_file(to_original(tensors), tmp_path / "dit.safetensors")
    got = merged(tmp_path / "dit.safetensors", tmp_path, "--lora", path, "--heads", "2")
    check(got, tensors, changes)


@pytest.mark.parametrize(
    ("prefix", "config", "file"),
    [
        ("transformer.", {"transformer.lora_alpha": 2.0}, "lora.safetensors"),
        ("base_model.model.", {"lora_alpha": 2.0}, "adapter_model.safetensors"),
    ],
    ids=["diffusers", "peft"],
)
def test_alpha_of_all_layers(prefix, config, file, base, make, public, tmp_path):
    """In the metadata of diffusers, or in a file of PEFT."""
    tensors, names = base

    def name(layer):
        return prefix + names[f"{layer}.weight"].removesuffix(".weight")

    path, stored, changes = make(("lora_A", "lora_B"), name, 2.0, config)
    if file != path.name:
        path = tmp_path / file
        save_file(stored, path)
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    check(merged(public("dit"), tmp_path, "--lora", path), tensors, changes)


def test_several_files_add_up_each_with_its_scale(base, make, public, tmp_path):
    tensors, _ = base
    first, _, changes = make(("lora_down", "lora_up"), kohya, alpha=1.0)
    first = first.rename(tmp_path / "first.safetensors")
    second, _, others = make(("lora_A", "lora_B"), "diffusion_model.{}".format)
    changes = {k: 2 * x - 0.25 * others[k] for k, x in changes.items()}
    got = merged(public("dit"), tmp_path, "--lora", first, second, "--scale", "2", "-0.25")
    check(got, tensors, changes)


def test_what_does_not_fit_is_named_with_its_file(make, public, tmp_path):
    path, stored, _ = make(("lora_down", "lora_up"), kohya, alpha=1.0)
    layer = kohya(LAYERS[0])
    wrong = {
        f"{kohya('blocks.9.ffn.0')}.lora_up.weight": "no such layer in the model",
        f"{layer}.hada_w1_a": "no known part of a LoRA",
        "text_embedding.0.diff_b": "shape (3,), expected (64,)",
    }
    bad = stored | dict.fromkeys(wrong, np.ones(3, np.float32))
    del bad[f"{layer}.lora_up.weight"]
    bad[f"{kohya(LAYERS[1])}.lora_down.weight"] = np.ones((RANK, 7), np.float32)
    bad[f"{kohya(LAYERS[2])}.alpha"] = np.ones(2, np.float32)
    save_file(bad, path)
    with pytest.raises(PortError) as caught:
        port(public("dit"), tmp_path / "ported", progress=False, lora=[(path, 1.0)])
    message = str(caught.value)
    assert message.startswith(f"{path}: 6 keys of this LoRA do not fit the dit of ")
    for problem in (
        *(f"{key}: {text}" for key, text in wrong.items()),
        f"{layer}: the up matrix is missing",
        f"{kohya(LAYERS[1])}: shapes (64, 3) and (3, 7) of the pair do not multiply to (64, 64)",
        f"{kohya(LAYERS[2])}: alpha has shape (2,), expected one number",
    ):
        assert problem in message
    assert not (tmp_path / "ported").exists()


def test_values_that_are_not_finite_are_found_in_the_sum(make, public, tmp_path):
    path, stored, _ = make(("lora_down", "lora_up"), kohya, alpha=1.0)
    stored[f"{kohya(LAYERS[0])}.alpha"] = np.array(np.nan, np.float32)
    save_file(stored, path)
    with pytest.raises(PortError, match=r"1 \* .*lora.safetensors: .*to_q.weight has 4096 of 4096"):
        port(public("dit"), None, progress=False, lora=[(path, 1.0)])


def test_factors_other_than_alpha_by_rank_are_refused(make, public, tmp_path):
    path, _, _ = make(("lora_down", "lora_up"), kohya, config={"transformer.use_rslora": True})
    with pytest.raises(PortError, match="use_rslora = True is not supported"):
        port(public("dit"), None, progress=False, lora=[(path, 1.0)])


def test_a_lora_needs_a_dit_and_scales_need_files(public, tmp_path, capsys):
    folder = public("vae")
    with pytest.raises(UsageError, match="a LoRA changes a DiT, and there is none"):
        port(folder, None, progress=False, lora=[(tmp_path / "x.safetensors", 1.0)])
    line = ["port", "--from", str(folder), "--check", "--scale", "0.5"]
    assert cli.main(line) == 2
    assert "--scale has 1 factors for 0 files of --lora" in capsys.readouterr().err
    assert cli.main([*line, "1", "2", "--lora", "x"]) == 2
    assert "--scale has 3 factors for 1 files of --lora" in capsys.readouterr().err
    public("dit")
    assert cli.main([*line, "--lora", "absent.safetensors"]) == 66
    assert "absent.safetensors: no such file" in capsys.readouterr().err
