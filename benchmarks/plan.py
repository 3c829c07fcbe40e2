"""What stage `latent` costs on 8 to 4096 chips: plans of compiled steps, a table and a plot.

    python benchmarks/plan.py [--cases "1.3B 1080p"] [--topologies 4x4x4]

Needs libtpu, and ten minutes for each point; those that benchmarks/results/plan.json has are not
compiled again, so the command goes on where it was stopped. Every point is the program of one
`gnvc plan` command. The plot, docs/scaling.svg, needs two points of a case.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from gnvc_jax.errors import UsageError
from gnvc_jax.files import write_json
from gnvc_jax.planner import chips, training
from gnvc_jax.training import config

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/plan.json"
SIZES = {"480p": ("512", "832"), "1080p": ("1088", "1920")}  # multiples of 64

# Model and frames; scaling; (topology of v5p, mesh, batch).
CASES = {
    "1.3B 480p": {
        "weak": (
            ("2x2x2", "fsdp=8", 8),
            ("4x4x4", "fsdp=16", 64),
            ("8x8x8", "fsdp=16", 512),
            ("16x16x16", "fsdp=16", 4096),
        ),
        "strong": (
            ("2x2x2", "fsdp=8", 64),
            ("4x4x4", "fsdp=16", 64),
            ("4x8x8", "fsdp=16,context=4", 64),
        ),
    },
    "1.3B 1080p": {
        "weak": (("2x2x2", "fsdp=8", 8), ("4x4x4", "fsdp=16", 64), ("16x16x16", "fsdp=16", 4096)),
        "strong": (("4x4x4", "fsdp=16", 64), ("4x8x8", "fsdp=16,context=4", 64)),
    },
    "14B 480p": {
        "weak": (("4x4x4", "fsdp=32", 64), ("16x16x16", "fsdp=32", 4096)),
        "strong": (("4x4x4", "fsdp=32", 64), ("4x8x8", "fsdp=32,context=4", 64)),
    },
}


def plan(case: str, topology: str, mesh: str, batch: int) -> dict:
    model, frames = case.split()
    path = ROOT / "configs" / f"wan_{model.lower().replace('.', '_')}" / "latent.py"
    settings = ["--mesh", mesh, "--data.size", *SIZES[frames], "--data.batch", str(batch)]
    experiment = config.override(config.load(path), [*settings, "--data.latents", "cache"])
    start = time.process_time()
    found = training.plan(experiment, f"v5p:{topology}")
    key = {"case": case, "point": [topology, mesh, batch]}
    return key | found | {"planned_cpu_s": round(time.process_time() - start)}


def figure(plans: dict, path: Path) -> None:
    """Clips per second over chips, of cases with several points that fit; none, no plot.

    Lines: all overlapped; bands: down to nothing overlapped.
    """
    matplotlib.rcParams |= {"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "gnvc"}
    drawing = Figure(figsize=(6.4, 4.0), layout="constrained")
    panel = drawing.subplots()
    for i, (case, ways) in enumerate(CASES.items()):
        for way, line in (("weak", "-"), ("strong", "--")):
            known = [plans[case, *p] for p in ways[way] if (case, *p) in plans]
            known = [p for p in known if p["fits"]]
            if len(known) < 2:
                continue
            sizes = [p["chips"] for p in known]
            low, high = zip(*(p["clips_per_s"] for p in known))
            panel.plot(sizes, high, line, marker="o", ms=3, color=f"C{i}", label=f"{case}, {way}")
            panel.fill_between(sizes, low, high, color=f"C{i}", alpha=0.12, linewidth=0)
    if not panel.lines:
        return
    panel.set(
        xscale="log", yscale="log", xlabel="v5p chips", ylabel="clips of 13 frames per second"
    )
    ticks = sorted({p["chips"] for p in plans.values()})
    panel.set_xticks(ticks, labels=map(str, ticks), minor=False)
    panel.minorticks_off()
    panel.yaxis.set_major_formatter(ScalarFormatter())
    panel.grid(color="#888888", alpha=0.25, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
    drawing.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--topologies", nargs="+", help="by default all that a case has")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))  # configurations import each other
    try:
        chips.libtpu_path()
    except UsageError as error:
        print(f"nothing is compiled: {error}")
        args.cases = []
    rows = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    plans = {(row["case"], *row["point"]): row for row in rows}
    for case in args.cases:
        for point in (p for way in CASES[case].values() for p in way):
            wanted = args.topologies is None or point[0] in args.topologies
            if wanted and (case, *point) not in plans:
                plans[case, *point] = plan(case, *point)
                print(training.report(plans[case, *point]), flush=True)
                write_json(RESULTS, list(plans.values()))
                jax.clear_caches()
    for case, ways in CASES.items():
        for way, points in ways.items():
            if known := [plans[case, *p] for p in points if (case, *p) in plans]:
                print(f"\n{case}, {way} scaling\n")
                print(training.table(known))
    figure(plans, ROOT / "docs/scaling.svg")


if __name__ == "__main__":
    main()
