"""Architectures of public weights: recognised from tensor shapes and config.json, and written back.

`recognise` turns a source into an `Architecture`, which knows the public tensors that a component
has (`names`) and the parameters that they become. `diffusers_config` is the way back.
"""

import dataclasses
import functools
import math

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
from gnvc_jax.vae.config import WAN22, with_tuples

# Statistics of Wan2.1's and Wan2.2's latents, per channel (diffusers' configurations of the VAEs).
WAN_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
WAN_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)
WAN22_MEAN = (
    *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557),
    *(-0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825),
    *(-0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
    *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230),
    *(-0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748),
    *(0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
)
WAN22_STD = (
    *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013),
    *(0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978),
    *(0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
    *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093),
    *(0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887),
    *(0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
)

STATISTICS = {16: (WAN_MEAN, WAN_STD), 48: (WAN22_MEAN, WAN22_STD)}  # by the number of channels

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
    "vae": {"attn_scales": [], "dropout": 0.0},
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
    facts = source.facts
    names = {
        "original": ("encoder.conv1.weight", "conv2.bias", "decoder.head.0.gamma"),
        "diffusers": ("encoder.conv_in.weight", "post_quant_conv.bias", "decoder.norm_out.gamma"),
    }
    nested = {
        "original": "encoder.downsamples.0.downsamples.",
        "diffusers": "encoder.down_blocks.0.resnets.",
    }
    # Levels are modules of their own in Wan2.2 only, whose shortcuts have no tensors.
    shortcuts = any(name.startswith(nested[source.scheme]) for name in source.entries)
    plain = WAN22 if shortcuts else VAEConfig()
    first, last, norm = names[source.scheme]
    # Channels of the first convolution, of the last one before the decoder, and of the last norm.
    pixel = 3 * plain.patch**2
    base, pixel = _sizes(source, first, (plain.base, pixel, 3, 3, 3))[:2]
    # The bias of the 1x1x1 convolution before the decoder has one value per latent channel.
    z = _sizes(source, last, (plain.latent_channels,))[0]
    finest = _sizes(source, norm, (plain.decoder_widths[-1], 1, 1, 1))[0]
    multipliers = tuple(facts.get("dim_mult", plain.multipliers))
    decoder_base = finest // multipliers[0]
    config = VAEConfig(
        base=base,
        multipliers=multipliers,
        blocks=facts.get("num_res_blocks", plain.blocks),
        latent_channels=z,
        temporal_down=tuple(facts.get("temperal_downsample", plain.temporal_down)),
        patch=math.isqrt(pixel // 3),
        shortcuts=shortcuts,
        decoder_base=0 if decoder_base == base else decoder_base,
    )
    for key, value in _variant(config).items():
        if facts.get(key) not in (None, value):
            raise ValueError(f"{key} = {facts[key]!r}, but the tensors are those of {value!r}")
    # Wan-AI publishes the statistics in its program only, diffusers in its config.json.
    mean, std = STATISTICS.get(z, ((), ()))
    mean, std = facts.get("latents_mean", mean), facts.get("latents_std", std)
    if not len(mean) == len(std) == z:
        raise ValueError(
            f"{len(mean)} means and {len(std)} standard deviations for {z} latent channels"
        )
    return Architecture("vae", config, tuple(mean), tuple(std))


def _variant(cfg: VAEConfig) -> dict:
    """What distinguishes the VAEs of Wan2.1 and 2.2 in the configuration of diffusers."""
    return {
        "is_residual": cfg.shortcuts,
        "in_channels": 3 * cfg.patch**2,
        "out_channels": 3 * cfg.patch**2,
        "patch_size": cfg.patch,
        "decoder_base_dim": cfg.decoder_base or cfg.base,
        "scale_factor_spatial": cfg.stride,
        "scale_factor_temporal": cfg.temporal_stride,
    }


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
        # What is as in Wan2.1 is the default of diffusers.
        default = _variant(VAEConfig(base=cfg.base))
        variant = {k: v for k, v in _variant(cfg).items() if v != default[k]}
        sizes = {
            "_class_name": "AutoencoderKLWan",
            "base_dim": cfg.base,
            "z_dim": cfg.latent_channels,
            "dim_mult": list(cfg.multipliers),
            "num_res_blocks": cfg.blocks,
            "temperal_downsample": list(cfg.temporal_down),
            "latents_mean": list(architecture.latents_mean or ()),
            "latents_std": list(architecture.latents_std or ()),
        }
        return fixed | variant | sizes
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
        # The default of diffusers. Here rotary angles are computed for any length.
        "rope_max_seq_len": 1024,
    }
    if cfg.context_every:
        facts["_class_name"] = "WanVACETransformer3DModel"
        facts["vace_layers"] = np.arange(0, cfg.layers, cfg.context_every).tolist()
        facts["vace_in_channels"] = cfg.context_channels
    return facts
