"""Architectures of public weights: recognised from tensor shapes and config.json, and written back.

`recognise` turns a source into an `Architecture`, which knows the public tensors that a component
has (`names`) and the parameters that they become. `diffusers_config` is the way back.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from gnvc_jax.arrays import Tree
from gnvc_jax.porting.errors import PortError
from gnvc_jax.porting.names import Tensor, dit_tensors, light_decoder_tensors, vae_tensors
from gnvc_jax.porting.sources import Source
from gnvc_jax.refiner import DiT, DiTConfig
from gnvc_jax.refiner.config import PATCH
from gnvc_jax.vae import VAE, LightDecoder, LightDecoderConfig, VAEConfig
from gnvc_jax.vae.config import with_tuples

# Statistics of Wan2.1's latents, per channel (diffusers' configuration of the VAE).
WAN_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
WAN_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)

CONFIGS = {"vae": VAEConfig, "dit": DiTConfig, "decoder": LightDecoderConfig}

# Values that a public config may state, of things that cannot be changed here.
FIXED = {
    "dit": {
        "patch_size": [1, PATCH, PATCH],
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
        "image_dim": None,
        "added_kv_proj_dim": None,
        "pos_embed_seq_len": None,
    },
    "vae": {
        "attn_scales": [],
        "dropout": 0.0,
        "in_channels": 3,
        "out_channels": 3,
        "is_residual": False,
        "patch_size": None,
        "decoder_base_dim": None,
    },
    "decoder": {},
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Architecture of a component.

    Attributes:
        component: "vae", "dit", or "decoder" for a light decoder.
        config: Sizes of the network.
        latents_mean: Mean of the latents per channel, None for a DiT.
        latents_std: Standard deviation of the latents per channel, None for a DiT.
    """

    component: str
    config: VAEConfig | DiTConfig | LightDecoderConfig
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """The public tensors of such a component."""
        if isinstance(self.config, VAEConfig):
            return vae_tensors(self.config)
        if isinstance(self.config, LightDecoderConfig):
            return light_decoder_tensors(self.config)
        return dit_tensors(self.config)

    def by_parameter(self) -> dict[str, list[Tensor]]:
        """Public tensors that make up each parameter, by the path of the parameter.

        A parameter of layers that are scanned over consists of one tensor per layer.
        """
        parts: dict[str, list[Tensor]] = {}
        for tensor in self.tensors:
            parts.setdefault(tensor.path, []).append(tensor)
        return parts

    def abstract(self) -> Tree:
        """Parameters as a tree of shapes (float32)."""
        cfg, key = self.config, jax.random.key(0)
        if isinstance(cfg, VAEConfig):
            # The smallest inputs: no parameter depends on the number of frames, latents or tokens.
            video = jnp.zeros((1, 1, cfg.stride, cfg.stride, 3))
            return jax.eval_shape(VAE(cfg).init, key, video)["params"]
        if isinstance(cfg, LightDecoderConfig):
            latents = jnp.zeros((1, 1, 1, 1, cfg.latent_channels))
            init = functools.partial(LightDecoder(cfg).init, method="decode")
            return jax.eval_shape(init, key, latents)["params"]
        latents = jnp.zeros((1, 1, PATCH, PATCH, cfg.channels))
        text = jnp.zeros((1, 1, cfg.text_width))
        context = jnp.zeros((1, 1, PATCH, PATCH, cfg.context_channels))
        inputs = latents, jnp.zeros((1,)), text, context if cfg.context_every else None
        return jax.eval_shape(DiT(cfg).init, key, *inputs)["params"]

    def to_json(self) -> dict:
        """Returns a JSON-ready dictionary, from which `from_json` restores the architecture."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, facts: dict) -> "Architecture":
        """Restores an architecture.

        It raises KeyError, TypeError or ValueError for anything that `to_json` did not make.
        """
        config = CONFIGS[facts["component"]](**with_tuples(facts["config"]))
        return cls(**with_tuples(facts) | {"config": config})


def recognise(source: Source, heads: int | None = None) -> Architecture:
    """Recognises the architecture of a source.

    Sizes come from the shapes of tensors, everything else from config.json.

    Args:
        source: Source with a single component.
        heads: Number of attention heads of the DiT; if None, that of config.json, and without it
            the number of heads of width 128, the width in all Wan models.

    Raises:
        PortError: If the variant is not text-to-video or VACE of Wan2.1, or VACE's adapter stands
            alone.
    """
    if source.component == "vace":
        raise PortError(
            f"{source.path}: holds VACE's adapter alone; give the text-to-video DiT that it belongs"
            " to as --from, and the adapter as --vace"
        )
    strange = [
        f"{key} = {source.facts[key]!r} (only {value!r})"
        for key, value in FIXED[source.component].items()
        if source.facts.get(key, value) != value
    ]
    if strange:
        raise PortError(f"{source.path}: unknown variant: {', '.join(strange)}")
    try:
        if source.component == "dit":
            return _dit(source, heads)
        return _vae(source) if source.component == "vae" else _light_decoder(source)
    except (TypeError, ValueError) as error:
        raise PortError(f"{source.path}: {error}") from error


def _sizes(source: Source, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a tensor, or a default if it is missing or of another rank.

    Such a tensor is reported later, together with everything else that does not fit.
    """
    shape = source.entries[name].shape if name in source.entries else default
    return shape if len(shape) == len(default) else default


def count_blocks(source: Source, prefix: str) -> int:
    """Counts the blocks whose names begin with `prefix` and a number, counted up to the largest."""
    numbers = {name.split(".")[1] for name in source.entries if name.startswith(prefix + ".")}
    return 1 + max((int(n) for n in numbers if n.isdecimal()), default=-1)


def _dit(source: Source, heads: int | None) -> Architecture:
    plain, facts = DiTConfig(), source.facts
    names = {
        "original": ("time_embedding.0.weight", "text_embedding.0.weight", "blocks.0.ffn.0.bias"),
        "diffusers": (
            "condition_embedder.time_embedder.linear_1.weight",
            "condition_embedder.text_embedder.linear_1.weight",
            "blocks.0.ffn.net.0.proj.bias",
        ),
    }
    time, text, ffn = names[source.scheme]
    patches = (plain.width, plain.channels, 1, PATCH, PATCH)
    width, channels = _sizes(source, "patch_embedding.weight", patches)[:2]
    context = (width, plain.context_channels, 1, PATCH, PATCH)
    # VACE has a context block for every n-th block, beginning with the first: n = 2 in the model of
    # 1.3 billion parameters, 5 in that of 14 billion.
    layers, context_blocks = count_blocks(source, "blocks"), count_blocks(source, "vace_blocks")
    if context_blocks and layers % context_blocks:
        raise ValueError(f"{context_blocks} context blocks for {layers} blocks")
    every = layers // context_blocks if context_blocks else 0
    places = list(range(0, layers, every)) if every else None
    if facts.get("vace_layers") not in (None, places):
        raise ValueError(f"vace_layers = {facts['vace_layers']}, expected every {every}th layer")
    if heads is None:
        # Named so by diffusers and by Wan-AI. No tensor tells the number of heads.
        heads = facts.get("num_attention_heads", facts.get("num_heads"))
    if heads is None and width % 128:
        raise ValueError(
            f"width {width} is not a multiple of 128 and config.json is missing: give --heads"
        )
    # Every model of Wan2.1 has heads of 128 channels.
    if heads is None:
        heads = width // 128
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise ValueError(f"the number of heads must divide the width {width}, got {heads}")
    config = DiTConfig(
        width=width,
        ffn_width=_sizes(source, ffn, (plain.ffn_width,))[0],
        heads=heads,
        layers=layers,
        frequencies=_sizes(source, time, (width, plain.frequencies))[1],
        channels=channels,
        text_width=_sizes(source, text, (width, plain.text_width))[1],
        text_length=facts.get("text_len", plain.text_length),
        context_every=every,
        context_channels=_sizes(source, "vace_patch_embedding.weight", context)[1],
    )
    return Architecture("dit", config)


def _vae(source: Source) -> Architecture:
    plain, facts = VAEConfig(), source.facts
    first = {"original": "encoder.conv1.weight", "diffusers": "encoder.conv_in.weight"}
    last = {"original": "conv2.bias", "diffusers": "post_quant_conv.bias"}
    # Output channels of the first convolution, and of the last one before the decoder.
    base = _sizes(source, first[source.scheme], (plain.base, 3, 3, 3, 3))[0]
    z = _sizes(source, last[source.scheme], (plain.latent_channels,))[0]
    config = VAEConfig(
        base=base,
        multipliers=tuple(facts.get("dim_mult", plain.multipliers)),
        blocks=facts.get("num_res_blocks", plain.blocks),
        latent_channels=z,
        temporal_down=tuple(facts.get("temperal_downsample", plain.temporal_down)),
    )
    # Wan-AI publishes the statistics in its program only, diffusers in its config.json.
    mean, std = facts.get("latents_mean", WAN_MEAN), facts.get("latents_std", WAN_STD)
    if not len(mean) == len(std) == z:
        raise ValueError(
            f"{len(mean)} means and {len(std)} standard deviations for {z} latent channels"
        )
    return Architecture("vae", config, tuple(mean), tuple(std))


def _light_decoder(source: Source) -> Architecture:
    plain = LightDecoderConfig()
    # The convolutions that lead to the first level and from each level to the next.
    names = [f"decoder.{place}.weight" for place in (1, 8, 14, 20)]
    shapes = [
        _sizes(source, name, (width, inner, 3, 3))
        for name, width, inner in zip(names, plain.widths, (plain.latent_channels, *plain.widths))
    ]
    # PyTorch has (outputs, inputs, rows, columns): the first convolution takes the latents.
    z = shapes[0][1]
    if z != len(WAN_MEAN):
        raise ValueError(
            f"decodes latents of {z} channels, those of Wan2.1 have {len(WAN_MEAN)}: use taew2_1"
        )
    config = LightDecoderConfig(widths=tuple(shape[0] for shape in shapes), latent_channels=z)
    return Architecture("decoder", config, WAN_MEAN, WAN_STD)


def diffusers_config(architecture: Architecture) -> dict:
    """Contents of the config.json with which diffusers builds the same model."""
    cfg = architecture.config
    assert not isinstance(cfg, LightDecoderConfig)  # diffusers has none
    fixed = {k: v for k, v in FIXED[architecture.component].items() if v is not None}
    if isinstance(cfg, VAEConfig):
        return fixed | {
            "_class_name": "AutoencoderKLWan",
            "base_dim": cfg.base,
            "z_dim": cfg.latent_channels,
            "dim_mult": list(cfg.multipliers),
            "num_res_blocks": cfg.blocks,
            "temperal_downsample": list(cfg.temporal_down),
            "latents_mean": list(architecture.latents_mean or ()),
            "latents_std": list(architecture.latents_std or ()),
        }
    facts = fixed | {
        "_class_name": "WanTransformer3DModel",
        "num_attention_heads": cfg.heads,
        "attention_head_dim": cfg.head_width,
        "in_channels": cfg.channels,
        "out_channels": cfg.channels,
        "text_dim": cfg.text_width,
        "freq_dim": cfg.frequencies,
        "ffn_dim": cfg.ffn_width,
        "num_layers": cfg.layers,
        # The default of diffusers.
        "rope_max_seq_len": 1024,
    }
    if cfg.context_every:
        facts["_class_name"] = "WanVACETransformer3DModel"
        facts["vace_layers"] = np.arange(0, cfg.layers, cfg.context_every).tolist()
        facts["vace_in_channels"] = cfg.context_channels
    return facts
