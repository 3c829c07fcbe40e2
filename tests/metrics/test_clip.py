"""CLIP's image encoder and its measures; tests/parity/test_clip.py compares with transformers."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from gnvc_jax.evaluation.quality import QualityMeter
from gnvc_jax.metrics.clip import clip_f, cmmd, embed, load_clip

WIDTH, INNER, DEPTH, PATCH, SIDE = 16, 24, 2, 8, 16


def tensors():
    """A model of two layers and two heads under its public names, from seeded numbers."""
    shapes = {
        "embeddings.class_embedding": (WIDTH,),
        "embeddings.patch_embedding.weight": (WIDTH, 3, PATCH, PATCH),
        "embeddings.position_embedding.weight": ((SIDE // PATCH) ** 2 + 1, WIDTH),
    }
    linear = {f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in ("q", "k", "v", "out")}
    linear |= {"mlp.fc1": (INNER, WIDTH), "mlp.fc2": (WIDTH, INNER)}
    for i in range(DEPTH):
        for name, shape in linear.items():
            shapes[f"encoder.layers.{i}.{name}.weight"] = shape
            shapes[f"encoder.layers.{i}.{name}.bias"] = shape[:1]
    norms = [f"encoder.layers.{i}.layer_norm{k}" for i in range(DEPTH) for k in (1, 2)]
    for norm in ("pre_layrnorm", "post_layernorm", *norms):
        shapes[f"{norm}.weight"] = shapes[f"{norm}.bias"] = (WIDTH,)
    rng = np.random.default_rng(0)
    made = {f"vision_model.{name}": rng.normal(0, 0.3, shape) for name, shape in shapes.items()}
    made["visual_projection.weight"] = rng.normal(0, 0.3, (12, WIDTH))
    made["text_model.final_layer_norm.bias"] = np.zeros(4)  # another tower's, left alone
    return {name: x.astype(np.float32) for name, x in made.items()}


def save(folder, changes=None):
    path = folder / "model.safetensors"
    kept = {k: v for k, v in (tensors() | (changes or {})).items() if v is not None}
    save_file(kept, path)
    config = {"vision_config": {"num_attention_heads": 2, "hidden_act": "quick_gelu"}}
    (folder / "config.json").write_text(json.dumps(config))
    return path


def test_embedding_is_that_of_transformers(tmp_path):
    images = np.random.default_rng(1).normal(size=(1, SIDE, SIDE, 3)).astype(np.float32)
    embedding = np.asarray(embed(load_clip(save(tmp_path)), images))[0]
    # CLIPVisionModelWithProjection of transformers 5.24 with these weights, made a unit vector
    expected = [0.1461357, -0.3555347, 0.170085, 0.1424005, 0.4071992, 0.379402]
    expected += [0.0988555, -0.1101808, 0.3189144, -0.0463084, -0.4652285, -0.3886837]
    np.testing.assert_allclose(embedding, expected, atol=1e-6)


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("vision_model.encoder.layers.1.mlp.fc1.bias", None, "mlp.fc1.bias is missing"),
        ("vision_model.pre_layrnorm.bias", np.zeros(3, np.float32), "expected (16,)"),
        ("vision_model.other", np.zeros(3, np.float32), "other is unknown"),
        ("visual_projection.weight", None, "not an image encoder of CLIP"),
    ],
)
def test_weights_of_another_model_are_refused(tmp_path, name, value, said):
    path = save(tmp_path, {name: value})
    with pytest.raises(ValueError) as caught:
        load_clip(path)
    assert str(path) in str(caught.value) and said in str(caught.value)


def test_files_that_are_not_weights_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_clip(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"model\.safetensors: cannot be read"):
        load_clip(path)


def test_clip_f_is_the_mean_cosine_of_adjacent_frames():
    x = np.eye(3)[[0, 0, 1, 1]]
    assert clip_f(x) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="2 frames"):
        clip_f(x[:1])


def test_cmmd_is_the_squared_distance_in_the_space_of_the_kernel():
    rng = np.random.default_rng(0)
    x, y = rng.normal(0, 5, (7, 4)), rng.normal(1, 5, (5, 4))

    def k(a, b):
        return np.exp(-((a - b) ** 2).sum() / 200)

    pairs = [np.mean([k(a, b) for a in u for b in v]) for u, v in ((x, x), (y, y), (x, y))]
    assert cmmd(x, y) == pytest.approx(1000 * (pairs[0] + pairs[1] - 2 * pairs[2]))
    assert cmmd(x, x) == pytest.approx(0, abs=1e-9)
    assert cmmd(x, y) > 0


def test_clip_metrics_need_a_weight_file(tmp_path):
    rng = np.random.default_rng(0)
    still = np.repeat(rng.integers(0, 256, (1, 20, 25, 3), dtype=np.uint8), 11, 0)
    busy = rng.integers(0, 256, still.shape, dtype=np.uint8)
    measured = QualityMeter(("clip",), {"clip": save(tmp_path)})(busy, still).temporal
    assert measured["clip_f"] == pytest.approx(1, abs=1e-6)
    assert measured["clip_f_source"] < 0.999
    assert measured["cmmd"] > 0
    without = QualityMeter(("clip",))(busy, still)
    assert set(without.temporal.values()) == {None}
    assert "--weights clip=FILE" in without.missing["clip"]
