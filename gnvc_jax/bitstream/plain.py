"""The entropy coder in plain Python: the definition, and the fallback without constriction.

An asymmetric numeral system (ANS; Duda 2013, arXiv 1311.2540), in the range variant with a 64-bit
state and 32-bit words. A segment is a stack of words: what is pushed last pops first. The state is
a number; pushing a symbol with frequency f and cumulative frequency c of 2**24 is the inverse of
popping it:

    slot = state % 2**24, in [c, c + f);  state = f * (state // 2**24) + slot - c

The state stays in [2**32, 2**64) while words remain. After the last symbol the state is 0 and no
word is left.
"""

from bisect import bisect_right
from itertools import accumulate

PRECISION = 24  # bits of a frequency; all frequencies of a table sum to 2**24
MASK = (1 << PRECISION) - 1
WORD = 32  # bits


class AnsCoder:
    """A stack of symbols.

    Attributes:
        words: Words that have left the state, the last one on top.
        state: State of the coder, a number below 2**64.
    """

    def __init__(self, words: list[int] | None = None) -> None:
        self.words = list(words or [])
        self.state = 0
        self._refill()

    def _refill(self) -> None:
        """Brings the state back into [2**32, 2**64)."""
        while self.words and self.state < 1 << WORD:
            self.state = self.state << WORD | self.words.pop()

    def push(self, symbols: list[int], frequencies: list[int]) -> None:
        """Pushes symbols (indices into `frequencies`) so that they pop in the given order."""
        # Symbol s owns the slots start[s] .. start[s + 1] - 1.
        start = [0, *accumulate(frequencies)]
        for symbol in reversed(symbols):
            f = frequencies[symbol]
            # Otherwise the new state would be 2**64 or more.
            if self.state >> (2 * WORD - PRECISION) >= f:
                self.words.append(self.state & ((1 << WORD) - 1))
                self.state >>= WORD
            self.state = (self.state // f << PRECISION) + self.state % f + start[symbol]

    def pop(self, count: int, frequencies: list[int]) -> list[int]:
        """Pops `count` symbols (indices into `frequencies`)."""
        start = [0, *accumulate(frequencies)]
        out = []
        for _ in range(count):
            slot = self.state & MASK
            # The symbol that owns the slot; all frequencies are at least 1.
            symbol = bisect_right(start, slot) - 1
            self.state = frequencies[symbol] * (self.state >> PRECISION) + slot - start[symbol]
            # One word is enough: a state of 2**32 or more leaves at least 2**8 behind.
            if self.words and self.state < 1 << WORD:
                self.state = self.state << WORD | self.words.pop()
            out.append(symbol)
        return out

    def get_words(self) -> list[int]:
        """Returns all words, those of the state last; low word first."""
        words, state = list(self.words), self.state
        while state:
            words.append(state & ((1 << WORD) - 1))
            state >>= WORD
        return words

    def is_empty(self) -> bool:
        """Whether no symbol is left."""
        return self.state == 0 and not self.words
