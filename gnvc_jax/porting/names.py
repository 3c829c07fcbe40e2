"""Names and shapes of the public tensors of Wan2.1 and 2.2, and the parameters that they become.

Two naming schemes are known: "original" is that of the files of Wan-AI, "diffusers" that of
diffusers. Beware: the affine norm before cross-attention is `norm3` in the original scheme and
`norm2` in that of diffusers; the other two norms of a block have no parameters.

Layouts: kernels (out, in, *window) become (*window, in, out), flattened to two dimensions where the
layer is a matrix product here; everything else is only reshaped.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from gnvc_jax.errors import UsageError
from gnvc_jax.refiner import DiTConfig
from gnvc_jax.refiner.config import PATCH
from gnvc_jax.vae import LightDecoderConfig, VAEConfig

SCHEMES = ("original", "diffusers")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One public tensor.

    Attributes:
        original: Name in the original scheme.
        diffusers: Name in the scheme of diffusers.
        path: Path of the parameter that it becomes.
        shape: Shape of the public tensor.
        index: Row of the parameter, for parameters of layers that are scanned over.
    """

    original: str
    diffusers: str
    path: str
    shape: tuple[int, ...]
    index: int | None = None

    def name(self, scheme: str) -> str:
        """Returns the name in a scheme; raises AttributeError for an unknown scheme."""
        return getattr(self, scheme)

    def forward(self, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Converts the public array to the layout of the parameter.

        Args:
            array: Public array of shape `self.shape`.
            shape: Shape of the parameter, or of one of its rows.
        """
        if self.path.endswith("kernel"):
            # (out, in, *window) -> (*window, in, out).
            array = np.moveaxis(array, (0, 1), (-1, -2))
        return array.reshape(shape)

    def inverse(self, array: np.ndarray) -> np.ndarray:
        """Inverts `forward`, bit for bit."""
        if not self.path.endswith("kernel"):
            return array.reshape(self.shape)
        out, inner, *window = self.shape
        array = np.moveaxis(array.reshape(*window, inner, out), (-1, -2), (0, 1))
        return np.ascontiguousarray(array)


def layer(
    original: str,
    diffusers: str,
    path: str,
    shape: tuple[int, ...],
    index: int | None = None,
) -> Iterator[Tensor]:
    """Yields kernel and bias of a layer.

    Args:
        original: Name of the layer in the original scheme.
        diffusers: Name of the layer in the scheme of diffusers.
        path: Path of the layer's parameters.
        shape: Shape of the public kernel, (out, in, *window).
        index: Row of the parameters, if the layer is scanned over.
    """
    for theirs, ours, size in (("weight", "kernel", shape), ("bias", "bias", shape[:1])):
        names = f"{original}.{theirs}", f"{diffusers}.{theirs}", f"{path}/{ours}"
        yield Tensor(*names, size, index)


def dit_tensors(cfg: DiTConfig) -> list[Tensor]:
    """All tensors of the DiT, including those of VACE's adapter if it has one."""
    d, patch = cfg.width, (1, PATCH, PATCH)
    condition = "condition_embedder."

    def top(original: str, diffusers: str, path: str, *shape: int) -> Iterator[Tensor]:
        return layer(original, diffusers, path, shape)

    tensors = [
        *top("patch_embedding", "patch_embedding", "patch_embedding", d, cfg.channels, *patch),
        *top(
            "text_embedding.0",
            condition + "text_embedder.linear_1",
            "text_in",
            d,
            cfg.text_width,
        ),
        *top("text_embedding.2", condition + "text_embedder.linear_2", "text_out", d, d),
        *top(
            "time_embedding.0",
            condition + "time_embedder.linear_1",
            "time_in",
            d,
            cfg.frequencies,
        ),
        *top("time_embedding.2", condition + "time_embedder.linear_2", "time_out", d, d),
        *top("time_projection.1", condition + "time_proj", "time_modulation", 6 * d, d),
        # Offsets of shift and scale; blocks have six, with gates for attention and feed-forward.
        Tensor("head.modulation", "scale_shift_table", "head_modulation", (1, 2, d)),
        *top("head.head", "proj_out", "head", PATCH**2 * cfg.channels, d),
    ]
    for i in range(cfg.layers):
        # Block i is number k of its group; the groups are rows of the scanned parameters.
        group, k = divmod(i, cfg.group_size)
        tensors += block(cfg, f"blocks.{i}", f"groups/block_{k}", group)
    if cfg.context_every:
        name = "vace_patch_embedding"
        tensors += top(name, name, "context_embedding", d, cfg.context_channels, *patch)
        first = "vace_blocks.0."
        tensors += top(first + "before_proj", first + "proj_in", "context_in", d, d)
        for i in range(cfg.groups):
            name = f"vace_blocks.{i}"
            tensors += block(cfg, name, "groups/context", i)
            out = f"{name}.after_proj", f"{name}.proj_out", "groups/context_out"
            tensors += layer(*out, (d, d), i)
    return tensors


def block(cfg: DiTConfig, name: str, path: str, index: int) -> Iterator[Tensor]:
    """Yields the tensors of one transformer block."""
    d = cfg.width
    table = f"{name}.modulation", f"{name}.scale_shift_table", f"{path}/modulation"
    yield Tensor(*table, (1, 6, d), index)
    for theirs, public, ours in (
        ("self_attn", "attn1", "self_attention"),
        ("cross_attn", "attn2", "cross_attention"),
    ):
        # All four map from width to width, heads side by side.
        for old, new in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0")):
            names = f"{name}.{theirs}.{old}", f"{name}.{public}.{new}", f"{path}/{ours}/{old}"
            yield from layer(*names, (d, d), index)
        for norm in ("norm_q", "norm_k"):
            names = f"{name}.{theirs}.{norm}.weight", f"{name}.{public}.{norm}.weight"
            yield Tensor(*names, f"{path}/{ours}/{norm}/scale", (d,), index)
    for theirs, ours in (("weight", "cross_scale"), ("bias", "cross_bias")):
        names = f"{name}.norm3.{theirs}", f"{name}.norm2.{theirs}", f"{path}/{ours}"
        yield Tensor(*names, (d,), index)
    f = cfg.ffn_width
    yield from layer(f"{name}.ffn.0", f"{name}.ffn.net.0.proj", f"{path}/ffn_in", (f, d), index)
    yield from layer(f"{name}.ffn.2", f"{name}.ffn.net.2", f"{path}/ffn_out", (d, f), index)


def vae_tensors(cfg: VAEConfig) -> list[Tensor]:
    """Lists all tensors of the VAE.

    Raises:
        UsageError: If the VAE is linear.
    """
    if cfg.linear:
        raise UsageError("a linear VAE has no public names")
    z, window, pixel = cfg.latent_channels, (3, 3, 3), 3 * cfg.patch**2
    tensors = [
        *layer("conv1", "quant_conv", "quant", (2 * z, 2 * z, 1, 1, 1)),
        *layer("conv2", "post_quant_conv", "post_quant", (z, z, 1, 1, 1)),
    ]

    part, widths = "encoder", cfg.widths
    names = "encoder.conv1", "encoder.conv_in", "encoder/conv_in"
    tensors += layer(*names, (widths[0], pixel, *window))
    for level, (inner, outer) in enumerate(zip((widths[0], *widths), widths)):
        for i in range(cfg.blocks):
            names = down_names(cfg, level, i)
            path = f"{part}/level{level}_block{i}"
            tensors += residual(*names, path, inner if i == 0 else outer, outer)
        if level < len(widths) - 1:
            names, path = down_names(cfg, level, cfg.blocks), f"{part}/level{level}"
            tensors += resample(*names, path, "down", outer, outer)
            if cfg.temporal_down[level]:
                tensors += time_conv(*names, path, outer, outer)
    tensors += middle_and_head(part, widths[-1], 2 * z)

    # Decoder: levels in reverse, with one residual block more. `inner` is what a block is given.
    part, widths, temporal = "decoder", cfg.decoder_widths, cfg.temporal_down[::-1]
    tensors += layer("decoder.conv1", "decoder.conv_in", "decoder/conv_in", (widths[0], z, *window))
    inner = widths[0]
    for level, width in enumerate(widths):
        for i in range(cfg.blocks + 1):
            names = up_names(cfg, level, i)
            tensors += residual(*names, f"{part}/level{level}_block{i}", inner, width)
            inner = width
        if level < len(widths) - 1:
            names, path = up_names(cfg, level, cfg.blocks + 1), f"{part}/level{level}"
            if temporal[level]:
                tensors += time_conv(*names, path, width, 2 * width)
            # Without shortcuts, an up-sampling halves the channels, so the next level begins with
            # half of them.
            inner = width if cfg.shortcuts else width // 2
            tensors += resample(*names, path, "up", width, inner)
    return tensors + list(middle_and_head(part, widths[0], pixel, widths[-1]))


def down_names(cfg: VAEConfig, level: int, place: int) -> tuple[str, str]:
    """Names of part `place` of a level of the encoder: a residual block, after them the sampling.

    Wan2.1 numbers the parts of all levels through; Wan2.2, with shortcuts, has a module per level.
    """
    if not cfg.shortcuts:
        place += level * (cfg.blocks + 1)
        return f"encoder.downsamples.{place}", f"encoder.down_blocks.{place}"
    public = f"resnets.{place}" if place < cfg.blocks else "downsampler"
    original = f"encoder.downsamples.{level}.downsamples.{place}"
    return original, f"encoder.down_blocks.{level}.{public}"


def up_names(cfg: VAEConfig, level: int, place: int) -> tuple[str, str]:
    """Names of part `place` of a level of the decoder, as `down_names` gives the encoder's."""
    parts = cfg.blocks + 1  # residual blocks
    if cfg.shortcuts:
        original, sampling = f"decoder.upsamples.{level}.upsamples.{place}", "upsampler"
    else:
        original, sampling = f"decoder.upsamples.{level * (parts + 1) + place}", "upsamplers.0"
    public = f"resnets.{place}" if place < parts else sampling
    return original, f"decoder.up_blocks.{level}.{public}"


def light_decoder_tensors(cfg: LightDecoderConfig) -> list[Tensor]:
    """Lists all tensors of a light decoder. TAEHV's names are the same in both schemes."""

    def conv(name: str, path: str, *shape: int) -> Iterator[Tensor]:
        return layer(name, name, path, shape)

    # A sequence: limit 0, convolution 1, ReLU 2, then the levels.
    place, window = 3, (3, 3)
    tensors = [*conv("decoder.1", "conv_in", cfg.widths[0], cfg.latent_channels, *window)]
    for level, (c, outer) in enumerate(zip(cfg.widths, cfg.widths[1:])):
        for i in range(cfg.blocks):
            # Places in a block: convolutions 0, 2 and 4, ReLU between them.
            for k, inner in enumerate((2 * c, c, c)):
                path = f"level{level}_block{i}/conv{k}"
                tensors += conv(f"decoder.{place + i}.conv.{2 * k}", path, c, inner, *window)
        place += cfg.blocks + 1  # the doubling, which has no parameters
        for name, path, shape in (
            ("conv.weight", "grow/kernel", (c * (1 + cfg.temporal_up[level]), c, 1, 1)),
            ("weight", "kernel", (outer, c, *window)),
        ):
            name = f"decoder.{place}.{name}"
            tensors.append(Tensor(name, name, f"level{level}_up/{path}", shape))
            place += 1
    # ReLU, convolution.
    return tensors + list(conv(f"decoder.{place + 1}", "conv_out", 3, cfg.widths[-1], *window))


def residual(original: str, diffusers: str, path: str, inner: int, outer: int) -> Iterator[Tensor]:
    """Yields the tensors of a residual block from `inner` to `outer` channels."""
    # Places in the original's sequence: norm 0, SiLU 1, convolution 2, norm 3, SiLU 4, dropout 5,
    # convolution 6.
    for place, norm, width in ((0, "norm1", inner), (3, "norm2", outer)):
        names = f"{original}.residual.{place}.gamma", f"{diffusers}.{norm}.gamma"
        yield Tensor(*names, f"{path}/{norm}/gamma", (width, 1, 1, 1))
    for place, conv, width in ((2, "conv1", inner), (6, "conv2", outer)):
        names = f"{original}.residual.{place}", f"{diffusers}.{conv}", f"{path}/{conv}"
        yield from layer(*names, (outer, width, 3, 3, 3))
    if inner != outer:
        names = f"{original}.shortcut", f"{diffusers}.conv_shortcut", f"{path}/shortcut"
        yield from layer(*names, (outer, inner, 1, 1, 1))


def resample(
    original: str, diffusers: str, path: str, kind: str, inner: int, outer: int
) -> Iterator[Tensor]:
    """Yields the tensors of the convolution that changes the resolution."""
    names = f"{original}.resample.1", f"{diffusers}.resample.1", f"{path}_{kind}"
    return layer(*names, (outer, inner, 3, 3))


def time_conv(original: str, diffusers: str, path: str, inner: int, outer: int) -> Iterator[Tensor]:
    """Yields the tensors of the convolution over time that changes the frame rate."""
    names = f"{original}.time_conv", f"{diffusers}.time_conv", f"{path}_time"
    return layer(*names, (outer, inner, 3, 1, 1))


def middle_and_head(
    part: str, width: int, outputs: int, head_width: int | None = None
) -> Iterator[Tensor]:
    """Yields the tensors of the middle blocks, of width `width`, and of the head.

    Args:
        part: "encoder" or "decoder".
        width: Channels of the middle blocks.
        outputs: Output channels of the head.
        head_width: Input channels of the head; `width` if None.
    """
    middle, blocks = f"{part}.middle", f"{part}.mid_block"
    yield from residual(
        f"{middle}.0", f"{blocks}.resnets.0", f"{part}/middle/block_0", width, width
    )
    theirs, public, path = f"{middle}.1", f"{blocks}.attentions.0", f"{part}/middle/attention"
    yield Tensor(
        f"{theirs}.norm.gamma", f"{public}.norm.gamma", f"{path}/norm/gamma", (width, 1, 1)
    )
    for name, size in (("to_qkv", 3 * width), ("proj", width)):
        names = f"{theirs}.{name}", f"{public}.{name}", f"{path}/{name}"
        yield from layer(*names, (size, width, 1, 1))
    yield from residual(
        f"{middle}.2", f"{blocks}.resnets.1", f"{part}/middle/block_1", width, width
    )
    width = head_width or width
    names = f"{part}.head.0.gamma", f"{part}.norm_out.gamma", f"{part}/head/norm/gamma"
    yield Tensor(*names, (width, 1, 1, 1))
    names = f"{part}.head.2", f"{part}.conv_out", f"{part}/head/conv"
    yield from layer(*names, (outputs, width, 3, 3, 3))
