"""Both convolution strategies against SciPy, and their gradients against XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import correlate

from gnvc_jax import convolution, winograd


def draw(*shapes: tuple[int, ...]) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def reference(x, kernel, pads=((0, 0), (1, 1), (1, 1))) -> np.ndarray:
    """Convolution of x (b, t, h, w, c) by SciPy, in float64, channel by channel."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    x = np.pad(x, ((0, 0), *pads, (0, 0)))
    *_, c, o = kernel.shape
    outputs = [
        [sum(correlate(clip[..., i], kernel[..., i, j], "valid") for i in range(c)) for clip in x]
        for j in range(o)
    ]
    return np.moveaxis(np.array(outputs), 0, -1)


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@pytest.fixture(params=["CPU", "DIRECT"])
def strategy(request, monkeypatch) -> convolution.Strategy:
    """The form for CPUs and the form for accelerators; both run here."""
    chosen = getattr(convolution, request.param)
    monkeypatch.setattr(convolution, "strategy", lambda: chosen)
    return chosen


def test_strategy_is_cpu_on_a_cpu_and_direct_elsewhere(monkeypatch):
    for platform, chosen in (("cpu", "CPU"), ("gpu", "DIRECT"), ("tpu", "DIRECT")):
        monkeypatch.setattr(convolution, "backend", lambda platform=platform: platform)
        assert convolution.strategy() is getattr(convolution, chosen)


@pytest.mark.parametrize("frames, taps, zeros", [(4, 3, 2), (1, 3, 2), (3, 3, 0), (2, 1, 0)])
def test_conv3d_is_valid_in_time_and_same_in_space(strategy, frames, taps, zeros):
    x, kernel = draw((2, frames, 5, 6, 3), (taps, 3, 3, 3, 4))
    expected = reference(x, kernel, ((zeros, 0), (1, 1), (1, 1)))
    assert_close(convolution.conv3d(x, kernel, zeros), expected)


@pytest.mark.parametrize("stride, padding", [(1, ((1, 1), (1, 1))), (2, ((0, 1), (0, 1)))])
def test_conv2d_pads_and_strides_every_frame(strategy, stride, padding):
    x, kernel = draw((2, 3, 6, 8, 3), (3, 3, 3, 4))
    got = convolution.conv2d(x, kernel, stride=stride, padding=padding)
    expected = reference(x, kernel[None], ((0, 0), *padding))
    assert_close(got, expected[:, :, ::stride, ::stride])


def test_conv2d_of_doubled_is_nearest_upsampling_then_convolution(strategy):
    x, kernel, dy = draw((1, 2, 3, 5, 4), (3, 3, 4, 6), (1, 2, 6, 10, 6))
    doubled = np.repeat(np.repeat(x, 2, axis=2), 2, axis=3)
    ours, pull = jax.vjp(convolution.conv2d_of_doubled, x, kernel)
    assert_close(ours, reference(doubled, kernel[None]))
    _, their_pull = jax.vjp(convolution.DIRECT.conv2d_of_doubled, x, kernel)
    for a, b in zip(pull(dy), their_pull(dy)):
        assert_close(a, b)


@pytest.mark.parametrize("frames, zeros, stride", [(5, 0, 2), (4, 2, 1), (0, 2, 1), (1, 0, 2)])
def test_conv_in_time_strides_and_starts_from_zeros(frames, zeros, stride):
    x, kernel = draw((2, frames, 2, 3, 4), (3, 1, 1, 4, 5))
    got = convolution.conv_in_time(x, kernel, zeros=zeros, stride=stride)
    if frames + zeros < 3:
        assert got.shape == (2, 0, 2, 3, 5)
        return
    pads = ((zeros, 0), (0, 0), (0, 0))
    assert_close(got, reference(x, kernel, pads)[:, ::stride])


def test_depthwise3x3_is_the_same_in_numpy_and_jax():
    rng = np.random.default_rng(0)
    x, kernel = rng.integers(0, 256, (4, 5, 3)), rng.integers(-127, 128, (3, 3, 3))
    expected = [correlate(x[..., i], kernel[..., i], "same") for i in range(3)]
    np.testing.assert_array_equal(convolution.depthwise3x3(x, kernel), np.stack(expected, -1))
    in_jax = convolution.depthwise3x3(*(jnp.asarray(v, jnp.float32) for v in (x, kernel)))
    np.testing.assert_array_equal(in_jax, np.stack(expected, -1))


@pytest.mark.parametrize(
    "frames, taps, zeros, h, w",
    [(5, 3, 0, 8, 8), (4, 3, 2, 7, 13), (1, 3, 2, 1, 2), (2, 1, 0, 5, 4), (3, 3, 1, 70, 9)],
)
def test_winograd_values_and_gradients_are_those_of_the_convolution(frames, taps, zeros, h, w):
    """One to four outputs in time, sizes that are no multiples of a tile, more than one strip."""
    c, o = 16, 24
    t = frames + zeros - taps + 1
    x, kernel, dy = draw((2, frames, h, w, c), (taps, 3, 3, c, o), (2, t, h, w, o))

    @jax.jit
    def both(x, kernel, dy):
        ours, our_pull = jax.vjp(lambda *a: winograd.conv3d(*a, zeros), x, kernel)
        theirs, their_pull = jax.vjp(lambda *a: convolution.DIRECT.conv3d(*a, zeros), x, kernel)
        return (ours, *our_pull(dy)), (theirs, *their_pull(dy))

    for ours, theirs in zip(*both(x, kernel, dy)):
        assert_close(ours, theirs)


def test_wide_float32_kernels_use_winograd_on_cpu(monkeypatch):
    original, calls = winograd.conv3d, []
    monkeypatch.setattr(winograd, "conv3d", lambda *args: calls.append(1) or original(*args))

    def used(function, *args, **options) -> bool:
        calls.clear()
        jax.eval_shape(lambda *a: function(*a, **options), *args)
        return bool(calls)

    for c, o, dtype, expected in (
        (64, 64, jnp.float32, True),
        (64, 32, jnp.float32, False),
        (64, 64, jnp.bfloat16, False),
    ):
        x, kernel = jnp.zeros((1, 3, 4, 4, c), dtype), jnp.zeros((3, 3, 3, c, o), dtype)
        assert used(convolution.conv3d, x, kernel) == expected
        assert used(convolution.conv2d, x, kernel[0]) == expected
        assert not used(convolution.conv2d, x, kernel[0], stride=2)
        assert not used(convolution.DIRECT.conv3d, x, kernel, zeros=0)


def test_cpu_kernel_gradient_is_that_of_the_convolution():
    x, kernel, dy = draw((2, 3, 6, 5, 4), (3, 3, 4, 7), (2, 3, 6, 5, 7))
    args = 1, convolution.SAME
    _, our_pull = jax.vjp(lambda *a: convolution.CPU.conv2d(*a, *args), x, kernel)
    _, their_pull = jax.vjp(lambda *a: convolution.DIRECT.conv2d(*a, *args), x, kernel)
    for ours, theirs in zip(our_pull(dy), their_pull(dy)):
        assert_close(ours, theirs)
