"""The fast forms of convolutions on CPU against XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import repeat
from jax import lax

from gnvc_jax import convolution, winograd


def draw(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def plain(x, kernel, zeros):
    """3-D convolution, 'same' in space, after frames of zeros."""
    return lax.conv_general_dilated(
        jnp.pad(x, ((0, 0), (zeros, 0), (0, 0), (0, 0), (0, 0))),
        kernel,
        (1, 1, 1),
        ((0, 0), (1, 1), (1, 1)),
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize(
    "frames, taps, zeros, h, w",
    [(5, 3, 0, 8, 8), (4, 3, 2, 7, 13), (1, 3, 2, 1, 2), (2, 1, 0, 5, 4), (3, 3, 1, 70, 9)],
)
def test_it_is_the_convolution(frames, taps, zeros, h, w):
    """Values and both gradients: one to four outputs in time, sizes off the tiles, many strips."""
    c, o = 16, 24
    t = frames + zeros - taps + 1
    x, kernel, dy = draw((2, frames, h, w, c), (taps, 3, 3, c, o), (2, t, h, w, o))

    @jax.jit
    def both(x, kernel, dy):
        ours, our_pull = jax.vjp(lambda *a: winograd.conv3d(*a, zeros), x, kernel)
        theirs, their_pull = jax.vjp(lambda *a: plain(*a, zeros), x, kernel)
        return (ours, *our_pull(dy)), (theirs, *their_pull(dy))

    for ours, theirs in zip(*both(x, kernel, dy)):
        assert_close(ours, theirs)


def test_wide_kernels_take_it(monkeypatch):
    monkeypatch.setattr(winograd, "conv3d", lambda x, kernel, zeros: "taken")
    for c, o, dtype, taken in (
        (64, 64, jnp.float32, True),
        (64, 32, jnp.float32, False),
        (64, 64, jnp.bfloat16, False),
    ):
        x, kernel = jnp.zeros((1, 3, 4, 4, c), dtype), jnp.zeros((3, 3, 3, c, o), dtype)
        assert isinstance(convolution.conv3d(x, kernel), str) == taken
        assert isinstance(convolution.conv2d(x, kernel[0]), str) == taken
        assert not isinstance(convolution.conv2d(x, kernel[0], stride=2), str)


def test_convolution_of_a_doubled_image():
    x, kernel, dy = draw((1, 2, 3, 5, 4), (3, 3, 4, 6), (1, 2, 6, 10, 6))

    def doubled(x, kernel):
        return plain(repeat(x, "b t h w c -> b t (h 2) (w 2) c"), kernel[None], 0)

    ours, our_pull = jax.vjp(convolution.conv2d_of_doubled, x, kernel)
    theirs, their_pull = jax.vjp(doubled, x, kernel)
    for a, b in zip((ours, *our_pull(dy)), (theirs, *their_pull(dy))):
        assert_close(a, b)


def test_kernel_gradient_is_that_of_the_convolution():
    """The CPU form of the kernel gradient against XLA's own."""
    rng = np.random.default_rng(1)
    x, kernel, dy = (
        rng.normal(size=s).astype(np.float32) for s in ((2, 3, 6, 5, 4), (3, 3, 4, 7), (6, 6, 5, 7))
    )

    def own(x, kernel):
        return jnp.sum(convolution.conv2d(x, kernel).reshape(dy.shape) * dy)

    def plain(x, kernel):
        return jnp.sum(convolution._conv(x.reshape(6, 6, 5, 4), kernel, 1, ((1, 1), (1, 1))) * dy)

    for ours, theirs in zip(jax.grad(own, (0, 1))(x, kernel), jax.grad(plain, (0, 1))(x, kernel)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
