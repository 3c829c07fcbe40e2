"""Metrics by quality level: means over the clips of four bands of levels.

A mean over all levels hides that one of them gets worse, and rates of the best levels are hundreds
of times those of the worst. A stage gives values per clip,

    metrics = output.metrics | by_level(output.q_index, loss=loss, bpp=bpp)

and the log has `levels/bpp_0_15`, `levels/bpp_16_31` and so on, each a mean over all clips of the
band since the last line: few batches have clips of every band, so sums and counts are added up
over micro-batches and steps before they are divided.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gnvc_jax.arrays import Array
from gnvc_jax.codec.config import QUALITIES

BANDS = 4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LevelSums:
    """Sums over the clips of each band of levels; those of several batches may be added.

    Attributes:
        total: Sums of a value, (BANDS,).
        count: Numbers of clips, (BANDS,).
    """

    total: Array
    count: Array


Metric = Array | LevelSums
Metrics = dict[str, Metric]


def by_level(q_index: Array, **values: Array) -> Metrics:
    """Sums values by the quality levels of their clips, as metrics `levels/NAME`.

    Args:
        q_index: Quality level of each clip, (b,) int32.
        **values: Values per clip, (b,), by name.
    """
    inside = (q_index * BANDS // QUALITIES)[:, None] == jnp.arange(BANDS)  # (b, BANDS)
    count = inside.sum(0).astype(jnp.float32)
    # Selected, not multiplied by zero: a NaN stays in the band of its clip.
    return {
        f"levels/{name}": LevelSums(jnp.where(inside, value[:, None], 0.0).sum(0), count)
        for name, value in values.items()
    }


def level_means(name: str, sums: Sequence[LevelSums]) -> dict[str, float]:
    """Means over the clips of several steps, by name and band: `levels/bpp_0_15`.

    Args:
        name: Name of the metric, `levels/bpp`.
        sums: Sums of each step. Those that are not finite do not count.

    Returns:
        Means of the bands that had clips.
    """
    totals = np.stack([np.asarray(one.total, np.float64) for one in sums])  # (steps, BANDS)
    counts = np.stack([np.asarray(one.count, np.float64) for one in sums])
    usable = np.isfinite(totals)
    total, count = np.where(usable, totals, 0).sum(0), np.where(usable, counts, 0).sum(0)
    # A band is named by its first and last level.
    width = QUALITIES // BANDS
    return {
        f"{name}_{i * width}_{(i + 1) * width - 1}": float(total[i] / count[i])
        for i in range(BANDS)
        if count[i]
    }
