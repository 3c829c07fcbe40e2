"""The integer scale network: which probability table each symbol is coded with.

Everything that decides how a stream is parsed is computed here, from decoded integers and by
integer arithmetic: weights in -127..127, activations in 0..255, at most 512 inputs per output, so
every sum stays below 2**24 and is exact in float32, bfloat16 inputs with float32 sums, or int32, in
any order of summation. After each layer

    out = clip(((acc + bias) * mult + 2**(shift - 1)) >> shift, 0, limit)

in int32, with mult in 64..127 and acc + bias clipped to 2**24 - 1, so that the product stays below
2**31. Training runs the very same integers with straight-through gradients.

Design after integer networks for data compression (Balle, Johnston, Minnen, ICLR 2019).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jax import lax

from gnvc_jax.codec.config import KNOTS, SCALE_MAX, SCALE_MIN, SCALES, CodecConfig
from gnvc_jax.codec.layers import depthwise3x3
from gnvc_jax.codec.quality import interpolate_levels
from gnvc_jax.codec.quantise import bound, round_ste, straight_through

Array = jax.Array
ACC_LIMIT = 2**24 - 1
BIAS_UNIT = 4096.0  # integer bias per unit of the trained bias
INDEX_LIMIT = SCALES - 1


@dataclasses.dataclass(frozen=True)
class ScaleLayer:
    """Static facts of one layer of the network (see `scale_layers`)."""

    name: str
    inputs: int
    outputs: int
    per_quality: bool = False  # the bias depends on the quality level
    depthwise: bool = False
    upsample: bool = False  # depth to space by 2 after the layer
    last: bool = False

    @property
    def window(self) -> tuple[int, ...]:
        return (3, 3, self.outputs) if self.depthwise else (self.inputs, self.outputs)

    @property
    def limit(self) -> int:
        """Largest output."""
        return INDEX_LIMIT if self.last else 255

    @property
    def shift(self) -> int:
        """Keeps the output in range for random weights of a quarter of the full scale."""
        fan_in = 9 if self.depthwise else self.inputs
        spread = fan_in**0.5 * 32 * 96 * (4.0 if self.last else 1.0)
        return int(np.ceil(np.log2(spread)))

    @property
    def start(self) -> float:
        """First value of the bias parameter: outputs start around a quarter of their range."""
        return 0.25 * self.limit * 2.0**self.shift / 96 / BIAS_UNIT


def scale_layers(config: CodecConfig) -> tuple[ScaleLayer, ...]:
    """The layers, in order; the previous latent's integers join before P2."""
    c, y = config.scale_width, config.y_channels
    return (
        ScaleLayer("P0", config.z_channels, 4 * c, per_quality=True, upsample=True),
        ScaleLayer("D0", c, c, depthwise=True),
        ScaleLayer("P1", c, 4 * c, upsample=True),
        ScaleLayer("D1", c, c, depthwise=True),
        ScaleLayer("P2", c + 2 * y, c, per_quality=True),
        ScaleLayer("D2", c, c, depthwise=True),
        ScaleLayer("P3", c, y, per_quality=True, last=True),
    )


def sigma_from_index(index: Array) -> Array:
    """Standard deviation of table `index` (may be fractional): 0.11 * (16 / 0.11) ** (k / 63)."""
    return SCALE_MIN * jnp.exp(index * (np.log(SCALE_MAX / SCALE_MIN) / INDEX_LIMIT))


def scale_inputs(z, prev_y, prev_index):
    """Integers in 0..255 that enter the network: z, |previous symbols|, previous indices.

    Works on JAX and NumPy arrays alike: z in -15..15, prev_y in -127..127, prev_index in 0..63.
    """
    magnitude = (16 * abs(prev_y)).clip(0, 255)
    return 8 * (z + 16), magnitude, 4 * prev_index


def requantise(acc: Array, bias: Array, mult: Array, shift: int, limit: int) -> Array:
    """The rounding step of the module docstring, in int32. acc, bias, mult int32."""
    total = jnp.clip(acc + bias, -ACC_LIMIT, ACC_LIMIT)
    return jnp.clip((total * mult + (1 << (shift - 1))) >> shift, 0, limit)


class ScaleNetwork(nn.Module):
    """z, previous symbols and previous indices -> table index of every y element."""

    config: CodecConfig

    def setup(self):
        self.weights = {layer.name: self._integers(layer) for layer in scale_layers(self.config)}

    def _integers(self, layer: ScaleLayer) -> tuple[Array, Array, Array]:
        """Weights, bias and multiplier as integers in float32, with straight-through gradients."""
        bias_shape = ((KNOTS,) if layer.per_quality else ()) + (layer.outputs,)

        def param(name, init, shape):
            return self.param(f"{layer.name}_{name}", init, shape)

        kernel = param("kernel", nn.initializers.normal(0.25), layer.window)
        bias = param("bias", nn.initializers.constant(layer.start), bias_shape)
        bias = interpolate_levels(bias) if layer.per_quality else bias
        mult = param("mult", nn.initializers.zeros, (layer.outputs,))
        return (
            round_ste(bound(128.0 * kernel, -127.0, 127.0)),
            round_ste(bound(BIAS_UNIT * bias, -ACC_LIMIT / 2, ACC_LIMIT / 2)),
            round_ste(bound(96.0 * jnp.exp(mult), 64.0, 127.0)),
        )

    def __call__(self, q_index: Array, z: Array, prev_y: Array, prev_index: Array) -> Array:
        """Indices (b, h, w, y_channels), whole numbers 0..63 in float32.

        q_index (b,) int32; z (b, h/4, w/4, z_channels); prev_y, prev_index (b, h, w, y_channels):
        those of the previous latent, zeros for an intra latent. All values are integers (in
        float32); gradients pass straight through every rounding.
        """
        x, *previous = scale_inputs(z, prev_y, prev_index)
        for layer in scale_layers(self.config):
            kernel, bias, mult = self.weights[layer.name]
            if layer.name == "P2":
                x = jnp.concatenate([x, *previous], axis=-1)
            if layer.per_quality:
                bias = bias[q_index][:, None, None, :]
            if layer.depthwise:
                acc = depthwise3x3(x, kernel)
            else:
                acc = jnp.dot(x, kernel, precision="highest")
            exact = requantise(
                *(lax.stop_gradient(v).astype(jnp.int32) for v in (acc, bias, mult)),
                layer.shift,
                layer.limit,
            )
            soft = bound((acc + bias) * mult * 2.0**-layer.shift, 0.0, float(layer.limit))
            x = straight_through(exact, soft)
            if layer.upsample:
                x = rearrange(x, "b h w (i j c) -> b (h i) (w j) c", i=2, j=2)
        return x


def export(config: CodecConfig, params: dict) -> dict[str, np.ndarray]:
    """The trained network as integers: NAME_kernel int8, NAME_bias int32, NAME_mult int8."""
    weights = ScaleNetwork(config).bind({"params": params}).weights
    out = {}
    for layer in scale_layers(config):
        for part, value, dtype in zip(
            ("kernel", "bias", "mult"),
            weights[layer.name],
            (np.int8, np.int32, np.int8),
            strict=True,
        ):
            out[f"{layer.name}_{part}"] = np.asarray(value).astype(dtype)
    return out


def scale_index(
    config: CodecConfig,
    tables: dict[str, np.ndarray],
    q_index: Array,
    z: Array,
    prev_y: Array,
    prev_index: Array,
    *,
    dtype=jnp.float32,
) -> Array:
    """The exported network in JAX: uint8 indices (h, w, y_channels) of one latent.

    q_index int32 scalar, z (h/4, w/4, z_channels), prev_y and prev_index (h, w, y_channels), all
    integers. `dtype` is the type of the matmul inputs (float32, bfloat16 with float32 sums, or
    int32): the result does not depend on it.
    """
    sums = jnp.int32 if dtype == jnp.int32 else jnp.float32
    x, *previous = scale_inputs(*(v.astype(jnp.int32)[None] for v in (z, prev_y, prev_index)))
    for layer in scale_layers(config):
        kernel, bias, mult = (tables[f"{layer.name}_{p}"] for p in ("kernel", "bias", "mult"))
        if layer.name == "P2":
            x = jnp.concatenate([x, *previous], axis=-1)
        if layer.per_quality:
            bias = jnp.asarray(bias)[q_index]
        if layer.depthwise:
            acc = depthwise3x3(x, jnp.asarray(kernel, jnp.int32))
        else:
            acc = jnp.dot(
                x.astype(dtype),
                jnp.asarray(kernel).astype(dtype),
                precision="highest" if dtype == jnp.float32 else None,
                preferred_element_type=sums,
            ).astype(jnp.int32)
        x = requantise(
            acc, jnp.asarray(bias), jnp.asarray(mult, jnp.int32), layer.shift, layer.limit
        )
        if layer.upsample:
            x = rearrange(x, "b h w (i j c) -> b (h i) (w j) c", i=2, j=2)
    return x[0].astype(jnp.uint8)


def scale_index_numpy(config, tables, q_index, z, prev_y, prev_index) -> np.ndarray:
    """The exported network in NumPy int64: the reference, and the path of last resort."""
    x, *previous = scale_inputs(*(np.asarray(v).astype(np.int64) for v in (z, prev_y, prev_index)))
    for layer in scale_layers(config):
        kernel, bias, mult = (
            tables[f"{layer.name}_{p}"].astype(np.int64) for p in ("kernel", "bias", "mult")
        )
        if layer.name == "P2":
            x = np.concatenate([x, *previous], axis=-1)
        if layer.per_quality:
            bias = bias[q_index]
        if layer.depthwise:
            h, w, _ = x.shape
            x = np.pad(x, ((1, 1), (1, 1), (0, 0)))
            acc = sum(x[i : i + h, j : j + w] * kernel[i, j] for i in range(3) for j in range(3))
        else:
            acc = x @ kernel
        total = np.clip(acc + bias, -ACC_LIMIT, ACC_LIMIT)
        x = np.clip((total * mult + (1 << (layer.shift - 1))) >> layer.shift, 0, layer.limit)
        if layer.upsample:
            x = rearrange(x, "h w (i j c) -> (h i) (w j) c", i=2, j=2)
    return x.astype(np.uint8)
