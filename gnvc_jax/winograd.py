"""3x3 convolution of frames by Winograd's minimal filtering F(4x4, 3x3), in plain JAX operations.

4x4 outputs of a 3x3 convolution depend on a 6x6 tile of inputs and take 144 multiplications. As
products of polynomials, evaluated at six points in each direction and interpolated, they take 36:
each a sum of inputs times a sum of weights. Over all tiles and channels, each of the 36 is a
convolution in time alone, that is, matrix products. On CPU this is about twice as fast as a direct
convolution; `gnvc_jax.convolution` decides when it is used.

The points are 0, ±3/4, ±3/2 and infinity. The usual 0, ±1, ±2 lose four times the accuracy; with
these, float32 errors stay below 1e-5 of the largest output. bfloat16 is too coarse for either.

Source: Lavin and Gray 2016 (arXiv 1509.09308) for the algorithm; the matrices follow from the
points by the Toom-Cook construction.
"""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

TILE, INPUTS, TAPS = 4, 6, 3  # outputs, inputs and weights of a tile in each direction
STRIP = 8  # rows of tiles that are in memory at once in transformed form

P, Q = 0.75, 1.5
POINTS = np.array([0, P, -P, Q, -Q])  # and infinity, where only the highest power counts
P2, Q2 = P * P, Q * Q
# Inputs of a tile, and weights, to values at the six points (rows); products at the points to
# outputs. B^T, G and A^T in the notation of Lavin and Gray.
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
# Product of the differences to the other points, by which interpolation divides; here the kernel
# takes the division.
SCALE = np.array([P2 * Q2, *2 * [2 * P2 * (P2 - Q2)], *2 * [2 * Q2 * (Q2 - P2)]])
# (6, 3): powers 0 to 2 of each point; (4, 6) below: powers 0 to 3. Infinity has the last alone.
FROM_KERNEL = np.vstack([np.vander(POINTS, TAPS, increasing=True) / SCALE[:, None], [0, 0, 1]])
TO_OUTPUT = np.vstack([np.vander(POINTS, TILE, increasing=True), [0, 0, 0, 1]]).T


def _mix(matrix: np.ndarray, parts: list[Array]) -> list[Array]:
    """Multiplies a matrix with a vector of arrays; skips zeros, a third of all entries."""
    terms = ([float(m) * part for m, part in zip(row, parts) if m] for row in matrix)
    return [functools.reduce(operator.add, row) for row in terms]


def _convolve(x: Array, kernel: Array, padding: tuple[int, int]) -> Array:
    """Convolves, 'same' in space.

    It works in strips of rows, each written into the output at once, so that the transformed inputs
    take a fraction of the memory of a frame.

    Args:
        x: Frames (b, t, h, w, c).
        kernel: Kernel (kt, 3, 3, c, o).
        padding: Number of zero frames before and after x.

    Returns:
        Frames (b, sum(padding) + t - kt + 1, h, w, o).
    """
    b, t, h, w, _ = x.shape
    kt, *_, o = kernel.shape
    # Tiles of 4x4 outputs, rounded up, and strips of tile rows of about equal height.
    rows, columns = -(-h // TILE), -(-w // TILE)
    strips = -(-rows // STRIP)
    rows = -(-rows // strips)  # of tiles in one strip
    # One zero row and column around the frame, and more below and right to fill the last tiles.
    edges = (1, strips * rows * TILE - h + 1), (1, columns * TILE - w + 1)
    # Every element of y is overwritten. The initial value depends on x, because XLA creates arrays
    # that depend on nothing for all layers at once and keeps them until they are used.
    shape = (b, sum(padding) + t - kt + 1, strips * rows * TILE, columns * TILE, o)
    y = jnp.full(shape, x[-1, -1, -1, -1, -1])
    x = jnp.pad(x, ((0, 0), (0, 0), *edges, (0, 0)))

    def strip(i: Array, y: Array) -> Array:
        # Strips overlap by two rows of input, as 3x3 kernels require.
        part = lax.dynamic_slice_in_dim(x, i * rows * TILE, rows * TILE + TAPS - 1, axis=2)
        return lax.dynamic_update_slice_in_dim(
            y, _convolve_strip(part, kernel, padding), i * rows * TILE, axis=2
        )

    return lax.fori_loop(0, strips, strip, y)[:, :, :h, :w]


def _convolve_strip(x: Array, kernel: Array, padding: tuple[int, int]) -> Array:
    """Convolves one strip, 'valid' in space; the sizes of the output are multiples of TILE."""
    b, t, h, w, c = x.shape
    rows, columns = h // TILE, w // TILE

    def product(x: Array, kernel: Array) -> Array:
        """Convolves one of the 36 in time: x (b, t, rows, columns, c), kernel (kt, c, o)."""
        # Time takes the place of rows in a 2-D convolution whose other axis has a kernel of 1.
        x = x.reshape(b, t, rows * columns, c)
        y = lax.conv_general_dilated(
            x,
            kernel[:, None],
            window_strides=(1, 1),
            padding=(padding, (0, 0)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y.reshape(b, -1, rows, columns, y.shape[-1])

    # Rows first, then columns. The six points of the rows are stacked and looped over: unrolled,
    # the products are no faster and compilation takes three times as long.
    step = slice(None, None, TILE)
    # Row i of every tile, at distances of 4; tiles of 6 inputs overlap by 2.
    lines = [x[:, :, i : i + TILE * rows - 3][:, :, step] for i in range(INPUTS)]
    lines = jnp.stack(_mix(FROM_INPUT, lines))  # (6, b, t, rows, w, c)
    inputs = [lines[..., j : j + TILE * columns - 3, :][..., step, :] for j in range(INPUTS)]
    inputs = _mix(FROM_INPUT, inputs)  # 6 of (6, b, t, rows, columns, c)

    def line(at: tuple[list[Array], Array]) -> list[Array]:
        """Outputs of the four columns at one point of the rows.

        The kernel is transformed here: outside the loop, XLA would do it for all layers at once and
        keep the results.
        """
        # Of one point: 6 arrays (b, t, rows, columns, c), and its row of FROM_KERNEL, (3,).
        inputs, point = at
        rows = (point[i] * kernel[:, i] for i in range(TAPS))
        weights = functools.reduce(operator.add, rows)  # (kt, 3, c, o)
        # 6 of (kt, c, o), one for each point of the columns.
        weights = _mix(FROM_KERNEL, [weights[:, j] for j in range(TAPS)])
        return _mix(TO_OUTPUT, list(map(product, inputs, weights)))

    points = jnp.asarray(FROM_KERNEL, kernel.dtype)
    outputs = lax.map(line, (inputs, points))  # 4 columns of (6, b, t', rows, columns, o)
    outputs = zip(*(_mix(TO_OUTPUT, list(column)) for column in outputs))  # 4 rows of 4 columns
    # (b, t', rows, 4, columns, 4, o), which is the image once the axes are merged.
    y = jnp.stack([jnp.stack(row, axis=4) for row in outputs], axis=3)
    return y.reshape(b, -1, rows * TILE, columns * TILE, y.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def conv3d(
    x: Float[Array, "b t h w c"], kernel: Float[Array, "kt 3 3 c o"], zeros: int
) -> Float[Array, "b t2 h w o"]:
    """Does the same as `gnvc_jax.convolution.conv3d`, for 3x3 kernels.

    The gradient of the input is the same algorithm with the kernel reversed; that of the kernel is
    a matrix product per tap.
    """
    # With a gradient of its own, nothing but x and the kernel is kept for the backward pass.
    return _convolve(x, kernel, (zeros, 0))


def _forward(x: Array, kernel: Array, zeros: int) -> tuple[Array, tuple[Array, Array]]:
    return conv3d(x, kernel, zeros), (x, kernel)


def _backward(zeros: int, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = saved
    kt, _, _, c, o = kernel.shape
    _, t, h, w, _ = dy.shape
    # Every input was seen through the kernel reversed. The padding makes as many frames as x has.
    dx = _convolve(dy, kernel[::-1, ::-1, ::-1].swapaxes(-1, -2), (kt - 1 - zeros, kt - 1))
    x = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))

    def tap(k: int, i: int, j: int) -> Float[Array, "c o"]:
        """Gradient of one weight matrix: what it saw, times where it went."""
        seen = x[:, max(0, k - zeros) : k - zeros + t, i : i + h, j : j + w]
        return seen.reshape(-1, c).T @ dy[:, max(0, zeros - k) :].reshape(-1, o)

    dkernel = jnp.stack([tap(*at) for at in np.ndindex(kt, TAPS, TAPS)])
    return dx, dkernel.reshape(kernel.shape)


conv3d.defvjp(_forward, _backward)
