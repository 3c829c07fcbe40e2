"""Efficiency of compute and communication, fitted to measured steps.

A plan gives the seconds that operations and each kind of collective would take at the published
peak of a chip. A measured step is taken to be their sum, each divided by an efficiency:

    step = compute / e_compute + all-gather / e_all-gather + ...

Efficiencies include what the sum leaves out. Communication that overlaps with computation seems
fast, even faster than its peak; launching programs and small operations make computation seem slow.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

Seconds = Mapping[str, float]

# Smallest singular value of the columns, scaled to unit length, from which on they are told apart.
DISTINCT = 0.05


class Efficiency(NamedTuple):
    """Result of `fit`.

    Attributes:
        shares: Efficiency by resource, 1 at the published peak; None for a resource that no time
            could be attributed to. Resources are "compute" and the kinds of collectives, or
            "compute" and "communication", or "step", for all together.
        error: Largest relative error of the seconds of a step, over the measured points.
        points: Number of measured points.
    """

    shares: dict[str, float | None]
    error: float
    points: int


def seconds_at_peak(plan: Mapping) -> dict[str, float]:
    """Seconds of a plan at peak: "compute", or memory traffic if it takes longer, and collectives.

    Args:
        plan: Plan that `gnvc_jax.planner.training.plan` made.
    """
    bounds = plan["roofline_s"]
    seconds = {"compute": max(bounds["compute"], bounds["hbm"])}
    for one in plan["collectives"]:
        # Between slices the same collective runs over another network.
        name = one["kind"] + (" between slices" if one["network"] == "dcn" else "")
        seconds[name] = seconds.get(name, 0.0) + one["seconds"]
    return seconds


def groupings(seconds: Seconds) -> list[dict[str, float]]:
    """Seconds of a step by resource, from the finest division to the coarsest."""
    compute, total = seconds["compute"], sum(seconds.values())
    two = {"compute": compute, "communication": total - compute}
    return [dict(seconds), two, {"step": total}]


def fit(planned: Sequence[Seconds], measured: Sequence[float]) -> Efficiency:
    """Fits efficiencies by least squares of the relative errors.

    The finest division into resources is taken that the points determine: there must be more points
    than resources, and resources must not rise and fall together.

    Args:
        planned: Seconds at peak of each point, see `seconds_at_peak`.
        measured: Measured seconds of a step of each point; at least one.
    """
    divided = list(zip(*map(groupings, planned)))
    for points in divided:
        names = list(dict.fromkeys(name for point in points for name in point))
        # The errors are relative: each row is divided by its measured time, which becomes 1.
        rows = np.array([[point.get(name, 0.0) for name in names] for point in points])
        rows /= np.asarray(measured, float)[:, None]
        if points is divided[-1] or (len(rows) > len(names) and are_distinct(rows)):
            break
    # A factor is the inverse of an efficiency: seconds needed per second at peak.
    factors = nonnegative_solution(rows, np.ones(len(rows)))
    shares = {name: float(1 / x) if x > 0 else None for name, x in zip(names, factors)}
    return Efficiency(shares, float(np.abs(rows @ factors - 1).max()), len(rows))


def are_distinct(columns: np.ndarray) -> bool:
    """Whether no column is nearly zero or a combination of the others."""
    lengths = np.linalg.norm(columns, axis=0)
    if lengths.min() == 0:
        return False
    return bool(np.linalg.svd(columns / lengths, compute_uv=False).min() > DISTINCT)


def nonnegative_solution(rows: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Least squares with no negative factor, over all choices of factors that are zero."""
    # There are at most a handful of resources, so all subsets of them can be tried.
    count, best, smallest = rows.shape[1], np.zeros(rows.shape[1]), np.inf
    for size in range(1, count + 1):
        for chosen in map(list, itertools.combinations(range(count), size)):
            found = np.zeros(count)
            found[chosen] = np.linalg.lstsq(rows[:, chosen], target, rcond=None)[0]
            error = float(np.sum((rows @ found - target) ** 2))
            if found.min() >= 0 and error < smallest:
                best, smallest = found, error
    return best


def predict(efficiency: Efficiency, seconds: Seconds) -> float | None:
    """Seconds of a step by a plan and fitted efficiencies.

    Args:
        efficiency: Fitted efficiencies.
        seconds: Seconds at peak of the plan.

    Returns:
        Seconds; None if the plan has a resource that was not measured.
    """
    shares = efficiency.shares
    for resources in groupings(seconds):
        if resources.keys() <= shares.keys():
            known = [(x, shares[name]) for name, x in resources.items()]
            return sum(x / share for x, share in known if share is not None)
    return None
