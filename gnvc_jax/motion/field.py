"""The motion field of one latent, and its expansion to a vector per 16x16 block and frame.

A field describes how the four frames of one latent follow from the frame before them. Vectors are
(dx, dy) displacements *into the reference*: frame(x, y) is predicted by reference(x + dx, y + dy).
A field holds few numbers: motion of the last frame per 32x32 block, finer vectors where blocks are
split, and corrections for the frames in between, which otherwise move linearly in time. `expand`
derives all vectors. Its arithmetic is in integers, so they are the same on every machine.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int16, Int32

COARSE, FINE = 32, 16  # sides of blocks in pixels
FRAMES = 4  # frames per field, evenly spaced in time
MAX_VECTOR = 127  # largest component of a coarse vector, in half pels
PEL = 16  # expanded vectors are in 1/16 pel


class MotionField(NamedTuple):
    """Integers of one latent's motion; (h, w) is the grid of 32x32 blocks.

    Attributes:
        coarse: Motion of the last frame in half pels, int16 (h, w, 2).
        split: Blocks whose four 16x16 quarters have vectors of their own, bool (h, w).
        fine: Corrections that the quarters add to the interpolated coarse field, in half pels,
            int16 (2h, 2w, 2); zero outside split blocks.
        middle: Correction that the second frame adds to half the motion of the last one, in half
            pels, int16 (h, w, 2); all zero if motion is linear in time.
        shift: Displacement that each of the first three frames adds to all its blocks, in quarter
            pels, int16 (3, 2).
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


def upsample(vectors: Int[np.ndarray, "h w 2"]) -> Int32[np.ndarray, "2*h 2*w 2"]:
    """Interpolates vectors bilinearly to twice the grid, times 16; edges repeat.

    The centre of a quarter lies a quarter of the way from the centre of its block to that of the
    neighbour, hence the weights 9, 3, 3, 1.
    """
    # No division, so nothing is rounded here: the result is 16 times the vectors.
    x = np.pad(vectors.astype(np.int32), ((1, 1), (1, 1), (0, 0)), mode="edge")
    for axis in (0, 1):  # separable: weights 3 and 1 in each direction
        x = np.moveaxis(x, axis, 0)
        near, before, after = x[1:-1], x[:-2], x[2:]
        x = np.stack([3 * near + before, 3 * near + after], axis=1)  # (size, 2, ...), interleaved
        x = np.moveaxis(x.reshape(-1, *x.shape[2:]), 0, axis)
    return x


def expand(field: MotionField) -> Int16[np.ndarray, "4 h2 w2 2"]:
    """Derives the vectors of every frame and 16x16 block, in 1/16 pel."""
    # All terms are in 1/128 pel, the largest unit in which they are whole numbers. A half pel is 64
    # of these units and `upsample` has multiplied by 16, hence the factor of 4.
    # Each frame has the shape (2h, 2w, 2).
    last = 4 * (upsample(field.coarse) + 16 * field.fine.astype(np.int32))
    # Without `middle`, motion is linear in time: the second of four frames has gone half the way.
    # Floor division gives the same integers on every machine.
    second = last // 2 + 4 * upsample(field.middle)
    # The first and third frame are halfway between their neighbours; a quarter pel is 32 units.
    frames = np.stack([second // 2, second, (second + last) // 2, last])
    frames[:-1] += 32 * field.shift[:, None, None].astype(np.int32)
    # To 1/16 pel, rounded half up; the shift of a negative number rounds down on every machine.
    return ((frames + 4) >> 3).astype(np.int16)
