"""CLIP's image encoder, and two metrics on its embeddings: CLIP-F and CMMD.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021: a
vision transformer, its weights read from a model.safetensors of Hugging Face. Embeddings are unit
vectors.

CLIP-F (the name is of Cong et al., "FLATTEN", 2023) is the mean cosine of the embeddings of
neighbouring frames. CMMD (Jayasumana et al., "Rethinking FID", 2024) is the squared maximum mean
discrepancy of two sets of embeddings x and y under k(a, b) = exp(-|a - b|² / (2 · 10²)):

    1000 (mean k(x, x') + mean k(y, y') - 2 mean k(x, y))

with means over all pairs, each point with itself included, as in its authors' program.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, UInt8
from PIL import Image
from safetensors import SafetensorError, safe_open

from gnvc_jax.files import not_weights

_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)  # of CLIP's training images
_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
_EPS = 1e-5  # of the layer norms
_HEAD = 64  # channels of an attention head in every model of OpenAI
ACTIVATIONS = ("quick_gelu", "gelu")
SIGMA, SCALE = 10.0, 1000.0  # of CMMD
BATCH = 8  # frames


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClipEncoder:
    """A vision transformer.

    Attributes:
        params: Parameters outside of the layers, by public name.
        layers: Parameters of the layers by public name, each stacked over the layers.
        heads: Number of attention heads.
        activation: "quick_gelu", which is x sigmoid(1.702 x), or "gelu".
    """

    params: dict
    layers: dict
    heads: int = dataclasses.field(metadata={"static": True})
    activation: str = dataclasses.field(metadata={"static": True})

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""
        return self.params["embeddings.patch_embedding.weight"].shape[-1]

    @property
    def size(self) -> int:
        """Side of the square input in pixels."""
        patches = self.params["embeddings.position_embedding.weight"].shape[0] - 1
        return self.patch * round(patches**0.5)


def preprocess(
    frames: UInt8[np.ndarray, "t h w 3"], size: int
) -> Float32[np.ndarray, "t {size} {size} 3"]:
    """Preprocesses frames as CLIP does.

    The shorter side is resized to `size` with Pillow's bicubic filter, the square in the middle is
    cropped, and values are normalised by mean and standard deviation of CLIP's training images.

    Args:
        frames: (t, h, w, 3) uint8.
        size: Side of the input of the encoder.

    Returns:
        (t, size, size, 3) float32.
    """
    h, w = frames.shape[1:3]
    short = min(h, w)
    # Rounded down, as torchvision does for the longer side.
    rows, columns = (int(size * side / short) for side in (h, w))
    top, left = (rows - size) // 2, (columns - size) // 2
    # Pillow takes (left, upper, right, lower).
    box = (left, top, left + size, top + size)
    scaled = (
        Image.fromarray(frame).resize((columns, rows), Image.Resampling.BICUBIC) for frame in frames
    )
    squares = np.stack([np.asarray(image.crop(box), np.float32) for image in scaled])
    return (squares / 255 - _MEAN) / _STD


def embed(
    encoder: ClipEncoder, images: Float32[Array | np.ndarray, "b size size 3"]
) -> Float32[Array, "b channels"]:
    """Embeds images (b, size, size, 3) from `preprocess` as unit vectors (b, channels), float32."""
    with jax.default_matmul_precision("highest"):
        params, p = encoder.params, encoder.patch
        b, h, w, _ = images.shape
        # Patches: rows r, p; columns c, q; i input and o output channels.
        x = images.reshape(b, h // p, p, w // p, p, 3)
        patches = params["embeddings.patch_embedding.weight"]
        x = jnp.einsum("brpcqi,oipq->brco", x, patches).reshape(b, -1, patches.shape[0])
        # (b, 1 + patches, channels): the class token comes first, and its output is the embedding.
        first = jnp.broadcast_to(params["embeddings.class_embedding"], (b, 1, x.shape[-1]))
        x = jnp.concatenate([first, x], 1) + params["embeddings.position_embedding.weight"]
        # (sic: the name is spelt like this in the public weights.)
        x = _norm(params, "pre_layrnorm", x)
        # Layers have equal shapes and are stacked: one compiled body for all of them.
        x, _ = jax.lax.scan(lambda x, layer: (_layer(encoder, layer, x), None), x, encoder.layers)
        x = _norm(params, "post_layernorm", x[:, 0]) @ params["visual_projection.weight"].T
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _layer(
    encoder: ClipEncoder, params: dict, x: Float32[Array, "b tokens c"]
) -> Float32[Array, "b tokens c"]:
    """Applies a layer with pre-normalisation: attention, then MLP; x (b, tokens, channels)."""
    y = _norm(params, "layer_norm1", x)
    # (b, tokens, c) -> (b, tokens, heads, c / heads).
    q, k, v = (
        _linear(params, f"self_attn.{name}_proj", y).reshape(*y.shape[:2], encoder.heads, -1)
        for name in "qkv"
    )
    y = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
    x = x + _linear(params, "self_attn.out_proj", y)
    y = _linear(params, "mlp.fc1", _norm(params, "layer_norm2", x))
    # Weights of OpenAI were trained with the approximation x sigmoid(1.702 x), others with the
    # exact function.
    y = (
        jax.nn.gelu(y, approximate=False)
        if encoder.activation == "gelu"
        else y * jax.nn.sigmoid(1.702 * y)
    )
    return x + _linear(params, "mlp.fc2", y)


def _linear(params: dict, name: str, x: jax.Array) -> jax.Array:
    return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]


def _norm(params: dict, name: str, x: jax.Array) -> jax.Array:
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    x = (x - mean) * jax.lax.rsqrt(variance + _EPS)
    return x * params[f"{name}.weight"] + params[f"{name}.bias"]


_embed = jax.jit(embed)


def clip_measures(encoder: ClipEncoder, source: np.ndarray, output: np.ndarray) -> dict[str, float]:
    """CLIP-F of a clip and of its source, and CMMD between their frames.

    Args:
        encoder: Image encoder.
        source: (t, h, w, 3) uint8.
        output: Clip of the same shape.

    Returns:
        clip_f, clip_f_source and cmmd.

    Raises:
        ValueError: If the clip has a single frame.
    """
    x, y = (
        np.concatenate(
            [
                _embed(encoder, preprocess(clip[i : i + BATCH], encoder.size))
                for i in range(0, len(clip), BATCH)
            ]
        )
        for clip in (source, output)
    )
    return {"clip_f": clip_f(y), "clip_f_source": clip_f(x), "cmmd": cmmd(x, y)}


def clip_f(embeddings: np.ndarray) -> float:
    """Mean cosine of adjacent unit vectors (t, channels).

    Raises:
        ValueError: If there are fewer than two.
    """
    if len(embeddings) < 2:
        raise ValueError(f"clip_f needs at least 2 frames, got {len(embeddings)}")
    x = np.asarray(embeddings, np.float64)
    return float((x[:-1] * x[1:]).sum(-1).mean())


def cmmd(x: np.ndarray, y: np.ndarray) -> float:
    """CMMD of two sets of unit vectors, (n, channels) and (m, channels); 0 for equal sets."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        # |a - b|² of all pairs, (n, m), in float64: the three means nearly cancel.
        squares = np.square(a).sum(-1)[:, None] + np.square(b).sum(-1) - 2 * a @ b.T
        return float(np.exp(squares / (-2 * SIGMA**2)).mean())

    return SCALE * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def load_clip(path: Path) -> ClipEncoder:
    """Loads the image encoder of a CLIPModel or CLIPVisionModelWithProjection.

    Sizes come from the tensors, heads and activation from the config.json beside the file. Without
    one, heads have 64 channels and the activation is "quick_gelu", as in the models of OpenAI.

    Args:
        path: .safetensors file of Hugging Face.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If the file is damaged, or tensors are missing or of another shape; the message
            lists all of them.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if kind := not_weights(path):
        raise ValueError(f"{path}: {kind}")
    try:
        with safe_open(path, framework="numpy") as file:
            names = [
                n for n in file.keys() if n.startswith(("vision_model.", "visual_projection."))
            ]
            found = {
                name.removeprefix("vision_model."): np.asarray(file.get_tensor(name), np.float32)
                for name in names
                if not name.endswith("position_ids")
            }
    except (SafetensorError, TypeError) as error:  # TypeError: a type that NumPy lacks
        raise ValueError(f"{path}: cannot be read as safetensors ({error})") from error
    # Sizes are guessed from a few tensors; then every tensor is compared with what they ask for.
    depth, wanted = _expected(path, found)
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in wanted]
    problems += [
        f"{name} is {found[name].shape}, expected {shape}"
        for name, shape in wanted.items()
        if name in found and found[name].shape != shape
    ]
    if problems:
        raise ValueError(f"{path}: not an image encoder of CLIP: {', '.join(problems)}")
    heads, activation = _settings(path, found["embeddings.class_embedding"].shape[0])
    # Stacked over the layers, as the scan in `embed` takes them; popped, so that each exists once.
    layers = {
        name: np.stack([found.pop(f"encoder.layers.{i}.{name}") for i in range(depth)])
        for name in _layer_shapes(1, 1)
    }
    params, layers = jax.device_put((found, layers))
    return ClipEncoder(params, layers, heads, activation)


def _layer_shapes(width: int, inner: int) -> dict[str, tuple[int, ...]]:
    linear = {f"self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
    linear |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    shapes = {f"{name}.weight": shape for name, shape in linear.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linear.items()}
    norms = ("layer_norm1", "layer_norm2")
    return shapes | {f"{name}.{part}": (width,) for name in norms for part in ("weight", "bias")}


def _expected(path: Path, found: dict) -> tuple[int, dict[str, tuple[int, ...]]]:
    """Number of layers, and expected shapes by name, judging by the shapes of a few tensors."""
    patches = found.get("embeddings.patch_embedding.weight")
    places = found.get("embeddings.position_embedding.weight")
    inner = found.get("encoder.layers.0.mlp.fc1.bias")
    projection = found.get("visual_projection.weight")

    def usable(x: np.ndarray | None) -> TypeGuard[np.ndarray]:
        return x is not None and x.ndim > 0

    if not (usable(patches) and usable(places) and usable(inner) and usable(projection)):
        raise ValueError(
            f"{path}: not an image encoder of CLIP: vision_model.embeddings, "
            "vision_model.encoder or visual_projection is not in it"
        )
    width, side, count = patches.shape[0], patches.shape[-1], places.shape[0]
    if round((count - 1) ** 0.5) ** 2 != count - 1:
        raise ValueError(
            f"{path}: {count} positions, expected a square number of patches and one more"
        )
    shapes = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, side, side),
        "embeddings.position_embedding.weight": (count, width),
        "visual_projection.weight": (projection.shape[0], width),
    }
    for norm in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"{norm}.{part}": (width,) for part in ("weight", "bias")}
    layers = [int(m[1]) for name in found if (m := re.match(r"encoder\.layers\.(\d+)\.", name))]
    depth = 1 + max(layers)
    for i in range(depth):
        of_layer = _layer_shapes(width, inner.shape[0])
        shapes |= {f"encoder.layers.{i}.{name}": shape for name, shape in of_layer.items()}
    return depth, shapes


def _settings(path: Path, width: int) -> tuple[int, str]:
    """Number of heads and activation, from config.json or the defaults of OpenAI's models."""
    config, facts = path.with_name("config.json"), {}
    if config.is_file():
        try:
            facts = json.loads(config.read_text())
            facts = facts.get("vision_config") or facts
            facts = {"heads": facts["num_attention_heads"], "activation": facts["hidden_act"]}
        except (ValueError, AttributeError, KeyError) as error:
            raise ValueError(f"{config}: no configuration of CLIP ({error!r})") from error
    heads, activation = facts.get("heads", width // _HEAD), facts.get("activation", ACTIVATIONS[0])
    if activation not in ACTIVATIONS:
        raise ValueError(f"{config}: unknown activation '{activation}'")
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise ValueError(f"{path}: {width} channels do not divide by {heads} heads")
    return heads, activation
