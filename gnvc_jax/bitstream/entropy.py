"""Symbols <-> bytes of a segment, which holds the latents of a group one after another.

`EntropyCoder.encode` makes a segment; `SegmentDecoder` reads it step by step, since the scale
network must run between z and y. Both use constriction's coder if it is installed, else the one in
`plain`; the bytes are the same.

Canonical order of a latent: z grouped by channel, raster inside a channel; then the y elements
whose scale index is at least k_skip, flattened (row, column, channel) and stably sorted by index.
The decoder pops z first, because the indices depend on it.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from gnvc_jax.bitstream import plain
from gnvc_jax.bitstream.errors import EntropyError
from gnvc_jax.bitstream.tables import SYMBOL_BOUND, TOTAL, Z_BOUND, Tables

constriction: Any
try:
    import constriction  # pyright: ignore[reportAssignmentType]
except ImportError:  # there is no wheel for this platform
    constriction = None


class ConstrictionCoder:
    """The coder of `plain` by constriction's AnsCoder."""

    def __init__(self, words: Sequence[int] = ()) -> None:
        ans = constriction.stream.stack.AnsCoder
        self.ans = ans(np.asarray(words, np.uint32)) if len(words) else ans()

    @staticmethod
    def model(frequencies: np.ndarray) -> Any:
        """Makes a model of the library with exactly these frequencies."""
        # The library scales probabilities to 2**24 - n and adds one to each of the n.
        p = frequencies.astype(np.float64) - 1.0
        return constriction.stream.model.Categorical(p, perfect=False)

    def push(self, symbols: np.ndarray, model: Any) -> None:
        """See `AnsCoder.push`."""
        self.ans.encode_reverse(symbols.astype(np.int32), model)

    def pop(self, count: int, model: Any) -> np.ndarray:
        """See `AnsCoder.pop`."""
        return self.ans.decode(model, count)

    def get_words(self) -> np.ndarray:
        """See `AnsCoder.get_words`."""
        return self.ans.get_compressed()

    def is_empty(self) -> bool:
        """Whether no symbol is left."""
        return self.ans.is_empty()


class PlainCoder(plain.AnsCoder):
    """`AnsCoder` with the interface of ConstrictionCoder."""

    def __init__(self, words: Sequence[int] = ()) -> None:
        super().__init__(np.asarray(words, np.uint32).tolist())

    @staticmethod
    def model(frequencies: np.ndarray) -> list[int]:
        """Returns the frequencies themselves, as a list."""
        return frequencies.tolist()

    def push(self, symbols: np.ndarray, model: list[int]) -> None:
        """See `AnsCoder.push`."""
        super().push(symbols.tolist(), model)


@dataclasses.dataclass(frozen=True)
class QuantisedLatent:
    """The integers of one latent.

    Attributes:
        kind: Kind of latent, 0 for intra and 1 for predicted.
        q_index: Quality level.
        z: Hyperlatent, int8 (h, w, cz).
        y: Symbols, int8 (4h, 4w, cy).
        index: Table of each element of y, uint8 (4h, 4w, cy). It follows from z, and from y and
            index of the latent before.
    """

    kind: int
    q_index: int
    z: np.ndarray
    y: np.ndarray
    index: np.ndarray


@dataclasses.dataclass(frozen=True)
class EntropyCoder:
    """Encodes segments with one set of tables; `SegmentDecoder` decodes them.

    Attributes:
        tables: Tables of a model.
        backend: ConstrictionCoder or PlainCoder.
    """

    tables: Tables
    backend: type = PlainCoder if constriction is None else ConstrictionCoder

    @functools.cached_property
    def motion_models(self) -> list:
        """One model per row of the motion tables."""
        return [self.backend.model(row) for row in self.tables.motion]

    @functools.cached_property
    def _y_models(self) -> list:
        return [self.backend.model(row) for row in self.tables.y]

    @functools.cached_property
    def _z_models(self) -> dict:
        """Models of the hyperlatent by kind and quality group, filled by `_z_rows`."""
        return {}

    def _z_rows(self, kind: int, q_index: int) -> list:
        # Models are kept: there is one per channel, and few quality groups occur in a stream.
        key = (kind, q_index * self.tables.z.shape[1] // 64)
        if key not in self._z_models:
            rows = self.tables.z_rows(kind, q_index)
            self._z_models[key] = [self.backend.model(row) for row in rows]
        return self._z_models[key]

    def encode(self, latents: Sequence[QuantisedLatent]) -> bytes:
        """Encodes consecutive latents to a segment.

        Raises:
            ValueError: If a symbol is out of range, or not zero where nothing is coded.
        """
        coder = self.backend()
        # The coder is a stack: what is to come out first goes in last.
        for latent in reversed(latents):
            self._push(coder, latent)
        return np.asarray(coder.get_words(), "<u4").tobytes()

    def _push(self, coder: Any, latent: QuantisedLatent) -> None:
        for name, values, bound in (("z", latent.z, Z_BOUND), ("y", latent.y, SYMBOL_BOUND)):
            if values.min(initial=0) < -bound or values.max(initial=0) > bound:
                raise ValueError(f"symbols of {name} must be in -{bound}..{bound}")
        if np.any(latent.y[latent.index < self.tables.k_skip]):
            raise ValueError("symbols of y must be 0 where the scale index is below k_skip")
        # Everything in the opposite of the canonical order.
        # counts[k] elements use table k; in `order` they lie side by side, by increasing k.
        order, counts = self._order(latent.index)
        symbols = np.asarray(latent.y).reshape(-1)[order].astype(np.int32) + SYMBOL_BOUND
        end = len(symbols)
        for k in range(len(counts) - 1, -1, -1):
            if counts[k]:
                # One call per table rather than one per symbol, which is why y is sorted.
                coder.push(symbols[end - counts[k] : end], self._y_models[k])
                end -= counts[k]
        # z goes in last, so that it comes out first: (h, w, cz) -> (cz, h * w).
        z = np.moveaxis(np.asarray(latent.z), -1, 0)
        channels = z.reshape(len(z), -1).astype(np.int32)
        models = self._z_rows(latent.kind, latent.q_index)
        for c in range(len(channels) - 1, -1, -1):
            coder.push(channels[c] + Z_BOUND, models[c])

    def _order(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the coded elements in canonical order, and how many use each table."""
        flat = np.asarray(index, np.uint8).reshape(-1)
        # The sort must be stable, since the order among equal indices is part of the format. For
        # bytes, NumPy uses radix sort.
        positions = np.flatnonzero(flat >= self.tables.k_skip)
        order = positions[np.argsort(flat[positions], kind="stable")]
        return order, np.bincount(flat[positions], minlength=len(self.tables.y))

    def ideal_bits(self, latent: QuantisedLatent) -> float:
        """Information content of a latent's symbols under the integer tables, in bits."""
        order, _ = self._order(latent.index)
        # -log2(frequency / 2**24), summed over all symbols that are written.
        k = np.asarray(latent.index).reshape(-1)[order]
        y_freq = self.tables.y[
            k, np.asarray(latent.y).reshape(-1)[order].astype(int) + SYMBOL_BOUND
        ]
        rows = self.tables.z_rows(latent.kind, latent.q_index)
        z_freq = rows[np.arange(latent.z.shape[-1]), np.asarray(latent.z).astype(int) + Z_BOUND]
        return float(-sum(np.log2(f / TOTAL).sum() for f in (y_freq, z_freq)))


class SegmentDecoder:
    """Decodes a segment latent by latent: z, then y with the indices that follow from z.

    Raises:
        EntropyError: If the bytes cannot be a segment.
    """

    def __init__(self, coder: EntropyCoder, data: bytes) -> None:
        self.coder, self.ans = coder, coder.backend(words_of(data))

    def z(self, kind: int, q_index: int, shape: tuple[int, int, int]) -> np.ndarray:
        """Decodes the hyperlatent of the next latent, int8 (h, w, cz)."""
        h, w, c = shape
        models = self.coder._z_rows(kind, q_index)
        # One table per channel, hence channel by channel; then (h * w, c) -> (h, w, c).
        channels = [np.asarray(self.ans.pop(h * w, models[i])) for i in range(c)]
        return (np.stack(channels, -1).reshape(shape) - Z_BOUND).astype(np.int8)

    def y(self, index: np.ndarray) -> np.ndarray:
        """Decodes the symbols that belong to `index`, int8 of its shape, 0 where none is coded."""
        order, counts = self.coder._order(index)
        models = self.coder._y_models
        # The tables in increasing order, as `_push` put them in from the other end.
        parts = [np.asarray(self.ans.pop(int(n), models[k])) for k, n in enumerate(counts) if n]
        out = np.zeros(index.size, np.int8)
        if parts:
            out[order] = np.concatenate(parts) - SYMBOL_BOUND
        return out.reshape(index.shape)

    def finish(self) -> None:
        """Checks that the segment is used up exactly.

        Raises:
            EntropyError: If it holds more than was decoded.
        """
        if not self.ans.is_empty():
            raise EntropyError("a segment holds more than its symbols")


def words_of(data: bytes) -> np.ndarray:
    """Splits a segment into its words.

    Raises:
        EntropyError: If the bytes cannot be a segment.
    """
    if len(data) % 4:
        raise EntropyError(f"a segment must consist of words of 4 bytes, got {len(data)} bytes")
    words = np.frombuffer(data, "<u4")
    # The last word is the top of the state, which is written without leading zeros. Only one form
    # is accepted, so that equal symbols mean equal bytes.
    if len(words) and words[-1] == 0:
        raise EntropyError("a segment ends with a zero word")
    return words
