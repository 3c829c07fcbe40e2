"""Colour conversion against float64, published code values and ffmpeg."""

import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from gnvc_jax.media.colour import (
    BT709,
    RGB,
    Colour,
    rgb_to_yuv420,
    rgb_to_yuv444,
    yuv_to_rgb,
)

WEIGHTS = {"bt709": (0.2126, 0.0722), "bt601": (0.299, 0.114), "bt2020": (0.2627, 0.0593)}


def forward_matrix(matrix):
    """RGB -> Y, U, V in 0..1 and -1/2..1/2; H.273 equations for non-constant luminance."""
    kr, kb = WEIGHTS[matrix]
    y = np.array([kr, 1 - kr - kb, kb])
    return np.stack(
        [y, (np.array([0, 0, 1]) - y) / (2 * (1 - kb)), (np.array([1, 0, 0]) - y) / (2 * (1 - kr))]
    )


def quantiser(full_range, bits):
    """(offset, range) of luma and of chroma code values."""
    top, step = 2**bits - 1, 2 ** (bits - 8)
    if full_range:
        return (0, top), (2 ** (bits - 1), top)
    return (16 * step, 219 * step), (128 * step, 224 * step)


def reference_rgb(y, u, v, matrix, full_range, bits):
    """In float64, with SciPy's interpolation and a numerically inverted matrix."""
    grid = np.meshgrid(*map(np.arange, y.shape), indexing="ij")
    (y0, ys), (c0, cs) = quantiser(full_range, bits)
    planes = [(y - float(y0)) / ys]
    for plane in (u, v):
        where = [
            (g + 0.5) * 0.5 - 0.5 if c != n else g for g, c, n in zip(grid, plane.shape, y.shape)
        ]
        up = map_coordinates(plane.astype(float), where, order=1, mode="nearest")
        planes.append((up - c0) / cs)
    rgb = np.stack(planes, -1) @ np.linalg.inv(forward_matrix(matrix)).T
    return np.clip(255 * rgb, 0, 255)


def random_planes(rng, size, factors, bits):
    dtype = np.uint8 if bits == 8 else np.uint16
    chroma = tuple(-(-n // f) for n, f in zip(size, factors))
    return [rng.integers(0, 2**bits, s).astype(dtype) for s in (size, chroma, chroma)]


@pytest.mark.parametrize("matrix", WEIGHTS)
@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize("factors", [(2, 2), (1, 2), (1, 1)], ids=["420", "422", "444"])
def test_yuv_to_rgb_is_the_formula(matrix, full_range, bits, factors):
    rng = np.random.default_rng(1)
    for size in [(34, 52), (7, 5), (1, 1), (2, 3), (300, 900)]:
        planes = random_planes(rng, size, factors, bits)
        rgb = yuv_to_rgb(*planes, Colour(matrix, full_range), bits)
        assert rgb.shape == (*size, 3) and rgb.dtype == np.uint8
        # Half a level, plus float32 where a value lies between two levels.
        assert np.abs(rgb - reference_rgb(*planes, matrix, full_range, bits)).max() < 0.5 + 1e-3


@pytest.mark.parametrize(
    "matrix, rgb, yuv",
    [  # Colour bars of full amplitude, 8-bit limited range; ITU-R BT.709 and BT.601
        ("bt709", (255, 0, 0), (63, 102, 240)),
        ("bt709", (0, 255, 0), (173, 42, 26)),
        ("bt709", (0, 0, 255), (32, 240, 118)),
        ("bt709", (255, 255, 255), (235, 128, 128)),
        ("bt601", (255, 0, 0), (81, 90, 240)),
        ("bt601", (0, 255, 0), (145, 54, 34)),
        ("bt601", (0, 0, 255), (41, 240, 110)),
        ("bt601", (0, 0, 0), (16, 128, 128)),
    ],
)
def test_colour_bars(matrix, rgb, yuv):
    image = np.full((4, 6, 3), rgb, np.uint8)
    for convert in (rgb_to_yuv420, rgb_to_yuv444):
        planes = convert(image, Colour(matrix))
        assert [set(plane.ravel().tolist()) for plane in planes] == [{value} for value in yuv]
        assert np.abs(yuv_to_rgb(*planes, Colour(matrix)).astype(int) - image).max() <= 2


@pytest.mark.parametrize("matrix", WEIGHTS)
@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("size", [(8, 6), (7, 5), (1, 1)])
def test_rgb_to_yuv_is_the_formula(matrix, full_range, size):
    rgb = np.random.default_rng(2).integers(0, 256, (*size, 3), dtype=np.uint8)
    yuv = (rgb / 255.0) @ forward_matrix(matrix).T
    luma, chroma = quantiser(full_range, 8)
    exact = [o + s * yuv[..., i] for i, (o, s) in enumerate((luma, chroma, chroma))]
    even = [np.pad(p, [(0, n % 2) for n in size], mode="edge") for p in exact]
    half = [p.reshape(p.shape[0] // 2, 2, p.shape[1] // 2, 2).mean((1, 3)) for p in even]
    colour = Colour(matrix, full_range)
    for got, want in (
        (rgb_to_yuv444(rgb, colour), exact),
        (rgb_to_yuv420(rgb, colour), [exact[0], *half[1:]]),
    ):
        for a, b in zip(got, want, strict=True):
            assert a.dtype == np.uint8 and a.shape == b.shape
            assert np.abs(a - np.clip(b, 0, 255)).max() < 0.5 + 1e-3


def test_half_levels_round_up():
    # 10 bits, limited range: 255 (c - 64) / 876 is 42.5 at 210, 127.5 at 502, 212.5 at 794.
    grey = np.array([[210, 502, 794]], np.uint16)
    assert yuv_to_rgb(grey, None, None, Colour(), 10)[0, :, 0].tolist() == [43, 128, 213]


@pytest.mark.parametrize("factors", [(2, 2), (1, 2), (2, 1), (1, 1)])
def test_a_crop_equals_that_part_of_the_whole(factors):
    rng = np.random.default_rng(3)
    planes = random_planes(rng, (21, 33), factors, 8)
    whole = yuv_to_rgb(*planes)
    for _ in range(50):
        top, left = rng.integers(0, 21), rng.integers(0, 33)
        height, width = rng.integers(1, 22 - top), rng.integers(1, 34 - left)
        part = yuv_to_rgb(*planes, crop=(top, left, height, width))
        np.testing.assert_array_equal(part, whole[top : top + height, left : left + width])
    with pytest.raises(ValueError, match="outside"):
        yuv_to_rgb(*planes, crop=(0, 0, 22, 3))


def test_agrees_with_swscale_in_its_accurate_mode(ffmpeg):
    rng = np.random.default_rng(4)
    noise = rng.normal(size=(64, 96, 3))
    smooth = np.real(
        np.fft.ifft2(
            np.fft.fft2(noise, axes=(0, 1))
            / (1 + 40 * (np.fft.fftfreq(64)[:, None] ** 2 + np.fft.fftfreq(96) ** 2))[..., None],
            axes=(0, 1),
        )
    )
    rgb = np.uint8(np.clip(128 + 60 * smooth, 0, 255))
    planes = rgb_to_yuv420(rgb)
    out = ffmpeg(
        *"-f rawvideo -pix_fmt yuv420p -s 96x64 -i - -vf".split(),
        "scale=in_color_matrix=bt709:in_range=tv:out_range=pc:in_h_chr_pos=128:in_v_chr_pos=128"
        ":flags=accurate_rnd+full_chroma_int+bilinear",
        *"-f rawvideo -pix_fmt rgb24 -".split(),
        data=b"".join(map(bytes, planes)),
    )
    theirs = np.frombuffer(out, np.uint8).reshape(64, 96, 3)
    difference = np.abs(yuv_to_rgb(*planes).astype(int) - theirs)
    assert difference.max() <= 2 and difference.mean() < 0.3
    other = np.abs(yuv_to_rgb(*planes, Colour("bt601")).astype(int) - theirs)
    assert other.mean() > 3 * difference.mean()


def test_code_points():
    assert BT709.code_points == (1, 1, 1, 0)  # H.273: all BT.709
    assert Colour("bt601").code_points[2] == 6
    assert Colour("bt2020", True).code_points[2:] == (9, 1)
    for colour in (BT709, RGB, Colour("bt601", True), Colour("bt2020", False, 9, 16)):
        assert Colour.from_code_points(*colour.code_points) == colour
    assert Colour.from_code_points(2, 2, 2, 0) == BT709  # nothing specified
    assert Colour.from_code_points(5, 6, 5, 0).matrix == "bt601"


def test_yuv_form_of_rgb():
    assert RGB.in_yuv() == BT709 and Colour("bt601").in_yuv() == Colour("bt601")
    pq = Colour("rgb", True, primaries=9, transfer=16).in_yuv()
    assert pq.code_points == (9, 16, 9, 0) and pq.is_hdr_or_wide
    assert not any(c.is_hdr_or_wide for c in (BT709, RGB, Colour("bt601")))


def test_wrong_arguments_are_errors():
    plane = np.zeros((4, 4), np.uint8)
    with pytest.raises(ValueError, match="matrix"):
        Colour("bt470")
    with pytest.raises(ValueError, match="do not fit"):
        yuv_to_rgb(plane, plane[:1], plane[:1])
    with pytest.raises(ValueError, match="RGB"):
        rgb_to_yuv420(np.zeros((2, 2, 3), np.uint8), RGB)
