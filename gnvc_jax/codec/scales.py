"""The integer scale network: which probability table each symbol is coded with.

Everything that decides how a stream is parsed is computed here, from decoded integers and by
integer arithmetic: weights in -127..127, activations in 0..255, at most 512 inputs per output, so
every sum stays below 2**24 and is exact in float32, in bfloat16 inputs with float32 sums, and in
int32, in any order of summation. After each layer

    out = clip(((acc + bias) * mult + 2**(shift - 1)) >> shift, 0, limit)

in int32, with mult in 64..127 and acc + bias clipped to 2**24 - 1, so that the product stays below
2**31.

`run_layers` is the network. It is written once; what differs between uses is the array library, how
matrices are multiplied, and how `requantise` passes gradients:

- `ScaleNetwork`: training, in float32 that holds integers, with straight-through gradients.
- `export`: its trained weights as small integers, which model files store.
- `scale_index`: the exported network in JAX, in the arithmetic that the device does best.
- `scale_index_numpy`: the same in NumPy's int64, the reference and the last resort.

Design after integer networks for data compression (Balle, Johnston, Minnen, ICLR 2019).
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float, Int, Shaped, UInt8

from gnvc_jax.arrays import AnyArray
from gnvc_jax.codec.config import KNOTS, SCALE_MAX, SCALE_MIN, SCALES, CodecConfig
from gnvc_jax.codec.layers import depth_to_space
from gnvc_jax.codec.quality import interpolate_levels
from gnvc_jax.codec.quantise import bound, round_ste, straight_through
from gnvc_jax.convolution import depthwise3x3

# Kernel, bias and multiplier of each layer by its name.
Weights = Mapping[str, tuple[Any, Any, Any]]

ACC_LIMIT = 2**24 - 1  # largest integer up to which float32 is exact
# In the full-size network a unit of the trained bias moves an output by 1.5 steps in the last layer
# and by up to 24 in the others.
BIAS_UNIT = 4096.0  # integer bias per unit of the trained bias
MULT_UNIT = 96.0  # integer multiplier at the start of training, in the middle of 64..127
INDEX_LIMIT = SCALES - 1


@dataclasses.dataclass(frozen=True)
class ScaleLayer:
    """Static description of one layer of the network (see `scale_layers`).

    Attributes:
        name: Prefix of the layer's parameters.
        inputs, outputs: Number of channels.
        per_quality: Whether the bias depends on the quality level.
        depthwise: A depthwise 3x3 convolution rather than a 1x1 convolution.
        joins: Whether the integers of the previous latent become inputs here.
        upsample: Whether four channels become 2x2 pixels after the layer.
        last: Whether the outputs are table indices.
    """

    name: str
    inputs: int
    outputs: int
    per_quality: bool = False
    depthwise: bool = False
    joins: bool = False
    upsample: bool = False
    last: bool = False

    @property
    def window(self) -> tuple[int, ...]:
        """Shape of the kernel."""
        return (3, 3, self.outputs) if self.depthwise else (self.inputs, self.outputs)

    @property
    def limit(self) -> int:
        """Largest output."""
        return INDEX_LIMIT if self.last else 255

    @property
    def shift(self) -> int:
        """Right shift that keeps outputs in range.

        It assumes weights of a quarter of full scale with random signs. A sum of n such products
        has a deviation of about sqrt(n) * 32 in units of the inputs. The range of the last layer is
        four times narrower.
        """
        # 32 is a quarter of the full scale of 127; kernels start with a deviation of 0.25 * 128.
        fan_in = 9 if self.depthwise else self.inputs
        deviation = fan_in**0.5 * 32 * MULT_UNIT * (4.0 if self.last else 1.0)
        return int(np.ceil(np.log2(deviation)))

    @property
    def start(self) -> float:
        """First value of the bias parameter: outputs start around a quarter of their range."""
        return 0.25 * self.limit * 2.0**self.shift / MULT_UNIT / BIAS_UNIT


def scale_layers(config: CodecConfig) -> tuple[ScaleLayer, ...]:
    """Layers of the network, in order.

    The hyperlatent is upsampled twice to the grid of y (P0 to D1), and then joined with the symbols
    and indices of the previous latent (P2).
    """
    # Grid sizes count from that of z, (h, w); y has (4h, 4w).
    c, y = config.scale_width, config.y_channels
    return (
        # -> (2h, 2w, c)
        ScaleLayer("P0", config.z_channels, 4 * c, per_quality=True, upsample=True),
        ScaleLayer("D0", c, c, depthwise=True),
        # -> (4h, 4w, c)
        ScaleLayer("P1", c, 4 * c, upsample=True),
        ScaleLayer("D1", c, c, depthwise=True),
        # The integers of the previous latent join here; D2 lets them move by a position.
        ScaleLayer("P2", c + 2 * y, c, per_quality=True, joins=True),
        ScaleLayer("D2", c, c, depthwise=True),
        # -> (4h, 4w, cy), table indices
        ScaleLayer("P3", c, y, per_quality=True, last=True),
    )


def sigma_from_index(index: Shaped[AnyArray, "*shape"]) -> Float[Array, "*shape"]:
    """Standard deviation of a table: 0.11 * (16 / 0.11) ** (index / 63); fractions interpolate."""
    return SCALE_MIN * jnp.exp(index * (np.log(SCALE_MAX / SCALE_MIN) / INDEX_LIMIT))


def scale_inputs(
    z: Shaped[AnyArray, "*b h w cz"],
    prev_y: Shaped[AnyArray, "*b h2 w2 cy"],
    prev_index: Shaped[AnyArray, "*b h2 w2 cy"],
) -> tuple[Any, Any, Any]:
    """Maps what the network sees to integers in 0..255.

    Args:
        z: Hyperlatent symbols in -15..15.
        prev_y: Symbols of the previous latent in -127..127; only their magnitude matters.
        prev_index: Table indices of the previous latent in 0..63.
    """
    # All three fit into eight bits, which bfloat16 holds exactly: z gives 8..248, indices give
    # 0..252, and magnitudes above 15 saturate.
    magnitude = (16 * abs(prev_y)).clip(0, 255)
    return 8 * (z + 16), magnitude, 4 * prev_index


def requantise(acc: AnyArray, bias: AnyArray, mult: AnyArray, shift: int, limit: int) -> AnyArray:
    """Brings accumulators to the range of activations, as the module docstring says.

    Args:
        acc: Sums of products, integers of at least 32 bits.
        bias, mult: Bias and multiplier of each channel.
        shift, limit: Properties of the layer.
    """
    # |total| < 2**24 and mult < 2**7, so the product and the rounding term fit into int32. The
    # arithmetic shift rounds down for either sign, in NumPy as in XLA; the clip at 0 is the ReLU.
    total = (acc + bias).clip(-ACC_LIMIT, ACC_LIMIT)
    return ((total * mult + (1 << (shift - 1))) >> shift).clip(0, limit)


def run_layers(
    config: CodecConfig,
    weights: Weights,
    q_index: int | Int[AnyArray, "*b"],
    z: Shaped[AnyArray, "*b h w cz"],
    prev_y: Shaped[AnyArray, "*b 4*h 4*w cy"],
    prev_index: Shaped[AnyArray, "*b 4*h 4*w cy"],
    *,
    matmul: Callable[..., Any],
    requantise: Callable[..., Any],
    xp: ModuleType,
) -> Any:
    """Runs the network, for training as for coding.

    Args:
        config: Sizes of the codec.
        weights: Integers, in any type that holds them exactly.
        q_index: Quality level.
        z, prev_y, prev_index: See `scale_inputs`; an intra latent has zeros for the previous one.
        matmul: Multiplies activations (..., n) with a kernel (n, m), exactly.
        requantise: Function that does what the one of this name says.
        xp: `numpy` or `jax.numpy`.

    Returns:
        The table index of every element of y, (*b, 4 * h, 4 * w, cy), in the type that
        `requantise` returns.
    """
    # x: (*b, h, w, cz); what was previous has the grid of y and waits for layer P2.
    x, *previous = scale_inputs(z, prev_y, prev_index)
    for layer in scale_layers(config):
        kernel, bias, mult = weights[layer.name]
        if layer.joins:
            x = xp.concatenate([x, *previous], axis=-1)
        if layer.per_quality:
            # In training q_index is (b,), in coding a scalar.
            bias = bias[q_index][..., None, None, :]  # (*b, 1, 1, outputs)
        # At most 512 products below 127 * 255: |acc| < 2**24, so the order of summation is free.
        acc = depthwise3x3(x, kernel) if layer.depthwise else matmul(x, kernel)
        # Back to 0..limit, so that the bound holds for the next layer.
        x = requantise(acc, bias, mult, layer.shift, layer.limit)
        if layer.upsample:
            x = depth_to_space(x)
    return x


def requantise_straight_through(
    acc: Array, bias: Array, mult: Array, shift: int, limit: int
) -> Array:
    """Requantises integers held in float32, with the gradient of the formula without rounding."""
    # (acc + bias) * mult needs up to 31 bits; float32 has 24, so the value comes from int32 and
    # only the gradient from float32.
    whole = [lax.stop_gradient(v).astype(jnp.int32) for v in (acc, bias, mult)]
    soft = bound((acc + bias) * mult * 2.0**-shift, 0.0, float(limit))
    rounded = requantise(whole[0], whole[1], whole[2], shift, limit)
    return straight_through(rounded, soft)


class ScaleNetwork(nn.Module):
    """The network in training form: z, previous symbols and previous indices -> table indices."""

    config: CodecConfig

    def setup(self) -> None:
        self.weights = {layer.name: self._integers(layer) for layer in scale_layers(self.config)}

    def _integers(self, layer: ScaleLayer) -> tuple[Array, Array, Array]:
        """Kernel, bias and multiplier as integers in float32, with straight-through gradients.

        The trained parameters are of order 1; the units (128, BIAS_UNIT, MULT_UNIT) make them
        integers, so that one learning rate suits them and other parameters alike.
        """
        bias_shape = ((KNOTS,) if layer.per_quality else ()) + (layer.outputs,)

        def param(name: str, init: nn.initializers.Initializer, shape: tuple[int, ...]) -> AnyArray:
            return self.param(f"{layer.name}_{name}", init, shape)

        kernel = param("kernel", nn.initializers.normal(0.25), layer.window)
        bias = param("bias", nn.initializers.constant(layer.start), bias_shape)
        bias = interpolate_levels(bias) if layer.per_quality else bias
        mult = param("mult", nn.initializers.zeros, (layer.outputs,))
        return (
            round_ste(bound(128.0 * kernel, -127.0, 127.0)),
            # Half the limit, so that the sum with an accumulator rarely reaches it.
            round_ste(bound(BIAS_UNIT * bias, -ACC_LIMIT / 2, ACC_LIMIT / 2)),
            # Shifts scale by powers of two; a range of two for the multiplier fills in between.
            round_ste(bound(MULT_UNIT * jnp.exp(mult), 64.0, 127.0)),
        )

    def __call__(
        self,
        q_index: Int[Array, " b"],
        z: Float[Array, "b h w cz"],
        prev_y: Float[Array, "b 4*h 4*w cy"],
        prev_index: Float[Array, "b 4*h 4*w cy"],
    ) -> Float[Array, "b 4*h 4*w cy"]:
        """Table indices, whole numbers 0..63; arguments as for `run_layers`, held in float32."""
        return run_layers(
            self.config, self.weights, q_index, z, prev_y, prev_index,
            matmul=lambda x, kernel: jnp.dot(x, kernel, precision="highest"),
            requantise=requantise_straight_through,
            xp=jnp,
        )  # fmt: skip


def export(config: CodecConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Exports a trained network as integers.

    Args:
        config: Sizes of the codec.
        params: Parameters of a `ScaleNetwork`.

    Returns:
        For each layer NAME: NAME_kernel int8, NAME_bias int32 and NAME_mult int8.
    """
    weights = ScaleNetwork(config).bind({"params": params}).weights
    out = {}
    for layer in scale_layers(config):
        # All fit: kernels are in -127..127, multipliers in 64..127, biases at most 2**23.
        kernel, bias, mult = map(np.asarray, weights[layer.name])
        out[f"{layer.name}_kernel"] = kernel.astype(np.int8)
        out[f"{layer.name}_bias"] = bias.astype(np.int32)
        out[f"{layer.name}_mult"] = mult.astype(np.int8)
    return out


def _weights_of(
    config: CodecConfig, tables: Mapping[str, AnyArray], xp: ModuleType, dtype: Any
) -> Weights:
    """Groups the exported integers by layer and converts them to one type."""
    return {
        layer.name: tuple(
            xp.asarray(tables[f"{layer.name}_{part}"], dtype) for part in ("kernel", "bias", "mult")
        )
        for layer in scale_layers(config)
    }


def scale_index(
    config: CodecConfig,
    tables: Mapping[str, AnyArray],
    q_index: int | Int[AnyArray, ""],
    z: Int[AnyArray, "h w cz"],
    prev_y: Int[AnyArray, "4*h 4*w cy"],
    prev_index: Int[AnyArray, "4*h 4*w cy"],
    *,
    dtype: Any = jnp.float32,
) -> UInt8[Array, "4*h 4*w cy"]:
    """Computes the table indices of one latent by the exported network, in JAX.

    Args:
        config: Sizes of the codec.
        tables: Integers of the network, see `export`.
        q_index: Quality level.
        z, prev_y, prev_index: See `scale_inputs`; an intra latent has zeros for the previous one.
        dtype: Type of the factors of matrix products: float32, bfloat16 (with float32 sums) or
            int32. The result does not depend on it.
    """

    def matmul(x: Array, kernel: Array) -> Array:
        # Only the matrix products run in `dtype`; depthwise layers and `requantise` stay in int32.
        products = jnp.dot(
            x.astype(dtype),
            kernel.astype(dtype),
            # Otherwise TPUs and GPUs may round float32 inputs to fewer bits.
            precision="highest" if dtype == jnp.float32 else None,
            preferred_element_type=jnp.int32 if dtype == jnp.int32 else jnp.float32,
        )
        return products.astype(jnp.int32)

    # The integers that a stream holds, in int32; a latent has no batch axis here.
    inputs = (jnp.asarray(v, jnp.int32) for v in (z, prev_y, prev_index))
    weights = _weights_of(config, tables, jnp, jnp.int32)
    index = run_layers(
        config, weights, q_index, *inputs, matmul=matmul, requantise=requantise, xp=jnp
    )
    return index.astype(jnp.uint8)


def scale_index_numpy(
    config: CodecConfig,
    tables: Mapping[str, np.ndarray],
    q_index: int,
    z: Int[np.ndarray, "h w cz"],
    prev_y: Int[np.ndarray, "4*h 4*w cy"],
    prev_index: Int[np.ndarray, "4*h 4*w cy"],
) -> UInt8[np.ndarray, "4*h 4*w cy"]:
    """Does the same as `scale_index` in NumPy's int64: the reference and the last resort."""
    inputs = (np.asarray(v, np.int64) for v in (z, prev_y, prev_index))
    weights = _weights_of(config, tables, np, np.int64)
    index = run_layers(
        config, weights, q_index, *inputs, matmul=np.matmul, requantise=requantise, xp=np
    )
    return index.astype(np.uint8)
