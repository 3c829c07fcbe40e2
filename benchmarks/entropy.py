"""Speed and size of the entropy coder: random symbols of several scales, both ways.

    python benchmarks/entropy.py [--out FILE] [--symbols 1000000 10000000] [--repeats 5]

One segment holds all symbols, coded as in a stream: sorted by scale index, one table each. Encoding
includes sorting and decoding includes putting the symbols back. Msymbols per second of processor
time of one core, so that waiting for other programs does not count; medians. "over" is what the
bytes take more than the information content under the integer tables.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gnvc_jax.bitstream import (
    EntropyCoder,
    LatentDecoder,
    Tables,
    frequencies_from_probabilities,
    gaussian_frequencies,
)
from gnvc_jax.files import write_json

SCALES = 0.11 * (16 / 0.11) ** (np.arange(64) / 63)
K_SKIP = 8
# name -> lowest and highest scale index; indices below K_SKIP are not coded
REGIMES = {"sparse": (0, 16), "low": (8, 24), "mixed": (8, 64), "high": (40, 64)}


def draw(rng: np.random.Generator, count: int, low: int, high: int):
    """Index map and rounded Gaussian symbols (n, n, 100), count in all."""
    side = round((count / 100) ** 0.5)
    index = rng.integers(low, high, (side, side, 100), np.uint8)
    y = rng.standard_normal(index.shape, np.float32) * SCALES.astype(np.float32)[index]
    y = np.clip(np.round(y), -127, 127).astype(np.int8)
    return np.where(index >= K_SKIP, y, np.int8(0)), index


def median_seconds(repeats: int, function: Callable) -> float:
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return statistics.median(times)


def measure(coder: EntropyCoder, count: int, regime: str, repeats: int) -> dict:
    y, index = draw(np.random.default_rng(count), count, *REGIMES[regime])
    z = np.zeros((1, 1, 1), np.int8)
    data = coder.encode(0, 0, z, y, index)

    def decode():
        decoder = LatentDecoder(coder, 0, 0, data)
        decoder.z(z.shape)
        out = decoder.y(index)
        decoder.finish()
        return out

    assert np.array_equal(decode(), y)
    ideal = coder.ideal_bits(0, 0, z, y, index)
    return {
        "regime": regime,
        "symbols": y.size,
        "coded": int((index >= K_SKIP).sum()),
        "bits_per_symbol": ideal / y.size,
        "encode_msymbols_per_s": y.size / 1e6 / median_seconds(
            repeats, lambda: coder.encode(0, 0, z, y, index)
        ),
        "decode_msymbols_per_s": y.size / 1e6 / median_seconds(repeats, decode),
        "overhead_percent": 100 * (8 * len(data) / ideal - 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/entropy.json")
    parser.add_argument("--symbols", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    z = frequencies_from_probabilities(np.full((2, 1, 1, 31), 1 / 31))
    coder = EntropyCoder(Tables(gaussian_frequencies(SCALES), z, K_SKIP))
    rows = []
    print("regime    Msymbols   coded    bits    enc/s    dec/s    over %")
    for count in args.symbols:
        for regime in REGIMES:
            row = measure(coder, count, regime, args.repeats)
            rows.append(row)
            print(
                f"{regime:8}{row['symbols'] / 1e6:10.2f}{row['coded'] / row['symbols']:8.1%}"
                f"{row['bits_per_symbol']:8.3f}{row['encode_msymbols_per_s']:9.1f}"
                f"{row['decode_msymbols_per_s']:9.1f}{row['overhead_percent']:10.4f}",
                flush=True,
            )
    facts = {
        "coder": coder.backend.__name__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "repeats": args.repeats,
    }
    write_json(args.out, {"facts": facts, "rows": rows})


if __name__ == "__main__":
    main()
