"""Frames as arrays: checks, padding, and the way from 8-bit RGB to what networks take and back.

Outside networks a video is uint8 RGB (t, h, w, 3); inside it is float32 in [-1, 1], with a batch
axis. All functions but the checks work on NumPy arrays and, also inside `jit`, on JAX arrays.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, UInt8

from gnvc_jax.errors import UsageError

HALF_RANGE = 127.5  # 8-bit steps per unit: 0 is -1, 255 is 1


def to_float(frames: Any) -> Any:
    """Converts uint8 frames of any shape to float32 in [-1, 1]; stays in NumPy or JAX."""
    return frames.astype(np.float32) / HALF_RANGE - 1.0


def to_uint8(frames: Float[Array, "*shape"]) -> UInt8[Array, "*shape"]:
    """Converts frames in [-1, 1] to the nearest of 0..255; values outside are clipped."""
    # Halves round up: floor(x + 0.5), not round(), which takes them to even numbers.
    return jnp.floor((jnp.clip(frames, -1.0, 1.0) + 1.0) * HALF_RANGE + 0.5).astype(jnp.uint8)


def pad_frames(frames: UInt8[np.ndarray, "t h w 3"], multiple: int) -> np.ndarray:
    """Repeats the last row and column up to a multiple of so many pixels."""
    _, h, w, _ = frames.shape
    return np.pad(frames, ((0, 0), (0, -h % multiple), (0, -w % multiple), (0, 0)), mode="edge")


def check_frame(frame: np.ndarray, height: int, width: int, number: int) -> None:
    """Checks a frame of a video that is to be encoded.

    Args:
        frame: Frame, expected to be uint8 (height, width, 3).
        height: Height of the video.
        width: Width of the video.
        number: Number of the frame, for the message.

    Raises:
        UsageError: If the frame has another shape or type.
    """
    if np.shape(frame) != (height, width, 3):
        raise UsageError(f"frame {number} is {np.shape(frame)}, expected {(height, width, 3)}")
    if frame.dtype != np.uint8:
        raise UsageError(
            f"frame {number} is {frame.dtype}, expected uint8 RGB in 0..255; convert frames in "
            "[0, 1] by np.round(255 * frame).astype(np.uint8)"
        )


def check_video(video: Any) -> None:
    """Checks that an array is a video, uint8 RGB (t, h, w, 3) with at least one pixel.

    Raises:
        UsageError: If the array has another shape or type.
    """
    shape = np.shape(video)
    if len(shape) != 4 or shape[-1] != 3 or 0 in shape:
        raise UsageError(f"video is {shape}, expected (frames, height, width, 3)")
    check_frame(video[0], *shape[1:3], 0)


def as_network_input(video: Any) -> Float[Array, "b t h w 3"]:
    """Checks a video or a batch of videos and brings it to the form that networks take.

    Args:
        video: uint8 RGB, or float in [-1, 1]; (t, h, w, 3) or (b, t, h, w, 3). The range of a
            traced array is not checked, since inside `jit` there are no values to look at.

    Returns:
        The video in [-1, 1], float32, with a batch axis.

    Raises:
        UsageError: If the array has another shape, type or range.
    """
    shape, dtype = np.shape(video), jnp.result_type(video)
    if len(shape) not in (4, 5) or shape[-1] != 3 or 0 in shape:
        raise UsageError(f"video is {shape}, expected (frames, height, width, 3) or a batch of it")
    if dtype == jnp.uint8:
        video = to_float(jnp.asarray(video))
    elif jnp.issubdtype(dtype, jnp.floating):
        video = jnp.asarray(video, jnp.float32)
        if not isinstance(video, Tracer):
            low, high = float(video.min()), float(video.max())
            if not (low >= -1.0 and high <= 1.0):  # NaN fails every comparison
                raise UsageError(f"video has values in [{low:g}, {high:g}], expected [-1, 1]")
    else:
        raise UsageError(f"video is {dtype}, expected uint8, or float in [-1, 1]")
    return video if len(shape) == 5 else video[None]
