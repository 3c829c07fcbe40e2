"""Table and plot of a scaling experiment, and what was fitted to its measured points."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from gnvc_jax.files import atomic_output
from gnvc_jax.planner.efficiency import Efficiency, fit, predict
from gnvc_jax.planner.program import mesh_text
from gnvc_jax.planner.scaling import same_chip

Points = Sequence[dict]


def fitted(points: Points) -> Efficiency | None:
    """Efficiencies that the measured points have; None without any."""
    known = [p for p in points if "measured" in p and "seconds_at_peak" in p["plan"]]
    if not known:
        return None
    seconds = [p["plan"]["seconds_at_peak"] for p in known]
    return fit(seconds, [p["measured"]["step_s"] for p in known])


def expected(points: Points, efficiency: Efficiency | None, chip: str) -> list[float | None]:
    """Seconds of a step of each point by the fitted efficiencies.

    Points that were only planned have one if the others were measured on the chip of the plan: of a
    CPU nothing follows for a TPU.
    """
    alike = any(same_chip(p, chip) for p in points)
    return [
        predict(efficiency, p["plan"]["seconds_at_peak"])
        if efficiency and "seconds_at_peak" in p["plan"] and ("measured" in p or alike)
        else None
        for p in points
    ]


def table(points: Points, chip: str) -> str:
    """Puts the points side by side in a Markdown table; a dash stands for what is not known."""
    rows = [
        "| chips | compiled for | mesh | batch | step s at peak | fitted | measured | clips/s "
        "| per chip | MFU | goodput | data wait |",
        "| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for point, seconds in zip(points, expected(points, fitted(points), chip)):
        plan, measured = point["plan"], point.get("measured", {})
        # Bounds if everything overlaps, and if nothing does.
        low, high = plan.get("step_s", (None, None))
        rate, bound = measured.get("samples_per_s"), plan.get("mfu_bound")
        cells = [
            str(point["chips"]),
            plan["topology"],
            mesh_text(plan),
            str(plan["batch"]),
            f"{low:.3g}–{high:.3g}" if "step_s" in plan else "does not fit",
            number(seconds),
            number(measured.get("step_s")),
            number(rate),
            number(rate and rate / point["chips"]),
            share(measured["mfu"]) if "mfu" in measured else bounded(bound, bool(measured)),
            share(measured.get("goodput")),
            share(measured.get("data_wait")),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def number(value: float | None) -> str:
    """Formats a number of the table."""
    return "–" if value is None else f"{value:.3g}"


def share(value: float | None) -> str:
    """Formats a share of the table."""
    return "–" if value is None else f"{value:.0%}"


def bounded(value: float | None, measured: bool) -> str:
    """Formats the largest MFU that a plan allows; that of measured points is another matter."""
    return "–" if value is None or measured else f"≤ {value:.0%}"


def efficiency_text(points: Points, chip: str) -> str:
    """Says in words what was fitted, and to what."""
    found = fitted(points)
    if found is None:
        return "Nothing was measured: seconds are those at the published peak."
    parts = ", ".join(
        f"{name} {'unknown, no time is left for it' if value is None else format(value, '.3g')}"
        for name, value in found.shares.items()
    )
    devices = sorted({p["measured"]["device"] for p in points if "measured" in p})
    lines = [
        f"Efficiency, 1 at the peak of {chip}, fitted to {found.points} points on "
        f"{', '.join(devices)}: {parts}.",
        f"A step takes what this gives within {found.error:.0%}.",
    ]
    if not any(same_chip(p, chip) for p in points):
        lines.append(f"None of these devices is a {chip}: nothing follows for a plan of it.")
    return " ".join(lines)


@matplotlib.rc_context({"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "gnvc"})
def figure(points: Points, chip: str, path: Path) -> None:
    """Draws clips per second over chips: bounds of the plans, what was measured and fitted."""
    drawing = Figure(figsize=(6.4, 4.0), layout="constrained")
    panel = drawing.subplots()
    # Plans compiled for other devices have another program, but the same operations.
    known = [p for p in points if "step_s" in p["plan"]]
    if known:
        sizes = [p["chips"] for p in known]
        low, high = zip(*(p["plan"]["clips_per_s"] for p in known))
        panel.fill_between(sizes, low, high, alpha=0.15, linewidth=0, color="C0")
        panel.plot(sizes, high, ":", color="C0", label=f"at the peak of {chip}")
    seconds = expected(points, fitted(points), chip)
    if lines := [(p["chips"], p["plan"]["batch"] / s) for p, s in zip(points, seconds) if s]:
        panel.plot(*zip(*lines), "--", color="C1", label="fitted")
    measured = [p for p in points if "measured" in p]
    if measured:
        rates = [p["measured"]["samples_per_s"] for p in measured]
        panel.plot([p["chips"] for p in measured], rates, "o", color="C2", label="measured")
    # Both logarithmic, so that ideal scaling is a straight line.
    panel.set(xscale="log", yscale="log", xlabel="chips", ylabel="clips per second")
    ticks = [p["chips"] for p in points]
    panel.set_xticks(ticks, labels=[str(tick) for tick in ticks])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.grid(color="#888888", alpha=0.25, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
    with atomic_output(path) as temporary:
        drawing.savefig(temporary, format="svg", metadata={"Date": None})
