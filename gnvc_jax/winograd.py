"""3x3 convolution of frames by Winograd's minimal filtering F(4x4, 3x3), in plain JAX operations.

4x4 outputs of a 3x3 convolution depend on a 6x6 tile of inputs and take 144 products. As products
of polynomials, evaluated at six points each way and interpolated, they take 36: each a sum of
inputs times a sum of weights. Over all tiles and channels, each of the 36 is a convolution in time
alone, that is, matrix products. On CPU this is about twice as fast as a direct convolution.

The points are 0, ±3/4, ±3/2 and infinity. The usual 0, ±1, ±2 lose four times the accuracy; with
these, float32 errors stay below 1e-5 of the largest output. bfloat16 would not bear it.
"""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = jax.Array

TILE, INPUTS, TAPS = 4, 6, 3  # outputs, inputs and weights of a tile, each way
STRIP = 8  # rows of tiles that are in memory at once in transformed form

P, Q = 0.75, 1.5
POINTS = np.array([0, P, -P, Q, -Q])  # and infinity, where only the highest power counts
P2, Q2 = P * P, Q * Q
# Values at the six points (rows) of the inputs of a tile and of the weights; outputs from products.
FROM_INPUT = np.array(
    [
        [P2 * Q2, 0, -P2 - Q2, 0, 1, 0],
        [0, -P * Q2, -Q2, P, 1, 0],
        [0, P * Q2, -Q2, -P, 1, 0],
        [0, -Q * P2, -P2, Q, 1, 0],
        [0, Q * P2, -P2, -Q, 1, 0],
        [0, P2 * Q2, 0, -P2 - Q2, 0, 1],
    ]
)
SCALE = np.array([P2 * Q2, *2 * [2 * P2 * (P2 - Q2)], *2 * [2 * Q2 * (Q2 - P2)]])
FROM_KERNEL = np.vstack([np.vander(POINTS, TAPS, increasing=True) / SCALE[:, None], [0, 0, 1]])
TO_OUTPUT = np.vstack([np.vander(POINTS, TILE, increasing=True), [0, 0, 0, 1]]).T


def _mix(matrix: np.ndarray, parts: list[Array]) -> list[Array]:
    """Matrix times a vector of arrays."""
    terms = ([float(m) * part for m, part in zip(row, parts) if m] for row in matrix)
    return [functools.reduce(operator.add, row) for row in terms]


def _convolve(x: Array, kernel: Array, padding: tuple[int, int]) -> Array:
    """x (b, t, h, w, c), kernel (kt, 3, 3, c, o) -> (b, sum(padding) + t - kt + 1, h, w, o).

    'Same' in space; in time, `padding` frames of zeros before and after. Works off strips of rows,
    each written into the output at once: what a strip takes in memory is a fraction of an image.
    """
    b, t, h, w, _ = x.shape
    kt, *_, o = kernel.shape
    rows, columns = -(-h // TILE), -(-w // TILE)
    strips = -(-rows // STRIP)
    rows = -(-rows // strips)  # of one strip
    edges = (1, strips * rows * TILE - h + 1), (1, columns * TILE - w + 1)
    # Every number of y is replaced. It starts from the newest of x, since what is known before, XLA
    # makes for all layers at once and keeps until their turn.
    shape = (b, sum(padding) + t - kt + 1, strips * rows * TILE, columns * TILE, o)
    y = jnp.full(shape, x[-1, -1, -1, -1, -1])
    x = jnp.pad(x, ((0, 0), (0, 0), *edges, (0, 0)))

    def strip(i: Array, y: Array) -> Array:
        part = lax.dynamic_slice_in_dim(x, i * rows * TILE, rows * TILE + TAPS - 1, axis=2)
        return lax.dynamic_update_slice_in_dim(
            y, _convolve_strip(part, kernel, padding), i * rows * TILE, axis=2
        )

    return lax.fori_loop(0, strips, strip, y)[:, :, :h, :w]


def _convolve_strip(x: Array, kernel: Array, padding: tuple[int, int]) -> Array:
    """As `_convolve`, 'valid' in space, for outputs that are whole tiles."""
    b, t, h, w, c = x.shape
    rows, columns = h // TILE, w // TILE

    def product(x: Array, kernel: Array) -> Array:
        """x (b, t, rows, columns, c), kernel (kt, c, o)"""
        x = x.reshape(b, t, rows * columns, c)
        y = lax.conv_general_dilated(
            x,
            kernel[:, None],
            window_strides=(1, 1),
            padding=(padding, (0, 0)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y.reshape(b, -1, rows, columns, y.shape[-1])

    # Rows first, then columns. The six points of the rows are stacked and looped over: written
    # out, the products are no faster and compilation takes three times as long.
    step = slice(None, None, TILE)
    lines = [x[:, :, i : i + TILE * rows - 3][:, :, step] for i in range(INPUTS)]
    lines = jnp.stack(_mix(FROM_INPUT, lines))  # (6, b, t, rows, w, c)
    inputs = [lines[..., j : j + TILE * columns - 3, :][..., step, :] for j in range(INPUTS)]
    inputs = _mix(FROM_INPUT, inputs)  # 6 of (6, b, t, rows, columns, c)

    def line(at: tuple[list[Array], Array]) -> list[Array]:
        """Outputs of the four columns at one point of the rows.

        Transforms the kernel itself: outside the loop, XLA would do so for all layers at once.
        """
        inputs, point = at
        weights = sum(point[i] * kernel[:, i] for i in range(TAPS))  # (kt, 3, c, o)
        weights = _mix(FROM_KERNEL, [weights[:, j] for j in range(TAPS)])
        return _mix(TO_OUTPUT, list(map(product, inputs, weights)))

    points = jnp.asarray(FROM_KERNEL, kernel.dtype)
    outputs = lax.map(line, (inputs, points))  # 4 columns of (6, b, t', rows, columns, o)
    outputs = zip(*(_mix(TO_OUTPUT, list(column)) for column in outputs))  # 4 rows of 4 columns
    y = jnp.stack([jnp.stack(row, axis=4) for row in outputs], axis=3)
    return y.reshape(b, -1, rows * TILE, columns * TILE, y.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def conv3d(x: Array, kernel: Array, zeros: int) -> Array:
    """As `gnvc_jax.convolution.conv3d`, for kernels (kt, 3, 3, c, o).

    The gradient of the input is the same algorithm with the kernel reversed; that of the kernel is
    a matrix product per tap.
    """
    return _convolve(x, kernel, (zeros, 0))


def _forward(x, kernel, zeros):
    return conv3d(x, kernel, zeros), (x, kernel)


def _backward(zeros, saved, dy):
    x, kernel = saved
    kt, _, _, c, o = kernel.shape
    _, t, h, w, _ = dy.shape
    dx = _convolve(dy, kernel[::-1, ::-1, ::-1].swapaxes(-1, -2), (kt - 1 - zeros, kt - 1))
    x = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))

    def tap(k: int, i: int, j: int) -> Array:
        seen = x[:, max(0, k - zeros) : k - zeros + t, i : i + h, j : j + w]
        return seen.reshape(-1, c).T @ dy[:, max(0, zeros - k) :].reshape(-1, o)

    dkernel = jnp.stack([tap(*at) for at in np.ndindex(kt, TAPS, TAPS)])
    return dx, dkernel.reshape(kernel.shape)


conv3d.defvjp(_forward, _backward)
