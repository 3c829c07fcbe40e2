"""What a motion field consists of, and its expansion to a vector per 16x16 block and frame.

A field describes where the four frames of one latent lie in the frame before them. Vectors are
(dx, dy) displacements *into the reference*: frame(x, y) is predicted by reference(x + dx, y + dy).
All arithmetic is in integers, so that an expanded field is the same on every machine.
"""

from typing import NamedTuple

import numpy as np

COARSE, FINE = 32, 16  # block sides in pixels
FRAMES = 4  # frames per field, evenly spaced in time
MAX_VECTOR = 127  # of coarse vectors, in half pels
PEL = 16  # expanded vectors are in 1/16 pel


class MotionField(NamedTuple):
    """Integers of one latent's motion; (h, w) is the grid of 32x32 blocks.

    Attributes:
      coarse: int16 (h, w, 2), motion of the last frame, half pels.
      split: bool (h, w), blocks whose four 16x16 quarters have vectors of their own.
      fine: int16 (2h, 2w, 2), what the quarters add to the interpolated coarse field, half pels;
        zero outside split blocks.
      middle: int16 (h, w, 2), what the second frame adds to half the motion of the last one, half
        pels; all zero where motion is linear in time.
      shift: int16 (3, 2), what the first three frames add as a whole, quarter pels.
    """

    coarse: np.ndarray
    split: np.ndarray
    fine: np.ndarray
    middle: np.ndarray
    shift: np.ndarray


def no_motion(h: int, w: int) -> MotionField:
    """The zero field on a grid of h x w coarse blocks."""
    return MotionField(
        np.zeros((h, w, 2), np.int16),
        np.zeros((h, w), bool),
        np.zeros((2 * h, 2 * w, 2), np.int16),
        np.zeros((h, w, 2), np.int16),
        np.zeros((FRAMES - 1, 2), np.int16),
    )


def upsample(vectors: np.ndarray) -> np.ndarray:
    """Bilinear interpolation to twice the grid, times 16: (h, w, 2) -> int32 (2h, 2w, 2).

    A quarter's centre lies a quarter of the way from its block's centre to the neighbour's, hence
    the weights 9, 3, 3, 1; edges repeat.
    """
    x = np.pad(vectors.astype(np.int32), ((1, 1), (1, 1), (0, 0)), mode="edge")
    for axis in (0, 1):
        x = np.moveaxis(x, axis, 0)
        near, before, after = x[1:-1], x[:-2], x[2:]
        x = np.stack([3 * near + before, 3 * near + after], axis=1)
        x = np.moveaxis(x.reshape(-1, *x.shape[2:]), 0, axis)
    return x


def expand(field: MotionField) -> np.ndarray:
    """Vectors of every frame and 16x16 block: int16 (4, 2h, 2w, 2) in 1/16 pel."""
    # All terms in 1/128 pel, the largest unit in which they are whole numbers.
    last = 4 * (upsample(field.coarse) + 16 * field.fine.astype(np.int32))
    second = last // 2 + 4 * upsample(field.middle)
    frames = np.stack([second // 2, second, (second + last) // 2, last])
    frames[:-1] += 32 * field.shift[:, None, None].astype(np.int32)
    return ((frames + 4) >> 3).astype(np.int16)
