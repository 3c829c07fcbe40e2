"""Probability tables as integers.

A table is a row of 24-bit frequencies: all at least 1, sum 2**24. Symbol s in -bound..bound has
frequency row[s + bound]. Tables are made once, when a model is released, and stored with it; they
are never computed again, because another machine might round differently. `Tables` holds and checks
those of a model; the functions make them from probabilities and from standard deviations.
"""

import dataclasses
import zlib

import numpy as np
from scipy.special import ndtr

from gnvc_jax.bitstream.errors import ModelCorrupt

SYMBOL_BOUND = 127  # symbols of y and of motion are -127..127
Z_BOUND = 15  # symbols of z are -15..15
SCALES = 64  # tables of y
QUALITIES = 64  # quality levels
TOTAL = 1 << 24  # sum of the frequencies of a table


def frequencies_from_probabilities(p: np.ndarray) -> np.ndarray:
    """Rounds probabilities to frequencies.

    Each of n symbols gets floor(p * (2**24 - n)) + 1, so none is zero; the most probable symbol
    gets the remainder.

    Args:
        p: Probabilities (..., n) in float64, which are normalised here.

    Returns:
        Frequencies (..., n), uint32, with sum 2**24.
    """
    p = np.asarray(p, np.float64)
    p = p / p.sum(axis=-1, keepdims=True)
    freq = np.floor(p * (TOTAL - p.shape[-1])).astype(np.int64) + 1
    # Rounding down leaves between 0 and n to give away, which the most probable symbol hardly
    # notices. argmax takes the first of several, as the specification says.
    rest = TOTAL - freq.sum(axis=-1, keepdims=True)
    mode = p.argmax(axis=-1)[..., None]
    np.put_along_axis(freq, mode, np.take_along_axis(freq, mode, -1) + rest, -1)
    return freq.astype(np.uint32)


def gaussian_frequencies(scales: np.ndarray) -> np.ndarray:
    """Makes tables of zero-mean Gaussians.

    Args:
        scales: Standard deviations (n,), in steps of the quantiser.

    Returns:
        Frequencies (n, 255). The end symbols hold the whole tails.
    """
    # Masses of bins in the lower half only, where differences keep their digits; the upper half is
    # its mirror image.
    edges = np.arange(-SYMBOL_BOUND, 1) - 0.5
    low = ndtr(edges / np.asarray(scales, np.float64)[:, None])
    # The outer edge moves to minus infinity, so that symbol -127 holds the whole tail.
    low[:, 0] = 0.0
    half = np.diff(low, axis=-1)  # symbols -127..-1
    middle = 1.0 - 2.0 * low[:, -1:]
    return frequencies_from_probabilities(np.concatenate([half, middle, half[:, ::-1]], axis=-1))


@dataclasses.dataclass(frozen=True)
class Tables:
    """The tables of one model.

    Attributes:
        y: Tables of y by scale index, uint32 (64, 255).
        z: Tables of z by kind of latent (0 intra, 1 predicted), quality group (g divides 64; the
            group is q_index * g // 64) and channel, uint32 (2, g, cz, 31).
        k_skip: Elements with a smaller scale index carry no symbol.
        motion: Tables of the symbols of block motion, uint32 (rows, 255); no rows in a model
            without motion.

    Raises:
        ModelCorrupt: If a shape, a sum or a frequency is impossible.
    """

    y: np.ndarray
    z: np.ndarray
    k_skip: int
    motion: np.ndarray = dataclasses.field(
        default_factory=lambda: np.zeros((0, 2 * SYMBOL_BOUND + 1), np.uint32)
    )

    def __post_init__(self) -> None:
        y, z = self.y, self.z
        if y.shape != (SCALES, 2 * SYMBOL_BOUND + 1) or y.dtype != np.uint32:
            raise ModelCorrupt(f"symbol tables are {y.dtype} {y.shape}, expected uint32 (64, 255)")
        # The bitstream relies on these properties without checking them again: a zero frequency,
        # for one, would make a symbol that cannot be coded.
        good = z.ndim == 4 and z.shape[0] == 2 and z.shape[3] == 2 * Z_BOUND + 1
        if not good or QUALITIES % z.shape[1] or z.dtype != np.uint32:
            raise ModelCorrupt(
                f"hyperlatent tables are {z.dtype} {z.shape}, expected (2, g, c, 31)"
            )
        if self.motion.shape[1:] != (2 * SYMBOL_BOUND + 1,) or self.motion.dtype != np.uint32:
            raise ModelCorrupt(
                f"motion tables are {self.motion.dtype} {self.motion.shape}, expected (rows, 255)"
            )
        for name, table in (("symbol", y), ("hyperlatent", z), ("motion", self.motion)):
            if (table == 0).any() or (table.sum(axis=-1, dtype=np.uint64) != TOTAL).any():
                raise ModelCorrupt(
                    f"{name} tables: a row has a zero frequency or does not sum to 2**24"
                )
        if not 0 <= self.k_skip <= SCALES:
            raise ModelCorrupt(f"k_skip must be in 0..{SCALES}, got {self.k_skip}")

    def z_rows(self, kind: int, q_index: int) -> np.ndarray:
        """Tables (cz, 31) of the hyperlatent of one latent."""
        # g groups share the 64 levels: floor(q_index * g / 64).
        return self.z[kind, q_index * self.z.shape[1] // QUALITIES]

    def crc32(self) -> int:
        """CRC32 of all frequencies, little-endian, and k_skip."""
        crc = zlib.crc32(self.y.astype("<u4").tobytes())
        crc = zlib.crc32(self.z.astype("<u4").tobytes(), crc)
        crc = zlib.crc32(self.motion.astype("<u4").tobytes(), crc)
        return zlib.crc32(bytes([self.k_skip]), crc)
