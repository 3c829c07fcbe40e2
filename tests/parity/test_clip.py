"""CLIP's image encoder and its preprocessing against transformers, with random weights."""

import jax
import numpy as np
import pytest

from gnvc_jax.metrics.clip import embed, load_clip, preprocess

torch = pytest.importorskip("torch", reason="torch is not installed: make test-parity")
transformers = pytest.importorskip("transformers", reason="make test-parity")
pytestmark = pytest.mark.parity

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, image_size=28, patch_size=7)


def random_model(kind, config):
    torch.manual_seed(0)
    model = kind(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def vision(activation="quick_gelu"):
    return transformers.CLIPVisionConfig(
        **SIZES, num_attention_heads=4, projection_dim=24, hidden_act=activation
    )


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_image_embeddings(activation, same, tmp_path):
    model = random_model(transformers.CLIPVisionModelWithProjection, vision(activation))
    model.save_pretrained(tmp_path)
    images = np.random.default_rng(0).normal(size=(2, 28, 28, 3)).astype(np.float32)
    with torch.inference_mode():
        theirs = model(torch.from_numpy(images).permute(0, 3, 1, 2)).image_embeds.numpy()
    encoder = load_clip(tmp_path / "model.safetensors")
    assert encoder.size == 28
    same(f"embedding, {activation}", jax.jit(embed)(encoder, images), unit(theirs))


def test_weights_of_both_clip_towers_are_read(same, tmp_path):
    text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.CLIPConfig(
        text_config=text | {"vocab_size": 20}, vision_config=vision().to_dict(), projection_dim=24
    )
    model = random_model(transformers.CLIPModel, config)
    model.save_pretrained(tmp_path)
    images = np.random.default_rng(0).normal(size=(1, 28, 28, 3)).astype(np.float32)
    with torch.inference_mode():
        pooled = model.vision_model(torch.from_numpy(images).permute(0, 3, 1, 2)).pooler_output
        theirs = model.visual_projection(pooled).numpy()
    ours = embed(load_clip(tmp_path / "model.safetensors"), images)
    same("embedding, both towers", ours, unit(theirs))


@pytest.mark.parametrize("shape", [(60, 97), (97, 60), (20, 25)])
def test_preprocessing(shape):
    frames = np.random.default_rng(0).integers(0, 256, (1, *shape, 3), dtype=np.uint8)
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    theirs = processor(list(frames), return_tensors="np", input_data_format="channels_last")
    theirs = theirs["pixel_values"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(preprocess(frames, 28), theirs, atol=1e-5)
