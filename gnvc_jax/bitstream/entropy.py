"""Symbols of one latent <-> bytes of one segment.

Canonical order: z grouped by channel, raster inside a channel; then the y elements whose scale
index is at least k_skip, flattened (row, column, channel) and stably sorted by index. The decoder
pops z first, because the indices depend on it.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from gnvc_jax.bitstream import plain
from gnvc_jax.bitstream.errors import EntropyError
from gnvc_jax.bitstream.tables import SYMBOL_BOUND, TOTAL, Z_BOUND, Tables

try:
    import constriction
except ImportError:  # no wheel for this platform: the plain coder reads and writes the same words
    constriction = None


class FastCoder:
    """The coder of `plain` by constriction's AnsCoder."""

    def __init__(self, words: Sequence[int] = ()):
        ans = constriction.stream.stack.AnsCoder
        self.ans = ans(np.asarray(words, np.uint32)) if len(words) else ans()

    @staticmethod
    def model(frequencies: np.ndarray):
        """Exactly this integer table: the library adds one to each of n scaled probabilities."""
        p = frequencies.astype(np.float64) - 1.0
        return constriction.stream.model.Categorical(p, perfect=False)

    def push(self, symbols: np.ndarray, model) -> None:
        self.ans.encode_reverse(symbols.astype(np.int32), model)

    def pop(self, count: int, model) -> np.ndarray:
        return self.ans.decode(model, count)

    def get_words(self) -> np.ndarray:
        return self.ans.get_compressed()

    def is_empty(self) -> bool:
        return self.ans.is_empty()


class PlainCoder(plain.Coder):
    """The plain coder under the interface of FastCoder."""

    def __init__(self, words: Sequence[int] = ()):
        super().__init__(np.asarray(words, np.uint32).tolist())

    @staticmethod
    def model(frequencies: np.ndarray) -> list[int]:
        return frequencies.tolist()

    def push(self, symbols: np.ndarray, model: list[int]) -> None:
        super().push(symbols.tolist(), model)


@dataclasses.dataclass(frozen=True)
class EntropyCoder:
    """Encoder and decoder of segments under one set of tables."""

    tables: Tables
    backend: type = PlainCoder if constriction is None else FastCoder

    @functools.cached_property
    def _y_models(self) -> list:
        return [self.backend.model(row) for row in self.tables.y]

    @functools.cached_property
    def _z_models(self) -> dict:
        return {}

    def _z_rows(self, kind: int, q_index: int) -> list:
        key = (kind, q_index * self.tables.z.shape[1] // 64)
        if key not in self._z_models:
            rows = self.tables.z_rows(kind, q_index)
            self._z_models[key] = [self.backend.model(row) for row in rows]
        return self._z_models[key]

    def encode(
        self, kind: int, q_index: int, z: np.ndarray, y: np.ndarray, index: np.ndarray
    ) -> bytes:
        """Segment of one latent: z (h, w, cz) in -15..15, y (H, W, cy) in -127..127, index uint8.

        y must be 0 where index < k_skip. ValueError if a symbol is out of range.
        """
        for name, values, bound in (("z", z, Z_BOUND), ("y", y, SYMBOL_BOUND)):
            if values.min(initial=0) < -bound or values.max(initial=0) > bound:
                raise ValueError(f"a symbol of {name} is outside -{bound}..{bound}")
        order, counts = self._order(index)
        symbols = np.asarray(y).reshape(-1)[order].astype(np.int32) + SYMBOL_BOUND
        coder = self.backend()
        end = len(symbols)
        for k in range(len(counts) - 1, -1, -1):
            if counts[k]:
                coder.push(symbols[end - counts[k] : end], self._y_models[k])
                end -= counts[k]
        channels = np.moveaxis(np.asarray(z), -1, 0).reshape(z.shape[-1], -1).astype(np.int32)
        models = self._z_rows(kind, q_index)
        for c in range(len(channels) - 1, -1, -1):
            coder.push(channels[c] + Z_BOUND, models[c])
        return np.asarray(coder.get_words(), "<u4").tobytes()

    def _order(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the coded elements in canonical order, and how many use each table."""
        flat = np.asarray(index, np.uint8).reshape(-1)
        positions = np.flatnonzero(flat >= self.tables.k_skip)
        order = positions[np.argsort(flat[positions], kind="stable")]
        return order, np.bincount(flat[positions], minlength=len(self.tables.y))

    def ideal_bits(
        self, kind: int, q_index: int, z: np.ndarray, y: np.ndarray, index: np.ndarray
    ) -> float:
        """-log2 of the probability of the symbols under the integer tables."""
        order, _ = self._order(index)
        k = np.asarray(index).reshape(-1)[order]
        y_freq = self.tables.y[k, np.asarray(y).reshape(-1)[order].astype(int) + SYMBOL_BOUND]
        rows = self.tables.z_rows(kind, q_index)
        z_freq = rows[np.arange(z.shape[-1]), np.asarray(z).astype(int) + Z_BOUND]
        return float(-sum(np.log2(f / TOTAL).sum() for f in (y_freq, z_freq)))


class LatentDecoder:
    """Decodes one segment: z, then y under the indices that follow from z, then finish."""

    def __init__(self, coder: EntropyCoder, kind: int, q_index: int, data: bytes):
        if len(data) % 4:
            raise EntropyError(f"a segment of {len(data)} bytes is not made of whole words")
        words = np.frombuffer(data, "<u4")
        if len(words) and words[-1] == 0:
            raise EntropyError("a segment ends with a zero word")
        self.coder, self.models = coder, coder._z_rows(kind, q_index)
        self.ans = coder.backend(words)

    def z(self, shape: tuple[int, int, int]) -> np.ndarray:
        """Hyperlatent (h, w, cz) int8."""
        h, w, c = shape
        channels = [np.asarray(self.ans.pop(h * w, self.models[i])) for i in range(c)]
        return (np.stack(channels, -1).reshape(shape) - Z_BOUND).astype(np.int8)

    def y(self, index: np.ndarray) -> np.ndarray:
        """Symbols int8 of the shape of index, 0 where nothing is coded."""
        order, counts = self.coder._order(index)
        models = self.coder._y_models
        parts = [np.asarray(self.ans.pop(int(n), models[k])) for k, n in enumerate(counts) if n]
        out = np.zeros(index.size, np.int8)
        if parts:
            out[order] = np.concatenate(parts) - SYMBOL_BOUND
        return out.reshape(index.shape)

    def finish(self) -> None:
        """EntropyError unless the segment is used up exactly."""
        if not self.ans.is_empty():
            raise EntropyError("a segment holds more than its symbols")
