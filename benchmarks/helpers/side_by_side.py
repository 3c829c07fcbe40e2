"""Runs of the same work by several programs, interleaved, each in a process of its own.

The script that measures starts itself again with `--child SIDE ARGUMENTS`; there it calls `serve`.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

from gnvc_jax.evaluation.environment import environment
from gnvc_jax.files import write_json


def peak_mib() -> float:
    """Largest resident size since the last `reset_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def serve(run: Callable[[], np.ndarray], compile_seconds: float, output: Path) -> None:
    """Prints its compile seconds; then, for each line read, seconds and peak memory of a run."""
    print(json.dumps(compile_seconds), flush=True)
    reset_peak()
    for _ in sys.stdin:
        start = time.perf_counter()
        result = run()
        measured = time.perf_counter() - start, peak_mib()
        np.save(output, result)
        print(json.dumps(measured), flush=True)


class Side:
    """A process that does the work when asked to."""

    def __init__(self, name: str, arguments: list[str], threads: int | None):
        command = [sys.executable, sys.argv[0], "--child", name, *arguments]
        if threads:
            command += ["--threads", str(threads)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.compile_seconds = self.answer()
        self.seconds: list[float] = []

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a benchmarked process ended early")
        return json.loads(line)

    def run(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        seconds, self.peak_mib = self.answer()
        self.seconds.append(seconds)

    def result(self) -> dict:
        return {
            "seconds": statistics.median(self.seconds),
            "peak_mib": self.peak_mib,
            "compile_s": self.compile_seconds,
        }


def compare(
    args: argparse.Namespace, label: str, names: tuple[str, ...], arguments: list[str], folder: Path
) -> dict[str, dict]:
    """Median seconds, peak memory and compile seconds of each side, the first of them the peer.

    The others also get `speed_ratio` and `memory_ratio` (peer over side) and `difference`, the
    largest from the peer's output over its largest value. Sides leave outputs in folder/NAME.npy.
    """
    sides: dict[str, Side] = {}
    with contextlib.ExitStack() as stack:
        for name in names:
            print(f"{label}: preparing {name}", file=sys.stderr, flush=True)
            sides[name] = Side(name, arguments, args.threads)
            stack.callback(sides[name].process.communicate)  # ends its input
        for i in range(args.warm_ups + args.repeats):
            for name, side in sides.items():
                side.run()
                if i < args.warm_ups:
                    side.seconds.clear()
                    continue
                done = f"run {i + 1 - args.warm_ups}, {name} {side.seconds[-1]:.1f} s"
                print(f"{label}: {done}", file=sys.stderr, flush=True)
    results = {name: side.result() for name, side in sides.items()}
    outputs = {name: np.load(folder / f"{name}.npy") for name in names}
    peer, *others = names
    for name in others:
        result = results[name]
        result["speed_ratio"] = results[peer]["seconds"] / result["seconds"]
        result["memory_ratio"] = results[peer]["peak_mib"] / result["peak_mib"]
        error = np.abs(outputs[name] - outputs[peer]).max() / np.abs(outputs[peer]).max()
        result["difference"] = float(error)
    return results


HEADER = f"{'side':8}{'seconds':>9}{'MiB':>9}{'compile s':>11}{'faster':>8}{'smaller':>9}  differ"


def line(name: str, result: dict) -> str:
    """A row of the table below HEADER."""
    text = f"{name:8}{result['seconds']:9.2f}{result['peak_mib']:9.0f}"
    if "speed_ratio" in result:
        text += f"{result['compile_s']:11.1f}{result['speed_ratio']:8.2f}"
        text += f"{result['memory_ratio']:9.2f}{result['difference']:10.1e}"
    return text


def parse(description: str, out: Path, options: Callable = lambda parser: None):
    """Arguments of a side-by-side benchmark; `options` adds its own. Exits if a peer is missing."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options(parser)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warm-ups", type=int, default=1, help="runs that are not counted")
    parser.add_argument("--threads", type=int, help="processor cores that each side may use")
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    missing = [m for m in ("torch", "diffusers") if importlib.util.find_spec(m) is None]
    if missing:
        raise SystemExit(f"this benchmark needs {' and '.join(missing)}: pip install them first")
    if args.threads:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    return args


def write(args: argparse.Namespace, row: dict, key: tuple[str, ...]) -> None:
    """Put a row into the JSON file, in place of an older one that is equal in `key`.

    Rows that were measured on another machine or with other versions are dropped.
    """
    facts = {
        "cpu": environment()["cpu"],
        "threads": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "torch", "diffusers")},
    }
    row |= {"repeats": args.repeats, "warm_ups": args.warm_ups}
    old = json.loads(args.out.read_text()) if args.out.exists() else {"facts": None}
    kept = old["rows"] if old["facts"] == facts else []
    kept = [r for r in kept if any(r[k] != row[k] for k in key)]
    rows = sorted([*kept, row], key=lambda r: [str(r[k]) for k in key])
    write_json(args.out, {"facts": facts, "rows": rows})
