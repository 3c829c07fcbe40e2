"""Frames as PyAV decodes them -> RGB.

Planes come from the decoder and are converted by `colour.yuv_to_rgb`; swscale only repacks samples
(nv12, palettes) and reduces RGB of more than 8 bits.
"""

import re

import av
import numpy as np
from av.video.plane import VideoPlane

from gnvc_jax.media.colour import Colour, yuv_to_rgb
from gnvc_jax.media.errors import UnsupportedFormat
from gnvc_jax.media.video import Crop, crop_frame

_PLANAR = re.compile(r"yuv[aj]?(420|422|440|444)p(\d+[lb]e)?")
_GREY = re.compile(r"gray(\d+[lb]e)?")
_PACKED_BIG_ENDIAN = re.compile(r"(?:rgb|bgr)5[56]5be")
_LIMITED, _FULL = 1, 2  # AVColorRange
# swscale's threads race on some formats: 16-bit grey with alpha came out with wrong rows.
_SCALER_THREADS = 1
GBR = 0  # H.273 matrix coefficients of RGB


def is_rgb(frame: av.VideoFrame) -> bool:
    """Whether the samples of a frame are RGB, or colours of a palette."""
    return frame.format.is_rgb or frame.format.has_palette


def frame_colour(frame: av.VideoFrame) -> Colour:
    """Colour space of a frame: as tagged, or BT.709.

    Untagged YUV has limited range, untagged grey full range. YUV that is tagged as RGB, as some
    phones and messengers do, gets the matrix that is usual for its size: BT.709 for HD, BT.601
    below.
    """
    tags = frame.color_primaries, frame.color_trc
    if is_rgb(frame):
        return Colour.from_code_points(*tags, GBR, full_range=True)
    # yuvj formats are old names of full range, from before the range had a tag.
    full = frame.color_range == _FULL or frame.format.name.startswith("yuvj")
    if len(frame.format.components) < 3 and frame.color_range != _LIMITED:
        full = True
    matrix = frame.colorspace
    if matrix == GBR:
        matrix = 1 if frame.width >= 1280 or frame.height > 576 else 6
    return Colour.from_code_points(*tags, matrix, full)


def _array(plane: VideoPlane, dtype: str) -> np.ndarray:
    # Lines are padded to a multiple of some bytes: (height, line size) -> (height, width).
    rows = np.frombuffer(memoryview(plane), dtype).reshape(plane.height, -1)
    return rows[:, : plane.width]


def _planar_name(frame: av.VideoFrame, name: str) -> str:
    """Planar format that holds all samples of a packed or unusual format."""
    form = frame.format
    parts = form.components  # luma and chroma, or the three colours, each with its own size
    depth = max(part.bits for part in parts)
    suffix = "" if depth <= 8 else f"{depth}le"
    if form.name.startswith(("xyz", "bayer")) or depth > 16:
        raise UnsupportedFormat(name, f"pixel format {form.name} is not supported")
    if len(parts) < 3:
        return f"gray{suffix}"
    # By which factors chroma is smaller than luma. 4:1:1 and 4:1:0 have no planar format that
    # `yuv_to_rgb` takes, so they are enlarged to 4:4:4.
    halves = frame.width > parts[1].width, frame.height > parts[1].height
    quarter = parts[1].width * 2 < frame.width
    layout = {(True, True): "420", (True, False): "422"}.get(halves, "444")
    return f"yuv{'444' if quarter else layout}p{suffix}"


def _little_endian(frame: av.VideoFrame) -> av.VideoFrame:
    """Swaps the bytes of 16-bit pixels; swscale converts only little-endian ones correctly."""
    # 15 and 16 bits per pixel, three colours packed into two bytes.
    swapped = av.VideoFrame(frame.width, frame.height, frame.format.name.replace("be", "le"))
    source, target = (
        np.frombuffer(memoryview(f.planes[0]), "u2").reshape(f.height, -1) for f in (frame, swapped)
    )
    target[:, : frame.width] = source[:, : frame.width].byteswap()
    return swapped


def _upright(rgb: np.ndarray, matrix: bytes, name: str) -> np.ndarray:
    """Rotates and mirrors a picture (h, w, c) as its display matrix asks.

    The matrix sends column x and row y of the coded picture to a x + c y and b x + d y, up to an
    offset; multiples of 90 degrees and mirrors have either b = c = 0 or a = d = 0.
    """
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    straight, turned = abs(a) + abs(d), abs(b) + abs(c)
    if 50 * min(straight, turned) > max(straight, turned):  # more than a degree away
        raise UnsupportedFormat(name, "is rotated by an angle that is not a multiple of 90 degrees")
    if straight >= turned:
        columns, rows = a, d
    else:
        rgb, columns, rows = rgb.swapaxes(0, 1), c, b
    return np.ascontiguousarray(rgb[:: -1 if rows < 0 else 1, :: -1 if columns < 0 else 1])


def frame_to_rgb(
    frame: av.VideoFrame, colour: Colour | None, name: str, crop: Crop | None = None
) -> np.ndarray:
    """Converts a decoded frame to uint8 RGB (h, w, 3), rotated as it is to be shown.

    Args:
        frame: Decoded frame.
        colour: Colour space that overrides the tags of a YUV frame.
        name: Name of the file, for messages.
        crop: (top, left, height, width) of the shown frame; only this part is converted.

    Raises:
        UnsupportedFormat: If the pixel format is not supported, or the frame is rotated by an angle
            that is not a multiple of 90 degrees.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    # The crop is one of the shown frame, so a rotated frame is converted whole and cropped after.
    inner = None if matrix else crop
    form = frame.format
    # RGB needs no colour conversion, which swscale would round; YUV is converted by `yuv_to_rgb`,
    # exactly, from its planes.
    if is_rgb(frame):
        if _PACKED_BIG_ENDIAN.fullmatch(form.name):
            frame = _little_endian(frame)
        rgb = crop_frame(frame.to_ndarray(format="rgb24", threads=_SCALER_THREADS), inner)
    else:
        colour = colour or frame_colour(frame)
        if not (_PLANAR.fullmatch(form.name) or _GREY.fullmatch(form.name)):
            frame = frame.reformat(format=_planar_name(frame, name), threads=_SCALER_THREADS)
            form = frame.format
        depth = form.components[0].bits
        dtype = "u1" if depth <= 8 else ">u2" if form.is_big_endian else "<u2"
        planes = [_array(plane, dtype) for plane in frame.planes[:3]]
        # Grey has a single plane. A fourth plane, alpha, was left out above.
        y, u, v = planes if len(planes) == 3 else (planes[0], None, None)
        rgb = yuv_to_rgb(y, u, v, colour, depth, inner)
    return crop_frame(_upright(rgb, matrix, name), crop) if matrix else rgb
