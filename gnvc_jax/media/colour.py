"""YUV to RGB and back, by one documented formula.

With y, u, v the code values of n bits, s = 2^(n-8), and (kr, kg, kb) the luma weights of the matrix
(ITU-R BT.709: 0.2126, 0.7152, 0.0722; BT.601: 0.299, 0.587, 0.114; BT.2020: 0.2627, 0.6780,
0.0593):

    limited range   Y = (y - 16 s) / (219 s)      C = (c - 128 s) / (224 s)
    full range      Y = y / (2^n - 1)             C = (c - 2^(n-1)) / (2^n - 1)

    R = Y + 2 (1 - kr) V
    B = Y + 2 (1 - kb) U
    G = Y - 2 kr (1 - kr) / kg V - 2 kb (1 - kb) / kg U

and an 8-bit value is floor(clip(255 X, 0, 255) + 1/2): round half up after clipping. This is
ITU-T H.273 equations 8.3 onward with the gamma-coded values left as they are.

Chroma is taken to sit in the middle of the luma samples that share it: going up is bilinear with
half-pixel centres (weights 3/4, 1/4), going down is the mean of 2x2; edges replicate, so odd sizes
work. Arithmetic is float32.
"""

from __future__ import annotations

import dataclasses

import numpy as np

LUMA_WEIGHTS = {  # matrix: (kr, kb)
    "bt709": (0.2126, 0.0722),
    "bt601": (0.299, 0.114),
    "bt2020": (0.2627, 0.0593),
}
# Code points of ITU-T H.273: matrix coefficients, primaries, transfer characteristics (13 is sRGB,
# 14 BT.2020 of 10 bits). Matrices 5 and 6 are equal, and so, here, are 9 and 10.
_MATRIX_CODE = {"rgb": 0, "bt709": 1, "bt601": 6, "bt2020": 9}
_CODE_MATRIX = {0: "rgb", 1: "bt709", 5: "bt601", 6: "bt601", 9: "bt2020", 10: "bt2020"}
_PRIMARIES = {"rgb": 1, "bt709": 1, "bt601": 6, "bt2020": 9}
_TRANSFER = {"rgb": 13, "bt709": 1, "bt601": 6, "bt2020": 14}
_STRIP = 1 << 17  # luma samples converted at a time
SUPPORTED_MATRICES = frozenset(_CODE_MATRIX)  # H.273 matrix coefficients
UNSPECIFIED = 2  # H.273: "unknown or determined by the application"


@dataclasses.dataclass(frozen=True)
class Colour:
    """Colour space of a video: how its sample values are to be read.

    Attributes:
        matrix: "bt709", "bt601", "bt2020", or "rgb" for sources that never were YUV.
        full_range: Whether samples use the full range instead of the limited one.
        primaries: H.273 code point; if None, the one that goes with the matrix. Primaries and
            transfer characteristics are carried along, and never used in a conversion.
        transfer: H.273 code point; if None, the one that goes with the matrix.
    """

    matrix: str = "bt709"
    full_range: bool = False
    primaries: int | None = None
    transfer: int | None = None

    def __post_init__(self):
        if self.matrix not in _MATRIX_CODE:
            raise ValueError(
                f"colour matrix must be one of {', '.join(_MATRIX_CODE)}, got {self.matrix!r}"
            )
        for field, default in (("primaries", _PRIMARIES), ("transfer", _TRANSFER)):
            if getattr(self, field) is None:
                object.__setattr__(self, field, default[self.matrix])

    @property
    def code_points(self) -> tuple[int, int, int, int]:
        """H.273 (primaries, transfer characteristics, matrix coefficients, full-range flag)."""
        return (
            self.primaries or 0,
            self.transfer or 0,
            _MATRIX_CODE[self.matrix],
            int(self.full_range),
        )

    @property
    def is_hdr_or_wide(self) -> bool:
        """Whether showing it as BT.709 is plainly wrong: PQ, HLG, or primaries of BT.2020 or P3."""
        return self.transfer in (16, 18) or self.primaries in (9, 11, 12)

    def in_yuv(self) -> Colour:
        """The colour space itself; for RGB its YUV form, BT.709, or BT.2020 for these primaries."""
        if self.matrix != "rgb":
            return self
        if (self.primaries, self.transfer) == (RGB.primaries, RGB.transfer):
            return BT709  # common practice, although plain RGB is sRGB by definition
        matrix = "bt2020" if self.primaries == _PRIMARIES["bt2020"] else "bt709"
        return Colour(matrix, primaries=self.primaries, transfer=self.transfer)

    @classmethod
    def from_code_points(
        cls, primaries: int, transfer: int, matrix: int, full_range: int
    ) -> Colour:
        """Inverts `code_points`; an unspecified or unknown matrix counts as BT.709."""
        name = _CODE_MATRIX.get(matrix, "bt709")
        return cls(
            matrix=name,
            full_range=bool(full_range),
            primaries=None if primaries in (0, UNSPECIFIED) else primaries,
            transfer=None if transfer in (0, UNSPECIFIED) else transfer,
        )


BT709 = Colour()
RGB = Colour(matrix="rgb", full_range=True)


def _scales(colour: Colour, bit_depth: int) -> tuple[float, float, float, float]:
    """(luma offset, luma scale, chroma offset, chroma scale) from code values to 0..255."""
    # The formulas at the top of this file, times 255.
    middle = float(1 << (bit_depth - 1))
    if colour.full_range:
        scale = 255.0 / ((1 << bit_depth) - 1)
        return 0.0, scale, middle, scale
    step = 2.0 ** (bit_depth - 8)
    return 16.0 * step, 255.0 / (219.0 * step), middle, 255.0 / (224.0 * step)


def _weights(colour: Colour) -> tuple[float, float, float]:
    if colour.matrix not in LUMA_WEIGHTS:
        raise ValueError("RGB samples have no YUV matrix; give a Colour with one")
    kr, kb = LUMA_WEIGHTS[colour.matrix]
    return kr, 1.0 - kr - kb, kb


def _double(plane: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Doubles a float32 plane (h, w) along an axis by bilinear interpolation, cut to `size`."""
    plane = np.moveaxis(plane, axis, 0)
    # New sample 2i lies a quarter before old sample i, new sample 2i + 1 a quarter behind it.
    near, far = 0.75 * plane, 0.25 * plane
    out = np.empty((2 * len(plane), *plane.shape[1:]), np.float32)
    out[0] = plane[0]
    np.add(near[1:], far[:-1], out=out[2::2])
    np.add(near[:-1], far[1:], out=out[1:-1:2])
    out[-1] = plane[-1]
    return np.moveaxis(out[:size], 0, axis)


def _upsample(plane: np.ndarray, height: int, width: int) -> np.ndarray:
    for axis, size in ((0, height), (1, width)):
        if plane.shape[axis] != size:
            plane = _double(plane, axis, size)
    return plane


def _round_to_uint8(values: np.ndarray) -> np.ndarray:
    # Truncation after adding a half: round half up. In place, since planes are large.
    np.clip(values, 0.0, 255.0, out=values)
    values += 0.5
    return values.astype(np.uint8)


def _convert(
    y: np.ndarray,
    u: np.ndarray | None,
    v: np.ndarray | None,
    colour: Colour,
    bit_depth: int,
    out: np.ndarray,
) -> None:
    """Converts planes that are small enough to stay in the processor's cache."""
    height, width = y.shape
    y_offset, y_scale, c_offset, c_scale = _scales(colour, bit_depth)
    luma = y.astype(np.float32)
    luma -= np.float32(y_offset)
    luma *= np.float32(y_scale)
    if u is None or v is None:
        out[...] = _round_to_uint8(luma)[..., None]
        return
    kr, kg, kb = _weights(colour)
    # The colour differences are formed before upsampling: the same by linearity, and 4x less work.
    u = (u.astype(np.float32) - np.float32(c_offset)) * np.float32(c_scale)
    v = (v.astype(np.float32) - np.float32(c_offset)) * np.float32(c_scale)
    differences = (
        np.float32(2 * (1 - kr)) * v,
        np.float32(-2 * kr * (1 - kr) / kg) * v + np.float32(-2 * kb * (1 - kb) / kg) * u,
        np.float32(2 * (1 - kb)) * u,
    )
    for channel, difference in enumerate(differences):
        out[..., channel] = _round_to_uint8(_upsample(difference, height, width) + luma)


def _window(start: int, length: int, size: int) -> tuple[int, int]:
    """Even-aligned range of luma samples that determines `length` samples from `start`."""
    # One chroma sample more on each side, which interpolation takes into account.
    return 2 * max(0, start // 2 - 1), min(size, 2 * ((start + length - 1) // 2 + 2))


def yuv_to_rgb(
    y: np.ndarray,
    u: np.ndarray | None,
    v: np.ndarray | None,
    colour: Colour = BT709,
    bit_depth: int = 8,
    crop: tuple[int, int, int, int] | None = None,
) -> np.ndarray:
    """Converts YUV planes to uint8 RGB (h, w, 3).

    Args:
        y: Luma (h, w), unsigned integers of `bit_depth` bits.
        u: Chroma; each side is that of y, or half of it, rounded up. None for grey.
        v: Chroma of the same shape as u. None for grey.
        colour: Colour space of the planes.
        bit_depth: Bits per sample.
        crop: (top, left, height, width); only this part is converted.

    Raises:
        ValueError: If planes do not fit together, or the crop reaches outside of the picture.
    """
    chroma_planes = None if u is None or v is None else (u, v)
    if chroma_planes is not None:
        shapes = [plane.shape for plane in chroma_planes]
        halves = [-(-n // 2) for n in y.shape]
        if shapes[0] != shapes[1] or any(
            c not in (n, half) for c, n, half in zip(shapes[0], y.shape, halves)
        ):
            raise ValueError(f"chroma planes {shapes[0]}, {shapes[1]} do not fit luma {y.shape}")
    top, left, height, width = (0, 0, *y.shape) if crop is None else crop
    if min(top, left) < 0 or top + height > y.shape[0] or left + width > y.shape[1]:
        raise ValueError(f"crop {crop} reaches outside of {y.shape}")
    out = np.empty((height, width, 3), np.uint8)
    if not out.size:
        return out
    # Strips of rows that fit the cache, each with the samples around it that it depends on.
    halved = (False, False)
    if chroma_planes is not None:
        halved = tuple(c != n for c, n in zip(chroma_planes[0].shape, y.shape))
    x0, x1 = _window(left, width, y.shape[1])
    rows = max(2, _STRIP // (x1 - x0))
    for row in range(0, height, rows):
        part = out[row : row + rows]
        y0, y1 = _window(top + row, len(part), y.shape[0])
        luma = (slice(y0, y1), slice(x0, x1))
        chroma = tuple(
            slice(s.start // 2, -(-s.stop // 2)) if half else s for s, half in zip(luma, halved)
        )
        strip = np.empty((y1 - y0, x1 - x0, 3), np.uint8)
        us, vs = (None, None) if chroma_planes is None else (p[chroma] for p in chroma_planes)
        _convert(y[luma], us, vs, colour, bit_depth, strip)
        part[...] = strip[top + row - y0 :, left - x0 :][: len(part), :width]
    return out


def _rgb_to_yuv(
    rgb: np.ndarray, colour: Colour, subsample: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    kr, kg, kb = _weights(colour)
    y_offset, y_scale, c_offset, c_scale = _scales(colour, 8)
    r, g, b = (rgb[..., i].astype(np.float32) for i in range(3))
    luma = np.float32(kr) * r + np.float32(kg) * g + np.float32(kb) * b
    # `_scales` leads from code values to 0..255, so its inverse leads back.
    planes = [luma * np.float32(1 / y_scale) + np.float32(y_offset)]
    for channel, weight in ((b, kb), (r, kr)):
        difference = channel - luma
        if subsample:
            height, width = difference.shape
            difference = np.pad(difference, ((0, height % 2), (0, width % 2)), mode="edge")
            rows = difference[0::2] + difference[1::2]
            difference = (rows[:, 0::2] + rows[:, 1::2]) * np.float32(0.25)
        # B - Y and R - Y span 2 (1 - k) of the range of Y: U and V are scaled to the same range.
        gain = 1 / (2 * (1 - weight) * c_scale)
        planes.append(difference * np.float32(gain) + np.float32(c_offset))
    y, u, v = map(_round_to_uint8, planes)
    return y, u, v


def rgb_to_yuv420(
    rgb: np.ndarray, colour: Colour = BT709
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Converts uint8 RGB (h, w, 3) to 8-bit planes y (h, w) and u, v (ceil(h/2), ceil(w/2))."""
    return _rgb_to_yuv(rgb, colour, subsample=True)


def rgb_to_yuv444(
    rgb: np.ndarray, colour: Colour = BT709
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Converts uint8 RGB (h, w, 3) to three 8-bit planes (h, w)."""
    return _rgb_to_yuv(rgb, colour, subsample=False)
